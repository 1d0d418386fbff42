"""The implementation of problems whose queries and keys are those of one device: `blockwise`, with keys that travel.

The problem has the arrays of a device, `LocalPositions`, and masks with arrays for local queries and local keys; pairs
have local rows and a column for every key.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._core import axes as _axes
from attnlib._core.context import Context, Layout
from attnlib._core.problem import AttentionProblem, AttentionResult, Estimate, Implementation
from attnlib._core.sizes import is_static
from attnlib._engine.blockwise.implementation import blockwise, nothing, prepared
from attnlib._engine.blockwise.plan import BlockwiseStrategy, plan_blocks, rows_per_query
from attnlib._engine.blockwise.tile import Axes, BlockwisePlan, Tile, TileArrays, TileIndex
from attnlib._engine.context.exchange import Exchange
from attnlib._engine.context.loops import ContextPlan, attend, pad_parts, unpad_parts
from attnlib._engine.context.positions import LocalPositions
from attnlib._engine.context.schedule import Schedule
from attnlib._engine.cost import operations
from attnlib.masks._base import entries_of_leaves


def layouts(problem: AttentionProblem) -> tuple[Layout, Layout]:
    """Which positions of queries and keys each device holds."""
    assert isinstance(problem.query_positions, LocalPositions) and isinstance(problem.key_positions, LocalPositions)
    return problem.query_positions.layout, problem.key_positions.layout


def schedule_of(problem: AttentionProblem, exchange: str) -> Schedule:
    """The schedule of a problem with the exchange "ring" or "gather"."""
    queries, keys = layouts(problem)
    if exchange == "gather":
        keys = Layout(keys.length, 1)
    implicit = problem.query_positions.explicit is None and problem.key_positions.explicit is None
    tile = _tile_sizes(problem, queries.part_length, keys.part_length)
    return Schedule.of(problem.mask, (problem.query_shape, problem.key_shape), (queries, keys), tile, implicit)


def _tile_sizes(problem: AttentionProblem, queries: int, keys: int) -> tuple[int, int]:
    """The tile of a problem with one part of the queries and one part of the keys."""

    def cut(array: jax.Array, length: int) -> Any:
        return jax.ShapeDtypeStruct((*array.shape[:-2], length, array.shape[-1]), array.dtype)

    part = dataclasses.replace(
        problem,
        query=cut(problem.query, queries),
        key=cut(problem.key, keys),
        value=cut(problem.value, keys),
        mask=None,
    )
    return plan_blocks(part, "all_heads").block_sizes


def _run(problem: AttentionProblem) -> AttentionResult:
    if problem.query_length == 0 or problem.key_length == 0:
        return nothing(problem)
    context = problem.options.context
    assert isinstance(context, Context) and context.exchange is not None
    schedule = schedule_of(problem, context.exchange)
    exchange = Exchange(context.axis_name, schedule, layouts(problem)[1])
    arrays, sides = _arrays(_prepared_for_travel(problem), schedule)
    tiles = BlockwisePlan.of(problem, BlockwiseStrategy("all_heads", schedule.tile), arrays)
    plan = ContextPlan(tiles, sides, exchange, problem.dtype)
    output, lse = attend(plan, jax.tree.leaves(arrays))
    parts, length = schedule.queries.parts, problem.query_length
    return AttentionResult(unpad_parts(output, -2, parts, length), unpad_parts(lse, -1, parts, length), None)


def _prepared_for_travel(problem: AttentionProblem) -> AttentionProblem:
    """The problem after the score's work on single positions; keys and values in their own dtype where they can be."""
    key = problem.key.astype(problem.dtype)
    made = prepared(dataclasses.replace(problem, key=key))
    return dataclasses.replace(made, key=problem.key if made.key is key else made.key, value=problem.value)


def _arrays(problem: AttentionProblem, schedule: Schedule) -> tuple[TileArrays, tuple[str, ...]]:
    """The arrays of a device, those of queries padded to whole tiles, and the side of each of their leaves."""
    query_positions, key_positions = problem.query_positions, problem.key_positions
    assert isinstance(query_positions, LocalPositions) and isinstance(key_positions, LocalPositions)
    parts, tile = schedule.queries.parts, schedule.tile
    ranks = {"query": len(problem.query_shape), "key": len(problem.key_shape)}
    columns = schedule.keys.length + -schedule.keys.part_length % tile[1]

    def padded_rows(array: Any, axis: int) -> Any:
        return pad_parts(jnp.asarray(array), axis, parts, tile[0])

    def padded_pairs(array: Any) -> Any:
        return _axes.pad_axis(padded_rows(array, -2), -1, columns)

    def local(value: Any, side: str | None) -> Any:
        if value is None or side is None:
            return value
        if side == "pairs":
            return padded_pairs(value)
        value = _flat(jnp.asarray(value), ranks[side])
        return padded_rows(value, -1) if side == "query" else value

    mask = None if problem.mask is None else problem.mask.mapped(local)
    explicit = query_positions.explicit
    arrays = TileArrays(
        query=padded_rows(problem.query, -2),
        key=problem.key,
        value=problem.value,
        bias=None if problem.bias is None else padded_pairs(problem.bias),
        score=problem.score,
        modifiers=problem.modifiers,
        mask=mask,
        dropout_seeds=problem.dropout_seeds,
        query_positions=dataclasses.replace(
            query_positions, tile=tile[0], explicit=None if explicit is None else padded_rows(explicit, -1)
        ),
        key_positions=dataclasses.replace(key_positions, tile=tile[1], layout=schedule.keys, first=jnp.int32(0)),
    )
    return arrays, _sides(arrays)


