"""Masks that the engine makes of a user's: padded, at explicit positions, of a run of the queries."""

from __future__ import annotations

import dataclasses

import jax

from attnlib._core.array_types import Array
from attnlib._core.axes import Shapes
from attnlib._core.block_positions import Positions, Run
from attnlib.masks._base import Mask


@dataclasses.dataclass(frozen=True, eq=False)
class Folded(Mask):
    """A dense mask on flat positions `(..., T | 1, S | 1)`, possibly padded at their ends; made by `Dense.padded`."""

    array: jax.Array

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return key.cut(query.cut(self.array, -2), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Placed(Mask):
    """A mask at explicit positions, or all pairs; a position below 0 neither attends nor is attended."""

    mask: Mask | None
    query_positions: Array | None
    key_positions: Array | None

    def at(self, query: Positions, key: Positions) -> jax.Array:
        query, key = query.placed(self.query_positions), key.placed(self.key_positions)
        real = (query.index >= 0) & (key.index >= 0)
        return real if self.mask is None else real & self.mask.at(query, key)

    def padded(self, query: Positions, key: Positions, sizes: tuple[int, int]) -> Mask:
        mask = None if self.mask is None else self.mask.padded(query, key, sizes)
        return Placed(mask, self.query_positions, self.key_positions)

    def check(self, shapes: Shapes) -> None:
        if self.mask is not None:
            self.mask.check(shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class Along(Mask):
    """A mask where the queries are a run of those that it speaks of."""

    mask: Mask
    run: Run

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return self.mask.at(self.run.of(query), key)

    def padded(self, query: Positions, key: Positions, sizes: tuple[int, int]) -> Mask:
        query = self.run.of(query)  # the run's last tile may reach so far beyond the last query
        return Along(self.mask.padded(query, key, (query.total + sizes[0], sizes[1])), self.run)
