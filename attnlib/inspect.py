"""Summaries of attention weights in linear memory: chosen rows, sums over queries, the largest weights, the entropy.

Every function takes the operands, score and options of `attnlib.attention`, except the value and dropout. The result is
what could be computed from the weights of `return_weights=True`. Each function uses attention itself: its transpose,
its tangent, or attention of a few queries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array, Key, Query
from attnlib._core.nan_where import nan_where
from attnlib._core.operand_checks import check_arrays, check_rank, compute_dtype, is_concrete
from attnlib._core.options import EntropyOptions, InspectionOptions, Options, takes_options
from attnlib._core.problem import AttentionProblem
from attnlib._core.pytree import jit, register
from attnlib._core.sizes import decide, is_static, state_bound, static_product
from attnlib._core.validation import check_bool, check_int, is_array
from attnlib._core.varying_axes import cast_to_varying, varying_axes
from attnlib._engine import call as _call
from attnlib._engine.call import Arguments
from attnlib._engine.explicit_call import rows, takes_explicit_axes
from attnlib.modifiers._base import TracedScoreMod
from attnlib.scores import Dot, Score

__all__ = ["attention_entropy", "attention_received", "attention_rows", "top_keys"]

Rows = int | Array | Sequence[int]

_WITHOUT = {
    **dict.fromkeys(("dropout_rate", "dropout_rng", "return_weights", "return_lse"), ""),
    "context": "context cannot be given: attnlib.inspect needs the whole sequence on each device.",
}
_NO_ENTROPY = "normalize cannot be given: the entropy is that of weights that add up to one."
_takes_options = takes_options(without=_WITHOUT, listed=("score",))
# The number of weights that `top_keys` computes at a time (docs/performance/tuning.md), and of queries at least.
_NUMBERS, _MIN_QUERIES = 2**20, 8


@_takes_options
def attention_rows(
    query: Query,
    key: Key,
    *,
    rows: Rows | tuple[Rows, ...],
    score: Score | None = None,
    **options: Unpack[InspectionOptions],
) -> jax.Array:
    """The weights of chosen queries, at the cost of attention of these queries.

    Args:
      query: `(*batch and attention axes, N, D)`.
      key: `(..., K, D)`.
      rows: ints of any shape: positions along the flattened (row-major) query axes, or a tuple of such ints, one entry
        for each attention axis, which broadcast. Negative positions count from the end. Positions may be traced.
      score: default `scores.Dot()`.
      {names}: as in `attnlib.attention`. Masks, biases, modifiers and positions are those of all queries; `block_sizes`
        are those of the chosen queries.

    Returns:
      Weights `(*batch, N, *shape of rows, *key axes)`, float32 at least. With a sink, the weights of a row add up to
      less than one, and with normalize=False to anything. A row beyond the end raises ValueError; if `rows` is traced,
      its weights are NaN.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attnlib import inspect
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 1, 16, 16, 2, 8))  # images of 16 x 16
      >>> inspect.attention_rows(query, key, rows=(3, jnp.array([0, 5]))).shape  # of the pixels (3, 0) and (3, 5)
      (1, 2, 2, 16, 16)

    Source: the weights are those of Bahdanau, Cho and Bengio (2015) and Vaswani et al. (2017).
    """
    arguments = _arguments(query, key, score, options)
    return _attention_rows(arguments, _indices(rows, _query_shape(arguments)))


@_takes_options
def attention_received(
    query: Query, key: Key, *, mean: bool = False, score: Score | None = None, **options: Unpack[InspectionOptions]
) -> jax.Array:
    """The attention that each key receives: the sum over t of its weights w_ts, in two passes over tiles.

    The sum is the transpose of attention, as a linear map of the values, applied to ones. It is differentiable.

    Args:
      query: `(*batch and attention axes, N, D)`.
      key: `(..., K, D)`.
      mean: divide by the number of queries that attend a key, for each batch entry and head. Default: False.
      score: default `scores.Dot()`.
      {names}: as in `attnlib.attention`.

    Returns:
      `(*batch, N, *key axes)`, float32 at least. The sum over the keys is the number of queries that attend a key (1
      with `mean`), less with a sink, and anything with normalize=False.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attnlib import inspect
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 1, 10, 2, 8))
      >>> received = inspect.attention_received(query, key, is_causal=True)
      >>> received.shape, bool(jnp.allclose(received.sum(-1), 10, rtol=1e-5))
      ((1, 2, 10), True)

    Source: as a measure of which keys matter, Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative
      Inference of Large Language Models" (2023).
    """
    return _attention_received(_arguments(query, key, score, options), mean=check_bool(mean, "mean"))


@_takes_options
def top_keys(
    query: Query, key: Key, *, k: int, score: Score | None = None, **options: Unpack[InspectionOptions]
) -> tuple[jax.Array, jax.Array]:
    """The k largest weights of each query, and the keys that have them.

    All weights are computed, for a few queries at a time. The time is that of `return_weights=True` and of a search
    through all weights; the memory is that of a few rows. The weights are differentiable.

    Args:
      query: `(*batch and attention axes, N, D)`.
      key: `(..., K, D)`.
      k: the number of weights, from 1 to the number of keys; static.
      score: default `scores.Dot()`.
      {names}: as in `attnlib.attention`; `block_sizes` are those of the few queries.

    Returns:
      (weights, indices), both `(*batch, N, *query axes, k)`, the largest weight first. The int32 indices are positions
      along the flattened (row-major) key axes; `jnp.unravel_index` converts them. An index is -1 if the weight is 0,
      because the key is masked or because the weight is too small for its dtype.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attnlib import inspect
      >>> x = 9 * jnp.eye(3)[None, :, None]  # one head; each position is most like itself
      >>> weights, keys = inspect.top_keys(x, x, k=2, is_causal=True)
      >>> keys[0, 0].tolist()
      [[0, -1], [1, 0], [2, 0]]

    Source: in chunks of queries, for attention to the k largest alone, Gupta et al., "Memory-efficient Transformers via
      Top-k Attention" (2021).
    """
    return _top_keys(_arguments(query, key, score, options), k=check_int(k, "k", minimum=1))


@takes_options(without={**_WITHOUT, "normalize": _NO_ENTROPY}, listed=("score",))
def attention_entropy(
    query: Query, key: Key, *, score: Score | None = None, **options: Unpack[EntropyOptions]
) -> jax.Array:
    """The entropy of the weights of each query, from a derivative of the lse.

    With logits x_s and weights w_s = exp(x_s - lse), the entropy is -sum_s w_s log w_s = lse - sum_s w_s x_s. The mean
    logit sum_s w_s x_s is the derivative of log sum_s exp(t x_s) by t at t = 1. This takes two passes over tiles:
    attention and its tangent.

    Args:
      query: `(*batch and attention axes, N, D)`.
      key: `(..., K, D)`.
      score: default `scores.Dot()`.
      {names}: as in `attnlib.attention`. A sink counts as one more key.

    Returns:
      `(*batch, N, *query axes)` in nats, float32 at least, differentiable: 0 if one key has all the weight, log S if
      all S keys have the same weight, and 0 if the query attends nothing. The entropy is a difference of numbers as
      large as the logits. Rounding may make it a little less than 0.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from attnlib import inspect
      >>> query, key = jnp.zeros((2, 1, 4, 1, 8))  # all keys alike
      >>> print(jnp.exp(inspect.attention_entropy(query, key, is_causal=True)).round(2))
      [[[1. 2. 3. 4.]]]

    Source: as a measure of what heads do, Ghader and Monz, "What does Attention in Neural Machine Translation Pay
      Attention to?" (2017); its collapse in training, Zhai et al., "Stabilizing Transformer Training by Preventing
      Attention Entropy Collapse" (2023).
    """
    return _attention_entropy(_arguments(query, key, score, options))


def _arguments(query: Any, key: Any, score: Score | None, options: EntropyOptions) -> Arguments:
    """The arguments of attention with values of one feature, whose output is not used."""
    check_arrays(query=query, key=key)
    value = jnp.ones((*key.shape[:-1], 1), compute_dtype(query, key))
    return _call.arguments(query, key, value, Dot() if score is None else score, Options(**options))


# Sums over the queries


@partial(jit, static_argnames=("mean",))
@takes_explicit_axes(rows)
def _attention_received(arguments: Arguments, *, mean: bool) -> jax.Array:
    problem, axes = _call.canonicalize(arguments)
    shape = list(arguments.key.shape)
    for axis, size in zip(axes.batch, problem.batch, strict=True):
        shape[axis] = size
    # The values have one feature for each query head of a key head; its cotangent is one for that head, and else zero.
    ones = jnp.ones((*shape[:-1], problem.groups), problem.dtype)
    shard_axes = varying_axes(*jax.tree.leaves(arguments))
    ones = cast_to_varying(ones, shard_axes)  # else the pullback would add up the shards
    cotangents = jnp.tile(jnp.eye(problem.groups, dtype=problem.dtype), (problem.kv_heads, 1))
    output, pullback = jax.vjp(lambda value: _call.attend(arguments._replace(value=value)), ones)
    (received,) = pullback(cast_to_varying(jnp.broadcast_to(cotangents, output.shape), shard_axes))
    received = jnp.swapaxes(_axes.fold_operand(received, axes), -1, -2)  # (*batch, K, G, S)
    received = received.reshape(*_batch_and_head(problem), problem.key_length)
    if mean:
        attending = _axes.fold_operand(output[..., :1], axes)[..., 0] > 0  # (*batch, N, T), weights adding up to that
        received /= jnp.maximum(jnp.sum(attending, -1, dtype=problem.dtype), 1)[..., None]
    return received.reshape(*received.shape[:-1], *problem.key_shape)


# Moments of the logits


@jit
@takes_explicit_axes(rows)
def _attention_entropy(arguments: Arguments) -> jax.Array:
    problem, axes = _call.canonicalize(arguments)
    dtype = compute_dtype(arguments.query, arguments.key)
    sink = None if problem.sink is None else jnp.asarray(problem.sink, dtype)

    def hot(temperature: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(output, lse) with all logits, the sink's too, times the temperature."""
        score_mod = arguments.options.score_mod
        assert score_mod is None or isinstance(score_mod, TracedScoreMod)
        function = _ScaledScoreMod(None if score_mod is None else score_mod.function, temperature)
        scaled = None if sink is None else temperature * sink
        changed = arguments.change(score_mod=TracedScoreMod(function), sink=scaled, return_lse=True)
        return _call.attend(changed._replace(value=value))

    # The tangent of the values, from 0 to 1, gives the sum of the weights, which is 1 up to the rounding of the lse.
    # The mean logit is divided by this sum, since the logits would multiply the rounding error.
    primals = jnp.ones((), dtype), jnp.zeros_like(arguments.value)
    (_, total), (weight, weighed) = jax.jvp(hot, primals, (primals[0], jnp.ones_like(arguments.value)))
    weight = _axes.fold_operand(weight, axes)[..., 0].reshape(total.shape)
    if sink is not None:
        sink, _ = _axes.align_ranks(sink.reshape(-1, *(1,) * len(axes.attention)), total)
        weight += jnp.exp(sink - total)
    empty = total == -jnp.inf
    return jnp.where(empty, 0, total) - weighed / jnp.where(empty, 1, weight)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class _ScaledScoreMod:
    """A score_mod (None: the logit itself), times a number."""

    function: Callable[..., jax.Array] | None
    factor: jax.Array

    def __call__(self, logit: jax.Array, *where: jax.Array) -> jax.Array:
        logit = logit if self.function is None else self.function(logit, *where)
        masked = logit == -jnp.inf  # by a bias: no weight at any temperature
        return jnp.where(masked, logit, self.factor * jnp.where(masked, 0, logit))


