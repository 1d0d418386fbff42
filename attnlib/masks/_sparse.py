"""Masks of neighbours, of blocks and of steps, which know every tile they empty or fill. Public in `attnlib.masks`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape
from attnlib._core.block_positions import BlockPositions
from attnlib._core.tile_kinds import TileKinds, TileRanges, classify
from attnlib._core.validation import check_per_axis, check_static_int, check_static_ints, per_axis
from attnlib.masks._base import Mask, set_fields


@dataclasses.dataclass(frozen=True, eq=False)
class Neighborhood(Mask):
    """The `size` nearest keys of each query along every attention axis (Hassani et al. 2023, NATTEN).

    At a border the window is shifted inward, so that every query sees `size` keys an axis (all of them where the
    axis is shorter); `border="clip"` cuts it off instead. With a dilation of d a query sees only keys whose
    coordinate is congruent to its own modulo d. An even size reaches one further to the left.

    Args:
      size: keys per axis, an int or one for each attention axis.
      dilation: step between them, an int or one for each attention axis.
      border: "shift" or "clip".
    """

    size: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    border: str = "shift"

    def __post_init__(self) -> None:
        set_fields(
            self,
            size=check_static_ints(self.size, "Neighborhood size"),
            dilation=check_static_ints(self.dilation, "Neighborhood dilation"),
        )
        if self.border not in ("shift", "clip"):
            raise ValueError(f'Neighborhood border must be "shift" or "clip"; got {self.border!r}.')

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        axes = len(key.shape)
        near = jnp.ones((1, 1), bool)
        for axis, (size, dilation) in enumerate(
            zip(per_axis(self.size, axes), per_axis(self.dilation, axes), strict=True)
        ):
            place, key_place = query.coordinates[axis], key.coordinates[axis]
            first = self._first(place, key.shape[axis], size, dilation)
            inside = (key_place // dilation >= first) & (key_place // dilation < first + size)
            near = near & inside & (key_place % dilation == place % dilation)
        return near

    def _first(self, place: Any, length: int, size: int, dilation: int) -> Any:
        """Where the window of a query coordinate begins, in steps of the dilation."""
        first = place // dilation - size // 2
        if self.border == "shift":
            group = (length - place % dilation + dilation - 1) // dilation  # keys of the same residue
            numpy = np if isinstance(place, np.ndarray) else jnp
            first = numpy.maximum(numpy.minimum(first, group - size), 0)
        return first

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        axes = len(key.shape)
        empty: Any = np.False_
        full: Any = np.True_
        for axis, (size, dilation) in enumerate(
            zip(per_axis(self.size, axes), per_axis(self.dilation, axes), strict=True)
        ):
            first = self._first(np.arange(query.shape[axis]), key.shape[axis], size, dilation)
            least, greatest = first * dilation, (first + size) * dilation - 1  # keys that a query coordinate can reach
            (query_first, query_last), (key_first, key_last) = query.along_axis(axis), key.along_axis(axis)
            # Over a run of queries: bounds by running extremes from either end, exact where the window only moves on.
            reach_first = np.minimum.accumulate(least[::-1])[::-1][query_first]
            reach_last = np.maximum.accumulate(greatest)[query_last]
            empty = empty | (key_last < reach_first) | (key_first > reach_last)
            common_first = np.maximum.accumulate(least)[query_last]
            common_last = np.minimum.accumulate(greatest[::-1])[::-1][query_first]
            full = full & (dilation == 1) & (key_first >= common_first) & (key_last <= common_last)
        return classify(empty, full)

    def check(self, shapes: AttentionShape) -> None:
        check_per_axis(self.size, "Neighborhood size", shapes)
        check_per_axis(self.dilation, "Neighborhood dilation", shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLocal(Mask):
    """Positions are cut into blocks of `size`; a query sees its own block and some before and after it.

    Over several attention axes the blocks are boxes, as the windows of Swin (Liu et al. 2021); `before` and `after`
    then count along each axis.

    Args:
      size: positions in a block, an int or one for each attention axis. The last block may be shorter.
      before: how many earlier blocks a query sees; None: all of them, which is causal from block to block.
      after: how many later blocks a query sees; None: all of them.

    Example:
      >>> from attnlib import masks
      >>> masks.BlockLocal(2, before=1).as_array(5, 5).astype(int)
      Array([[1, 1, 0, 0, 0],
             [1, 1, 0, 0, 0],
             [1, 1, 1, 1, 0],
             [1, 1, 1, 1, 0],
             [0, 0, 1, 1, 1]], dtype=int32)
    """

    size: int | tuple[int, ...]
    before: int | None = 0
    after: int | None = 0

    def __post_init__(self) -> None:
        set_fields(
            self,
            size=check_static_ints(self.size, "BlockLocal size"),
            before=check_static_int(self.before, "BlockLocal before", least=0),
            after=check_static_int(self.after, "BlockLocal after", least=0),
        )

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        near = jnp.ones((1, 1), bool)
        for axis, size in enumerate(per_axis(self.size, len(key.shape))):
            block, key_block = query.coordinates[axis] // size, key.coordinates[axis] // size
            if self.before is not None:
                near = near & (block - key_block <= self.before)
            if self.after is not None:
                near = near & (key_block - block <= self.after)
        return near

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        empty: Any = np.False_
        full: Any = np.True_
        for axis, size in enumerate(per_axis(self.size, len(key.shape))):
            first, last = (place // size for place in query.along_axis(axis))
            key_first, key_last = (place // size for place in key.along_axis(axis))
            if self.before is not None:
                empty = empty | (key_last < first - self.before)
                full = full & (key_first >= last - self.before)
            if self.after is not None:
                empty = empty | (key_first > last + self.after)
                full = full & (key_last <= first + self.after)
        return classify(empty, full)

    def check(self, shapes: AttentionShape) -> None:
        check_per_axis(self.size, "BlockLocal size", shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class Dilated(Mask):
    """A query sees the keys that are a multiple of `step` away from it, along every attention axis.

    With a window it is a dilated window (Longformer, Beltagy et al. 2020), `Causal() & (SlidingWindow(step, 0) |
    Dilated(step))` is the strided pattern of the Sparse Transformer (Child et al. 2019), and with `BlockLocal` it is a
    part of LongNet's (Ding et al. 2023). Tiles are skipped only where they are shorter than the step; `Neighborhood`
    with a dilation, too, counts its keys in steps.

    Args:
      step: an int or one for each attention axis.

    Example:
      >>> from attnlib import masks
      >>> (masks.Dilated(2) & masks.Causal()).as_array(4, 4).astype(int)
      Array([[1, 0, 0, 0],
             [0, 1, 0, 0],
             [1, 0, 1, 0],
             [0, 1, 0, 1]], dtype=int32)
    """

    step: int | tuple[int, ...]

    def __post_init__(self) -> None:
        set_fields(self, step=check_static_ints(self.step, "Dilated step"))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        same = jnp.ones((1, 1), bool)
        for axis, step in enumerate(per_axis(self.step, len(key.shape))):
            same = same & (query.coordinates[axis] % step == key.coordinates[axis] % step)
        return same

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        empty: Any = np.False_
        full: Any = np.True_
        for axis, step in enumerate(per_axis(self.step, len(key.shape))):
            (first, last), (key_first, key_last) = query.along_axis(axis), key.along_axis(axis)
            nearest, farthest = key_first - last, key_last - first  # all distances between occur
            none = farthest // step * step < nearest
            empty = empty | none
            full = full & ((step == 1) | ((nearest == farthest) & ~none))
        return classify(empty, full)

    def check(self, shapes: AttentionShape) -> None:
        check_per_axis(self.step, "Dilated step", shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSparse(Mask):
    """A table says which blocks of keys each block of queries sees: any pattern of blocks, random ones as in BigBird
    (Zaheer et al. 2020) among them. Blocks are of flat row-major positions.

    The table is static, since it decides which tiles are skipped: another table is another program. Of a traced one
    make `Dense(jnp.repeat(jnp.repeat(table, size, 0), size, 1)[:T, :S])`.

    Args:
      blocks: a bool array `(ceil(T / size), ceil(S / size))`, or nested sequences, or rows of text such as "1001"; True
        or 1: all pairs of the block attend. It is kept as rows of text.
      size: positions in a block; the last one may be shorter.

    Example:
      >>> from attnlib import masks
      >>> masks.BlockSparse(["10", "11"], 2).as_array(3, 4).astype(int)
      Array([[1, 1, 0, 0],
             [1, 1, 0, 0],
             [1, 1, 1, 1]], dtype=int32)
    """

    blocks: Sequence[str] | Sequence[Sequence[bool]] | Array
    size: int

    def __post_init__(self) -> None:
        size = check_static_int(self.size, "BlockSparse size", least=1)
        if size is None:
            raise TypeError("BlockSparse size must be an int; got None.")
        set_fields(self, blocks=_rows(self.blocks), size=size)

    @property
    def _table(self) -> np.ndarray:
        return _table(tuple(self.blocks))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        place = query.position // self.size, key.position // self.size
        return jnp.asarray(self._table).at[place].get(mode="fill", fill_value=False)  # nothing attends beyond the table

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        table = self._table
        sums = np.pad(table.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # how many blocks are True before a row and a column
        (first, end), (key_first, key_end) = (
            (run.first // self.size, run.last // self.size + 1) for run in (query, key)
        )
        (top, bottom), (left, right) = (
            (np.minimum(start, count), np.minimum(stop, count))
            for start, stop, count in ((first, end, table.shape[0]), (key_first, key_end, table.shape[1]))
        )
        true = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return classify(empty=true == 0, full=true == (end - first) * (key_end - key_first))

    def check(self, shapes: AttentionShape) -> None:
        expected = tuple(max(-(-math.prod(axes) // self.size), 1) for axes in (shapes.query, shapes.key))
        if self._table.shape != expected:
            raise ValueError(
                f"BlockSparse blocks must have shape {expected} for query axes {shapes.query} and key axes "
                f"{shapes.key} in blocks of {self.size}; got {self._table.shape}."
            )


def _rows(blocks: Any) -> tuple[str, ...]:
    """A table as rows of text: hashable, and hashed once."""
    listed = isinstance(blocks, Sequence) and not isinstance(blocks, str)
    if listed and all(isinstance(row, str) and set(row) <= {"0", "1"} for row in blocks):
        rows = tuple(blocks)
    else:
        if isinstance(blocks, jax.core.Tracer):
            raise TypeError(
                "BlockSparse blocks must be known when the program is made, since it decides which tiles are skipped; "
                f"got {blocks}. Make it of a NumPy array outside jit, or use masks.Dense."
            )
        table = np.asarray(blocks)
        if table.dtype != np.bool_ or table.ndim != 2:
            raise TypeError(
                "BlockSparse blocks must be a bool array of rank 2, or rows of text of 0 and 1; got "
                f"{table.dtype}{list(table.shape)}."
            )
        rows = tuple("".join("01"[int(entry)] for entry in row) for row in table)
    if not rows or not rows[0] or len(set(map(len, rows))) != 1:
        raise ValueError(f"BlockSparse blocks must have rows of one length, at least one; got {rows!r}.")
    return rows


@functools.lru_cache(maxsize=16)
def _table(rows: tuple[Any, ...]) -> np.ndarray:
    return np.array([[entry == "1" for entry in row] for row in rows])
