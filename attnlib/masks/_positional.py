"""Masks computed from positions: causal, windows, prefixes, lengths, user functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape, align_ranks, broadcasts
from attnlib._core.block_positions import BlockPositions
from attnlib._core.suggestions import explains_callback
from attnlib._core.tile_kinds import TileKinds, TileRanges, classify, tiles_below
from attnlib._core.validation import (
    check_int,
    check_integer,
    check_per_batch,
    check_per_head,
    expand_per_batch,
    expand_per_head,
    is_array,
    saturating_add,
)
from attnlib.masks._base import Mask, all_of, set_fields


@dataclasses.dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Key position <= query position + offset. Position 0 is the first query and the first key.

    Args:
      offset: the position of the first query, e.g. the number of cached keys in decoding. An int is static; an int
        array `()` or `(*batch,)` is traced.
      axis: the attention axis to compare along, as an index into `attention_axes`; None: flat row-major positions.
    """

    offset: int | Array = 0
    axis: int | None = None

    def __post_init__(self) -> None:
        offset, axis = check_integer(self.offset, "Causal offset"), check_int(self.axis, "Causal axis", optional=True)
        set_fields(self, offset=offset, axis=axis)

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        if self.axis is None:
            query_index, key_index = query.position, key.position
        else:
            query_index, key_index = query.coordinates[self.axis], key.coordinates[self.axis]
        last, key_index = align_ranks(saturating_add(query_index, expand_per_batch(self.offset)), key_index)
        return key_index <= last

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        if not isinstance(self.offset, int):
            return super().classify_tiles(query, key)
        if self.axis is None:
            query_first, query_last, key_first, key_last = query.first, query.last, key.first, key.last
        else:
            (query_first, query_last), (key_first, key_last) = query.along_axis(self.axis), key.along_axis(self.axis)
        return classify(empty=key_first > query_last + self.offset, full=key_last <= query_first + self.offset)

    def check(self, shapes: AttentionShape) -> None:
        check_per_batch(self.offset, "Causal offset", shapes)
        axes = len(shapes.key)
        if self.axis is not None and not -axes <= self.axis < axes:
            raise ValueError(
                f"Causal axis must be one of the {axes} attention axes ({-axes}..{axes - 1}); got {self.axis}."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class SlidingWindow(Mask):
    """Query position - left <= key position <= query position + right, in flat row-major positions.

    Args:
      left: the number of earlier keys that a query sees; None: all. An int is static; an int array `()` or `(N,)`, one
        for each query head, is traced. A number below 0 in an array leaves out the query's own key too.
      right: the number of later keys that a query sees, likewise.

    Example: windows for each head, and the tiles beyond the largest window are skipped.

      >>> import jax.numpy as jnp
      >>> from attnlib import masks
      >>> windows = jnp.array([4, 16, 64])
      >>> mask = masks.SlidingWindow(windows, 0) & masks.SlidingWindow(64, 0)
    """

    left: int | Array | None
    right: int | Array | None

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            name, length = f"SlidingWindow {side}", getattr(self, side)
            if is_array(length) or isinstance(length, (list, tuple)):
                length = check_integer(length, name)
            if not is_array(length):
                length = check_int(length, name, minimum=0, optional=True)
            set_fields(self, **{side: length})

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        sides = []
        if isinstance(self.left, int):
            sides.append(key.position >= query.position - self.left)
        elif self.left is not None:
            key_position, first = align_ranks(key.position, saturating_add(query.position, -expand_per_head(self.left)))
            sides.append(key_position >= first)
        if self.right is not None:
            key_position, last = align_ranks(key.position, saturating_add(query.position, expand_per_head(self.right)))
            sides.append(key_position <= last)
        return all_of(*sides)

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        empty: Any = np.False_
        full: Any = np.True_
        if isinstance(self.left, int):
            empty = empty | (key.last < query.first - self.left)
            full = full & (key.first >= query.last - self.left)
        elif self.left is not None:
            full = np.False_
        if isinstance(self.right, int):
            empty = empty | (key.first > query.last + self.right)
            full = full & (key.last <= query.first + self.right)
        elif self.right is not None:
            full = np.False_
        return classify(empty, full)

    def check(self, shapes: AttentionShape) -> None:
        check_per_head(self.left, "SlidingWindow left", shapes)
        check_per_head(self.right, "SlidingWindow right", shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Key position < length. `Causal() | Prefix(length)` is the prefix language model (Raffel et al. 2020).

    Args:
      length: an int (static) or an int array `()` or `(*batch,)` (traced).
    """

    length: int | Array

    def __post_init__(self) -> None:
        set_fields(self, length=check_integer(self.length, "Prefix length"))

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return _before(key, self.length)

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        return tiles_below(key, self.length)

    def check(self, shapes: AttentionShape) -> None:
        check_per_batch(self.length, "Prefix length", shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """Flat row-major positions < length. Later positions are padding.

    Args:
      query: the number of real queries, an int or int array `()` or `(*batch,)`; None: all. Padding attends nothing.
      key: the number of real keys, likewise. No query attends padding.
    """

    query: int | Array | None = None
    key: int | Array | None = None

    def __post_init__(self) -> None:
        for side in ("query", "key"):
            set_fields(self, **{side: check_integer(getattr(self, side), f"Lengths {side}", optional=True)})

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        sides = (query, self.query), (key, self.key)
        return all_of(*(_before(positions, length) for positions, length in sides if length is not None))

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        return np.minimum(tiles_below(query, self.query), tiles_below(key, self.key))

    def check(self, shapes: AttentionShape) -> None:
        check_per_batch(self.query, "Lengths query", shapes)
        check_per_batch(self.key, "Lengths key", shapes)


def _before(positions: BlockPositions, length: int | Array) -> jax.Array:
    position, end = align_ranks(positions.position, expand_per_batch(length))
    return position < end


@dataclasses.dataclass(frozen=True, eq=False)
class Predicate(Mask):
    """A function of positions as a mask.

    Args:
      fn: `fn(query_position, key_position) -> bool`, called with broadcastable integer arrays. With several attention
        axes, each position is a tuple of one array for each axis. The function is static: pass the same function
        object to avoid recompilation.
    """

    fn: Callable[[Any, Any], Any]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"Predicate fn must be a function of (query_position, key_position); got {self.fn!r}.")

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        one_axis = len(key.shape) == 1
        with explains_callback("Predicate"):
            result = jnp.asarray(self.fn(*(p.position if one_axis else p.coordinates for p in (query, key))))
        if result.dtype != jnp.bool_:
            raise TypeError(f"Predicate fn must return bool (True = attend); got {result.dtype}.")
        return jnp.broadcast_to(result, jnp.broadcast_shapes(result.shape, (1, 1)))

    def check(self, shapes: AttentionShape) -> None:
        def evaluate() -> jax.Array:  # makes the positions, which cache arrays of the trace that they are used in
            return self.evaluate(BlockPositions(shapes.query, "query"), BlockPositions(shapes.key, "key"))

        shape = jax.eval_shape(evaluate).shape
        weights = (*shapes.batch, shapes.heads, math.prod(shapes.query), math.prod(shapes.key))
        if not broadcasts(shape, weights):
            raise ValueError(
                f"Predicate fn must return an array that broadcasts to (*batch, heads, queries, keys) = {weights}; got "
                f"shape {shape}."
            )
