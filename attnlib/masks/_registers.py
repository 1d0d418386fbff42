"""Registers: positions before those of a grid, which see all and are seen by all."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import max_dim

from attnlib._core.axes import AttentionShape, align_ranks
from attnlib._core.block_positions import BlockPositions
from attnlib._core.sizes import decide
from attnlib._core.tile_kinds import FULL, PARTIAL, TileKinds, TileRanges, classify
from attnlib._core.validation import check_int, check_int_or_ints, per_axis
from attnlib.masks._arrays import as_mask
from attnlib.masks._base import Mask, set_fields


@dataclasses.dataclass(frozen=True, eq=False)
class Registers(Mask):
    """Positions before all others that every query sees, and that see every key (Darcet et al. 2024); `mask` is for the
    rest.

    The first `keys` keys and the first `queries` queries of one flat attention axis are registers, such as class
    tokens, text tokens beside an image, or learned memory. The other positions count from 0 in `mask`.

    Args:
      keys: the number of keys that are registers.
      mask: a Mask or a bool array over the other queries and keys; None: all of their pairs attend.
      queries: the number of queries that are registers; default: keys. 0 is for keys without queries of their own.
      grid: the lengths of the axes over which the other positions are laid out in row-major order, for masks of several
        axes; default: one axis.

    Example: two registers before the pixels of an image of 3 x 4.

      >>> import jax.numpy as jnp, attnlib
      >>> from attnlib import masks
      >>> mask = masks.Registers(2, masks.Neighborhood((3, 3)), grid=(3, 4))
      >>> x = jnp.ones((1, 2 + 3 * 4, 2, 8))
      >>> attnlib.dot_product_attention(x, x, x, mask=mask).shape
      (1, 14, 2, 8)
    """

    keys: int
    mask: Any = None
    queries: int | None = dataclasses.field(default=None, kw_only=True)
    grid: int | tuple[int, ...] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        set_fields(self, keys=check_int(self.keys, "Registers keys", minimum=0), mask=as_mask(self.mask))
        set_fields(self, queries=check_int(self.queries, "Registers queries", minimum=0, optional=True))
        if self.grid is not None:
            set_fields(self, grid=check_int_or_ints(self.grid, "Registers grid", minimum=1))

    @property
    def _counts(self) -> tuple[int, int]:
        """The number of registers among the queries and among the keys."""
        return self.keys if self.queries is None else self.queries, self.keys

    def _shape(self, shape: Sequence[int], registers: int) -> tuple[int, ...]:
        """The lengths of the axes of the positions after the registers."""
        return (max_dim(math.prod(shape) - registers, 0),) if self.grid is None else per_axis(self.grid, 1)

    @staticmethod
    def _covers(total: int, registers: int) -> bool:
        """Whether all positions of a side are registers, so that every pair has one."""
        return decide(lambda: total <= registers, otherwise=False)

    def _inner(self, *sides: BlockPositions) -> list[BlockPositions]:
        """The positions of a query and a key block, counted after the registers."""
        return [
            side.after(count, self._shape(side.shape, count))
            for side, count in zip(sides, self._counts, strict=True)
        ]  # fmt: skip

    def closure_converted(self, shapes: AttentionShape) -> Mask:
        query, key = (
            self._shape(side, count) for side, count in zip((shapes.query, shapes.key), self._counts, strict=True)
        )
        return super().closure_converted(shapes._replace(query=query, key=key))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        sides = list(zip((query, key), self._counts, strict=True))
        if self.mask is None or any(side.explicit is None and self._covers(side.total, count) for side, count in sides):
            return jnp.ones((1, 1), bool)
        registers = [side.position < count for side, count in sides if count]
        blocks = align_ranks(self.mask.evaluate(*self._inner(query, key)), *registers)
        return functools.reduce(operator.or_, blocks)

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        if self.mask is None:
            return classify(empty=False, full=True)
        sides = list(zip((query, key), self._counts, strict=True))
        shapes = [self._shape(side.shape, count) for side, count in sides]
        if any(self._covers(math.prod(side.shape), count) for side, count in sides):
            return classify(empty=False, full=True)
        kinds = self.mask.classify_tiles(
            *(
                TileRanges(np.maximum(side.first - count, 0), np.maximum(side.last - count, 0), shape)
                for (side, count), shape in zip(sides, shapes, strict=True)
            )
        )
        for side, count in sides:
            kinds = np.where(side.first < count, np.maximum(kinds, PARTIAL), kinds)
        for side, count in sides:
            kinds = np.where(side.last < count, FULL, kinds)
        return kinds

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        if self.mask is None:
            return self
        inner = self._inner(query, key)
        return dataclasses.replace(self, mask=self.mask.pad_to(*inner, (inner[0].total, inner[1].total)))

    def check(self, shapes: AttentionShape) -> None:
        if len(shapes.key) != 1:
            raise ValueError(
                f"Registers are positions of one attention axis; there are {len(shapes.key)}. Flatten the axes of "
                "query, key and value into one, concatenate the registers before them, and pass Registers(..., "
                "grid=lengths of the axes)."
            )
        if self.grid is not None:
            expected = tuple(math.prod(per_axis(self.grid, 1)) + count for count in self._counts)
            if decide(lambda: (shapes.query[0], shapes.key[0]) != expected, otherwise=False):
                raise ValueError(
                    f"Registers with grid={self.grid} need {expected[0]} queries and {expected[1]} keys, those of the "
                    f"grid and {self._counts[0]} and {self._counts[1]} registers; got {shapes.query[0]} and "
                    f"{shapes.key[0]}."
                )
        if self.mask is not None:
            query, key = (
                self._shape(side, count) for side, count in zip((shapes.query, shapes.key), self._counts, strict=True)
            )
            self.mask.check(shapes._replace(query=query, key=key))