# Rows


def _weights(problem: AttentionProblem, implementation: Any, start: jax.Array, size: int) -> jax.Array:
    """`(*batch, N, size, S)`: the weights of `size` consecutive queries."""
    block = problem.query_positions.block(start, size)
    few = dataclasses.replace(
        problem,
        query=block.cut(problem.query, -2),
        query_positions=dataclasses.replace(problem.query_positions, first=start, size=size),
        bias=None if problem.bias is None else block.cut(problem.bias, -2),
        return_weights=True,
        to_support=(*problem.to_support, "return_weights"),
    )
    weights = _call.run_problem(few, implementation).weights
    assert weights is not None
    return weights.reshape(*_batch_and_head(problem), size, problem.key_length)


@jit
@takes_explicit_axes(rows)
def _attention_rows(arguments: Arguments, rows: Any) -> jax.Array:
    problem, _ = _call.canonicalize(arguments)
    parts, sizes = (rows, problem.query_shape) if isinstance(rows, tuple) else ((rows,), (problem.query_length,))
    flat, inside = jnp.int32(0), jnp.bool_(True)
    for part, size in zip(_axes.align_ranks(*parts), sizes, strict=True):
        inside &= (part >= -size) & (part < size)
        flat = flat * size + jnp.where(part < 0, part + size, part)
    if flat.size == 0:
        return jnp.zeros((*_batch_and_head(problem), *flat.shape, *problem.key_shape), problem.dtype)

    def one(row: jax.Array) -> jax.Array:
        return _weights(problem, arguments.options.implementation, row, 1)[..., 0, :]

    weights = jax.vmap(one, out_axes=-2)(flat.reshape(-1))
    weights = nan_where(~inside.reshape(-1, 1), weights)
    return weights.reshape(*_batch_and_head(problem), *flat.shape, *problem.key_shape)


