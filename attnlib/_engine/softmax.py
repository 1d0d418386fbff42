"""Softmax over keys that arrive in blocks: a running maximum and a running sum (Milakov and Gimelshein 2018).

And softmax over sets of keys of which the log-sum-exps are known: those of `merge_attention`, and an attention sink,
which is one more key for every row, of a logit of its own and of no value (Xiao et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlib._core.problem import AttentionProblem, AttentionResult


class SoftmaxState(NamedTuple):
    """What is known of each row after some blocks; a row that has seen no finite logit has highest -inf, sum 0."""

    row_max: jax.Array  # (..., T)
    row_sum: jax.Array  # (..., T): sum of exp(logit - highest)
    output: jax.Array  # (..., T, E): sum of exp(logit - highest) * value, before division


def finite_max(row_max: jax.Array) -> jax.Array:
    """What to subtract in an exponent: the maximum, or 0 where it is -inf, so that exp(-inf - base) is 0, not NaN."""
    return jnp.where(row_max == -jnp.inf, 0, row_max)


def normalize(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """(output, lse); 0 and -inf for a row that has seen nothing."""
    empty = state.row_sum == 0
    row_sum = jnp.where(empty, 1, state.row_sum)
    lse = jnp.where(empty, -jnp.inf, jnp.log(row_sum) + finite_max(state.row_max))
    return state.output / row_sum[..., None], lse


def merge(lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the share of each set of keys in the weight of all, the lse of all) from their lses `(..., T, sets)`."""
    highest = jax.lax.stop_gradient(jnp.max(lses, -1))
    # An infinite one takes all, where inf - inf would be NaN.
    terms = jnp.exp(jnp.where(lses == jnp.inf, 0, lses - finite_max(highest)[..., None]))
    return normalize(SoftmaxState(highest, jnp.sum(terms, -1), terms))


def add_sink(result: AttentionResult, problem: AttentionProblem) -> AttentionResult:
    """What an implementation gives, where softmax has one more term, exp(sink): it takes a share of each row's weight.

    A row that attends nothing but the sink keeps its zeros.
    """
    if problem.sink is None:
        return result
    output, lse, weights = result
    assert lse is not None
    sink = jnp.asarray(problem.sink, lse.dtype)
    sink = jnp.broadcast_to(sink.reshape(*problem.heads[-2:], 1) if sink.ndim else sink, lse.shape)
    shares, joined = merge(jnp.stack([lse, sink], -1))
    share = shares[..., :1]
    return AttentionResult(output * share, joined, None if weights is None else weights * share)
