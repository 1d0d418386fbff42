"""One call: check the arguments, fold them into a Problem, choose an implementation and run it, unfold the results."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape
from attnlib._core.operand_checks import (
    check_arrays,
    check_axes,
    check_bias,
    check_bias_shape,
    check_block_sizes,
    check_dropout,
    check_explicit_positions,
    check_implementation,
    check_integers,
    check_operands,
    check_precision,
    check_rank,
    check_sink,
    check_sink_shape,
    check_soft_cap,
)
from attnlib._core.problem import Asked, AttentionProblem, AttentionResult, compute_dtype
from attnlib._core.pytree import jit
from attnlib._core.suggestions import suggestion_for
from attnlib._core.validation import check_bool
from attnlib._engine import dispatch as _choose
from attnlib._engine import dropout as _dropout
from attnlib._engine.softmax import add_sink
from attnlib.masks import Causal
from attnlib.masks._arrays import as_mask
from attnlib.masks._base import Mask
from attnlib.masks._views import RepositionedMask
from attnlib.modifiers._base import TracedScoreMod
from attnlib.scores import Score
from attnlib.scores._base import check_score

# What every public function takes beside its operands and score, and the default of each.
DEFAULTS: dict[str, Any] = dict(
    mask=None, bias=None, is_causal=False, attention_axes=None, dropout_rate=0.0, dropout_rng=None,
    logits_soft_cap=None, score_mod=None, sink=None, query_positions=None, key_positions=None,
    return_weights=False, return_lse=False, implementation=None, block_sizes=None, precision=None,
)  # fmt: skip


def options(caller: str, given: dict[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options of a call with their defaults; TypeError for one that `caller` does not take."""
    known = sorted({*DEFAULTS, "score"} - set(without))
    for word in given:
        if word not in known:
            raise TypeError(f"{caller} takes no {word!r}: {suggestion_for(word, known)}")
    return {**DEFAULTS, **given}


class TracedArguments(NamedTuple):
    """What of a call may be traced."""

    query: Array
    key: Array
    value: Array
    score: Score
    mask: Mask | None
    bias: Array | None
    score_mod: TracedScoreMod | None
    sink: Any
    query_positions: Array | None
    key_positions: Array | None
    dropout_rng: Any


def arguments(
    query, key, value, score, mask, bias, is_causal, attention_axes, dropout_rate, dropout_rng, logits_soft_cap,
    score_mod, sink, query_positions, key_positions, return_weights, return_lse, implementation, block_sizes, precision,
) -> tuple[TracedArguments, dict[str, Any]]:  # fmt: skip
    """Splits the arguments into traced arrays and hashable static options, refusing what cannot be either."""
    check_score(score)
    rate = check_dropout(dropout_rate, dropout_rng)
    static = dict(
        is_causal=check_bool(is_causal, "is_causal"),
        attention_axes=check_axes(attention_axes),
        dropout_rate=rate,
        logits_soft_cap=check_soft_cap(logits_soft_cap),
        return_weights=check_bool(return_weights, "return_weights"),
        return_lse=check_bool(return_lse, "return_lse"),
        implementation=check_implementation(implementation, _choose.NAMES),
        block_sizes=check_block_sizes(block_sizes),
        precision=check_precision(precision),
    )
    mask = as_mask(mask)
    check_arrays(query=query, key=key, value=value)
    check_bias(bias)
    if query_positions is not None or key_positions is not None:
        check_integers(query_positions, "query_positions")
        check_integers(key_positions, "key_positions")
    if score.may_close_over_arrays or score_mod is not None:
        check_rank(query, "query")
        check_rank(key, "key")
        axes = _axes.normalize(static["attention_axes"], query.ndim, trailing=2)
        dtype = compute_dtype(query, key, value)
        score = score.closure_converted(query.shape[-1], key.shape[-1], dtype)
        if score_mod is not None:
            positions, heads = (query_positions, key_positions), query.shape[-2]
            score_mod = TracedScoreMod.of(score_mod, len(axes.batch), len(axes.attention), heads, dtype, positions)
    arrays = TracedArguments(
        query, key, value, score, mask, bias, score_mod, check_sink(sink), query_positions, key_positions,
        dropout_rng if rate else None,
    )  # fmt: skip
    return arrays, static


