"""The implementations, the choice of one of them (`preferred` has the order), and the explanation of the choice."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from attnlib._core.problem import Asked, AttentionProblem, AttentionResult, Implementation
from attnlib._core.sizes import decide, is_static
from attnlib._engine.blockwise.implementation import blockwise
from attnlib._engine.blockwise.plan import choose_kind
from attnlib._engine.context.explanation import ContextExplanation
from attnlib._engine.context.implementation import in_context
from attnlib._engine.cost import operations
from attnlib._engine.cudnn.implementation import cudnn
from attnlib._engine.reference import reference
from attnlib._engine.softmax import rescale_rows

# Implementations never import each other: the one that gives the derivatives that cuDNN lacks is handed over here.
IMPLEMENTATIONS: tuple[Implementation, ...] = (blockwise(), reference, cudnn(blockwise(), off_platform=False))
NAMES = tuple(implementation.name for implementation in IMPLEMENTATIONS)

# Used where the default backend is a GPU. A program that is later lowered for another platform runs blockwise.
_CUDNN_OR_BLOCKWISE = cudnn(blockwise(), off_platform=True)

# Numbers in the largest array of all pairs up to which computing all pairs at once is faster than tiles, for scores
# without and with an axis of features for each pair. Measured on 2 CPU cores (docs/performance/tuning.md) by
# `python tests/benchmarks/crossover.py`.
DENSE_NUMBERS, DENSE_NUMBERS_WITH_FEATURES = 2**23, 2**24
# Likewise for additive scores. Their tiles compute no `tanh` of each pair, and so pay sooner.
DENSE_NUMBERS_ADDITIVE = 2**19


def choose(problem: AttentionProblem, asked: Asked) -> Implementation:
    """The first implementation, of those asked for or else of all in order of preference, that can compute the problem.

    Raises:
      ValueError: none can; the message gives each one's reason.
    """
    return _first(problem, asked, _candidates(problem, asked))


def _candidates(problem: AttentionProblem, asked: Asked) -> tuple[Implementation, ...]:
    if problem.options.context is None:
        return preferred(problem) if asked is None else _named(asked)
    return (in_context,) if asked is None else _named(asked, {in_context.name: in_context})


def _first(problem: AttentionProblem, asked: Asked, candidates: Sequence[Implementation]) -> Implementation:
    reasons = {implementation.name: implementation.refusal(problem) for implementation in candidates}
    for implementation in candidates:
        if reasons[implementation.name] is None:
            return implementation
    raise ValueError(
        f"no implementation can compute this with implementation={asked!r}:\n"
        + "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        + ("\nimplementation=None chooses among all that can." if asked is not None else "")
    )


def preferred(problem: AttentionProblem) -> tuple[Implementation, ...]:
    """The implementations worth trying on this machine, the one likely fastest first; the last can compute all."""
    features = problem.query.shape[-1]
    features_per_pair = problem.score.features_per_pair(features)
    prepared_features_per_pair = problem.score.prepared_features_per_pair(features)
    numbers = problem.rows * problem.key_length * features_per_pair
    if decide(lambda: prepared_features_per_pair < features_per_pair, otherwise=True):  # additive scores
        small = decide(lambda: numbers <= DENSE_NUMBERS_ADDITIVE, otherwise=False)
        # With one query or one key, all pairs are no more numbers than those that tiles prepare first.
        small = small or 1 in (problem.query_length, problem.key_length)
        return (reference, blockwise()) if small else (blockwise(), reference)
    kind = choose_kind(problem)
    # In half precision, keys and values have to be converted first. `reference` does so while it moves them, which is
    # faster than the decode path (docs/performance/tuning.md).
    full_precision = problem.key.dtype == problem.value.dtype == problem.dtype
    fast = kind == "loop_over_heads" or (kind == "decode" and full_precision)
    if kind == "dense" or (fast and not problem.return_weights):
        return blockwise(kind), reference
    limit = DENSE_NUMBERS if features_per_pair == 1 else DENSE_NUMBERS_WITH_FEATURES
    # A symbolic size counts as its least value: the array is small for each batch entry, or for short sequences.
    dense = problem.return_weights or decide(lambda: numbers <= limit, otherwise=True)
    anywhere = (reference, blockwise(kind)) if dense else (blockwise(kind), reference)
    return (_CUDNN_OR_BLOCKWISE, *anywhere) if jax.default_backend() == "gpu" else anywhere


def _named(
    asked: str | Implementation | Sequence[str | Implementation], others: Mapping[str, Implementation] | None = None
) -> tuple[Implementation, ...]:
    """Those asked for, where `others` replace the registered ones of their names."""
    named = {implementation.name: implementation for implementation in IMPLEMENTATIONS} | dict(others or {})
    several = (asked,) if isinstance(asked, (str, Implementation)) else asked
    return tuple(named[one] if isinstance(one, str) else one for one in several)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call would run, and why not the other implementations; print it.

    Attributes:
      implementation: the name of the implementation that would run.
      axes: the role of each axis of query and key.
      block_sizes: (queries, keys) of a tile; None if the implementation has no tiles.
      tiles: (number of tiles that are computed, number of all tiles); None if the implementation has no tiles. Tiles
        that the mask empties are not computed.
      memory: estimated bytes of temporaries of a forward pass.
      flops: operations of a forward pass, counted as XLA counts them: two for each multiplication and addition of a
        matrix product, and one for each number that any other operation computes, be it a comparison or a `tanh`. A
        tile that is masked in part counts whole. The number is no measure of time: a `tanh` takes many times as long
        as a sum.
      bytes: the size of all arguments and of all results, which is the least that any implementation has to read and
        write.
      refusals: the reason why each other implementation would not run.
      context: with the option `context`, how the sequence is sharded; its attributes are `axis_name`, `devices`,
        `order`, `exchange`, `turns`, `balance` (1: no device waits) and `received`, the bytes that a device receives
        by each exchange. Memory, operations, bytes and shapes are then those of one device, and tiles those of all.
    """

    implementation: str
    axes: str
    block_sizes: tuple[int, int] | None
    tiles: tuple[int, int] | None
    memory: int
    flops: int
    bytes: int
    refusals: dict[str, str]
    context: ContextExplanation | None = None

    def __str__(self) -> str:
        lines = [f"implementation: {self.implementation}", f"axes: {self.axes}"]
        if self.block_sizes and self.tiles:
            size, tiles = self.block_sizes, self.tiles
            lines.append(f"tiles: {size[0]} queries x {size[1]} keys, {tiles[0]} of {tiles[1]} computed")
        if self.context is not None:
            lines.append(str(self.context))
        lines.append(f"memory: about {self.memory / 1e6:.1f} MB of temporaries in a forward pass")
        lines.append(f"cost: about {_short(self.flops)}FLOP, {_short(self.bytes)}B read and written")
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.refusals.items()])


