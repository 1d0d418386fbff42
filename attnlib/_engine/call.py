"""One call: check the arguments, bring them into canonical form, run an implementation, unfold the results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape
from attnlib._core.explicit_axes import replicated
from attnlib._core.operand_checks import (
    check_arrays,
    check_axes,
    check_bias,
    check_bias_shape,
    check_block_sizes,
    check_dropout,
    check_explicit_positions,
    check_implementation,
    check_normalization,
    check_operands,
    check_precision,
    check_sink,
    check_sink_shape,
    check_soft_cap,
)
from attnlib._core.options import CHECKS, DEFAULTS, FIELDS, Options
from attnlib._core.problem import Asked, AttentionProblem, AttentionResult
from attnlib._core.pytree import jit
from attnlib._core.sizes import explains_symbolic_sizes
from attnlib._core.validation import check_array
from attnlib._engine import dispatch as _choose
from attnlib._engine import dropout as _dropout
from attnlib._engine.context.call import attend_in_context
from attnlib._engine.context.part import WHOLE, WholeOperands, whole_key_count
from attnlib._engine.explicit_call import output_and_rows, takes_explicit_axes
from attnlib._engine.softmax import rescale_rows
from attnlib.masks import Causal
from attnlib.masks._arrays import as_mask
from attnlib.masks._base import Mask
from attnlib.masks._views import ExplicitPositions
from attnlib.modifiers._base import LogitModifier, LogitsSoftCap, TracedScoreMod
from attnlib.scores import Score
from attnlib.scores._base import check_score


class Arguments(NamedTuple):
    """The checked arguments of one call. All but static options are traced."""

    query: Array
    key: Array
    value: Array
    score: Score
    options: Options  # its mask a Mask, its score_mod a TracedScoreMod

    def change(self, **options: Any) -> Arguments:
        """The arguments with some options changed."""
        return self._replace(options=self.options.replace(**options))


def arguments(query: Array, key: Array, value: Array, score: Score, options: Options) -> Arguments:
    """The arguments, checked except for shapes: static options are hashable, and captured arrays are traced."""
    check_score(score)
    check_arrays(query=query, key=key, value=value)
    # Most options of a call have their defaults, which need no check: this is on the way of every eager call.
    given = {name: option for name, option in vars(options).items() if option is not DEFAULTS.get(name)}
    checked = {name: _CHECKS[name](option) for name, option in given.items() if name in _CHECKS}
    if "dropout_rate" in given or "dropout_rng" in given:
        rate = check_dropout(options.dropout_rate, options.dropout_rng)
        checked |= dict(dropout_rate=rate, dropout_rng=options.dropout_rng if rate else None)
    if "normalize" in given:
        check_normalization(checked["normalize"], options.sink)
    mask = checked.get("mask")
    mask = mask if mask is not None and mask.may_close_over_arrays else None
    if score.may_close_over_arrays or mask is not None or "score_mod" in given:
        _, shapes = check_operands(query, key, value, checked.get("attention_axes"))
        score = score.closure_converted(*shapes.features, shapes.dtype)
        if mask is not None:
            checked["mask"] = mask.closure_converted(shapes)
        if "score_mod" in given:
            keys = whole_key_count(shapes, checked.get("context"), (query, key, value))
            known = None if "key_positions" in given else keys
            checked["score_mod"] = TracedScoreMod.of(replicated(options.score_mod), shapes, known)
    return Arguments(query, key, value, score, options.replace(**checked) if checked else options)


# The check of each option that can be checked by itself; it returns the value to use.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    **{name: partial(check, name=name) for name, check in CHECKS.items()},
    "mask": as_mask,
    "bias": check_bias,
    "attention_axes": check_axes,
    "logits_soft_cap": check_soft_cap,
    "sink": check_sink,
    **{
        name: partial(check_array, name=name, kind="integer", optional=True)
        for name in ("query_positions", "key_positions")
    },
    "implementation": partial(check_implementation, registered=_choose.NAMES),
    "block_sizes": check_block_sizes,
    "precision": check_precision,
}


@jit
@jax.named_scope("attnlib.attention")  # so that profiles show the name
@explains_symbolic_sizes()
@takes_explicit_axes(output_and_rows)
def attend(arguments: Arguments) -> Any:
    """The output, or a tuple of the output and of the other results that the options ask for."""
    return (
        _attend(arguments) if arguments.options.context is None else attend_in_context(arguments, _attend, canonicalize)
    )


def _attend(arguments: Arguments, part: WholeOperands = WHOLE) -> Any:
    problem, axes = canonicalize(arguments, part)
    output, lse, weights = run_problem(problem, arguments.options.implementation)

    batch_and_head = (*problem.batch, problem.kv_heads * problem.groups)
    output = output.reshape(*batch_and_head, *output.shape[-2:]).astype(arguments.value.dtype)
    query_axes = axes.attention_shape(arguments.query.shape)
    results = [_axes.unfold_output(output, axes, query_axes)]
    if weights is not None:
        results.append(weights.reshape(*batch_and_head, *query_axes, *problem.key_shape))
    if problem.return_lse:
        assert lse is not None
        results.append(lse.reshape(*batch_and_head, *query_axes))
    return results[0] if len(results) == 1 else tuple(results)


@explains_symbolic_sizes()
def run_problem(problem: AttentionProblem, implementation: Asked) -> AttentionResult:
    """The result of the chosen implementation, with the sink or without normalization."""
    return rescale_rows(_choose.choose(problem, implementation).run(problem), problem)


@explains_symbolic_sizes()
def canonicalize(arguments: Arguments, part: WholeOperands = WHOLE) -> tuple[AttentionProblem, _axes.Axes]:
    """(the problem in canonical form, the axes of the operands), after a check of all shapes.

    Args:
      part: which of all positions the operands have.
    """
    query, key, value, score, options = arguments
    mask, bias = options.mask, options.bias
    assert mask is None or isinstance(mask, Mask)
    modifiers: list[LogitModifier] = []
    if options.logits_soft_cap is not None:
        modifiers.append(LogitsSoftCap(options.logits_soft_cap))
    # The score_mod is the last: `inspect.attention_entropy` scales the logits after all other modifiers.
    if options.score_mod is not None:
        assert isinstance(options.score_mod, TracedScoreMod)
        modifiers.append(options.score_mod)
    axes, shapes = check_operands(query, key, value, options.attention_axes)
    heads, kv_heads = shapes.heads, key.shape[-2]
    score.check(heads, *shapes.features)
    whole = part.shapes(shapes)
    if mask is not None:
        part.whole_mask(mask, shapes).check(whole)
        mask = part.mask(mask, shapes)
    check_bias_shape(part.whole_pairs(bias, shapes), whole)
    check_sink_shape(options.sink, heads)
    if options.is_causal:
        mask = Causal() if mask is None else mask & Causal()
    explicit = options.query_positions, options.key_positions
    if any(positions is not None for positions in explicit):
        check_explicit_positions(*explicit, shapes)
        explicit = _of_one_rank(*explicit, shapes, part)
        mask = ExplicitPositions() if mask is None else mask & ExplicitPositions()

    if bias is not None:
        bias = _axes.split_heads(_axes.fold_pairs(bias, shapes.query, whole.key), kv_heads, len(shapes.batch) + 4)
    query, key, value = (_axes.fold_operand(jnp.asarray(x), axes) for x in (query, key, value))  # (*batch, N, T, D)
    problem = AttentionProblem(
        query=query.reshape(*query.shape[:-3], kv_heads, heads // kv_heads, *query.shape[-2:]),
        key=key,
        value=value,
        score=score,
        modifiers=tuple(modifiers),
        mask=mask,
        bias=bias,
        dropout_seeds=None
        if options.dropout_rng is None
        else part.dropout_seeds(_dropout.hash_seeds(options.dropout_rng)),
        query_positions=part.positions(shapes, "query", explicit[0]),
        key_positions=part.positions(shapes, "key", explicit[1]),
        batch=shapes.batch,
        dtype=shapes.dtype,
        dropout_rate=options.dropout_rate,
        return_weights=options.return_weights,
        block_sizes=options.block_sizes,
        precision=options.precision,
        to_support=options.to_support(),
        return_lse=options.return_lse,
        sink=options.sink,
        options=options.replace(**_ELSEWHERE),
    )
    return problem, axes


def _of_one_rank(
    query: Array | None, key: Array | None, shapes: AttentionShape, part: WholeOperands
) -> tuple[Array | None, Array | None]:
    """Explicit positions; if one side has batch axes, both have, so that masks compare blocks of the same rank."""
    if max(np.ndim(x) if x is not None else 0 for x in (query, key)) <= 1:
        return query, key
    sides = zip((query, key), ("query", "key"), strict=True)
    arrays = [part.default_positions(shapes, side) if x is None else jnp.asarray(x) for x, side in sides]
    first, second = _axes.align_ranks(*arrays)
    return first, second


# Options that the problem has in another form, besides those that implementations never see.
_CONVERTED = (
    "mask", "bias", "score_mod", "logits_soft_cap", "dropout_rate", "sink", "return_weights", "return_lse",
    "block_sizes", "precision",
)  # fmt: skip
_ELSEWHERE = {
    name: option.default for name, option in FIELDS.items() if option.metadata["resolved"] or name in _CONVERTED
}
