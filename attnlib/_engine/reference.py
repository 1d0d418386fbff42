"""The definition: every logit at once, plain automatic differentiation, the shortest code that keeps the contract.

softmax(score_mod(soft_cap(score(q, k) + bias))) v over the pairs that may attend (Bahdanau et al. 2015; Vaswani et al.
2017). Its memory is quadratic; it shares no numerics with the fast implementations, which are tested against it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._autodiff.custom_rule import finite_entries
from attnlib._core import axes as _axes
from attnlib._core.nan_where import nan_where
from attnlib._core.problem import AttentionProblem, AttentionResult, Estimate, Implementation
from attnlib._core.varying_axes import cast_to_varying, varying_axes
from attnlib._engine import dropout as _dropout
from attnlib._engine.cost import operations

_SUPPORTS = frozenset(
    "mask bias dropout_rate logits_soft_cap score_mod sink normalize return_weights return_lse precision".split()
)
_REASONS = {"block_sizes": "it computes all pairs at once and has no blocks; leave block_sizes=None"}


def _run(problem: AttentionProblem) -> AttentionResult:
    query, key, value = (x.astype(problem.dtype) for x in (problem.query, problem.key, problem.value))
    mask = _dense_mask(problem)
    poison: jax.Array | bool = False
    if mask is not None:
        finite = jnp.isfinite(query), jnp.isfinite(key), finite_entries(value)
        bad_query, bad_key, bad_value = (~jnp.all(x, -1) for x in finite)
        poison = bad_query[..., :, None] | (bad_key | bad_value)[..., None, None, :]
        query, key, value = (
            jnp.where(is_finite, x, 1) for is_finite, x in zip(finite, (query, key, value), strict=True)
        )

    logits = problem.score.block(query, key, problem.precision)  # (*batch, K, G, T, S)
    if problem.bias is not None:
        logits = logits + problem.bias.astype(logits.dtype)
    for modifier in problem.modifiers:
        if mask is not None:
            logits = jnp.where(mask, logits, 0)  # a masked bias may be NaN, and so would be the modifier's derivative
        logits = modifier.apply(logits, problem.heads, *problem.positions)
    if mask is not None:
        # What a row attends must reach it, NaN too; what it does not attend must not, in either pass.
        logits = jnp.where(mask, nan_where(poison, logits), -jnp.inf)

    logits = jnp.broadcast_to(logits, (*problem.batch, *logits.shape[-4:]))
    weights, lse = _softmax(mask is not None, logits)
    if problem.dropout_seeds is not None:
        weights = jnp.where(_keep(problem), weights / (1 - problem.dropout_rate), 0)
    output = jnp.einsum("...kgts,...kse->...kgte", weights, value, precision=problem.precision)
    if mask is not None:
        # Stops the NaN cotangent of a poisoned row from meeting the zero weights of what the row does not attend.
        output = nan_where(jnp.isnan(lse)[..., None], output)
    return AttentionResult(output, lse, weights if problem.return_weights else None)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(masked: bool, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis and its log-sum-exp; a row of -inf (or of no keys) gives weights 0 and lse -inf."""
    highest = jnp.max(logits, -1, keepdims=True, initial=-jnp.inf)
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    terms = jnp.exp(logits - highest)
    total = jnp.sum(terms, -1, keepdims=True)
    empty = total == 0
    lse = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + highest)
    weights = terms / jnp.where(empty, 1, total)
    if masked:  # a row that attends NaN is NaN, but not where it does not attend
        weights = jnp.where(logits == -jnp.inf, 0, weights)
    axes = varying_axes(logits)  # JAX forgets those of an array without entries
    return cast_to_varying(weights, axes), cast_to_varying(lse[..., 0], axes)


@_softmax.defjvp
def _softmax_jvp(masked: bool, primals: Any, tangents: Any) -> Any:
    weights, lse = _softmax(masked, *primals)
    mean = jnp.sum(weights * tangents[0], -1)
    weights_dot = weights * (tangents[0] - mean[..., None])
    if masked:  # likewise: the mean of a NaN row must not reach what the row does not attend
        weights_dot = jnp.where(weights == 0, 0, weights_dot)
    return (weights, lse), (weights_dot, mean)


def _dense_mask(problem: AttentionProblem) -> jax.Array | None:
    if problem.mask is None:
        return None
    return _axes.split_heads(problem.mask.evaluate(*problem.positions), problem.kv_heads, problem.query.ndim)


def _keep(problem: AttentionProblem) -> jax.Array:
    query, key = problem.positions
    heads = _dropout.batch_head_index(problem.batch, problem.kv_heads, problem.groups, problem.dropout_seeds)
    assert problem.dropout_seeds is not None
    return _dropout.keep_mask(problem.dropout_seeds, problem.dropout_rate, heads, query.array_index, key.array_index)


def _estimate(problem: AttentionProblem) -> Estimate:
    """Logits and weights of all pairs."""
    memory = 2 * problem.rows * problem.key_length * jnp.dtype(problem.dtype).itemsize
    return Estimate(memory, operations(_run, problem))


reference = Implementation("reference", _SUPPORTS, lambda problem: None, _run, _estimate, _REASONS)
