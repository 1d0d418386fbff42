"""Functions with a custom derivative rule that holds in derivatives of every order.

JAX drops the rule of a `custom_jvp` when it linearizes the body of a loop or a checkpoint. The next derivative then
differentiates the code of the function, which may be a loop that stores every step. The primitive of this module stays
a primitive until lowering, so derivatives of every order use the rule, and only its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from attnlib._autodiff.linear_map import (
    HashablePartial,
    Leaves,
    call_traced_once,
    exposed_jaxpr,
    linear_map,
    output_avals,
)
from attnlib._core.varying_axes import cast_to_common_axes

Function = Callable[..., Sequence[Any]]
Rule = Callable[[tuple[int, ...], Leaves, Leaves], tuple[Sequence[Any], Sequence[Any]]]


def call_with_rule(function: Function, rule: Rule, args: Leaves) -> list[jax.Array]:
    """`function(*args)`, a list of arrays, with the derivative `rule(perturbed, args, tangents)`.

    `perturbed` are the indices of the arguments with nonzero tangents, and `tangents` these tangents. The rule returns
    the results and their tangents. Both functions must be hashable, and equal if they compute the same.
    """
    args = cast_to_common_axes(args)  # here, so that JAX's transpose of the casts adds up the cotangents of all devices
    jaxpr = exposed_jaxpr(function, *args)
    return list(_custom_rule.bind(*args, function=function, rule=rule, jaxpr=jaxpr))


def linear_tangent(
    forward: Function, transpose: Function, residuals: Leaves, perturbed: tuple[int, ...], tangents: Leaves
) -> list[jax.Array]:
    """The tangents for a rule: the linear map `forward(perturbed, residuals, tangents)`, with its transpose."""
    return linear_map(
        HashablePartial(forward, (perturbed,)), HashablePartial(transpose, (perturbed,)), residuals, tangents
    )


def inner_jaxpr(equation: Any) -> Any:
    """The jaxpr of the function in an equation of `call_with_rule`, or None for any other equation."""
    if equation.primitive is not _custom_rule:
        return None
    function = equation.params["function"]
    return jax.make_jaxpr(lambda *args: call_traced_once(function, *args))(
        *(atom.aval for atom in equation.invars)
    ).jaxpr


_custom_rule = Primitive("attnlib_ruled")
_custom_rule.multiple_results = True


def _evaluate(*args: Any, function: Function, rule: Rule, jaxpr: Any) -> list[Any]:
    del rule, jaxpr
    return call_traced_once(function, *args)


_custom_rule.def_impl(_evaluate)
mlir.register_lowering(_custom_rule, mlir.lower_fun(_evaluate, multiple_results=True))


@_custom_rule.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract_eval(*avals: Any, function: Function, rule: Rule, jaxpr: Any) -> list[Any]:
    del rule, jaxpr
    return output_avals(function, *avals)


def _jvp(primals: Any, tangents: Any, *, function: Function, rule: Rule, jaxpr: Any) -> Any:
    del function, jaxpr
    perturbed = tuple(n for n, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    return rule(perturbed, primals, [tangents[n] for n in perturbed])


ad.primitive_jvps[_custom_rule] = _jvp


def _batched(function: Function, axes: tuple[int | None, ...], *args: Any) -> Sequence[Any]:
    """A function over a batch. `axes` are the batch axes of the arguments; None: not batched."""
    return jax.vmap(lambda *args: tuple(function(*args)), in_axes=axes)(*args)


def _batched_rule(
    rule: Rule, axes: tuple[int | None, ...], perturbed: tuple[int, ...], args: Any, tangents: Any
) -> Any:
    """A rule over a batch. Each tangent has the batch axis of its argument."""

    def rule_of_tuples(args: Any, tangents: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        results, tangents = rule(perturbed, args, tangents)
        return tuple(results), tuple(tangents)

    return jax.vmap(rule_of_tuples, in_axes=(axes, [axes[n] for n in perturbed]))(tuple(args), list(tangents))


def _batch(args: Any, dims: Any, *, function: Function, rule: Rule, jaxpr: Any) -> Any:
    del jaxpr
    axes = tuple(dims)
    out = call_with_rule(
        HashablePartial(_batched, (function, axes)), HashablePartial(_batched_rule, (rule, axes)), args
    )
    return out, [0] * len(out)


batching.primitive_batchers[_custom_rule] = _batch
