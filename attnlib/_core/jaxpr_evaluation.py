"""Evaluation of a jaxpr with arguments on a device mesh for which it was not traced.

The types in a jaxpr contain a mesh: the axes along which an array varies inside `jax.shard_map`, and shardings over
Explicit axes. JAX evaluates a jaxpr with arguments of the same types only. The evaluation of this module casts instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from attnlib._core.varying_axes import Names, cast_to_common_axes, cast_to_varying, type_varying, varying_axes


def has_other_types(jaxpr: Any, mesh: Any, captured: Sequence[Any], args: Sequence[Any]) -> bool:
    """Whether a jaxpr that was traced with `mesh` may have other types than these constants and arguments."""
    avals = [var.aval for var in (*jaxpr.constvars, *jaxpr.invars)]
    if varying_axes(*captured, *args, *avals):
        return True
    meshes, current = [mesh, *(aval.sharding.mesh for aval in avals)], jax.sharding.get_abstract_mesh()
    if mesh.manual_axes != current.manual_axes:
        return True
    return any(mesh.explicit_axes and mesh != current for mesh in meshes)


def evaluate(jaxpr: Any, captured: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*captured, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        results = _apply(equation, cast_to_common_axes(list(map(read, equation.invars))))
        values.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _apply(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of an equation, of operands that vary along the same axes."""
    primitive, params = equation.primitive, equation.params
    if primitive.name == "pvary":  # a cast to axes along which the operand may vary already
        return [cast_to_varying(operand, params["axes"]) for operand in operands]
    if primitive.name in ("jit", "pjit"):
        return evaluate(*_opened(params["jaxpr"]), operands)
    if primitive.name == "custom_jvp_call":
        return _with_rule(equation, operands)
    axes = varying_axes(*operands)
    return _bind(primitive, {name: _traced_anew(value, axes) for name, value in params.items()}, operands)


def _bind(primitive: Any, params: dict[str, Any], operands: Sequence[Any]) -> Sequence[Any]:
    bound = primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a tuple before jax 0.10
    results = primitive.bind(*functions, *operands, **params)
    return results if primitive.multiple_results else [results]


def _with_rule(equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """The results of a call of a `jax.custom_jvp` function, with its derivative."""
    avals = [var.aval if varying_axes(var.aval) else _plain(var.aval) for var in equation.invars]
    axes = varying_axes(*operands)

    def evaluate_and_cast(program: Any, args: Sequence[Any]) -> list[Any]:
        return [cast_to_varying(x, axes) for x in evaluate(*_opened(program), args)]

    def call(*args: Any) -> Any:
        return list(_bind(equation.primitive, equation.params, args))

    @jax.custom_jvp
    def function(*args: Any) -> list[Any]:
        return evaluate_and_cast(equation.params["call_jaxpr"], args)

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        # The rule is traced for the types of the equation too.
        rule = jax.make_jaxpr(lambda primals, tangents: jax.jvp(call, primals, tangents)[1])(avals, avals)
        return function(*primals), evaluate_and_cast(rule, (*primals, *tangents))

    return function(*operands)


def _traced_anew(parameter: Any, axes: Names) -> Any:
    """A parameter of an equation, with its jaxprs traced for operands that vary along these axes."""
    if type(parameter) is tuple:  # a named one has no jaxprs
        return tuple(_traced_anew(item, axes) for item in parameter)
    if not isinstance(parameter, (ClosedJaxpr, Jaxpr)):
        return parameter
    jaxpr, consts = _opened(parameter)

    def function(*args: Any) -> list[Any]:
        return [cast_to_varying(x, axes) for x in evaluate(jaxpr, consts, args)]

    avals = [type_varying(v.aval.shape, v.aval.dtype, v.aval.weak_type, axes) for v in jaxpr.invars]
    closed = jax.make_jaxpr(function)(*avals)
    return closed if isinstance(parameter, ClosedJaxpr) else closed.jaxpr


def _plain(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _opened(program: Any) -> tuple[Any, Sequence[Any]]:
    """(the jaxpr, its constants) of a jaxpr, which may be closed."""
    return getattr(program, "jaxpr", program), getattr(program, "consts", ())
