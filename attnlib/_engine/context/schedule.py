"""Which tiles of keys each device needs, and in which turns it gets them.

All devices run the same program. What a static mask makes of a tile depends on the device of the queries and on that of
the keys, so the program looks the kind up in a table. In turn s a device computes with the keys of the device that is s
before it, and turns in which no device needs any keys are left out.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import NamedTuple

import numpy as np

from attnlib._core.context import Layout
from attnlib._core.tile_kinds import EMPTY, FULL, PARTIAL, TileRanges
from attnlib.masks._base import Mask


class Turn(NamedTuple):
    """What a device computes with keys of one other device."""

    shift: int  # how far before the device itself the device of the keys is
    first: int  # the first of its tiles of keys that a device needs
    end: int  # the end of these tiles


@dataclasses.dataclass(frozen=True)
class Schedule:
    """All of it is static: equal schedules are equal programs.

    Attributes:
      queries: which positions of the queries each device holds.
      keys: likewise of the keys; a single device where each gathers all keys.
      tile: (queries, keys) of a tile.
      kinds: the bytes of `table`.
    """

    queries: Layout
    keys: Layout
    tile: tuple[int, int]
    kinds: bytes

    @classmethod
    def of(
        cls,
        mask: Mask | None,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        layouts: tuple[Layout, Layout],
        tile: tuple[int, int],
        implicit: bool,
    ) -> Schedule:
        """The schedule of a mask over all positions, whose axes are `shapes`."""
        rows, columns = (_ranges(*side) for side in zip(shapes, layouts, tile, strict=True))
        rows = dataclasses.replace(rows, first=rows.first.T, last=rows.last.T)
        full = (rows.last - rows.first + 1 == tile[0]) & (columns.last - columns.first + 1 == tile[1])
        kinds = np.where(full, FULL, PARTIAL)
        if mask is not None:
            kinds = np.minimum(kinds, mask.classify_tiles(rows, columns) if implicit else PARTIAL)
        shape = layouts[0].devices, -1, layouts[1].devices, kinds.shape[1] // layouts[1].devices
        table = kinds.astype(np.int8).reshape(shape).swapaxes(1, 2)
        return cls(*layouts, tile, table.tobytes())

    @cached_property
    def table(self) -> np.ndarray:
        """The kind of each tile, (devices of queries, devices of keys, tiles of queries, tiles of keys)."""
        counts = [
            side.parts * -(-side.part_length // size)
            for side, size in zip((self.queries, self.keys), self.tile, strict=True)
        ]
        return np.frombuffer(self.kinds, np.int8).reshape(self.queries.devices, self.keys.devices, *counts)

    @property
    def devices(self) -> int:
        return self.keys.devices

    def kinds_in(self, shift: int) -> np.ndarray:
        """The kinds of the tiles of each device and of the keys `shift` devices before it."""
        devices = np.arange(self.queries.devices)
        return self.table[devices, (devices - shift) % self.devices]

    @cached_property
    def turns(self) -> tuple[Turn, ...]:
        """The turns in which a device needs keys."""
        turns = []
        for shift in range(self.devices):
            needed = np.flatnonzero((self.kinds_in(shift) != EMPTY).any((0, 1)))
            if needed.size:
                turns.append(Turn(shift, int(needed[0]), int(needed[-1]) + 1))
        return tuple(turns)

    @property
    def is_direct(self) -> bool:
        """Whether all keys come from the device itself and from its neighbours, which send just what is needed."""
        return {turn.shift for turn in self.turns} <= {0, 1, self.devices - 1}

    @property
    def run(self) -> tuple[int, int]:
        """(first shift, number of turns) of the shortest run around the ring that has all turns."""
        shifts, n = [turn.shift for turn in self.turns], self.devices
        gaps = [(after - shift - 1) % n for shift, after in zip(shifts, [*shifts[1:], shifts[0]], strict=True)]
        longest = int(np.argmax(gaps))
        first, count = shifts[(longest + 1) % len(shifts)], n - gaps[longest]
        if count == n:
            return 0, n
        return (first if first < n - first else first - n), count

    def keys_of(self, turn: Turn) -> tuple[int, int]:
        """(first, end) of the keys that are sent for a turn; of all keys where a device holds two parts."""
        if self.keys.parts > 1:
            return 0, self.keys.local_length
        return turn.first * self.tile[1], min(turn.end * self.tile[1], self.keys.local_length)

    @property
    def keys_received(self) -> int:
        """How many keys a device receives in a forward pass."""
        if not self.turns:
            return 0
        if self.devices == 1:
            return self.keys.length - self.keys.length // self.queries.devices
        if self.is_direct:
            spans = [self.keys_of(turn) for turn in self.turns if turn.shift]
            return sum(end - first for first, end in spans)
        first, count = self.run
        return (count - 1 + (first != 0)) * self.keys.local_length

    @property
    def critical_path(self) -> int:
        """The tiles of the device that has most to do, turn by turn."""
        return sum(int((self.kinds_in(turn.shift) != EMPTY).sum((1, 2)).max()) for turn in self.turns)

    @property
    def tiles_computed(self) -> int:
        """The tiles of all devices."""
        return int((self.table != EMPTY).sum())


def _ranges(shape: tuple[int, ...], layout: Layout, size: int) -> TileRanges:
    """The positions of the tiles of all devices, device after device, as a row."""
    offsets = np.arange(0, layout.part_length, size)
    start = layout.numbers()[..., None] * layout.part_length
    first = (start + offsets).reshape(1, -1)
    last = (start + np.minimum(offsets + size, layout.part_length) - 1).reshape(1, -1)
    return TileRanges(first, last, shape)
