"""The strategy of a blockwise computation: which heads a tile has, and how many queries and keys.

The largest array of a tile fits in the cache. Tiles are about equally long, so that the last one has little padding.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import numpy as np

from attnlib._core.block_positions import OperandPositions
from attnlib._core.problem import AttentionProblem
from attnlib._core.sizes import decide, is_static, static_product
from attnlib._core.tile_kinds import FULL, PARTIAL, key_spans, tile_kinds
from attnlib.masks import Mask

# The limits below were measured on 2 CPU cores (docs/performance/tuning.md).
# Numbers in the largest array of a tile, for scores without and with an axis of features for each pair.
_NUMBERS, _NUMBERS_WITH_FEATURES = 2**20, 2**17
# Pairs of several heads in a tile of the transpose loop.
PAIRS_OF_TRANSPOSE = 2**19
_MAX_BLOCK_SIZE = 1024
# Queries of the tiles that have all keys of a window.
_SPAN_QUERIES = 128, 256, 512
# Pairs of a key head from which on a loop over heads is faster than all heads at once.
_PAIRS_LOOP_OVER_HEADS = 2**16
# Logits up to which one tile of all pairs is faster than a loop over heads, and than tiles of all heads.
_DENSE_LOOP_OVER_HEADS, _DENSE_ALL_HEADS = 2**21, 2**23
# Pairs of a key head, and logits in all, from which on one tile is faster than the reference: always, and with a mask.
_DENSE_FROM, _DENSE_FROM_MASKED = (2**10, 0), (2**8, 2**14)
# The decode path: rows of a batch index and of a key head up to which it is faster, and the keys from which on.
_DECODE_ROWS, _DECODE_ROWS_OF_A_KEY_HEAD, _DECODE_KEYS = 64, 8, 512


Kind = Literal["all_heads", "loop_over_heads", "dense", "decode"]


@dataclasses.dataclass(frozen=True)
class BlockwiseStrategy:
    """How a problem is divided into tiles.

    Attributes:
      kind: `"all_heads"`: a tile has all heads. `"loop_over_heads"`: a tile has `heads_at_once`.
        `"dense"`: one tile has all pairs of all heads.
        `"decode"`: so too, and keys and values keep their layout in memory.
      block_sizes: (queries, keys) of a tile.
      heads_at_once: how many batch indices along each axis, and how many key heads, a tile of `"loop_over_heads"` has.
      fallback_keys: the number of keys of a tile where `"decode"` computes results that were not finite again.
      has_key_spans: whether each block of queries has one tile, with all keys that a static mask leaves.
    """

    kind: Kind
    block_sizes: tuple[int, int]
    heads_at_once: tuple[int, ...] = ()
    fallback_keys: int = 512
    has_key_spans: bool = False


def plan_blocks(problem: AttentionProblem, kind: Kind | None = None) -> BlockwiseStrategy:
    """The strategy of this kind, or of the kind that is likely fastest on this machine."""
    kind = choose_kind(problem) if kind is None else kind
    if kind == "loop_over_heads":
        return _with_heads(problem, _tiles(problem, kind))
    if kind == "all_heads":
        return _tiles(problem, kind)
    whole = BlockwiseStrategy(kind, (problem.query_length, problem.key_length))
    if problem.block_sizes is None:
        return whole
    return dataclasses.replace(whole, fallback_keys=min(whole.fallback_keys, problem.block_sizes[1]))


def choose_kind(problem: AttentionProblem) -> Kind:
    """The kind that is likely fastest.

    With several devices that is all heads at once, since the other kinds would gather sharded operands.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return "all_heads"
    if unsupported(problem, "decode") is None and _few_queries(problem):
        return "decode"
    pairs = problem.groups * problem.query_length * problem.key_length
    long = decide(lambda: pairs >= _PAIRS_LOOP_OVER_HEADS, otherwise=False)
    in_turn = long and unsupported(problem, "loop_over_heads") is None
    limit = _DENSE_LOOP_OVER_HEADS if in_turn else _DENSE_ALL_HEADS
    # A symbolic size counts as its least value: the tile is small for each batch entry.
    logits = problem.rows * problem.key_length
    small = decide(lambda: logits <= limit, otherwise=True)
    if small and _dense_is_faster(problem, pairs, logits) and unsupported(problem, "dense") is None:
        return "dense"
    return "loop_over_heads" if in_turn else "all_heads"


def _dense_is_faster(problem: AttentionProblem, pairs: int, logits: int) -> bool:
    """Whether one tile is faster than the reference. Under a mask it is so for smaller problems."""
    limits = [_DENSE_FROM] if problem.mask is None else [_DENSE_FROM, _DENSE_FROM_MASKED]

    def reached(limit: tuple[int, int]) -> bool:
        return decide(lambda: pairs >= limit[0] and logits >= limit[1], otherwise=False)

    return any(map(reached, limits))


