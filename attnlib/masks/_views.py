"""Masks that the engine makes of a user's: padded, at explicit positions, of a run of the queries."""

from __future__ import annotations

import dataclasses

import jax

from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape
from attnlib._core.block_positions import BlockPositions, QuerySlice
from attnlib.masks._base import Mask


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedDenseMask(Mask):
    """A dense mask on flat positions `(..., T | 1, S | 1)`, possibly padded at their ends; made by `Dense.padded`."""

    array: jax.Array

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return key.cut(query.cut(self.array, -2), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class RepositionedMask(Mask):
    """A mask at explicit positions, or all pairs; a position below 0 neither attends nor is attended."""

    mask: Mask | None
    query_positions: Array | None
    key_positions: Array | None

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        query, key = query.at_positions(self.query_positions), key.at_positions(self.key_positions)
        real = (query.position >= 0) & (key.position >= 0)
        return real if self.mask is None else real & self.mask.evaluate(query, key)

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        mask = None if self.mask is None else self.mask.pad_to(query, key, sizes)
        return RepositionedMask(mask, self.query_positions, self.key_positions)

    def check(self, shapes: AttentionShape) -> None:
        if self.mask is not None:
            self.mask.check(shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class QuerySliceMask(Mask):
    """A mask where the queries are a run of those that it speaks of."""

    mask: Mask
    run: QuerySlice

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return self.mask.evaluate(self.run.of(query), key)

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        query = self.run.of(query)  # the run's last tile may reach so far beyond the last query
        return QuerySliceMask(self.mask.pad_to(query, key, (query.total + sizes[0], sizes[1])), self.run)
