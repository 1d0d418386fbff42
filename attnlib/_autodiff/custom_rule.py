"""Functions with a custom derivative rule that holds in derivatives of every order.

JAX drops the rule of a `custom_jvp` when it linearizes the body of a loop or a checkpoint. The next derivative then
differentiates the code of the function, which may be a loop that stores every step. The primitive of this module stays
a primitive until lowering, so derivatives of every order use the rule, and only its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval

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
# For each argument in which the function is linear: (the argument, the results that are linear in it). All other
# results are constant in this argument, as long as its numbers are finite.
Linear = tuple[tuple[int, tuple[int, ...]], ...]


def call_with_rule(function: Function, rule: Rule, args: Leaves, linear: Linear = ()) -> list[jax.Array]:
    """`function(*args)`, a list of arrays, with the derivative `rule(perturbed, args, tangents)`.

    `perturbed` are the indices of the arguments with nonzero tangents, and `tangents` these tangents. The rule returns
    the results and their tangents. Both functions must be hashable, and equal if they compute the same.
    `jax.linear_transpose` needs to know in which arguments the function is `linear`.
    """
    args = cast_to_common_axes(args)  # here, so that JAX's transpose of the casts adds up the cotangents of all devices
    jaxpr = exposed_jaxpr(function, *args)
    return list(_custom_rule.bind(*args, function=function, rule=rule, linear=linear, jaxpr=jaxpr))


def finite_entries(array: jax.Array) -> jax.Array:
    """`jnp.isfinite(array)`, which is True to `jax.linear_transpose`: functions are linear in finite numbers."""
    return call_with_rule(_isfinite, _no_rule, [array], linear=((0, ()),))[0]


def _isfinite(array: jax.Array) -> list[jax.Array]:
    return [jnp.isfinite(array)]


def _no_rule(perturbed: tuple[int, ...], args: Leaves, tangents: Leaves) -> Any:
    raise AssertionError("a constant has no tangent")


def linear_tangent(
    forward: Function,
    transpose: Function,
    residuals: Leaves,
    perturbed: tuple[int, ...],
    tangents: Leaves,
    results: Leaves,
) -> list[jax.Array]:
    """The tangents of the results for a rule: the linear map `forward(perturbed, residuals, tangents)`."""
    return linear_map(
        HashablePartial(forward, (perturbed,)), HashablePartial(transpose, (perturbed,)), residuals, tangents, results
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


def _evaluate(*args: Any, function: Function, rule: Rule, linear: Linear, jaxpr: Any) -> list[Any]:
    del rule, linear, jaxpr
    return call_traced_once(function, *args)


_custom_rule.def_impl(_evaluate)
mlir.register_lowering(_custom_rule, mlir.lower_fun(_evaluate, multiple_results=True))


@_custom_rule.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract_eval(*avals: Any, function: Function, rule: Rule, linear: Linear, jaxpr: Any) -> list[Any]:
    del rule, linear, jaxpr
    return output_avals(function, *avals)


def _jvp(primals: Any, tangents: Any, *, function: Function, rule: Rule, linear: Linear, jaxpr: Any) -> Any:
    del jaxpr
    perturbed = tuple(n for n, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    if all(dict(linear).get(n) == () for n in perturbed):  # no result depends on them
        out = call_with_rule(function, rule, primals, linear)
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
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


def _batch(args: Any, dims: Any, *, function: Function, rule: Rule, linear: Linear, jaxpr: Any) -> Any:
    del jaxpr
    axes = tuple(dims)
    out = call_with_rule(
        HashablePartial(_batched, (function, axes)), HashablePartial(_batched_rule, (rule, axes)), args, linear
    )
    return out, [0] * len(out)


batching.primitive_batchers[_custom_rule] = _batch


# The transpose of a function that is linear in one argument, for `jax.linear_transpose`. It is the transpose of the
# tangent, which the rule gives. A linear function has the same tangent everywhere, so the rule is evaluated at 0.


def _constant_results(linear: Linear, arguments: Sequence[int], count: int) -> list[bool]:
    """Whether each of `count` results is constant in all of these arguments."""
    depends = dict(linear)
    return [all(n in depends and result not in depends[n] for n in arguments) for result in range(count)]


def _partial_eval(trace: Any, *tracers: Any, **params: Any) -> list[Any]:
    """Knows the results that are constant in all unknown arguments; other operations may not be linear in them."""
    out = list(trace.default_process_primitive(_custom_rule, tracers, params))
    unknown = [n for n, tracer in enumerate(tracers) if not tracer.is_known()]
    constant = _constant_results(params["linear"], unknown, len(out))
    if not unknown or not any(constant):
        return out
    args = [_zeros(tracer.aval) if n in unknown else tracer.pval.get_known() for n, tracer in enumerate(tracers)]
    known = _custom_rule.bind(*args, **params)
    return [x if is_constant else y for x, y, is_constant in zip(known, out, constant, strict=True)]


partial_eval.custom_partial_eval_rules[_custom_rule] = _partial_eval


def _transpose(cotangents: Any, *args: Any, function: Function, rule: Rule, linear: Linear, jaxpr: Any) -> list[Any]:
    del function, jaxpr
    arguments = tuple(n for n, arg in enumerate(args) if ad.is_undefined_primal(arg))
    if len(arguments) != 1 or arguments[0] not in dict(linear):
        raise TypeError(
            "jax.linear_transpose needs a linear function. Attention is linear in the value, and not in query, key, "
            "bias or parameters. Write jax.vjp(function, *arguments)[1] for the transpose of its derivative."
        )
    (n,) = arguments
    at_zero = [_zeros(arg.aval) if i == n else arg for i, arg in enumerate(args)]
    transpose = jax.linear_transpose(lambda tangent: list(rule(arguments, at_zero, [tangent])[1]), at_zero[n])
    (cotangent,) = transpose([ad.instantiate_zeros(ct) for ct in cotangents])
    return [cotangent if i == n else None for i in range(len(args))]


ad.primitive_transposes[_custom_rule] = _transpose


def _zeros(aval: Any) -> Any:
    return ad.instantiate_zeros(ad.Zero(aval))
