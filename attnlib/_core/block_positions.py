"""Positions of queries and keys along the attention axes, for masks and modifiers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.core import max_dim

from attnlib._core.array_types import Array
from attnlib._core.pytree import register
from attnlib._core.sizes import as_scalar

_STATIC = {"static": True}


@dataclass(frozen=True)
class BlockPositions:
    """The positions of a block: a run of consecutive flat positions over the attention axes.

    Masks compare `position`. Query positions are a column `(size, 1)` and key positions a row `(1, size)`, so that a
    comparison of the two is a block. `array_index` is the index of an entry in its array, which explicit positions do
    not change.

    Attributes:
      shape: lengths of the attention axes.
      side: "query" or "key".
      start: the first flat position of the block.
      size: how many positions the block has; None: all.
      explicit: integers `(*batch, *shape)` or `shape` that stand for the positions; None: 0, 1, 2...
    """

    shape: tuple[int, ...]
    side: str
    start: int | jax.Array = 0
    size: int | None = None
    explicit: Array | None = None

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        return self.total if self.size is None else self.size

    @property
    def is_all(self) -> bool:
        """Whether these are all positions, in order."""
        return self.length == self.total

    @cached_property
    def position(self) -> jax.Array:
        """Flat positions, by default in row-major order; explicit ones of a batch are `(*batch, 1, T, 1)`."""
        return self.array_index if self.explicit is None else self.gather(self.explicit).astype(jnp.int32)

    @cached_property
    def array_index(self) -> jax.Array:
        """Indices into the flattened array, in row-major order."""
        block = (self.length, 1) if self.side == "query" else (1, self.length)
        index = jax.lax.broadcasted_iota(jnp.int32, block, 0 if self.side == "query" else 1)
        return index + jnp.asarray(self.start, jnp.int32)

    @cached_property
    def coordinates(self) -> tuple[jax.Array, ...]:
        """The position along each attention axis."""
        if len(self.shape) == 1:
            return (self.position,)
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return tuple(
            (self.position // as_scalar(max_dim(stride, 1))) % as_scalar(max_dim(size, 1))
            for stride, size in zip(strides, self.shape, strict=True)
        )

    def gather(self, array: Array) -> jax.Array:
        """Entries of `array (*batch, *shape)` at these positions, laid out against a block `(*batch, 1, T, S)`.

        Positions beyond the end, in the padding of the last tile, return the last entry.
        """
        batch = array.shape[: array.ndim - len(self.shape)]
        entries = jnp.asarray(array).reshape(*batch, self.total)
        if not self.is_all:
            entries = jnp.take(entries, self.array_index.reshape(-1), axis=-1, mode="clip")
        entries = entries[..., None] if self.side == "query" else entries[..., None, :]
        return entries[..., None, :, :] if batch else entries  # batch entries get a head axis of one

    def cut(self, array: jax.Array, axis: int) -> jax.Array:
        """The slice of a flattened axis at these positions; an axis of size 1 stays."""
        if array.shape[axis] == 1 or self.length == array.shape[axis]:
            return array
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.length, axis, allow_negative_indices=False)

    def after(self, count: int, shape: tuple[int, ...]) -> BlockPositions:
        """These positions, counted from position `count` on along axes of lengths `shape`; earlier ones are below 0."""
        return _LaterPositions(shape, self.side, size=self.length, every=self, count=count)


@dataclass(frozen=True)
class _LaterPositions(BlockPositions):
    """The positions `every` without the first `count`."""

    every: BlockPositions = dataclasses.field(kw_only=True)
    count: int = dataclasses.field(kw_only=True)

    @property
    def is_all(self) -> bool:
        return False

    @cached_property
    def position(self) -> jax.Array:
        return self.every.position - self.count

    @cached_property
    def array_index(self) -> jax.Array:
        return self.every.array_index - self.count

    def cut(self, array: jax.Array, axis: int) -> jax.Array:
        """The entries of a flattened axis at these positions; positions before the first return the first entry."""
        if array.shape[axis] == 1:
            return array
        return jnp.take(array, self.array_index.reshape(-1), axis=axis, mode="clip")


@register
@dataclass(frozen=True, eq=False)
class OperandPositions:
    """The positions of all queries, or of all keys, of a problem; by default 0, 1, 2...

    Attributes:
      shape: lengths of the attention axes.
      side: "query" or "key".
      first: the flat position of the first entry where the operand is a slice along its axes; None: 0.
      size: how many entries a slice has; None: all.
      explicit: integers that stand for the positions, see `BlockPositions`; None: none do.
    """

    shape: tuple[int, ...] = dataclasses.field(metadata=_STATIC)
    side: str = dataclasses.field(metadata=_STATIC)
    first: jax.Array | None = None
    size: int | None = dataclasses.field(default=None, metadata=_STATIC)
    explicit: Array | None = None

    @property
    def length(self) -> int:
        return math.prod(self.shape) if self.size is None else self.size

    @property
    def is_implicit(self) -> bool:
        """Whether the positions are 0, 1, 2..., so that static values decide what a mask does to a whole tile."""
        return self.first is None and self.explicit is None

    def block(self, start: int | jax.Array = 0, size: int | None = None) -> BlockPositions:
        """Those of `size` entries from the entry `start` on; by default of all."""
        first = start if self.first is None else self.first + start
        return BlockPositions(self.shape, self.side, first, self.length if size is None else size, self.explicit)

    def contains(self, block: BlockPositions) -> jax.Array:
        """Which entries of a block are among these, and not padding after them."""
        end = self.length if self.first is None else self.first + self.length
        return block.array_index < end

    def padded_length(self, length: int) -> int:
        """How long an array of all positions must be for blocks of a slice that was padded to `length`."""
        return length if self.first is None else math.prod(self.shape) - self.length + length