# What the leaves of some fields are; all others are "whole".
_SIDES = {"query": "query", "key": "key", "value": "key", "bias": "pairs"}
_SIDES_OF_KEY_POSITIONS = {"device": "device", "first": "first", "explicit": "key"}


def _sides(arrays: TileArrays) -> tuple[str, ...]:
    of_mask = iter([] if arrays.mask is None else entries_of_leaves(arrays.mask))
    sides = []
    for path, _ in jax.tree_util.tree_leaves_with_path(arrays):
        field = path[0].name
        if field == "mask":
            sides.append(next(of_mask))
        elif field == "key_positions":
            sides.append(_SIDES_OF_KEY_POSITIONS[path[1].name])
        else:
            sides.append(_SIDES.get(field, "whole"))
    return tuple(sides)


def _flat(array: jax.Array, axes: int) -> jax.Array:
    """`(*batch, *attention axes)` as `(*batch, 1..., flat)`."""
    batch = array.shape[: array.ndim - axes]
    return array.reshape(*batch, *(1,) * (axes - 1), -1)


def _unsupported(problem: AttentionProblem) -> str | None:
    if not is_static(problem.query_length, problem.key_length):
        return "with context, lengths are a part of the program, but they are symbolic; export numbers for them"
    return blockwise().unsupported(problem)


def _estimate(problem: AttentionProblem) -> Estimate:
    """Memory of one device: running sums, two chunks of keys, and one tile; operations of the critical path."""
    if problem.query_length == 0 or problem.key_length == 0:
        return Estimate(memory=0, flops=0)
    context = problem.options.context
    assert isinstance(context, Context) and context.exchange is not None
    schedule = schedule_of(problem, context.exchange)
    queries, keys = schedule.tile
    numbers = problem.rows * (problem.query.shape[-1] + problem.value.shape[-1] + 2)
    numbers += 2 * rows_per_query(problem, "all_heads") * queries * keys
    chunks = 2 if schedule.devices > 1 else schedule.queries.devices
    size = numbers * jnp.dtype(problem.dtype).itemsize + chunks * bytes_of_keys(problem)
    flops = schedule.critical_path * operations(_one_tile(problem, schedule), problem)
    return Estimate(size, flops, schedule.tile, (schedule.tiles_computed, schedule.table.size))


def bytes_of_keys(problem: AttentionProblem) -> int:
    """The size of the keys and values of one device."""
    return sum(x.size * x.dtype.itemsize for x in (problem.key, problem.value))


def _one_tile(problem: AttentionProblem, schedule: Schedule) -> Any:
    """The forward pass of one tile as a function of the problem."""

    def compute(problem: AttentionProblem) -> Any:
        arrays, _ = _arrays(prepared(problem), schedule)
        plan = BlockwisePlan.of(problem, BlockwiseStrategy("all_heads", schedule.tile), arrays)
        index = TileIndex((), (jnp.int32(0), jnp.int32(0)), schedule.tile, apply_mask=False)
        parts = [_tile_of(x, axes, schedule.tile) for x, axes in zip(jax.tree.leaves(arrays), plan.axes, strict=True)]
        return Tile(plan, plan.structure.unflatten(parts), index).state()

    return compute


def _tile_of(array: jax.Array, axes: Axes, tile: tuple[int, int]) -> jax.Array:
    """An array in the place of a tile's part, which may be longer than what a device holds."""
    shape = list(array.shape)
    for axis, size in zip(axes or (), tile, strict=False):
        if axis is not None and shape[axis] > 1:
            shape[axis] = size
    return array if axes is None else jnp.zeros(shape, array.dtype)


in_context = Implementation(
    "blockwise",
    (blockwise().supports | {"context"}) - {"return_weights"},
    _unsupported,
    _run,
    _estimate,
    {"return_weights": "with context, no device has the weights of all pairs; leave return_weights=False"},
)