STATIC = (
    "is_causal", "attention_axes", "dropout_rate", "logits_soft_cap", "return_weights", "return_lse",
    "implementation", "block_sizes", "precision",
)  # fmt: skip


@partial(jit, static_argnames=STATIC)
def attend(arrays: TracedArguments, *, return_lse, implementation, **static):
    problem, axes = canonicalize(arrays, return_lse=return_lse, **static)
    output, lse, weights = run_problem(problem, implementation)

    lead = (*problem.batch, problem.kv_heads * problem.groups)
    output = output.reshape(*lead, *output.shape[-2:]).astype(arrays.value.dtype)
    results = [_axes.unfold_output(output, axes, problem.query_shape)]
    if weights is not None:
        results.append(weights.reshape(*lead, *problem.query_shape, *problem.key_shape))
    if return_lse:
        assert lse is not None
        results.append(lse.reshape(*lead, *problem.query_shape))
    return results[0] if len(results) == 1 else tuple(results)


def run_problem(problem: AttentionProblem, implementation: Asked) -> AttentionResult:
    """What the chosen implementation gives, with the sink."""
    return add_sink(_choose.choose(problem, implementation).run(problem), problem)


def canonicalize(
    arrays: TracedArguments, *, is_causal, attention_axes, dropout_rate, logits_soft_cap, return_weights, return_lse,
    block_sizes, precision,
) -> tuple[AttentionProblem, _axes.Axes]:  # fmt: skip
    """Checks the shapes and brings the arguments into the canonical form."""
    query, key, value, score, mask, bias = arrays[:6]
    check_rank(query, "query")
    axes = _axes.normalize(attention_axes, query.ndim, trailing=2)
    batch = check_operands(query, key, value, axes)
    heads, kv_heads = query.shape[-2], key.shape[-2]
    score.check(heads, query.shape[-1], key.shape[-1])
    shapes = AttentionShape(batch, heads, axes.attention_shape(query.shape), axes.attention_shape(key.shape))
    if mask is not None:
        mask.check(shapes)
    check_bias_shape(bias, shapes)
    check_sink_shape(arrays.sink, heads)
    if is_causal:
        mask = Causal() if mask is None else mask & Causal()
    positions = arrays.query_positions, arrays.key_positions
    if positions != (None, None):
        check_explicit_positions(*positions, shapes)
        mask = RepositionedMask(mask, *positions)

    folded_query = _axes.fold_operand(jnp.asarray(query), axes)  # (*batch, N, T, D)
    lead, tail = folded_query.shape[:-3], folded_query.shape[-2:]
    problem = AttentionProblem(
        query=folded_query.reshape(*lead, kv_heads, heads // kv_heads, *tail),
        key=_axes.fold_operand(jnp.asarray(key), axes),
        value=_axes.fold_operand(jnp.asarray(value), axes),
        score=score,
        score_mod=arrays.score_mod,
        mask=mask,
        bias=None if bias is None else _axes.split_heads(_axes.fold_pairs(bias, shapes.query, shapes.key), kv_heads),
        dropout_seeds=_dropout.hash_seeds(arrays.dropout_rng) if dropout_rate else None,
        batch=batch,
        query_shape=shapes.query,
        key_shape=shapes.key,
        dropout_rate=dropout_rate,
        logits_soft_cap=logits_soft_cap,
        return_weights=return_weights,
        block_sizes=block_sizes,
        precision=precision,
        return_lse=return_lse,
        sink=arrays.sink,
    )
    return problem, axes
