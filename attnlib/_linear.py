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

LinearFn = Callable[[tuple[Any, ...], tuple[Any, ...]], Sequence[Any]]


def linear_map(
    forward: LinearFn, transpose: LinearFn, residuals: Sequence[jax.Array], operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """`forward(residuals, operands)`, linear in the operands; its transpose is `transpose(residuals, cotangents)`.

    Both functions must be hashable, equal when they mean the same, and differentiable in the floating residuals.
    """
    return _bind(*residuals, *operands, forward=forward, transpose=transpose, count=len(residuals))


@dataclasses.dataclass(frozen=True)
class Shown:
    """A function for `linear_map` that uses custom partitioning.

    JAX looks through the programs inside a program for operations that must know their devices before it lowers them;
    so it has to be shown the one that this function is.
    """

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def tangent_of(
    forward: Callable[..., Sequence[Any]],
    transpose: Callable[..., Sequence[Any]],
    residuals: Sequence[jax.Array],
    tangents: Sequence[Any],
    *outputs: jax.Array,
) -> Any:
    """The tangents of `outputs` for a `custom_jvp` rule with symbolic zeros; one alone where there is one output.

    `forward(active, residuals, tangents)` and `transpose(active, residuals, cotangents)` get the numbers of the
    tangents that are not zero, and take or give those alone.
    """
    active = tuple(n for n, t in enumerate(tangents) if not isinstance(t, jax.custom_derivatives.SymbolicZero))
    if active:
        changes = [tangents[n] for n in active]
        results = linear_map(partial(forward, active), partial(transpose, active), residuals, changes)
    else:
        results = [jnp.zeros_like(output) for output in outputs]
    return results[0] if len(outputs) == 1 else tuple(results)


def unbroadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of broadcasting from `shape`, of the same rank."""
    return jnp.sum(x, [axis for axis, size in enumerate(shape) if size != x.shape[axis]], keepdims=True)


_linear_map = Primitive("attnlib_linear_map")
_linear_map.multiple_results = True


def _bind(*args: Any, **params: Any) -> Any:
    shown = jax.make_jaxpr(partial(_evaluate, **params))(*args) if _is_shown(params["forward"]) else None
    return _linear_map.bind(*args, **params, shown=shown)


def _is_shown(function: Any) -> bool:
    while isinstance(function, (partial, _Batched)):
        function = function.func if isinstance(function, partial) else function.function
    return isinstance(function, Shown)


def _evaluate(*args: Any, forward: LinearFn, transpose: LinearFn, count: int, shown: Any = None) -> list[Any]:
    return list(forward(args[:count], args[count:]))


_linear_map.def_impl(_evaluate)
mlir.register_lowering(_linear_map, mlir.lower_fun(_evaluate, multiple_results=True))


@_linear_map.def_abstract_eval  # type: ignore[untyped-decorator]
def _abstract_eval(*avals: Any, **params: Any) -> list[Any]:
    return list(jax.make_jaxpr(lambda *args: _evaluate(*args, **params))(*avals).out_avals)


def _jvp(primals: Any, tangents: Any, *, forward: LinearFn, transpose: LinearFn, count: int, shown: Any) -> Any:
    del shown
    params = dict(forward=forward, transpose=transpose, count=count)
    residuals, operands = primals[:count], primals[count:]
    out = _bind(*primals, **params)
    parts = []
    if any(type(t) is not ad.Zero for t in tangents[count:]):
        parts.append(_bind(*residuals, *map(ad.instantiate_zeros, tangents[count:]), **params))
    moving = [n for n in range(count) if type(tangents[n]) is not ad.Zero]
    if moving:

        def of_residuals(*moved: Any) -> list[Any]:
            whole = list(residuals)
            for n, value in zip(moving, moved, strict=True):
                whole[n] = value
            return list(forward(tuple(whole), operands))

        _, part = jax.jvp(of_residuals, [residuals[n] for n in moving], [tangents[n] for n in moving])
        parts.append(part)
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


@dataclasses.dataclass(frozen=True)
class _Batched:
    """A linear function over a batch: operands are all batched, residuals where `axes` says so."""

    function: LinearFn
    axes: tuple[int | None, ...]

    def __call__(self, residuals: tuple[Any, ...], operands: tuple[Any, ...]) -> Sequence[Any]:
        def one(residuals: Any, operands: Any) -> tuple[Any, ...]:
            return tuple(self.function(residuals, operands))

        if not operands:
            raise AssertionError("a linear map without operands")
        return jax.vmap(one, in_axes=(self.axes, 0))(residuals, operands)


def _batch(args: Any, dims: Any, *, forward: LinearFn, transpose: LinearFn, count: int, shown: Any) -> Any:
    del shown
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    operands = [
        jnp.broadcast_to(x[None], (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(args[count:], dims[count:], strict=True)
    ]
    axes = tuple(dims[:count])
    out = _bind(
        *args[:count], *operands, forward=_Batched(forward, axes), transpose=_Batched(transpose, axes), count=count
    )
    return out, [0] * len(out)


batching.primitive_batchers[_linear_map] = _batch