def unsupported(problem: AttentionProblem, kind: Kind | None) -> str | None:
    """The reason why a kind cannot compute a problem, or None if it can."""
    if (reason := _unsupported_sizes(problem, kind)) is not None:
        return reason
    if kind == "dense" and not _is_one_tile(problem):
        return "block_sizes cut the pairs into several tiles"
    if problem.score.is_inner_product:
        return None
    if kind == "loop_over_heads" and _prepared_score_has_arrays(problem):
        return "the score has arrays, which are not cut into heads"
    if kind in ("dense", "decode"):
        return "the score is not a product"
    return None


def _prepared_score_has_arrays(problem: AttentionProblem) -> bool:
    """Whether the score has arrays in a tile; `Additive()` makes its scale while it is prepared."""
    prepared = jax.eval_shape(
        lambda score, *operands: score.prepare(*operands)[2], problem.score, problem.query, problem.key
    )
    return bool(jax.tree.leaves(prepared))


def _unsupported_sizes(problem: AttentionProblem, kind: Kind | None) -> str | None:
    """The reason why symbolic sizes do not fit a schedule of tiles, which is part of the program."""
    batch, heads = problem.batch, (problem.kv_heads, problem.groups)
    sizes: dict[str, tuple[int, ...]] = {"queries": problem.query_shape, "keys": problem.key_shape}
    if not problem.score.is_inner_product:
        sizes["features"] = (problem.query.shape[-1],)
    if kind == "loop_over_heads":
        sizes |= {"batch": batch, "key heads": heads[:1]}
    if kind == "decode":
        sizes["heads"] = heads
    symbolic = [f"{name} {size}" for name, size in sizes.items() if not is_static(*size)]
    if not symbolic:
        return None
    return f"its tiles are a part of the program, but {' and '.join(symbolic)} are symbolic; export numbers for them"


def _is_one_tile(problem: AttentionProblem) -> bool:
    """Whether block sizes, if any are asked for, leave all pairs in one tile."""
    if problem.block_sizes is None:
        return True
    return problem.block_sizes[0] >= problem.query_length and problem.block_sizes[1] >= problem.key_length


def _few_queries(problem: AttentionProblem) -> bool:
    """Whether there are few queries and many keys, in one tile, of which a static mask leaves most to compute."""
    lengths, rows = (problem.query_length, problem.key_length), problem.groups * problem.query_length
    few = rows <= _DECODE_ROWS_OF_A_KEY_HEAD and problem.kv_heads * rows <= _DECODE_ROWS
    few = few and decide(lambda: problem.rows > 0, otherwise=False) and problem.key_length >= _DECODE_KEYS
    if not (few and (problem.kv_heads > 1 or problem.mask is not None)):
        return False
    if problem.block_sizes is not None:
        return _is_one_tile(problem)
    return problem.mask is None or 2 * problem.pairs_computed(lengths[0], 128) > lengths[0] * lengths[1]


def rows_per_query(problem: AttentionProblem, kind: Kind) -> int:
    """The number of softmax rows that a tile has for each of its queries; a symbolic size counts as one."""
    return static_product((problem.groups,) if kind == "loop_over_heads" else problem.heads)


def tile_starts(
    strategy: BlockwiseStrategy, mask: Mask | None, query: OperandPositions, key: OperandPositions
) -> dict[int, np.ndarray]:
    """The first query and the first key of each tile that the mask does not empty, by the kind of the tiles."""
    queries, keys = strategy.block_sizes
    if not strategy.has_key_spans:
        kinds, _ = tile_kinds(mask, query, key, (queries, keys))
        return {kind: np.argwhere(kinds == kind) * np.array([queries, keys]) for kind in (FULL, PARTIAL)}
    spans = key_spans(mask, query, key, queries)
    first_key = np.minimum(spans[:, 0], key.length - keys)  # the last tile must not end beyond the last key
    return {PARTIAL: np.stack([np.arange(len(spans)) * queries, first_key], 1)[spans[:, 1] > 0]}


