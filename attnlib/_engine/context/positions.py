"""The positions of what one device holds, among those of the whole sequence."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp

from attnlib._core.array_types import Array
from attnlib._core.block_positions import BlockPositions, OperandPositions
from attnlib._core.context import Layout
from attnlib._core.pytree import register

_STATIC = {"static": True}


@dataclasses.dataclass(frozen=True)
class LocalBlock(BlockPositions):
    """A block of the entries of one device: a run of consecutive flat positions, `start` being the first.

    Arrays with an entry for each position, and dense masks, are cut at `local_start`: they are those of the device,
    `(*batch, 1..., local length)`. An array of all positions is read at the positions themselves.
    """

    local_start: int | jax.Array = 0
    offset: int | jax.Array = 0  # of the block in its part

    def gather(self, array: Array) -> jax.Array:
        batch = array.shape[: array.ndim - len(self.shape)]
        if array.shape[len(batch) :] == self.shape:
            return super().gather(array)
        entries = jnp.asarray(array).reshape(*batch, -1)
        entries = jax.lax.dynamic_slice_in_dim(entries, self.local_start, self.length, -1, allow_negative_indices=False)
        entries = entries[..., None] if self.side == "query" else entries[..., None, :]
        return entries[..., None, :, :] if batch else entries

    def cut(self, array: jax.Array, axis: int) -> jax.Array:
        if array.shape[axis] in (1, self.length):
            return array
        if array.shape[axis] == self.total:
            return jnp.take(array, self.array_index.reshape(-1), axis=axis, mode="clip")
        return jax.lax.dynamic_slice_in_dim(array, self.local_start, self.length, axis, allow_negative_indices=False)

    @cached_property
    def offsets(self) -> jax.Array:
        """The index of each entry in its part."""
        return self.array_index - jnp.asarray(self.start, jnp.int32) + self.offset


@register
@dataclasses.dataclass(frozen=True, eq=False)
class LocalPositions(OperandPositions):
    """The positions of all entries of one device, each part of them padded to whole tiles.

    Attributes:
      layout: which positions each device holds.
      tile: the number of entries of a tile.
      device: the number of the device.
      first: the index in its part of the first entry that is here; None: 0.
    """

    layout: Layout = dataclasses.field(default=Layout(0, 1), metadata=_STATIC)
    tile: int = dataclasses.field(default=1, metadata=_STATIC)
    device: jax.Array | int = 0

    @property
    def length(self) -> int:
        """That of one part: blocks are cut from parts."""
        return self.layout.part_length

    @property
    def padded_part_length(self) -> int:
        return -(-self.length // self.tile) * self.tile

    def block(self, start: int | jax.Array = 0, size: int | None = None) -> LocalBlock:
        part, offset = start // self.padded_part_length, start % self.padded_part_length
        if self.first is not None:
            offset = offset + self.first
        position = self.layout.number(self.device, part) * self.length + offset
        return LocalBlock(self.shape, self.side, position, self.tile, self.explicit, start, offset)

    def contains(self, block: BlockPositions) -> jax.Array:
        assert isinstance(block, LocalBlock)
        return block.offsets < self.length
