"""A linear map with a custom transpose, which supports every transformation of JAX.

`custom_vjp` has no forward mode, and `linear_call` no batching. The primitive of this module has both, and derivatives
with respect to the residuals. Derivatives of every order are therefore compositions of three loops: forward, tangent
and transpose. The module uses public extension points of JAX only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from attnlib._autodiff.leaves import partial_in
from attnlib._core.varying_axes import cast_to_varying, varying_axes

Leaves = Sequence[Any]
LinearFn = Callable[[tuple[Any, ...], tuple[Any, ...]], Sequence[Any]]
Avals = tuple[Any, ...] | None  # of the results of a linear map, if they are known


@dataclasses.dataclass(frozen=True)
class HashablePartial:
    """A `functools.partial` that compares equal to another one with equal parts.

    A function with custom partitioning must set `exposes_jaxpr` for `linear_map` and `call_with_rule`, because JAX
    searches nested jaxprs for operations that need their devices before lowering.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    exposes_jaxpr: bool = False

    def __call__(self, *args: Any) -> Any:
        return self.function(*self.arguments, *args)


@partial(jax.jit, static_argnums=0, inline=True)
def _jitted(function: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    axes = varying_axes(*args)  # inside shard_map; `call_with_rule` has cast all arguments to the same ones
    return tuple(cast_to_varying(result, axes) for result in function(*args))


def call_traced_once(function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)`, traced once for each combination of argument types."""
    return list(_jitted(function, *args))


def output_avals(function: Callable[..., Any], *avals: Any) -> list[Any]:
    """The avals of the results of `function`."""
    program = jax.make_jaxpr(_jitted, static_argnums=0)(function, *avals)
    if any(isinstance(const, jax.core.Tracer) for const in program.consts):
        raise TypeError(
            "masks.Predicate must not capture traced arrays, and a Score of your own must hold its arrays in fields. "
            "The function of a masks.Function may capture them, and masks.Dense and masks.Lengths take arrays; "
            "implementation='reference' takes all."
        )
    return list(program.out_avals)


def linear_map(
    forward: LinearFn,
    transpose: LinearFn,
    residuals: Sequence[jax.Array],
    operands: Sequence[jax.Array],
    results: Sequence[jax.Array],
) -> list[jax.Array]:
    """`forward(residuals, operands)`, linear in the operands, with the transpose `transpose(residuals, cotangents)`.

    Both functions must be hashable, equal if they compute the same, and differentiable in the floating-point residuals.
    The results of `forward` have the types of `results`, so that it is not traced to find them.
    """
    avals = _plain(map(jax.typeof, results))
    return _bind(*residuals, *operands, forward=forward, transpose=transpose, count=len(residuals), avals=avals)


def unbroadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of broadcasting from `shape`, which has the rank of `x`."""
    return jnp.sum(x, [axis for axis, size in enumerate(shape) if size != x.shape[axis]], keepdims=True)


def _plain(avals: Iterable[Any]) -> tuple[Any, ...] | None:
    """The avals if they do not depend on a mesh, else None: a program may be evaluated again on another mesh."""
    avals = tuple(avals)
    return avals if all(aval.sharding.mesh.empty for aval in avals) and not varying_axes(*avals) else None


_linear_map = Primitive("attnlib_linear_map")
_linear_map.multiple_results = True


def _bind(*args: Any, forward: LinearFn, transpose: LinearFn, count: int, avals: Avals) -> Any:
    jaxpr = exposed_jaxpr(HashablePartial(_apply_flat, (forward, count)), *args)
    return _linear_map.bind(*args, forward=forward, transpose=transpose, count=count, jaxpr=jaxpr, avals=avals)


def exposed_jaxpr(function: Any, *args: Any) -> Any:
    """The jaxpr of a function that exposes it, or that contains a function that does; else None."""
    return jax.make_jaxpr(function)(*args) if _exposes_jaxpr(function) else None


def _exposes_jaxpr(function: Any) -> bool:
    if not isinstance(function, HashablePartial):
        return False
    return function.exposes_jaxpr or any(map(_exposes_jaxpr, (function.function, *function.arguments)))


def _evaluate(*args: Any, forward: LinearFn, transpose: LinearFn, count: int, jaxpr: Any, avals: Avals) -> list[Any]:
    del transpose, jaxpr, avals
    return call_traced_once(HashablePartial(_apply_flat, (forward, count)), *args)


def _apply_flat(function: LinearFn, count: int, *args: Any) -> Sequence[Any]:
    """A linear function of `count` residuals and then the operands, in one flat list."""
    return function(args[:count], args[count:])


_linear_map.def_impl(_evaluate)
mlir.register_lowering(_linear_map, mlir.lower_fun(_evaluate, multiple_results=True))


@_linear_map.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract_eval(
    *args: Any, forward: LinearFn, transpose: LinearFn, count: int, jaxpr: Any, avals: Avals
) -> list[Any]:
    del transpose, jaxpr
    if avals is not None and _plain(args) is not None:
        return list(avals)
    return output_avals(HashablePartial(_apply_flat, (forward, count)), *args)


def _jvp(
    primals: Any, tangents: Any, *, forward: LinearFn, transpose: LinearFn, count: int, jaxpr: Any, avals: Avals
) -> Any:
    del jaxpr
    params: dict[str, Any] = dict(forward=forward, transpose=transpose, count=count, avals=avals)
    residuals, operands = primals[:count], primals[count:]
    out = _bind(*primals, **params)
    terms = []
    if any(type(t) is not ad.Zero for t in tangents[count:]):
        terms.append(_bind(*residuals, *map(ad.instantiate_zeros, tangents[count:]), **params))
    perturbed = [n for n in range(count) if type(tangents[n]) is not ad.Zero]
    if perturbed:
        in_residuals = partial_in(lambda residuals: list(forward(tuple(residuals), operands)), perturbed, residuals)
        terms.append(jax.jvp(*in_residuals, [tangents[n] for n in perturbed])[1])
    if not terms:
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, terms[0] if len(terms) == 1 else [a + b for a, b in zip(*terms, strict=True)]


ad.primitive_jvps[_linear_map] = _jvp


def _transpose(
    cotangents: Any, *args: Any, forward: LinearFn, transpose: LinearFn, count: int, jaxpr: Any, avals: Avals
) -> list[Any]:
    del jaxpr, avals
    cotangents = [ad.instantiate_zeros(ct) if type(ct) is ad.Zero else ct for ct in cotangents]
    operand_avals = _plain(operand.aval for operand in args[count:])
    out = _bind(*args[:count], *cotangents, forward=transpose, transpose=forward, count=count, avals=operand_avals)
    return [None] * count + list(out)


ad.primitive_transposes[_linear_map] = _transpose


def _batched(
    function: LinearFn, axes: tuple[int | None, ...], residuals: tuple[Any, ...], operands: tuple[Any, ...]
) -> Sequence[Any]:
    """A linear function over a batch. All operands are batched; `axes` are the batch axes of the residuals."""
    if not operands:
        raise AssertionError("a linear map without operands")
    return jax.vmap(lambda *args: tuple(function(*args)), in_axes=(axes, 0))(residuals, operands)


def _batch(
    args: Any, dims: Any, *, forward: LinearFn, transpose: LinearFn, count: int, jaxpr: Any, avals: Avals
) -> Any:
    del jaxpr, avals
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    operands = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(args[count:], dims[count:], strict=True)
    ]
    axes = tuple(dims[:count])
    forward, transpose = (HashablePartial(_batched, (function, axes)) for function in (forward, transpose))
    out = _bind(*args[:count], *operands, forward=forward, transpose=transpose, count=count, avals=None)
    return out, [0] * len(out)


batching.primitive_batchers[_linear_map] = _batch
