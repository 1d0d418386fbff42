"""How a problem is cut: into heads or not, and into tiles.

Tiles are small enough that the largest array of one stays in cache, and even, so as to pad little.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax

from attnlib._core.problem import AttentionProblem

# Numbers in the largest array of a tile, and how long and wide one is at most. Measured on 2 CPU cores, 64 features of
# 2048 positions: of 8 heads 512 x 256 was fastest forward and in training, of one head 2048 x 512. Of scores whose
# derivatives make an array of (queries, keys, features), 32 x 32 x 128.
_NUMBERS, _NUMBERS_WITH_FEATURES = 2**20, 2**17
_LONGEST = 2048, 512
# From this many pairs of a key head on, heads are computed in turn. Measured likewise, all at once / in turn, forward
# and training of 8 heads: 1.13, 0.94 at 8 x 128 positions; 1.31, 1.66 at 8 x 256; 2.0, 2.1 at 4 x 512.
_PAIRS_IN_TURN = 2**16
# Up to so many rows of a batch index and of a key head, heads are computed side by side, from so many keys on. Measured
# on 2 shared CPU cores, 64 features, 4096 keys, the faster of dense and tiled / side by side, forward and training: 8
# heads, 1 query 3.2, 1.5 (with lengths 4.3, 4.0), 8 queries 1.5, 1.03, 16 queries 0.87, 0.86; 8 heads on 2 key heads, 1
# query 1.9, 1.4, 2 queries 1.3, 1.3, 4 queries 0.99, 0.56; on 1 key head, where nothing has to be moved, 1 query 0.92,
# 0.80, but with lengths 1.7, 1.4; 32 heads, 1 query 3.6; 32 on 8 of 128 features 5.1. 8 heads, 1 query, 256 keys 0.99,
# 0.96; 512 keys 1.3, 0.98; 32768 keys 7.3.
_ROWS_SIDE_BY_SIDE, _ROWS_OF_A_KEY_HEAD, _KEYS_SIDE_BY_SIDE = 64, 8, 512


Kind = Literal["all_heads", "loop_over_heads", "decode"]


@dataclasses.dataclass(frozen=True)
class BlockwiseStrategy:
    """How a problem is cut.

    Attributes:
      kind: `"all_heads"` at once; `"loop_over_heads"`, one batch index and key head after another; or `"decode"`, the
        forward pass has all heads in one product, with keys and values as they lie, and one tile.
      block_sizes: (queries, keys) of a tile.
      fallback_keys: of `"decode"`, the keys of a tile where results were not finite and are computed again; few, so
        that little is moved.
    """

    kind: Kind
    block_sizes: tuple[int, int]
    fallback_keys: int = 512


def plan_blocks(problem: AttentionProblem, kind: Kind | None = None) -> BlockwiseStrategy:
    """The strategy of that kind, or of the one likely fastest on this machine, in blocks as the user asked for."""
    kind = choose_kind(problem) if kind is None else kind
    if kind != "decode":
        return BlockwiseStrategy(kind, _tile_sizes(problem, kind))
    whole = BlockwiseStrategy(kind, (problem.query_length, problem.key_length))
    if problem.block_sizes is None:
        return whole
    return dataclasses.replace(whole, fallback_keys=min(whole.fallback_keys, problem.block_sizes[1]))


def choose_kind(problem: AttentionProblem) -> Kind:
    """The kind likely fastest.

    Only all heads at once does not gather what is sharded; the others are faster on a CPU and need it for themselves.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return "all_heads"
    if unsupported(problem, "decode") is None and _few_queries(problem):
        return "decode"
    long = problem.groups * problem.query_length * problem.key_length >= _PAIRS_IN_TURN
    return "loop_over_heads" if long and unsupported(problem, "loop_over_heads") is None else "all_heads"


def unsupported(problem: AttentionProblem, kind: Kind | None) -> str | None:
    """Why a kind cannot compute a problem; None where it can."""
    if problem.score.is_inner_product:
        return None
    if kind == "loop_over_heads" and jax.tree.leaves(problem.score):
        return "the score has arrays, which are not cut"
    if kind == "decode":
        return "the score is not a product"
    return None


def _few_queries(problem: AttentionProblem) -> bool:
    """Whether there are few queries and many keys.

    Not where the user asks for several tiles, or a static mask (a window, say) leaves most of the keys out.
    """
    lengths, rows = (problem.query_length, problem.key_length), problem.groups * problem.query_length
    few = rows <= _ROWS_OF_A_KEY_HEAD and problem.kv_heads * rows <= _ROWS_SIDE_BY_SIDE
    few = few and min(problem.rows, problem.query_length) > 0 and problem.key_length >= _KEYS_SIDE_BY_SIDE
    if not (few and (problem.kv_heads > 1 or problem.mask is not None)):
        return False
    if problem.block_sizes is not None:
        return problem.block_sizes[0] >= lengths[0] and problem.block_sizes[1] >= lengths[1]
    return problem.mask is None or 2 * problem.pairs_computed(lengths[0], 128) > lengths[0] * lengths[1]


def rows_per_query(problem: AttentionProblem, kind: Kind) -> int:
    """How many rows of softmax a tile has for each of its queries."""
    return problem.groups if kind == "loop_over_heads" else problem.rows // problem.query_length


def _tile_sizes(problem: AttentionProblem, kind: Kind) -> tuple[int, int]:
    lengths = problem.query_length, problem.key_length
    if problem.block_sizes is not None:
        return min(problem.block_sizes[0], lengths[0]), min(problem.block_sizes[1], lengths[1])
    features_per_pair = problem.score.prepared_features_per_pair(problem.query.shape[-1])
    numbers = (_NUMBERS if features_per_pair == 1 else _NUMBERS_WITH_FEATURES) / max(
        rows_per_query(problem, kind) * features_per_pair, 1
    )
    keys = min(_power_of_two(math.sqrt(numbers)), _LONGEST[1])
    queries = min(_power_of_two(numbers / keys), _LONGEST[0])
    queries, keys = min(queries, _covering_power_of_two(lengths[0])), min(keys, _covering_power_of_two(lengths[1]))
    size = _shrink_for_mask(problem, queries, keys)
    return _balanced_block(lengths[0], size[0]), _balanced_block(lengths[1], size[1])


def _power_of_two(number: float) -> int:
    """Not above the number, but 16 at least."""
    return max(2 ** math.floor(math.log2(max(number, 1))), 16)


def _covering_power_of_two(length: int) -> int:
    """The power of two from which on one tile covers a length."""
    return max(2 ** math.ceil(math.log2(max(length, 1))), 16)


def _shrink_for_mask(problem: AttentionProblem, queries: int, keys: int) -> tuple[int, int]:
    """Smaller tiles, down to 128, where a static mask (a window, say) then leaves a good part of the work out.

    All sizes are looked at: scattered blocks leave nothing out until tiles are as small as they are.
    """
    best, penalty = (queries, keys), 1.0
    if problem.mask is None or max(best) < 256:
        return best
    min_cost: float = problem.pairs_computed(queries, keys)
    while max(queries, keys) >= 256:
        queries, keys = (queries // 2, keys) if queries > keys else (queries // 2, keys // 2)
        penalty /= 0.85  # a halving has to pay
        if (cost := penalty * problem.pairs_computed(queries, keys)) < min_cost:
            best, min_cost = (queries, keys), cost
    return best


def _balanced_block(length: int, side: int) -> int:
    """About a side, a multiple of 8, such that the last tile is not much shorter than the others."""
    count = -(-length // side)
    return min(length, -(-length // (8 * count)) * 8)
