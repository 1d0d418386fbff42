"""Classification of (query, key) tiles by a mask: EMPTY, FULL, or PARTIAL, which needs the mask of each pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from attnlib._core.block_positions import OperandPositions
    from attnlib.masks import Mask

EMPTY, PARTIAL, FULL = 0, 1, 2  # so that `&` is min, `|` is max and `~` is 2 - kind

TileKinds: TypeAlias = np.ndarray  # of EMPTY, PARTIAL, FULL, broadcastable to (query tiles, key tiles)


@dataclass(frozen=True)
class TileRanges:
    """The positions of all tiles along one side: runs of consecutive flat positions.

    Query tiles are columns `(tiles, 1)`, and key tiles are rows `(1, tiles)`.

    Attributes:
      first: the first flat position of each tile.
      last: the last flat position of each tile.
      shape: lengths of the attention axes.
    """

    first: np.ndarray
    last: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], size: int, side: str, total: int | None = None) -> TileRanges:
        """All runs of `size` of the first `total` positions (None: of all), the last one cut at the end."""
        total = math.prod(shape) if total is None else total
        first = np.arange(0, total, size)
        last = np.minimum(first + size, total) - 1
        return cls(first[:, None], last[:, None], shape) if side == "query" else cls(first[None], last[None], shape)

    def along_axis(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """The least and greatest coordinates along an attention axis; the bounds of the axis if a tile wraps around."""
        stride = math.prod(self.shape[axis + 1 :] if axis != -1 else ())
        size = self.shape[axis]
        whole = self.first // (stride * size) != self.last // (stride * size)
        least, greatest = self.first // stride % size, self.last // stride % size
        return np.where(whole, 0, least), np.where(whole, size - 1, greatest)


def classify(empty: np.ndarray | bool, full: np.ndarray | bool) -> TileKinds:
    """EMPTY where `empty`, FULL where `full`, else PARTIAL; one kind for all tiles is an array (1, 1)."""
    return np.atleast_2d(np.where(empty, EMPTY, np.where(full, FULL, PARTIAL)))


def tiles_below(positions: TileRanges, length: Any) -> TileKinds:
    """The kinds of tiles in a mask of positions below a length: all FULL if None, all PARTIAL if traced."""
    if length is None:
        return classify(empty=False, full=True)
    if not isinstance(length, int):
        return classify(empty=False, full=False)
    return classify(empty=positions.first >= length, full=positions.last < length)


def cells_in_tiles(table: np.ndarray, query: TileRanges, key: TileRanges, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(how many True cells of a table each tile meets, how many cells). A cell has `size` queries and `size` keys.

    There is no cell beyond the table, but it counts among the cells.
    """
    sums = np.pad(table.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # number of True above a row and left of a column
    (first, end), (key_first, key_end) = ((tiles.first // size, tiles.last // size + 1) for tiles in (query, key))
    (top, bottom), (left, right) = (
        (np.minimum(start, count), np.minimum(stop, count))
        for start, stop, count in ((first, end, table.shape[0]), (key_first, key_end, table.shape[1]))
    )
    count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return count, (end - first) * (key_end - key_first)


def tile_kinds(
    mask: Mask | None, query: OperandPositions, key: OperandPositions, tile: tuple[int, int]
) -> tuple[TileKinds, np.ndarray]:
    """The kind of each tile, and its number of pairs, both `(query tiles, key tiles)`.

    A padded tile at the end is never FULL, because its padding is masked.
    """
    rows, columns = (
        TileRanges.of(side.shape, size, side.side, side.length) for side, size in zip((query, key), tile, strict=True)
    )
    pairs = (rows.last - rows.first + 1) * (columns.last - columns.first + 1)
    kinds = np.where(pairs < tile[0] * tile[1], PARTIAL, FULL)
    if mask is None:
        return kinds, pairs
    known = query.is_implicit and key.is_implicit
    return np.minimum(kinds, mask.classify_tiles(rows, columns) if known else PARTIAL), pairs


def key_spans(mask: Mask | None, query: OperandPositions, key: OperandPositions, queries: int) -> np.ndarray:
    """(first key, last key + 1) for each block of so many queries, from the first to the last that the mask leaves.

    They are multiples of 64, except for the end of all keys. A block that attends nothing has (0, 0).
    """
    side = 64
    attends = tile_kinds(mask, query, key, (queries, side))[0] != EMPTY
    first = np.argmax(attends, 1) * side
    last = (attends.shape[1] - np.argmax(attends[:, ::-1], 1)) * side
    return np.where(attends.any(1)[:, None], np.stack([first, np.minimum(last, key.length)], 1), 0)
