"""Masks: frozen values that say which query position may attend which key position.

A mask knows no implementation and carries no lengths; it answers from positions. `True` means attend, everywhere.
`&`, `|` and `~` compose masks. Python ints inside a mask are static; arrays are traced, so other values (lengths,
segment ids, offsets) never recompile. `mask.as_array(query_shape, key_shape)` is the definition of each kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib import _axes
from attnlib._mask import (
    Folded,
    Mask,
    Shapes,
    ahead,
    boolean,
    check_per_batch,
    check_positions,
    integer,
    integers,
    per_batch,
    set_fields,
    static_int,
    widened,
)
from attnlib._positions import Positions
from attnlib._sparse_masks import BlockLocal, BlockSparse, Dilated, Neighborhood
from attnlib._tiles import Kinds, Ranges, before, kinds
from attnlib._types import Array
from attnlib._words import called

__all__ = [
    "BlockLocal",
    "BlockSparse",
    "Causal",
    "Dense",
    "Dilated",
    "KeyPadding",
    "Lengths",
    "Mask",
    "Neighborhood",
    "Predicate",
    "Prefix",
    "QueryPadding",
    "Segments",
    "SlidingWindow",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Key position <= query position + offset (top-left aligned where the lengths differ).

    Args:
      offset: how far the queries are ahead of the keys, e.g. the number of cached keys in decoding. An int is static;
        an int array `()` or `(*batch,)` is traced.
      axis: with several attention axes, the one (by its index among `attention_axes`) along which to be causal;
        None compares flat positions in row-major order.
    """

    offset: int | Array = 0
    axis: int | None = None

    def __post_init__(self) -> None:
        set_fields(self, offset=integer(self.offset, "Causal offset"), axis=static_int(self.axis, "Causal axis"))

    def at(self, query: Positions, key: Positions) -> jax.Array:
        if self.axis is None:
            query_index, key_index = query.index, key.index
        else:
            query_index, key_index = query.coordinates[self.axis], key.coordinates[self.axis]
        return key_index <= ahead(query_index, per_batch(self.offset))

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        if not isinstance(self.offset, int):
            return super().tile(query, key)
        if self.axis is None:
            query_first, query_last, key_first, key_last = query.first, query.last, key.first, key.last
        else:
            (query_first, query_last), (key_first, key_last) = query.along(self.axis), key.along(self.axis)
        return kinds(empty=key_first > query_last + self.offset, full=key_last <= query_first + self.offset)

    def check(self, shapes: Shapes) -> None:
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
      left: how many earlier keys a query sees; None: all of them.
      right: how many later keys a query sees; None: all of them.
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        set_fields(
            self,
            left=static_int(self.left, "SlidingWindow left", least=0),
            right=static_int(self.right, "SlidingWindow right", least=0),
        )

    def at(self, query: Positions, key: Positions) -> jax.Array:
        inside = jnp.ones((1, 1), bool)
        if self.left is not None:
            inside = inside & (key.index >= query.index - self.left)
        if self.right is not None:
            inside = inside & (key.index <= ahead(query.index, self.right))
        return inside

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        empty: Any = np.False_
        full: Any = np.True_
        if self.left is not None:
            empty = empty | (key.last < query.first - self.left)
            full = full & (key.first >= query.last - self.left)
        if self.right is not None:
            empty = empty | (key.first > query.last + self.right)
            full = full & (key.last <= query.first + self.right)
        return kinds(empty, full)


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Key position < length: with `Causal() | Prefix(length)` the prefix language model (Raffel et al. 2020).

    Args:
      length: an int (static) or an int array `()` or `(*batch,)` (traced).
    """

    length: int | Array

    def __post_init__(self) -> None:
        set_fields(self, length=integer(self.length, "Prefix length"))

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return key.index < per_batch(self.length)

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        return before(key, self.length)

    def check(self, shapes: Shapes) -> None:
        check_per_batch(self.length, "Prefix length", shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """Positions < length are real, the rest is padding (flat row-major positions).

    Args:
      query: real query positions, an int or int array `()` or `(*batch,)`; None: all. Padded queries attend nothing.
      key: real key positions, likewise. Padded keys are attended by none.
    """

    query: int | Array | None = None
    key: int | Array | None = None

    def __post_init__(self) -> None:
        for side in ("query", "key"):
            value = getattr(self, side)
            set_fields(self, **{side: None if value is None else integer(value, f"Lengths {side}")})

    def at(self, query: Positions, key: Positions) -> jax.Array:
        real = jnp.ones((1, 1), bool)
        if self.query is not None:
            real = real & (query.index < per_batch(self.query))
        if self.key is not None:
            real = real & (key.index < per_batch(self.key))
        return real

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        return np.minimum(before(query, self.query), before(key, self.key))

    def check(self, shapes: Shapes) -> None:
        check_per_batch(self.query, "Lengths query", shapes)
        check_per_batch(self.key, "Lengths key", shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class KeyPadding(Mask):
    """Keys that are real: bool `(*batch, *key axes)` or `(*key axes,)`, True = real."""

    mask: Array

    def __post_init__(self) -> None:
        set_fields(self, mask=boolean(self.mask, "KeyPadding mask"))

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return key.take(self.mask)

    def check(self, shapes: Shapes) -> None:
        check_positions(self.mask, "KeyPadding mask", shapes.batch, shapes.key, "key")


@dataclasses.dataclass(frozen=True, eq=False)
class QueryPadding(Mask):
    """Queries that are real: bool `(*batch, *query axes)` or `(*query axes,)`, True = real; others attend nothing."""

    mask: Array

    def __post_init__(self) -> None:
        set_fields(self, mask=boolean(self.mask, "QueryPadding mask"))

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return query.take(self.mask)

    def check(self, shapes: Shapes) -> None:
        check_positions(self.mask, "QueryPadding mask", shapes.batch, shapes.query, "query")


@dataclasses.dataclass(frozen=True, eq=False)
class Segments(Mask):
    """Positions with equal ids attend each other: packed documents (Krell et al. 2021).

    Args:
      query_ids: int `(*batch, *query axes)` or `(*query axes,)`.
      key_ids: likewise for the keys; None: the same as `query_ids`.
      padding_id: a position with this id neither attends nor is attended; None: there is no such id.
    """

    query_ids: Array
    key_ids: Array | None = None
    padding_id: int | Array | None = None

    def __post_init__(self) -> None:
        set_fields(self, query_ids=integers(self.query_ids, "Segments query_ids"))
        if self.key_ids is not None:
            set_fields(self, key_ids=integers(self.key_ids, "Segments key_ids"))
        if self.padding_id is not None:
            set_fields(self, padding_id=integer(self.padding_id, "Segments padding_id"))
            if np.ndim(self.padding_id) != 0:
                raise ValueError(f"Segments padding_id must be one integer; got shape {np.shape(self.padding_id)}.")

    def at(self, query: Positions, key: Positions) -> jax.Array:
        query_ids = query.take(widened(self.query_ids))
        key_ids = key.take(widened(self.query_ids if self.key_ids is None else self.key_ids))
        with jax.numpy_dtype_promotion("standard"):  # ids are of the user's dtypes, each of its own
            same = query_ids == key_ids
            return same if self.padding_id is None else same & (query_ids != widened(self.padding_id))

    def check(self, shapes: Shapes) -> None:
        check_positions(self.query_ids, "Segments query_ids", shapes.batch, shapes.query, "query")
        if self.key_ids is not None:
            check_positions(self.key_ids, "Segments key_ids", shapes.batch, shapes.key, "key")
        elif shapes.query != shapes.key:
            raise ValueError(
                f"Segments needs key_ids where query and key lengths differ; got query axes {shapes.query} and key "
                f"axes {shapes.key} with key_ids=None."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Any bool array: of the rank of the weights `(*batch, N, *query axes, *key axes)` with ones where it broadcasts,
    or of at most the number of query and key axes."""

    array: Array

    def __post_init__(self) -> None:
        set_fields(self, array=boolean(self.array, "mask"))

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return self.padded(query, key, (query.total, key.total)).at(query, key)

    def padded(self, query: Positions, key: Positions, sizes: tuple[int, int]) -> Mask:
        return Folded(_axes.pad_pairs(_axes.fold_pairs(self.array, query.shape, key.shape), sizes))

    def check(self, shapes: Shapes) -> None:
        _axes.check_pairs(self.array.shape, "mask", *shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class Predicate(Mask):
    """A mask from a function of positions.

    Args:
      fn: `fn(query_position, key_position) -> bool`, called with broadcastable integer arrays, or with tuples of them
        (one for each attention axis) where there are several attention axes. Static: pass the same function object
        to avoid recompilation.
    """

    fn: Callable[[Any, Any], Any]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"Predicate fn must be a function of (query_position, key_position); got {self.fn!r}.")

    def at(self, query: Positions, key: Positions) -> jax.Array:
        single = len(key.shape) == 1
        with called("Predicate"):
            result = jnp.asarray(self.fn(*(p.index if single else p.coordinates for p in (query, key))))
        if result.dtype != jnp.bool_:
            raise TypeError(f"Predicate fn must return bool (True = attend); got {result.dtype}.")
        return jnp.broadcast_to(result, jnp.broadcast_shapes(result.shape, (1, 1)))

    def check(self, shapes: Shapes) -> None:
        query, key = Positions(shapes.query, "query"), Positions(shapes.key, "key")
        shape = jax.eval_shape(lambda: self.at(query, key)).shape
        whole = (*shapes.batch, shapes.heads, query.total, key.total)
        aligned = zip(reversed(shape), reversed(whole), strict=False)
        if len(shape) > len(whole) or any(size not in (1, full) for size, full in aligned):
            raise ValueError(
                f"Predicate fn must return an array that broadcasts to (*batch, heads, queries, keys) = {whole}; got "
                f"shape {shape}."
            )
