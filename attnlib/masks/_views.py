"""Masks that the engine makes of a user's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax

from attnlib._core.block_positions import BlockPositions
from attnlib.masks._base import Mask


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedDenseMask(Mask):
    """A dense mask on flat positions `(..., T | 1, S | 1)`, possibly padded at their ends; made by `Dense.pad_to`."""

    array: jax.Array
    entries: ClassVar[Mapping[str, str]] = {"array": "pairs"}

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return key.cut(query.cut(self.array, -2), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class ExplicitPositions(Mask):
    """Where positions are explicit, one below 0 neither attends nor is attended."""

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return (query.position >= 0) & (key.position >= 0)
