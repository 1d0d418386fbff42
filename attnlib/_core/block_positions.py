"""Positions: the places along the attention axes of a query or a key, as masks and modifiers see them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.pytree import register


@dataclass(frozen=True)
class BlockPositions:
    """The positions of a block: a run of consecutive flat positions over the attention axes.

    `position` is what masks compare. Query positions are a column `(size, 1)` and key positions a row `(1, size)`, so
    that a comparison of the two is already a block. `array_index` is where an entry stands in its array, whatever
    positions are explicit there.

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

    def at_positions(self, explicit: Array | None) -> BlockPositions:
        """The same run, whose positions are these integers."""
        return dataclasses.replace(self, explicit=explicit)

    @cached_property
    def position(self) -> jax.Array:
        """Flat positions, by default in row-major order; explicit ones of a batch are `(*batch, 1, T, 1)`."""
        return self.array_index if self.explicit is None else self.gather(self.explicit).astype(jnp.int32)

    @cached_property
    def array_index(self) -> jax.Array:
        """Places in the flattened array, in row-major order."""
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
            (self.position // np.int32(max(stride, 1))) % np.int32(max(size, 1))
            for stride, size in zip(strides, self.shape, strict=True)
        )

    def gather(self, array: Array) -> jax.Array:
        """Entries of `array (*batch, *shape)` at these positions, laid out against a block `(*batch, 1, T, S)`.

        Positions beyond the end, in the last tile, give the last entry: whoever pads leaves them out.
        """
        lead = array.shape[: array.ndim - len(self.shape)]
        run = jnp.asarray(array).reshape(*lead, self.total)
        if self.length != self.total:
            run = jnp.take(run, self.array_index.reshape(-1), axis=-1, mode="clip")
        run = run[..., None] if self.side == "query" else run[..., None, :]
        return run[..., None, :, :] if lead else run  # batch entries get a head axis of one

    def cut(self, array: jax.Array, axis: int) -> jax.Array:
        """The part of a flattened axis that these positions cover; an axis of one broadcasts and stays."""
        if array.shape[axis] == 1 or self.length == array.shape[axis]:
            return array
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.length, axis)


@register
@dataclass(frozen=True, eq=False)
class QuerySlice:
    """Where queries that are looked at alone stand among all queries: a run of them from `start`."""

    start: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def of(self, query: BlockPositions) -> BlockPositions:
        """Positions along the run as positions among all queries."""
        return BlockPositions(self.shape, "query", self.start + query.start, query.length)