def _short(number: int) -> str:
    """Three digits and the prefix of a unit."""
    rounded = float(f"{number:.3g}")
    power = next((n for n in range(5) if rounded < 1000 ** (n + 1)), 5)
    return f"{rounded / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}"


def _result(chosen: Implementation, problem: AttentionProblem) -> AttentionResult:
    """The shapes of the result."""
    if problem.options.context is None:
        return jax.eval_shape(chosen.run, problem)
    rows = *problem.heads, problem.query_length  # `run` needs the mesh axis
    output, lse = ((*rows, problem.value.shape[-1]), problem.dtype), (rows, problem.dtype)
    return jax.eval_shape(lambda: AttentionResult(jnp.zeros(*output), jnp.zeros(*lse), None))


def explain(problem: AttentionProblem, asked: Asked, context: ContextExplanation | None = None) -> Explanation:
    sizes = (problem.batch, problem.heads[-2:], problem.query_shape, problem.key_shape, problem.query.shape[-1:])
    if not is_static(*itertools.chain(*sizes)):
        raise ValueError(
            f"explain counts tiles, operations and bytes, which needs a number for every size; got batch {sizes[0]}, "
            f"key heads and groups {sizes[1]}, queries {sizes[2]}, keys {sizes[3]}, features {sizes[4]}. Pass operands "
            "of the sizes that you expect, such as jax.ShapeDtypeStruct((8, 1024, 4, 64), jnp.float32)."
        )
    candidates = _candidates(problem, asked)
    chosen = _first(problem, asked, candidates)
    others = [implementation for implementation in IMPLEMENTATIONS if implementation.name != chosen.name]
    tried = {implementation.name for implementation in candidates}

    def reason(other: Implementation) -> str:
        if asked is not None:
            return f"{chosen.name} was asked for"
        if other.name in tried:
            return f"{chosen.name} is likely faster at this size"
        return "the default device is no GPU" if other.name == "cudnn" else "it runs only where it is asked for"

    refusals = {other.name: other.refusal(problem) or reason(other) for other in others}
    estimate = chosen.estimate(problem)
    flops = estimate.flops
    if problem.rescales_rows:
        flops += operations(rescale_rows, _result(chosen, problem), problem)
    heads = problem.kv_heads * problem.groups
    shared = f" on {problem.kv_heads} of keys" if problem.groups > 1 else ""
    axes = (
        f"batch {problem.batch}, queries {problem.query_shape}, keys {problem.key_shape}, {heads} heads{shared}, "
        f"{problem.query.shape[-1]} features"
    )
    return Explanation(
        chosen.name,
        axes,
        estimate.block_sizes,
        estimate.tiles,
        estimate.memory,
        flops,
        problem.bytes_accessed,
        refusals,
        context,
    )
