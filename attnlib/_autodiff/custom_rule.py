"""Functions with a derivative rule of their own that stays theirs, however often and wherever they are differentiated.

`custom_jvp` has such rules too, but JAX drops them where it linearises the body of a loop or of a checkpoint: what is
differentiated next is then the function's own code, a loop whose steps are all kept. This primitive is never opened
before it is lowered, so a derivative of any order has the memory that its rule gives it.
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

Function = Callable[..., Sequence[Any]]
Rule = Callable[[tuple[int, ...], Leaves, Leaves], tuple[Sequence[Any], Sequence[Any]]]


def call_with_rule(function: Function, rule: Rule, args: Leaves) -> list[jax.Array]:
    """`function(*args)`, a list of arrays, with `rule(active, args, changes)` for its derivative.

    `perturbed` are the numbers of the arguments that change, `tangents` their tangents; the rule gives the results and
    the tangents of them all. Both functions must be hashable, and equal when they mean the same.
    """
    shown = exposed_jaxpr(function, *args)
    return list(_ruled.bind(*args, function=function, rule=rule, shown=shown))


def linear_tangent(
    forward: Function, transpose: Function, residuals: Leaves, perturbed: tuple[int, ...], tangents: Leaves
) -> list[jax.Array]:
    """The tangents that a rule gives, as a linear map: `forward(active, residuals, changes)`, with its transpose."""
    return linear_map(
        HashablePartial(forward, (perturbed,)), HashablePartial(transpose, (perturbed,)), residuals, tangents
    )


def inner_jaxpr(equation: Any) -> Any:
    """The jaxpr that an equation of a jaxpr runs if it is one of `call_with_rule`, else None."""
    if equation.primitive is not _ruled:
        return None
    function = equation.params["function"]
    return jax.make_jaxpr(lambda *args: call_traced_once(function, *args))(
        *(atom.aval for atom in equation.invars)
    ).jaxpr


_ruled = Primitive("attnlib_ruled")
_ruled.multiple_results = True


def _evaluate(*args: Any, function: Function, rule: Rule, shown: Any) -> list[Any]:
    del rule, shown
    return call_traced_once(function, *args)


_ruled.def_impl(_evaluate)
mlir.register_lowering(_ruled, mlir.lower_fun(_evaluate, multiple_results=True))


@_ruled.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract_eval(*avals: Any, function: Function, rule: Rule, shown: Any) -> list[Any]:
    del rule, shown
    return output_avals(function, *avals)


def _jvp(primals: Any, tangents: Any, *, function: Function, rule: Rule, shown: Any) -> Any:
    del function, shown
    perturbed = tuple(n for n, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    return rule(perturbed, primals, [tangents[n] for n in perturbed])


ad.primitive_jvps[_ruled] = _jvp


def _in_batch(function: Function, axes: tuple[int | None, ...], *args: Any) -> Sequence[Any]:
    """A function over a batch; the arguments are batched where `axes` says so."""
    return jax.vmap(lambda *args: tuple(function(*args)), in_axes=axes)(*args)


def _rule_in_batch(
    rule: Rule, axes: tuple[int | None, ...], perturbed: tuple[int, ...], args: Any, tangents: Any
) -> Any:
    """The same for a rule; a tangent is batched where its argument is."""

    def one(args: Any, tangents: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        results, tangents = rule(perturbed, args, tangents)
        return tuple(results), tuple(tangents)

    return jax.vmap(one, in_axes=(axes, [axes[n] for n in perturbed]))(tuple(args), list(tangents))


def _batch(args: Any, dims: Any, *, function: Function, rule: Rule, shown: Any) -> Any:
    del shown
    axes = tuple(dims)
    out = call_with_rule(
        HashablePartial(_in_batch, (function, axes)), HashablePartial(_rule_in_batch, (rule, axes)), args
    )
    return out, [0] * len(out)


batching.primitive_batchers[_ruled] = _batch
