"""Attention sinks: one more key for every row, of a logit of its own and of no value (Xiao et al. 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlib._core.problem import AttentionProblem, AttentionResult


def add_sink(result: AttentionResult, problem: AttentionProblem) -> AttentionResult:
    """What an implementation gives, where softmax has one more term, exp(sink): it takes a share of each row's weight.

    With l the lse without it, that of a row is sigmoid(l - sink), and the new lse is log(exp(l) + exp(sink)).
    """
    if problem.sink is None:
        return result
    output, lse, weights = result
    assert lse is not None
    sink = jnp.asarray(problem.sink, lse.dtype)
    sink = jnp.broadcast_to(sink.reshape(*problem.heads[-2:], 1) if sink.ndim else sink, lse.shape)
    empty = lse == -jnp.inf  # a row that attends nothing but the sink keeps its zeros
    over = jnp.where(empty, 0, lse) - sink
    attended_fraction = jnp.where(empty, 0, jax.nn.sigmoid(over))
    joined = jnp.where(empty, sink, sink + jax.nn.softplus(over))
    return AttentionResult(
        output * attended_fraction[..., None],
        joined,
        None if weights is None else weights * attended_fraction[..., None],
    )
