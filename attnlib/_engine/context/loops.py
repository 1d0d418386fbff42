"""Attention of the queries of one device to keys that come from all devices, with derivatives of every order.

The output, the tangent and the transpose of a tile are those of one device (`blockwise/implementation.py`), and so are
the statistics: output and lse are those of all keys before the transpose begins. Three things differ:

  positions   a tile is cut from the arrays of a device, and masks, modifiers and dropout get its positions in the
              whole sequence, which follow from the device that the keys come from.
  tiles       all devices run one program, so it looks up what a static mask makes of a tile (`schedule.py`), and has
              a branch for each kind.
  gradients   the cotangents of keys and values collect behind them in the dtype of the softmax, and come home.

Keys and values travel in their own dtype. What is the same on all devices, such as the scale, was cast to vary over
them before (`call_with_rule`), and the transpose of the cast is the sum over the devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._autodiff.custom_rule import call_with_rule, linear_tangent
from attnlib._autodiff.linear_map import HashablePartial
from attnlib._autodiff.zeros import zeros_like_varying
from attnlib._core import axes as _axes
from attnlib._core.tile_kinds import EMPTY, PARTIAL
from attnlib._core.varying_axes import cast_to_common_axes
from attnlib._engine import softmax as _softmax
from attnlib._engine.blockwise.implementation import (
    joined,
    row_cotangents,
    tangent_of_rows,
    tangent_of_tile,
    transpose_of_tile,
)
from attnlib._engine.blockwise.tile import Axes, BlockwisePlan, Tile, TileIndex
from attnlib._engine.context.exchange import Arrays, Exchange, Visit
from attnlib._engine.softmax import SoftmaxState

Leaves = Sequence[jax.Array]
# `body(parts of the state, tile, the tile's parts of other arrays) -> new parts`
Body = Callable[[Arrays, Tile, Arrays], Sequence[jax.Array]]

_ROWS, _OUTPUT = (-1, None), (-2, None)
_STATE = _ROWS, _ROWS, _OUTPUT
_OPERANDS = 1, 2  # key and value among the leaves
_LINEAR = ((2, (0,)),)  # the output in the value


@dataclasses.dataclass(frozen=True)
class ContextPlan:
    """The static part of a call: equal plans are equal programs.

    Attributes:
      tiles: the plan of a tile, in which heads are those of a device.
      sides: what each leaf of the arrays is: "query" or "whole", which stays; "key", which travels; "pairs", which
        stays and has a column for each key; "device" and "first", the device and the index of the first key here.
      exchange: how keys travel.
      dtype: that of the logits.
    """

    tiles: BlockwisePlan
    sides: tuple[str, ...]
    exchange: Exchange
    dtype: Any

    @property
    def travelling(self) -> list[int]:
        return [n for n, side in enumerate(self.sides) if side == "key"]

    def key_axis(self, leaf: int) -> int:
        axes = self.tiles.axes[leaf]
        return -1 if axes is None or axes[1] is None else axes[1]


def attend(plan: ContextPlan, leaves: Leaves) -> tuple[jax.Array, jax.Array]:
    """(output, lse) of the queries of this device, padded to whole tiles."""
    forward, rule = HashablePartial(_forward, (plan,)), HashablePartial(_rule, (plan,))
    output, lse = call_with_rule(forward, rule, leaves, linear=_LINEAR)
    return output, lse


def _rule(plan: ContextPlan, perturbed: tuple[int, ...], leaves: Leaves, tangents: Leaves) -> Any:
    results = attend(plan, leaves)
    forward, transpose = HashablePartial(_tangent, (plan,)), HashablePartial(_transpose, (plan,))
    return results, linear_tangent(forward, transpose, (*leaves, *results), perturbed, tangents, results)


def _forward(plan: ContextPlan, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
    def body(parts: Arrays, tile: Tile, others: Arrays) -> Sequence[jax.Array]:
        return joined(SoftmaxState(*parts), tile)

    def step(state: Arrays, keys: Arrays, visit: Visit) -> tuple[Arrays, Arrays]:
        here = _Keys(plan, leaves, keys, visit)
        return here.run(body, state, _STATE, [], [], checkpoint=False), []

    rows = jnp.sum(zeros_like_varying(leaves[0][..., :1]), -1)
    output = jnp.broadcast_to(rows[..., None], (*rows.shape, leaves[2].shape[-1]))
    state = [rows + jnp.finfo(rows.dtype).min, rows, output]
    state, _ = _circulate(plan, step, state, [leaves[n] for n in plan.travelling], plan.travelling)
    return _softmax.normalize(SoftmaxState(*state))


def _tangent(plan: ContextPlan, perturbed: tuple[int, ...], residuals: Leaves, tangents: Leaves) -> Arrays:
    *leaves, output, lse = residuals
    moving = [n for n in plan.travelling if n in perturbed]
    of_leaf = dict(zip(perturbed, tangents, strict=True))
    axes = [*(plan.tiles.axes[n] for n in perturbed), _ROWS]

    def body(parts: Arrays, tile: Tile, others: Arrays) -> Sequence[jax.Array]:
        *tangents, lse = others
        return tangent_of_tile((parts[0], parts[1]), tile, perturbed, tangents, lse)

    def step(state: Arrays, arrays: Arrays, visit: Visit) -> tuple[Arrays, Arrays]:
        keys, moved = arrays[: len(plan.travelling)], dict(zip(moving, arrays[len(plan.travelling) :], strict=True))
        here = _Keys(plan, leaves, keys, visit)
        others = [here.cut(n, moved.get(n, of_leaf[n])) for n in perturbed]
        return here.run(body, state, (_OUTPUT, _ROWS), [*others, lse], axes, checkpoint=True), []

    travelling = [*(leaves[n] for n in plan.travelling), *(of_leaf[n] for n in moving)]
    start = [zeros_like_varying(output), zeros_like_varying(lse)]
    (weighted_dot, lse_dot), _ = _circulate(plan, step, start, travelling, [*plan.travelling, *moving])
    return tangent_of_rows(output, weighted_dot, lse_dot)


def _transpose(plan: ContextPlan, perturbed: tuple[int, ...], residuals: Leaves, cotangents: Leaves) -> Arrays:
    *leaves, output, lse = residuals
    masked = bool((plan.exchange.schedule.table == PARTIAL).any())
    output_ct, delta = row_cotangents(output, lse, cotangents, masked)
    returning = [n for n in plan.travelling if n in perturbed]
    staying = [n for n in perturbed if n not in returning]
    axes = [plan.tiles.axes[n] for n in perturbed]

    def body(parts: Arrays, tile: Tile, others: Arrays) -> Sequence[jax.Array]:
        return transpose_of_tile(list(parts), tile, perturbed, *others)

    def step(state: Arrays, keys: Arrays, visit: Visit) -> tuple[Arrays, Arrays]:
        here = _Keys(plan, leaves, keys, visit)
        totals = dict(zip(staying, state, strict=True))
        start = [here.start(n, totals.get(n)) for n in perturbed]
        parts = here.run(body, start, axes, [output_ct, lse, delta], [_OUTPUT, _ROWS, _ROWS], checkpoint=True)
        sums = {n: here.put(n, part, totals.get(n)) for n, part in zip(perturbed, parts, strict=True)}
        return [sums[n] for n in staying], [sums[n] for n in returning]

    zeros = [zeros_like_varying(leaves[n]) for n in staying]
    totals = [zeros_like_varying(leaves[n]).astype(plan.dtype) for n in returning]
    keys = [leaves[n] for n in plan.travelling]
    state, home = _circulate(plan, step, zeros, keys, plan.travelling, totals, returning)
    sums = dict(zip((*staying, *returning), (*state, *home), strict=True))
    return [sums[n].astype(leaves[n].dtype) for n in perturbed]


def _circulate(
    plan: ContextPlan,
    step: Any,
    state: Arrays,
    travelling: Arrays,
    leaves: Sequence[int],
    totals: Sequence[jax.Array] = (),
    total_leaves: Sequence[int] = (),
) -> tuple[Arrays, Arrays]:
    axes, total_axes = ([plan.key_axis(n) for n in numbers] for numbers in (leaves, total_leaves))
    return plan.exchange.circulate(step, state, travelling, axes, list(totals), total_axes)


class _Keys:
    """The arrays of a device together with keys of one or all devices, and the loop over their tiles."""

    def __init__(self, plan: ContextPlan, leaves: Leaves, keys: Arrays, visit: Visit):
        self.plan, self.visit, self.held = plan, visit, leaves
        schedule = plan.exchange.schedule
        self.tile, self.layout = schedule.tile, schedule.keys
        self.keys = dict(zip(plan.travelling, keys, strict=True))
        self.leaves = [self.cut(n, self.keys.get(n, leaf)) for n, leaf in enumerate(leaves)]

    def cut(self, leaf: int, array: jax.Array) -> jax.Array:
        """The array of a leaf, or its tangent, for the keys that are here, padded to whole tiles."""
        match self.plan.sides[leaf]:
            case "key":
                array = array.astype(self.plan.dtype) if leaf in _OPERANDS else array
                return pad_parts(array, self.plan.key_axis(leaf), self.layout.parts, self.tile[1])
            case "pairs" if array.shape[-1] > 1:
                starts, width = self._columns()
                parts = [
                    jax.lax.dynamic_slice_in_dim(array, start, width, -1, allow_negative_indices=False)
                    for start in starts
                ]
                return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
            case "device":
                return jnp.asarray(self.visit.source, jnp.int32)
            case "first":
                return jnp.asarray(self.visit.first * self.tile[1], jnp.int32)
        return array

    def start(self, leaf: int, total: jax.Array | None) -> jax.Array:
        """What the cotangents of a leaf's part are added to: the total where the part is the whole, or zeros."""
        if total is not None and self.leaves[leaf].shape == total.shape:
            return total
        return zeros_like_varying(self.leaves[leaf])

    def put(self, leaf: int, part: jax.Array, total: jax.Array | None) -> jax.Array:
        """The transpose of `cut`, added to a total."""
        if total is None:
            length = self.keys[leaf].shape[self.plan.key_axis(leaf)]
            return unpad_parts(part, self.plan.key_axis(leaf), self.layout.parts, length)
        if part.shape == total.shape:
            return part
        starts, width = self._columns()
        for start, columns in zip(starts, jnp.split(part, len(starts), -1), strict=True):
            sums = jax.lax.dynamic_slice_in_dim(total, start, width, -1, allow_negative_indices=False) + columns
            total = jax.lax.dynamic_update_slice_in_dim(total, sums, start, -1, allow_negative_indices=False)
        return total

    def _columns(self) -> tuple[list[Any], int]:
        """(the first column of each part of the keys, the number of columns), in an array of pairs."""
        length = self.keys[_OPERANDS[0]].shape[-2] // self.layout.parts
        width = -(-length // self.tile[1]) * self.tile[1]
        numbers = [self.layout.number(self.visit.source, part) for part in range(self.layout.parts)]
        return [number * self.layout.part_length + self.visit.first * self.tile[1] for number in numbers], width

    def run(
        self,
        body: Body,
        state: Sequence[jax.Array],
        axes: Sequence[Axes],
        others: Sequence[jax.Array],
        other_axes: Sequence[Axes],
        checkpoint: bool,
    ) -> Arrays:
        """The state after the body has run on all tiles that the mask does not empty."""
        plan, schedule = self.plan.tiles, self.plan.exchange.schedule
        kinds = np.stack([schedule.kinds_in(shift) for shift in self.visit.shifts])
        tiles = np.argwhere((kinds != EMPTY).any((0, 1))).astype(np.int32)
        if not len(tiles):
            return list(state)
        present = np.unique(kinds[..., tiles[:, 0], tiles[:, 1]]).tolist()
        here = jax.lax.axis_index(self.plan.exchange.axis_name)
        table = schedule.table[..., tiles[:, 0], tiles[:, 1]]
        numbers = jnp.asarray(np.searchsorted(present, table).astype(np.int32))[here, self.visit.source]
        starts = jnp.asarray((tiles - np.array([0, self.visit.first])) * np.array(self.tile), jnp.int32)

        def step(state: Arrays, row: Any) -> tuple[Arrays, None]:
            number, start = row
            index = TileIndex((), (start[0], start[1]), self.tile, apply_mask=False)

            def cut(arrays: Sequence[Any], axes: Sequence[Axes]) -> Arrays:
                return [index.cut(x, of) for x, of in zip(arrays, axes, strict=True)]

            parts, arrays = cut(state, axes), (cut(self.leaves, plan.axes), cut(others, other_axes))
            branches = [self._branch(body, index, kind) for kind in present]
            new = jax.lax.switch(number, branches, parts, arrays) if len(branches) > 1 else branches[0](parts, arrays)
            return [index.put(x, y, of) for x, y, of in zip(state, new, axes, strict=True)], None

        if checkpoint:
            step = jax.checkpoint(step, prevent_cse=len(tiles) == 1)
        if len(tiles) == 1:
            return step(list(state), (numbers[0], starts[0]))[0]
        return jax.lax.scan(step, list(state), (numbers, starts))[0]

    def _branch(self, body: Body, index: TileIndex, kind: int) -> Callable[[Arrays, Any], Arrays]:
        def compute(parts: Arrays, arrays: Any) -> Arrays:
            if kind == EMPTY:
                return parts
            leaves, others = arrays
            plan = self.plan.tiles
            tile = Tile(plan, plan.structure.unflatten(leaves), index._replace(apply_mask=kind == PARTIAL))
            return list(cast_to_common_axes(list(body(parts, tile, others))))

        return compute


def pad_parts(array: jax.Array, axis: int, parts: int, tile: int) -> jax.Array:
    """The array with each of the equal parts of an axis padded to whole tiles; an axis of one stays."""
    axis %= array.ndim
    length = array.shape[axis] // parts
    padded = -(-length // tile) * tile
    if array.shape[axis] == 1 or padded == length:
        return array
    split = array.reshape(*array.shape[:axis], parts, length, *array.shape[axis + 1 :])
    split = _axes.pad_axis(split, axis + 1, padded)
    return split.reshape(*array.shape[:axis], parts * padded, *array.shape[axis + 1 :])


def unpad_parts(array: jax.Array, axis: int, parts: int, length: int) -> jax.Array:
    """The array without the padding; `length` is that of all parts."""
    axis %= array.ndim
    if array.shape[axis] == length:
        return array
    split = array.reshape(*array.shape[:axis], parts, array.shape[axis] // parts, *array.shape[axis + 1 :])
    split = jax.lax.slice_in_dim(split, 0, length // parts, axis=axis + 1)
    return split.reshape(*array.shape[:axis], length, *array.shape[axis + 1 :])
