"""A call with the option `context`: over a mesh axis that is manual, or in a `jax.shard_map` of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attnlib._core.axes import Axes
from attnlib._core.context import Context, check_lengths, mesh_axis
from attnlib._core.explicit_axes import on_auto_axes, reshard
from attnlib._core.operand_checks import check_operands
from attnlib._core.problem import AttentionProblem
from attnlib._engine.context.choice import choose_exchange
from attnlib._engine.context.heads import attend_by_heads
from attnlib._engine.context.part import Part, WholeOperands
from attnlib._engine.explicit_call import output_and_rows
from attnlib.masks._base import entries_of_leaves

if TYPE_CHECKING:
    from attnlib._engine.call import Arguments

# Of the arguments and of what they have of all positions.
Attend = Callable[["Arguments", WholeOperands], Any]
Canonicalize = Callable[["Arguments", WholeOperands], tuple[AttentionProblem, Axes]]


def attend_in_context(arguments: Arguments, attend: Attend, canonicalize: Canonicalize) -> Any:
    """The results of a call with the option `context`, of whole operands or of those of one device."""
    context, devices, manual = resolve(arguments)
    if devices == 1:
        return attend(arguments.change(context=None), WholeOperands())
    if manual:
        return _attend_part(arguments, context, devices, attend, canonicalize)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes:  # but no operand is sharded over them
        (attended, *_), rank = _attention_axes(arguments), arguments.query.ndim
        names = [context.axis_name if axis == attended else None for axis in range(rank)]
        query = reshard(arguments.query, NamedSharding(mesh, P(*names)))
        arguments = arguments._replace(query=query)

        def on_auto(arguments: Arguments) -> Any:
            return _attend_over_mesh(arguments, context, devices, attend, canonicalize)

        return on_auto_axes(on_auto, (arguments,), output_and_rows(arguments))
    return _attend_over_mesh(arguments, context, devices, attend, canonicalize)


def resolve(arguments: Arguments) -> tuple[Context, int, bool]:
    """(the context, the number of devices, whether its axis is manual), after checks of what it cannot do."""
    context = arguments.options.context
    assert isinstance(context, Context)
    operands = arguments[:3]
    devices, manual = mesh_axis(context.axis_name, operands)
    if arguments.options.return_weights:
        raise ValueError(
            "with context, no device has the weights of all pairs; leave return_weights=False. "
            "attnlib.inspect computes chosen rows of the weights without context."
        )
    axes, _ = check_operands(*operands, arguments.options.attention_axes)
    factor = devices if manual else 1
    lengths = {n: x.shape[axes.attention[0]] * factor for n, x in zip(("query", "key"), operands, strict=False)}
    check_lengths(context, devices, lengths)
    return context, devices, manual


def localized(arguments: Arguments, context: Context, devices: int) -> Arguments:
    """The shapes of the arguments of one device, from those of whole arguments."""
    leaves, structure = flatten(arguments)

    def local(leaf: Any, spec: P) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        shape = [size // devices if name else size for size, name in zip(leaf.shape, spec, strict=False)]
        return jax.ShapeDtypeStruct((*shape, *leaf.shape[len(shape) :]), leaf.dtype)

    return structure.unflatten(list(map(local, leaves, _specs(arguments, context))))


def _attend_part(
    arguments: Arguments, context: Context, devices: int, attend: Attend, canonicalize: Canonicalize
) -> Any:
    part = Part(devices, context.order, jax.lax.axis_index(context.axis_name))
    if context.exchange is None:
        problem = jax.eval_shape(lambda arguments: canonicalize(arguments, part)[0], arguments)
        context = dataclasses.replace(context, exchange=choose_exchange(problem, arguments.options.implementation))
    if context.exchange == "heads":
        return attend_by_heads(arguments, context, devices, attend)
    return attend(arguments.change(context=context), part)


def _attend_over_mesh(
    arguments: Arguments, context: Context, devices: int, attend: Attend, canonicalize: Canonicalize
) -> Any:
    leaves, structure = flatten(arguments)

    def run(*leaves: Any) -> Any:
        return _attend_part(structure.unflatten(leaves), context, devices, attend, canonicalize)

    axes, shapes = check_operands(*arguments[:3], arguments.options.attention_axes)
    attended, axis_name = axes.attention[0], context.axis_name
    out: Any = _spec(axes.rank, attended, axis_name)
    if arguments.options.return_lse:
        rows = len(shapes.batch) + 1
        out = out, _spec(rows + len(shapes.query), rows, axis_name)
    specs = tuple(_specs(arguments, context))
    return jax.shard_map(run, in_specs=specs, out_specs=out, axis_names={axis_name})(*leaves)


def _specs(arguments: Arguments, context: Context) -> list[P]:
    """How each leaf of the arguments is sharded over the axis of the context."""
    axes, shapes = check_operands(*arguments[:3], arguments.options.attention_axes)
    options, name = arguments.options, context.axis_name
    pair_axes = len(shapes.query) + len(shapes.key)

    def spec_of(array: Any, side: str) -> P:
        if side == "whole":
            return P()
        axis = array.ndim - {"pairs": pair_axes, "query": len(shapes.query), "key": len(shapes.key)}[side]
        return P() if axis < 0 or (side == "pairs" and array.shape[axis] == 1) else _spec(array.ndim, axis, name)

    def of_mask(mask: Any) -> Any:
        leaves, structure = flatten(mask)
        return structure.unflatten(list(map(spec_of, leaves, entries_of_leaves(mask))))

    operand = _spec(axes.rank, axes.attention[0], name)
    whole = jax.tree.map(lambda _: P(), arguments)
    tree = whole._replace(
        query=operand,
        key=operand,
        value=operand,
        options=whole.options.replace(
            mask=None if options.mask is None else of_mask(options.mask),
            bias=None if options.bias is None else spec_of(options.bias, "pairs"),
            query_positions=None if options.query_positions is None else spec_of(options.query_positions, "query"),
            key_positions=None if options.key_positions is None else spec_of(options.key_positions, "key"),
        ),
    )
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, P))


def flatten(tree: Any) -> tuple[list[Any], Any]:
    leaves, structure = jax.tree.flatten(tree)
    return leaves, structure


def _spec(rank: int, axis: int, name: str) -> P:
    return P(*(name if n == axis else None for n in range(rank)))


def _attention_axes(arguments: Arguments) -> tuple[int, ...]:
    return check_operands(*arguments[:3], arguments.options.attention_axes)[0].attention