def _tiles(problem: AttentionProblem, kind: Kind) -> BlockwiseStrategy:
    lengths = problem.query_length, problem.key_length
    if problem.block_sizes is not None:
        sizes = min(problem.block_sizes[0], lengths[0]), min(problem.block_sizes[1], lengths[1])
        return BlockwiseStrategy(kind, sizes)
    features_per_pair = problem.score.prepared_features_per_pair(problem.query.shape[-1])
    numbers_per_pair = max(rows_per_query(problem, kind) * features_per_pair, 1)
    pairs = (_NUMBERS if features_per_pair == 1 else _NUMBERS_WITH_FEATURES) / numbers_per_pair
    keys = min(_power_of_two(math.sqrt(pairs)), _MAX_BLOCK_SIZE)
    if problem.mask is None and features_per_pair == 1 and keys < lengths[1] <= 2 * keys:
        keys *= 2  # a tile with all keys has no running softmax
    queries = min(_power_of_two(pairs / keys), _MAX_BLOCK_SIZE)
    queries, keys = min(queries, _covering_power_of_two(lengths[0])), min(keys, _covering_power_of_two(lengths[1]))
    (queries, keys), cost = _shrink_for_mask(problem, queries, keys, numbers_per_pair)
    if (spans := _spans(problem, numbers_per_pair, pairs, cost)) is not None:
        return BlockwiseStrategy(kind, spans, has_key_spans=True)
    return BlockwiseStrategy(kind, (_balanced_block(lengths[0], queries), _balanced_block(lengths[1], keys)))


def _with_heads(problem: AttentionProblem, strategy: BlockwiseStrategy) -> BlockwiseStrategy:
    """The strategy with as many heads in a tile as it can have: all key heads before another batch index.

    With block sizes that the user chose, a tile has one head.
    """
    limit = _NUMBERS if problem.block_sizes is None else 0
    return dataclasses.replace(strategy, heads_at_once=heads_at_once(problem.heads, strategy.block_sizes, limit))


def heads_at_once(heads: tuple[int, ...], block_sizes: tuple[int, int], limit: int) -> tuple[int, ...]:
    """How many batch indices along each axis, and how many key heads, have up to `limit` pairs in a tile, or one."""
    *sizes, groups = heads
    numbers, at_once = groups * math.prod(block_sizes), []
    for size in reversed(sizes):
        count = max(n for n in range(1, size + 1) if size % n == 0 and (n == 1 or n * numbers <= limit))
        numbers = numbers * count if count == size else limit + 1
        at_once.append(count)
    return tuple(reversed(at_once))


def _spans(problem: AttentionProblem, numbers_per_pair: int, max_pairs: float, cost: float) -> tuple[int, int] | None:
    """(queries, keys) of tiles with all keys that a static mask leaves, if they cost less than other tiles."""
    best = None
    if problem.mask is None:
        return best
    for queries in _SPAN_QUERIES:
        spans = key_spans(problem.mask, problem.query_positions, problem.key_positions, queries)
        keys = int((spans[:, 1] - spans[:, 0]).max())
        fits = queries < problem.query_length and 0 < keys < problem.key_length and queries * keys <= max_pairs
        # These tiles have no running softmax.
        span_cost = 0.9 * len(spans) * queries * keys * _cost_of_a_pair(queries * keys * numbers_per_pair)
        if fits and span_cost < cost:
            best, cost = (queries, keys), span_cost
    return best


def _power_of_two(number: float) -> int:
    """The largest power of two up to the number, at least 16."""
    return max(2 ** math.floor(math.log2(max(number, 1))), 16)


def _covering_power_of_two(length: int) -> int:
    """The smallest power of two from the length on, at least 16."""
    return max(2 ** math.ceil(math.log2(max(length, 1))), 16)


def _shrink_for_mask(
    problem: AttentionProblem, queries: int, keys: int, numbers_per_pair: int
) -> tuple[tuple[int, int], float]:
    """(tiles of this size or smaller, down to 128, if a static mask then empties enough of them; what they cost).

    All sizes are compared, since a mask of scattered blocks empties no tile that is larger than its blocks.
    """
    best, min_cost, penalty = (queries, keys), math.inf, 1.0
    if problem.mask is None:
        return best, min_cost
    while True:
        pairs = problem.pairs_computed(queries, keys)
        cost = pairs * _cost_of_a_pair(queries * keys * numbers_per_pair)
        if penalty * cost < min_cost:
            best, min_cost = (queries, keys), penalty * cost
        if max(queries, keys) < 256:
            return best, min_cost
        queries, keys = (queries // 2, keys) if queries > keys else (queries // 2, keys // 2)
        penalty /= 0.97  # of two sizes that cost the same, the larger


def _cost_of_a_pair(numbers: int) -> float:
    """The time of a pair in a tile of so many numbers, relative to its time in a large tile.

    XLA computes small tiles on one core, and each tile has some cost of its own.
    """
    if numbers >= 2**18:
        return 1.0
    return (2**18 / numbers) ** 0.4 if numbers >= 2**16 else 1.74 * (2**16 / max(numbers, 1)) ** 0.16


def _balanced_block(length: int, side: int) -> int:
    """A multiple of 8 near `side` with which the last tile is not much shorter than the others."""
    count = -(-length // side)
    return min(length, -(-length // (8 * count)) * 8)
