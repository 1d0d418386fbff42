"""Calls with operands that are sharded over Explicit axes of a mesh: which axes, and how their results are sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import PartitionSpec

from attnlib._core.context import Context
from attnlib._core.explicit_axes import Partition, is_sharded, on_auto_axes, partition
from attnlib._core.operand_checks import check_operands

if TYPE_CHECKING:
    from attnlib._engine.call import Arguments

Computation = Callable[..., Any]  # of `Arguments` and of other arguments


def takes_explicit_axes(results: Callable[[Arguments], Any]) -> Callable[[Computation], Computation]:
    """A decorator that computes a traced call on Auto axes if an array of it is sharded over Explicit ones.

    Args:
      results: how the results are sharded, as `on_auto_axes` takes it.
    """

    def decorate(function: Computation) -> Computation:
        @functools.wraps(function)
        def call(arguments: Arguments, *args: Any, **options: Any) -> Any:
            if not is_sharded((arguments, args)):
                return function(arguments, *args, **options)
            return on_auto_axes(functools.partial(function, **options), (arguments, *args), results(arguments))

        return call

    return decorate


def rows(arguments: Arguments) -> PartitionSpec:
    """Of results with batch axes and heads first: those of the operands."""
    query, key, value, _, options = arguments
    axes, _ = check_operands(query, key, value, options.attention_axes)
    partitions = [partition(x) for x in (query, key, value)]
    sequence = _sequence_axis(arguments)
    for name, x, names in zip(("query", "key", "value"), (query, key, value), partitions, strict=True):
        features = [] if name == "value" else [axes.rank - 1]
        in_context = sequence is not None and names[axes.attention[0]] == sequence
        _check_whole(name, x, names, [*axes.attention[in_context:], *features])
    chosen: list[Any] = [sequence]
    for axis in (*axes.batch, axes.rank - 2):
        candidates = partitions if axis in axes.batch else partitions[:1]
        chosen.append(next((p[axis] for p in candidates if p[axis] and not _overlaps(p[axis], chosen)), None))
    return PartitionSpec(*chosen[1:])


def _sequence_axis(arguments: Arguments) -> str | None:
    """The Explicit mesh axis over which the option `context` shards the sequence, if there is one."""
    context = arguments.options.context
    if not isinstance(context, Context):
        return None
    meshes = (jax.typeof(x).sharding.mesh for x in arguments[:3])
    return context.axis_name if any(context.axis_name in mesh.explicit_axes for mesh in meshes) else None


def output_and_rows(arguments: Arguments) -> Any:
    """Of the output and of the other results of attention."""
    batch_and_head = rows(arguments)
    axes, _ = check_operands(*arguments[:3], arguments.options.attention_axes)
    output: list[Any] = [None] * axes.rank
    for axis, names in zip((*axes.batch, axes.rank - 2), batch_and_head, strict=True):
        output[axis] = names
    sequence = _sequence_axis(arguments)
    output[axes.attention[0]] = sequence
    features = partition(arguments.value)[-1]
    output[-1] = None if _overlaps(features, [*batch_and_head, sequence]) else features
    others = arguments.options.return_weights + arguments.options.return_lse
    other = PartitionSpec(*batch_and_head, sequence) if sequence else batch_and_head
    return (PartitionSpec(*output), *[other] * others) if others else PartitionSpec(*output)


def _check_whole(name: str, array: Any, names: Partition, axes: Sequence[int]) -> None:
    """Raises ValueError if an operand is sharded along one of these axes."""
    for axis in axes:
        if names[axis] is not None:
            kept = ", ".join(repr(None if n in axes else names[n]) for n in range(array.ndim))
            role = "the features" if axis == array.ndim - 1 else "an axis to attend over"
            raise ValueError(
                f"{name} {array.shape} is sharded along axis {axis}, {role}, over the Explicit mesh axis "
                f"{names[axis]!r}. attnlib shards batch axes and heads. Write jax.reshard({name}, P({kept})) to gather "
                "the axis, or make the mesh with axis_types=(jax.sharding.AxisType.Auto, ...), which lets the compiler "
                "gather it."
            )


def _overlaps(names: Any, chosen: Sequence[Any]) -> bool:
    """Whether one of the mesh axes already shards another axis."""
    return bool(_flat(names) & set().union(*map(_flat, chosen)))


def _flat(names: Any) -> set[str]:
    return set() if names is None else set(names) if isinstance(names, tuple) else {names}
