"""Closure conversion: the arrays that a user's function captures become its arguments, traced and differentiable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from attnlib._core.identity import program_key
from attnlib._core.jaxpr_evaluation import evaluate, has_other_types
from attnlib._core.pytree import register


class _HashableJaxpr:
    """A jaxpr that compares equal to every jaxpr that computes the same, so that they share a compiled program."""

    __slots__ = ("jaxpr", "key", "mesh")

    def __init__(self, jaxpr: Any):
        self.jaxpr, self.key = jaxpr, program_key(jaxpr)
        self.mesh = jax.sharding.get_abstract_mesh()  # the one that it was traced with

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HashableJaxpr) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return str(self.jaxpr)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class ClosureConverted:
    """A function of arrays, as its jaxpr and the arrays that it captures."""

    captured: list[Any]
    program: _HashableJaxpr = dataclasses.field(metadata={"static": True})

    def __call__(self, *args: Any) -> Any:
        """The single result of the function."""
        jaxpr = self.program.jaxpr
        if has_other_types(jaxpr, self.program.mesh, self.captured, args):
            return evaluate(jaxpr, self.captured, args)[0]
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, self.captured))(*args)[0]


def closure_convert(function: Callable[..., Any], *avals: Any) -> tuple[ClosureConverted, Any]:
    """The function for arguments of these types, and its result as a tree of shapes and dtypes."""
    closed, result = jax.make_jaxpr(function, return_shape=True)(*avals)
    return ClosureConverted(list(closed.consts), _HashableJaxpr(closed.jaxpr)), result


def convert_pair_function(
    function: Callable[..., Any], batch_axes: int, axes: int, *avals: Any
) -> tuple[ClosureConverted, Any]:
    """`closure_convert` of a user's function of (*values, batch, head, query_position, key_position), for one pair.

    The converted function takes the values, the batch index along each batch axis, the head, the query position along
    each attention axis and the key position along each, all as int32 scalars but the values.

    Args:
      batch_axes, axes: the number of batch axes and of attention axes. The user's function gets a tuple of indices
        unless there is one.
      avals: types of the values before the indices.
    """

    def flat(*args: jax.Array) -> Any:
        values, indices = args[: len(avals)], args[len(avals) :]
        batch, head, rest = indices[:batch_axes], indices[batch_axes], indices[batch_axes + 1 :]
        return function(*values, _single(batch), head, _single(rest[:axes]), _single(rest[axes:]))

    index = jax.ShapeDtypeStruct((), jnp.int32)
    return closure_convert(flat, *avals, *[index] * (batch_axes + 1 + 2 * axes))


def _single(indices: Sequence[jax.Array]) -> Any:
    return indices[0] if len(indices) == 1 else tuple(indices)
