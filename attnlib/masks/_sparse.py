"""Masks of neighbourhoods, blocks and steps, which classify tiles."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape
from attnlib._core.block_positions import BlockPositions
from attnlib._core.sizes import is_static
from attnlib._core.tile_kinds import TileKinds, TileRanges, cells_in_tiles, classify
from attnlib._core.validation import check_int, check_int_or_ints, check_per_axis, per_axis
from attnlib.masks._base import Mask, set_fields


@dataclasses.dataclass(frozen=True, eq=False)
class Neighborhood(Mask):
    """The `size` nearest keys of each query along every attention axis (Hassani et al. 2023, NATTEN).

    At a border, the window shifts inward, so that every query sees `size` keys per axis, or all if the axis is shorter;
    `border="clip"` cuts the window off instead. With dilation d, a query sees only keys whose coordinate equals its own
    coordinate modulo d. A window of even size has one more key on the left. With stride s, s consecutive queries share
    one window, that of their middle query (Hassani et al. 2025, GNA). Windows then move in steps, and more tiles are
    full or empty.

    Args:
      size: the number of keys per axis, an int or one for each attention axis.
      dilation: the step between these keys, an int or one for each attention axis.
      border: "shift" or "clip", or one for each attention axis.
      stride: the number of queries that share a window, at most size; an int or one for each attention axis. Queries of
        one window are a dilation apart. stride=size is attention within blocks if the blocks divide the axis.

    Example:
      >>> from attnlib import masks
      >>> masks.Neighborhood(3, stride=2).as_array(6, 6).astype(int)
      Array([[1, 1, 1, 0, 0, 0],
             [1, 1, 1, 0, 0, 0],
             [0, 0, 1, 1, 1, 0],
             [0, 0, 1, 1, 1, 0],
             [0, 0, 0, 1, 1, 1],
             [0, 0, 0, 1, 1, 1]], dtype=int32)
    """

    size: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    border: str | tuple[str, ...] = "shift"
    stride: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name in ("size", "dilation", "stride"):
            set_fields(self, **{name: check_int_or_ints(getattr(self, name), f"Neighborhood {name}", minimum=1)})
        borders = [self.border] if isinstance(self.border, str) else self.border
        if not isinstance(borders, Sequence) or not borders or not {*borders} <= {"shift", "clip"}:
            raise ValueError(
                f'Neighborhood border must be "shift" or "clip", or one of these for each axis; got {self.border!r}.'
            )
        if not isinstance(self.border, str):
            set_fields(self, border=tuple(self.border))
        longest = max(len(x) if isinstance(x, tuple) else 1 for x in (self.size, self.stride))
        for size, stride in zip(per_axis(self.size, longest), per_axis(self.stride, longest), strict=False):
            if stride > size:
                raise ValueError(
                    "Neighborhood stride must be at most size, or no query would see the keys between two windows; got "
                    f"stride={self.stride!r} and size={self.size!r}."
                )

    def _along_axes(self, axes: int) -> Iterator[tuple[int, _Window]]:
        """The number of each attention axis and the windows along it."""
        fields = self.size, self.dilation, self.border, self.stride
        return enumerate(map(_Window, *(per_axis(field, axes) for field in fields)))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        mask = jnp.ones((1, 1), bool)
        for axis, window in self._along_axes(len(key.shape)):
            query_coordinate, key_coordinate = query.coordinates[axis], key.coordinates[axis]
            first, dilation = window.start(query_coordinate, key.shape[axis]), window.dilation
            in_window = (key_coordinate // dilation >= first) & (key_coordinate // dilation < first + window.size)
            mask = mask & in_window & (key_coordinate % dilation == query_coordinate % dilation)
        return mask

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        empty: Any = np.False_
        full: Any = np.True_
        for axis, window in self._along_axes(len(key.shape)):
            start, dilation = window.start(np.arange(query.shape[axis]), key.shape[axis]), window.dilation
            first, last = start * dilation, (start + window.size) * dilation - 1  # keys in each query's window
            (query_first, query_last), (key_first, key_last) = query.along_axis(axis), key.along_axis(axis)
            # Running extremes bound the windows of the queries in a tile. They are exact if windows never move back.
            union_first = np.minimum.accumulate(first[::-1])[::-1][query_first]
            union_last = np.maximum.accumulate(last)[query_last]
            empty = empty | (key_last < union_first) | (key_first > union_last)
            common_first = np.maximum.accumulate(first)[query_last]
            common_last = np.minimum.accumulate(last[::-1])[::-1][query_first]
            full = full & (dilation == 1) & (key_first >= common_first) & (key_last <= common_last)
        return classify(empty, full)

    def check(self, shapes: AttentionShape) -> None:
        for name in ("size", "dilation", "border", "stride"):
            check_per_axis(getattr(self, name), f"Neighborhood {name}", shapes)


class _Window(NamedTuple):
    """The windows of a neighbourhood along one axis."""

    size: int
    dilation: int
    border: str
    stride: int

    def start(self, coordinate: Any, length: int) -> Any:
        """The first key in the window of a query coordinate, in steps of the dilation."""
        numpy = np if isinstance(coordinate, np.ndarray) else jnp
        leader = coordinate // self.dilation  # the query whose window this is
        if self.stride == 1 and self.border == "clip":
            return leader - self.size // 2
        group = (length - coordinate % self.dilation + self.dilation - 1) // self.dilation  # keys of this residue
        if self.stride > 1:  # the middle query of the stride, or its last one if the middle is beyond the keys
            middle = leader // self.stride * self.stride + self.stride // 2
            leader = numpy.minimum(middle, numpy.maximum(leader, group - 1))
        first = leader - self.size // 2
        return numpy.maximum(numpy.minimum(first, group - self.size), 0) if self.border == "shift" else first


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLocal(Mask):
    """Attention of each query to its own block of `size` positions, and to blocks before and after.

    With several attention axes the blocks are boxes, like the windows of Swin (Liu et al. 2021). `before` and `after`
    count blocks along each axis.

    Args:
      size: the number of positions in a block, an int or one for each attention axis. The last block may be shorter.
      before: the number of earlier blocks that a query sees; None: all, which is causal attention between blocks.
      after: the number of later blocks that a query sees; None: all.

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
            size=check_int_or_ints(self.size, "BlockLocal size", minimum=1),
            before=check_int(self.before, "BlockLocal before", minimum=0, optional=True),
            after=check_int(self.after, "BlockLocal after", minimum=0, optional=True),
        )

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        mask = jnp.ones((1, 1), bool)
        for axis, size in enumerate(per_axis(self.size, len(key.shape))):
            block, key_block = query.coordinates[axis] // size, key.coordinates[axis] // size
            if self.before is not None:
                mask = mask & (block - key_block <= self.before)
            if self.after is not None:
                mask = mask & (key_block - block <= self.after)
        return mask

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        empty: Any = np.False_
        full: Any = np.True_
        for axis, size in enumerate(per_axis(self.size, len(key.shape))):
            first, last = (coordinate // size for coordinate in query.along_axis(axis))
            key_first, key_last = (coordinate // size for coordinate in key.along_axis(axis))
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
    """Attention at distances that are multiples of `step`, along every attention axis.

    Together with `SlidingWindow` this is a dilated window (Longformer, Beltagy et al. 2020). `Causal() &
    (SlidingWindow(step, 0) | Dilated(step))` is the strided pattern of the Sparse Transformer (Child et al. 2019).
    Together with `BlockLocal` this is a part of the pattern of LongNet (Ding et al. 2023). Only tiles shorter than the
    step can be skipped.

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
        set_fields(self, step=check_int_or_ints(self.step, "Dilated step", minimum=1))

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
            nearest, farthest = key_first - last, key_last - first  # all distances from one to the other occur
            none = farthest // step * step < nearest
            empty = empty | none
            full = full & ((step == 1) | ((nearest == farthest) & ~none))
        return classify(empty, full)

    def check(self, shapes: AttentionShape) -> None:
        check_per_axis(self.step, "Dilated step", shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSparse(Mask):
    """Attention between blocks of flat row-major positions, by a table of block pairs, such as the random pattern of
    BigBird (Zaheer et al. 2020).

    The table is static, because it decides which tiles are skipped. Another table compiles another program. Write a
    traced table as `Dense(jnp.repeat(jnp.repeat(table, size, 0), size, 1)[:T, :S])`.

    Args:
      blocks: a bool array `(ceil(T / size), ceil(S / size))`, nested sequences, or rows of text such as "1001". True
        or 1: all pairs of the two blocks attend. The field stores rows of text.
      size: the number of positions in a block. The last block may be shorter.

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
        set_fields(self, blocks=_rows(self.blocks), size=check_int(self.size, "BlockSparse size", minimum=1))

    @property
    def _table(self) -> np.ndarray:
        return _table(tuple(self.blocks))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        block = query.position // self.size, key.position // self.size
        return jnp.asarray(self._table).at[block].get(mode="fill", fill_value=False)  # False beyond the table

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        count, cells = cells_in_tiles(self._table, query, key, self.size)
        return classify(empty=count == 0, full=count == cells)

    def check(self, shapes: AttentionShape) -> None:
        if not is_static(*shapes.query, *shapes.key):
            raise ValueError(
                f"BlockSparse blocks cover a number of positions; got the symbolic query axes {shapes.query} and key "
                f"axes {shapes.key}. Write numbers for them in jax.export.symbolic_shape, or pass a mask of positions, "
                "such as masks.BlockLocal or masks.Predicate."
            )
        expected = tuple(max(-(-math.prod(axes) // self.size), 1) for axes in (shapes.query, shapes.key))
        if self._table.shape != expected:
            raise ValueError(
                f"BlockSparse blocks must have shape {expected} for query axes {shapes.query} and key axes "
                f"{shapes.key} in blocks of {self.size}; got {self._table.shape}."
            )


def _rows(blocks: Any) -> tuple[str, ...]:
    """The table as rows of text, which are hashable. Python caches their hashes."""
    is_sequence = isinstance(blocks, Sequence) and not isinstance(blocks, str)
    if is_sequence and all(isinstance(row, str) and set(row) <= {"0", "1"} for row in blocks):
        rows = tuple(blocks)
    else:
        if isinstance(blocks, jax.core.Tracer):
            raise TypeError(
                "BlockSparse blocks must be known when the program is compiled, because they decide which tiles are "
                f"skipped; got {blocks}. Write BlockSparse(array, size) with a NumPy array, or use masks.Dense."
            )
        table = np.asarray(blocks)
        if table.dtype != np.bool_ or table.ndim != 2:
            raise TypeError(
                "BlockSparse blocks must be a bool array of rank 2, or rows of text of 0 and 1; got "
                f"{table.dtype}{list(table.shape)}."
            )
        rows = tuple("".join("01"[int(entry)] for entry in row) for row in table)
    if not rows or not rows[0] or len(set(map(len, rows))) != 1:
        raise ValueError(f"BlockSparse blocks must have at least one row and rows of equal length >= 1; got {rows!r}.")
    return rows


@functools.lru_cache(maxsize=16)
def _table(rows: tuple[Any, ...]) -> np.ndarray:
    return np.array([[entry == "1" for entry in row] for row in rows])
