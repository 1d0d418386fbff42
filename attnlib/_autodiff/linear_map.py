"""A linear map with a transpose of our own, which every transformation of JAX understands.

`custom_vjp` has no forward mode and `linear_call` no batching; this primitive has both, and derivatives with respect
to the residuals too, so derivatives of any order compose from three loops (forward, tangent, transpose). It is built
from the public extension points of JAX alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from attnlib._autodiff.leaves import partial_in

Leaves = Sequence[Any]
LinearFn = Callable[[tuple[Any, ...], tuple[Any, ...]], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class HashablePartial:
    """A function with its first arguments; unlike a `partial`, equal to another one of the same parts.

    One that uses custom partitioning, for `linear_map` or `call_with_rule`, must expose its jaxpr: JAX looks through
    the programs inside a program for operations that must know their devices before it lowers them.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    exposes_jaxpr: bool = False

    def __call__(self, *args: Any) -> Any:
        return self.function(*self.arguments, *args)


@partial(jax.jit, static_argnums=0, inline=True)
def _jitted(function: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    return tuple(function(*args))


def call_traced_once(function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)`, traced once for all calls with such arguments."""
    return list(_jitted(function, *args))


def output_avals(function: Callable[..., Any], *avals: Any) -> list[Any]:
    """The types of what `function` returns."""
    program = jax.make_jaxpr(_jitted, static_argnums=0)(function, *avals)
    if any(isinstance(const, jax.core.Tracer) for const in program.consts):
        raise TypeError(
            "a masks.Predicate captures a traced array, or a Score of your own holds one that is no field; tiles "
            "cannot take it: use a mask with arrays (masks.Dense, masks.Lengths...) or implementation='reference'."
        )
    return list(program.out_avals)


def linear_map(
    forward: LinearFn, transpose: LinearFn, residuals: Sequence[jax.Array], operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """`forward(residuals, operands)`, linear in the operands; its transpose is `transpose(residuals, cotangents)`.

    Both functions must be hashable, equal when they mean the same, and differentiable in the floating residuals.
    """
    return _bind(*residuals, *operands, forward=forward, transpose=transpose, count=len(residuals))


def unbroadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of broadcasting from `shape`, of the same rank."""
    return jnp.sum(x, [axis for axis, size in enumerate(shape) if size != x.shape[axis]], keepdims=True)


_linear_map = Primitive("attnlib_linear_map")
_linear_map.multiple_results = True


def _bind(*args: Any, forward: LinearFn, transpose: LinearFn, count: int) -> Any:
    shown = exposed_jaxpr(HashablePartial(_in_one_row, (forward, count)), *args)
    return _linear_map.bind(*args, forward=forward, transpose=transpose, count=count, shown=shown)


def exposed_jaxpr(function: Any, *args: Any) -> Any:
    """The program of a function that has to expose it, or holds one that has, else None."""
    return jax.make_jaxpr(function)(*args) if _exposes_jaxpr(function) else None


def _exposes_jaxpr(function: Any) -> bool:
    if not isinstance(function, HashablePartial):
        return False
    return function.exposes_jaxpr or any(map(_exposes_jaxpr, (function.function, *function.arguments)))


def _evaluate(*args: Any, forward: LinearFn, transpose: LinearFn, count: int, shown: Any) -> list[Any]:
    del transpose, shown
    return call_traced_once(HashablePartial(_in_one_row, (forward, count)), *args)


def _in_one_row(function: LinearFn, count: int, *args: Any) -> Sequence[Any]:
    """A linear function, of its residuals and operands in one row."""
    return function(args[:count], args[count:])


_linear_map.def_impl(_evaluate)
mlir.register_lowering(_linear_map, mlir.lower_fun(_evaluate, multiple_results=True))


@_linear_map.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract_eval(*avals: Any, forward: LinearFn, transpose: LinearFn, count: int, shown: Any) -> list[Any]:
    del transpose, shown
    return output_avals(HashablePartial(_in_one_row, (forward, count)), *avals)


def _jvp(primals: Any, tangents: Any, *, forward: LinearFn, transpose: LinearFn, count: int, shown: Any) -> Any:
    del shown
    params: dict[str, Any] = dict(forward=forward, transpose=transpose, count=count)
    residuals, operands = primals[:count], primals[count:]
    out = _bind(*primals, **params)
    parts = []
    if any(type(t) is not ad.Zero for t in tangents[count:]):
        parts.append(_bind(*residuals, *map(ad.instantiate_zeros, tangents[count:]), **params))
    perturbed = [n for n in range(count) if type(tangents[n]) is not ad.Zero]
    if perturbed:
        of_residuals = partial_in(lambda residuals: list(forward(tuple(residuals), operands)), perturbed, residuals)
        parts.append(jax.jvp(*of_residuals, [tangents[n] for n in perturbed])[1])
    if not parts:
        return out, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in out]
    return out, parts[0] if len(parts) == 1 else [a + b for a, b in zip(*parts, strict=True)]


ad.primitive_jvps[_linear_map] = _jvp


def _transpose(
    cotangents: Any, *args: Any, forward: LinearFn, transpose: LinearFn, count: int, shown: Any
) -> list[Any]:
    del shown
    cotangents = [ad.instantiate_zeros(ct) if type(ct) is ad.Zero else ct for ct in cotangents]
    out = _bind(*args[:count], *cotangents, forward=transpose, transpose=forward, count=count)
    return [None] * count + list(out)


ad.primitive_transposes[_linear_map] = _transpose


def _in_batch(
    function: LinearFn, axes: tuple[int | None, ...], residuals: tuple[Any, ...], operands: tuple[Any, ...]
) -> Sequence[Any]:
    """A linear function over a batch: operands are all batched, residuals where `axes` says so."""
    if not operands:
        raise AssertionError("a linear map without operands")
    return jax.vmap(lambda *args: tuple(function(*args)), in_axes=(axes, 0))(residuals, operands)


def _batch(args: Any, dims: Any, *, forward: LinearFn, transpose: LinearFn, count: int, shown: Any) -> Any:
    del shown
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    operands = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(args[count:], dims[count:], strict=True)
    ]
    axes = tuple(dims[:count])
    forward, transpose = (HashablePartial(_in_batch, (function, axes)) for function in (forward, transpose))
    out = _bind(*args[:count], *operands, forward=forward, transpose=transpose, count=count)
    return out, [0] * len(out)


batching.primitive_batchers[_linear_map] = _batch
