"""Which of all positions the operands of a call have: all, or the part of one device.

`canonicalize` asks here for everything that depends on it. Arrays of a part are checked as if they were whole, so that
masks and biases need no checks of their own for parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape
from attnlib._core.block_positions import OperandPositions
from attnlib._core.context import Context, Layout, mesh_axis
from attnlib._engine.context.positions import LocalPositions
from attnlib.masks import Dense, Segments
from attnlib.masks._base import Mask
from attnlib.masks._views import PaddedDenseMask


class WholeOperands:
    """The operands have all positions."""

    def shapes(self, shapes: AttentionShape) -> AttentionShape:
        """The sizes of attention over all positions, from those of the operands."""
        return shapes

    def whole_mask(self, mask: Mask, shapes: AttentionShape) -> Mask:
        """The mask of all positions, to be checked."""
        return mask

    def whole_pairs(self, array: Any, shapes: AttentionShape) -> Any:
        """An array of pairs of all positions, to be checked."""
        return array

    def mask(self, mask: Mask, shapes: AttentionShape) -> Mask:
        """The mask as implementations take it."""
        return mask

    def positions(self, shapes: AttentionShape, side: str, explicit: Array | None) -> OperandPositions:
        return OperandPositions(getattr(shapes, side), side, explicit=explicit)

    def dropout_seeds(self, seeds: jax.Array) -> jax.Array:
        """The words that dropout hashes with."""
        return seeds

    def default_positions(self, shapes: AttentionShape, side: str) -> jax.Array:
        """The positions along the one attention axis, as an array."""
        return jnp.arange(getattr(shapes, side)[0])


@dataclasses.dataclass(frozen=True)
class Part(WholeOperands):
    """The operands have the positions of one device.

    Attributes:
      devices: how many devices hold parts.
      order: "contiguous" or "zigzag".
      device: the number of this device; traced.
    """

    devices: int
    order: str
    device: Any

    def shapes(self, shapes: AttentionShape) -> AttentionShape:
        query, key = ((axes[0] * self.devices, *axes[1:]) for axes in (shapes.query, shapes.key))
        return shapes._replace(query=query, key=key)

    def whole_mask(self, mask: Mask, shapes: AttentionShape) -> Mask:
        def whole(value: Any, side: str | None) -> Any:
            if value is None or side is None:
                return value
            if side == "pairs":
                return self.whole_pairs(value, shapes)
            return self._repeated(value, value.ndim - len(getattr(shapes, side)))

        return mask.mapped(whole)

    def whole_pairs(self, array: Any, shapes: AttentionShape) -> Any:
        axis = array.ndim - len(shapes.query) - len(shapes.key) if array is not None else -1
        return self._repeated(array, axis) if axis >= 0 and array.shape[axis] > 1 else array

    def _repeated(self, array: Any, axis: int) -> Any:
        """The shape of an array that has this axis of all devices."""
        shape = list(array.shape)
        if 0 <= axis < len(shape):
            shape[axis] *= self.devices
        return jax.ShapeDtypeStruct(tuple(shape), array.dtype)

    def mask(self, mask: Mask, shapes: AttentionShape) -> Mask:
        if isinstance(mask, Dense):
            keys = self.shapes(shapes).key
            return PaddedDenseMask(_axes.fold_pairs(jnp.asarray(mask.array), shapes.query, keys))
        if isinstance(mask, Segments) and mask.key_ids is None:
            return Segments(mask.query_ids, mask.query_ids, mask.padding_id)
        parts = {name: self.mask(part, shapes) for name, part in vars(mask).items() if isinstance(part, Mask)}
        foreign = not type(mask).__module__.startswith("attnlib.")
        if foreign and not mask.entries and type(mask).pad_to is not Mask.pad_to:
            raise ValueError(
                f"context cannot shard the arrays of {type(mask).__name__}, which has its own pad_to. Name its arrays "
                'in the class attribute `entries`, such as {"ids": "key"}, or pass a masks.Dense of their pairs.'
            )
        copy: Mask = object.__new__(type(mask))
        vars(copy).update({**vars(mask), **parts})
        return copy

    def positions(self, shapes: AttentionShape, side: str, explicit: Array | None) -> OperandPositions:
        lengths = getattr(self.shapes(shapes), side)
        return LocalPositions(
            lengths, side, explicit=explicit, layout=self._layout(lengths), device=jnp.asarray(self.device, jnp.int32)
        )

    def default_positions(self, shapes: AttentionShape, side: str) -> jax.Array:
        return self._layout(getattr(self.shapes(shapes), side)).positions(self.device)

    def _layout(self, lengths: tuple[int, ...]) -> Layout:
        return Layout(math.prod(lengths), self.devices, self.order)


WHOLE = WholeOperands()


def whole_key_count(shapes: AttentionShape, context: Context | None, operands: Sequence[Any]) -> int:
    """The number of keys of the whole sequence, from the sizes of operands that may have those of one device."""
    devices, manual = (1, False) if context is None else mesh_axis(context.axis_name, operands)
    return math.prod(shapes.key) * (devices if manual else 1)
