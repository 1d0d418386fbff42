"""Softmax over keys that arrive in blocks: a running maximum and a running sum (Milakov and Gimelshein 2018).

`merge` joins sets of keys by their log-sum-exps: the parts of `merge_attention`, or the keys and an attention sink. A
sink is one more key for every row, with a logit and no value (Xiao et al. 2023). `rescale_rows` adds it to the result
of any implementation, or undoes the division by the sum of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlib._autodiff.exponential import exp
from attnlib._core.problem import AttentionProblem, AttentionResult


class SoftmaxState(NamedTuple):
    """The statistics of each row after some blocks; without a logit above -inf so far, the sum is 0."""

    row_max: jax.Array  # (..., T), at least the least finite number, so that exp(-inf - row_max) is 0 and not NaN
    row_sum: jax.Array  # (..., T): sum of exp(logit - row_max)
    output: jax.Array  # (..., T, E): sum of exp(logit - row_max) * value, before division


def finite_max(row_max: jax.Array) -> jax.Array:
    """The maximum, or 0 if it is -inf, so that exp(-inf - finite_max) is 0 and not NaN."""
    return jnp.where(row_max == -jnp.inf, 0, row_max)


def finite_row_max(logits: jax.Array) -> jax.Array:
    """The maximum of each row, for a `SoftmaxState`."""
    return jnp.max(logits, -1, initial=jnp.finfo(logits.dtype).min)


def divisor(row_sum: jax.Array) -> jax.Array:
    """What the sums of a row are divided by. A sum has the term exp(0) of the maximum, or it has no terms and is 0."""
    return jnp.maximum(row_sum, 0.5)


def join(state: SoftmaxState, other: SoftmaxState) -> SoftmaxState:
    """The state after the blocks of both."""
    row_max = jnp.maximum(state.row_max, other.row_max)
    scale, other_scale = exp(state.row_max - row_max), exp(other.row_max - row_max)
    return SoftmaxState(
        row_max,
        state.row_sum * scale + other.row_sum * other_scale,
        state.output * scale[..., None] + other.output * other_scale[..., None],
    )


def normalize(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """(output, lse); 0 and -inf for a row without a logit above -inf."""
    row_sum = divisor(state.row_sum)
    lse = jnp.where(state.row_sum == 0, -jnp.inf, jnp.log(row_sum) + state.row_max)
    return state.output / row_sum[..., None], lse


def merge(lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the fraction of all weight that each set of keys has, the lse of all keys) from the lses `(..., T, sets)`."""
    row_max = jax.lax.stop_gradient(finite_row_max(lses))
    # A set with an lse of inf takes all weight; inf - inf would be NaN.
    terms = jnp.exp(jnp.where(lses == jnp.inf, 0, lses - row_max[..., None]))
    return normalize(SoftmaxState(row_max, jnp.sum(terms, -1), terms))


def rescale_rows(result: AttentionResult, problem: AttentionProblem) -> AttentionResult:
    """The result of the problem, from softmax over the keys alone: with a sink, or with weights that are not divided.

    A sink is one more term exp(sink) in the softmax of each row. Without normalization, the weights are exp(logit),
    which is softmax times exp(lse). The output of a row without keys stays 0.
    """
    if not problem.rescales_rows:
        return result
    output, lse, weights = result
    assert lse is not None
    if not problem.options.normalize:
        factors = jnp.exp(lse)[..., None]
        # A factor may be infinite, or NaN in a row that attends NaN; the weight of a masked pair is 0 all the same.
        exponentials = None if weights is None else jnp.where(weights == 0, 0, weights * factors)
        return AttentionResult(output * factors, lse, exponentials)
    sink = jnp.asarray(problem.sink, lse.dtype)
    sink = jnp.broadcast_to(sink.reshape(*problem.heads[-2:], 1) if sink.ndim else sink, lse.shape)
    fractions, joined_lse = merge(jnp.stack([lse, sink], -1))
    attended = fractions[..., :1]
    return AttentionResult(output * attended, joined_lse, None if weights is None else weights * attended)