@partial(jit, static_argnames=("k",))
@takes_explicit_axes(rows)
def _top_keys(arguments: Arguments, *, k: int) -> tuple[jax.Array, jax.Array]:
    problem, _ = _call.canonicalize(arguments)
    total = problem.query_length
    if decide(lambda: k > problem.key_length, otherwise=True):
        remedy = "" if is_static(problem.key_length) else f" {state_bound(problem.key_length, k)}"
        raise ValueError(f"k must be at most the number of keys, {problem.key_length}; got {k}.{remedy}")
    size = _queries_at_a_time(problem)

    @jax.checkpoint  # derivatives compute the weights again rather than keep them
    def few(start: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = _weights(problem, arguments.options.implementation, start, size)
        largest, keys = jax.lax.top_k(weights, k)
        return largest, jnp.where(largest == 0, -1, keys)

    if total == 0:
        empty = jnp.zeros((*_batch_and_head(problem), *problem.query_shape, k), problem.dtype)
        return empty, empty.astype(jnp.int32)
    # The last chunk ends with the last query, and repeats queries of the chunk before.
    starts = np.minimum(np.arange(0, total, size), total - size) if is_static(total) else jnp.arange(total)
    runs = jax.lax.map(few, jnp.asarray(starts, jnp.int32))
    computed = starts.shape[0] * size
    whole = computed - size

    def joined(run: jax.Array) -> jax.Array:
        run = jnp.moveaxis(run, 0, -3).reshape(*_batch_and_head(problem), computed, k)
        if is_static(total):
            run = jnp.concatenate([run[..., :whole, :], run[..., computed - (total - whole) :, :]], -2)
        return run.reshape(*_batch_and_head(problem), *problem.query_shape, k)

    return joined(runs[0]), joined(runs[1])


def _queries_at_a_time(problem: AttentionProblem) -> int:
    """The number of queries of a chunk: one where their number is symbolic, since chunks of one fit every number."""
    if not is_static(problem.query_length):
        return 1
    numbers = _MIN_QUERIES
    if is_static(problem.key_length):
        features = problem.score.prepared_features_per_pair(problem.query.shape[-1])
        row = static_product(_batch_and_head(problem)) * problem.key_length * static_product((features,))
        numbers = max(_NUMBERS // max(row, 1), _MIN_QUERIES)
    return min(numbers, problem.query_length)


# What they share


def _batch_and_head(problem: AttentionProblem) -> tuple[int, ...]:
    """(*batch, N)."""
    return (*problem.batch, problem.kv_heads * problem.groups)


def _query_shape(arguments: Arguments) -> tuple[int, ...]:
    check_rank(arguments.query, "query")
    axes = _axes.normalize(arguments.options.attention_axes, arguments.query.ndim, trailing=2)
    return axes.attention_shape(arguments.query.shape)


def _indices(rows: Any, shape: tuple[int, ...]) -> Any:
    """`rows` as int32 arrays, checked against the sizes of the query axes if the values are concrete."""
    if isinstance(rows, tuple) and len(rows) != len(shape):
        raise ValueError(
            f"rows as a tuple must have one entry for each of the {len(shape)} attention axes; got {len(rows)}. For "
            "several rows pass a list or an array."
        )
    checked = []
    parts, sizes = (rows, shape) if isinstance(rows, tuple) else ((rows,), (math.prod(shape),))
    for part, size in zip(parts, sizes, strict=True):
        array = part if is_array(part) else np.asarray(part)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"rows must hold integers; got {array.dtype}{list(array.shape)}.")
        if (
            is_static(size)
            and is_concrete(array)
            and not np.all((-size <= np.asarray(array)) & (np.asarray(array) < size))
        ):
            raise ValueError(f"rows must be in {-size}..{size - 1}, of {size} queries; got {part}.")
        checked.append(jnp.asarray(array).astype(jnp.int32))
    return tuple(checked) if isinstance(rows, tuple) else checked[0]
