"""What every mask is: the abstract `Mask`, its algebra, how it becomes a pytree, and checks of the values it holds."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._positions import Positions, Run
from attnlib._pytree import Pytree
from attnlib._tiles import FULL, Kinds, Ranges, kinds
from attnlib._types import Array
from attnlib._values import in_32_bits
from attnlib._words import untraced


class Shapes(NamedTuple):
    """What a mask is checked against: sizes of the batch axes, of heads, and of the attention axes on each side."""

    batch: tuple[int, ...]
    heads: int
    query: tuple[int, ...]
    key: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Mask(Pytree):
    """Which query positions may attend which key positions; abstract.

    A kind of mask implements `at(query, key)`, `tile(query, key)` where it knows whole tiles, and `check(shapes)` where
    it holds arrays. It is a pytree: arrays and masks in its fields are traced, plain values static.
    """

    static_types = (bool, int, type(None))

    def at(self, query: Positions, key: Positions) -> jax.Array:
        """The mask on a block: bool, broadcastable to `(*batch, N, T, S)`, True = attend."""
        raise NotImplementedError

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        """For each tile, whether the mask empties it, fills it, or is to be asked entry by entry (PARTIAL).

        It may say PARTIAL of an empty or a full tile, never the reverse. It decides the program, so it sees static
        values alone: where those do not decide, it says PARTIAL.
        """
        del query, key
        return kinds(empty=False, full=False)

    def padded(self, query: Positions, key: Positions, sizes: tuple[int, int]) -> Mask:
        """The same mask, with arrays of pairs folded and padded to `sizes` so that tiles can be cut from them."""
        del query, key, sizes
        return self

    def check(self, shapes: Shapes) -> None:
        """Raises ValueError where the arrays of this mask do not fit the operands."""

    def as_array(self, query_shape: int | Sequence[int], key_shape: int | Sequence[int]) -> jax.Array:
        """The mask as a bool array `(*query_shape, *key_shape)`, with `(*batch, 1 or N)` in front where it has them.

        Args:
          query_shape: length of each query attention axis (an int where there is one).
          key_shape: length of each key attention axis.

        Returns:
          A bool array that can itself be passed as `mask=`; True = attend.

        >>> from attnlib import masks
        >>> masks.Causal().as_array(2, 3).astype(int)
        Array([[1, 0, 0],
               [1, 1, 0]], dtype=int32)
        """
        query_shape, key_shape = _as_shape(query_shape, "query_shape"), _as_shape(key_shape, "key_shape")
        query, key = Positions(query_shape, "query"), Positions(key_shape, "key")
        block = self.at(query, key)
        block = jnp.broadcast_to(block, (*block.shape[:-2], query.total, key.total))
        return block.reshape(*block.shape[:-2], *query_shape, *key_shape)

    def plot(
        self,
        query_shape: int | Sequence[int],
        key_shape: int | Sequence[int],
        *,
        block_sizes: tuple[int, int] | None = None,
        ax: Any = None,
    ) -> Any:
        """Draws the mask on matplotlib axes, with tiles of `block_sizes` where given, and returns the axes.

        It needs the `notebooks` extra; `attnlib.plot.mask` describes the arguments.
        """
        from attnlib import plot

        return plot.mask(self, query_shape, key_shape, block_sizes=block_sizes, ax=ax)

    def __and__(self, other: Mask) -> Mask:
        return And(self, _as_mask(other, "&"))

    def __rand__(self, other: Mask) -> Mask:
        return And(_as_mask(other, "&"), self)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _as_mask(other, "|"))

    def __ror__(self, other: Mask) -> Mask:
        return Or(_as_mask(other, "|"), self)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "a Mask has no truth value: combine masks with `&`, `|` and `~` instead of `and`, `or` and `not`, and "
            "test for absence with `mask is None`."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair(Mask):
    left: Mask
    right: Mask

    def padded(self, query: Positions, key: Positions, sizes: tuple[int, int]) -> Mask:
        return type(self)(self.left.padded(query, key, sizes), self.right.padded(query, key, sizes))

    def check(self, shapes: Shapes) -> None:
        self.left.check(shapes)
        self.right.check(shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class And(_Pair):
    """`left & right`."""

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return self.left.at(query, key) & self.right.at(query, key)

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        return np.minimum(self.left.tile(query, key), self.right.tile(query, key))


@dataclasses.dataclass(frozen=True, eq=False)
class Or(_Pair):
    """`left | right`."""

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return self.left.at(query, key) | self.right.at(query, key)

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        return np.maximum(self.left.tile(query, key), self.right.tile(query, key))


@dataclasses.dataclass(frozen=True, eq=False)
class Not(Mask):
    """`~mask`."""

    mask: Mask

    def at(self, query: Positions, key: Positions) -> jax.Array:
        return ~self.mask.at(query, key)

    def tile(self, query: Ranges, key: Ranges) -> Kinds:
        return FULL - self.mask.tile(query, key)

    def padded(self, query: Positions, key: Positions, sizes: tuple[int, int]) -> Mask:
        return Not(self.mask.padded(query, key, sizes))

    def check(self, shapes: Shapes) -> None:
        self.mask.check(shapes)


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


def set_fields(mask: Mask, /, **values: Any) -> None:
    """Sets fields of a frozen mask while it is being made."""
    for name, value in values.items():
        object.__setattr__(mask, name, value)


def static_int(value: Any, name: str, least: int | None = None) -> int | None:
    """An int or None; anything else is refused, since it decides the program."""
    if value is None:
        return None
    untraced(value, name, "a Python int or None")
    try:
        result = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a Python int or None (it is static); got {value!r}.") from error
    if least is not None and result < least:
        raise ValueError(f"{name} must be at least {least}; got {result}.")
    return in_32_bits(result, name)


def static_ints(value: Any, name: str) -> int | tuple[int, ...]:
    """A positive int, or a tuple of them, one for each attention axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    for each in values:
        if each is None or static_int(each, name, least=1) is None:
            raise TypeError(f"{name} must be an int or a sequence of ints; got {value!r}.")
    return tuple(map(operator.index, values)) if isinstance(value, Sequence) else operator.index(value)


def integer(value: Any, name: str) -> int | Array:
    """A static int, or an integer array, which is traced."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return in_32_bits(int(value), name)
    return integers(value, name)


def integers(value: Any, name: str) -> Array:
    value = _as_array(value, name)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers; got {value.dtype}{list(value.shape)}.")
    return value


def boolean(value: Any, name: str) -> Array:
    value = _as_array(value, name)
    if value.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be bool (True = attend); got {value.dtype}{list(value.shape)}. Write `array.astype(bool)` "
            "for a 0/1 array, and pass additive numbers (0 and -inf) as `bias`."
        )
    return value


def _as_array(value: Any, name: str) -> Any:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    if isinstance(value, (Sequence, bool, float)) and not isinstance(value, str):
        return np.asarray(value)
    raise TypeError(f"{name} must be an array; got {type(value).__name__}.")


def check_per_batch(value: Any, name: str, shapes: Shapes) -> None:
    """Lengths and offsets are `()` or one for each batch index."""
    shape = np.shape(value) if value is not None else ()
    if shape and not _broadcasts(shape, shapes.batch):
        raise ValueError(f"{name} must be () or one integer for each batch index {shapes.batch}; got shape {shape}.")


def check_positions(array: Any, name: str, batch: tuple[int, ...], positions: tuple[int, ...], side: str) -> None:
    """Arrays of one entry a position are `(*batch, *axes)` or `(*axes,)`."""
    shape = tuple(array.shape)
    lead, tail = shape[: len(shape) - len(positions)], shape[len(shape) - len(positions) :]
    if tail != positions or (lead and not _broadcasts(lead, batch)):
        raise ValueError(
            f"{name} must have shape (*batch, *{side} axes) = {(*batch, *positions)} or {positions}; got {shape}."
        )


def each(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """One value for each attention axis."""
    return value if isinstance(value, tuple) else (value,) * axes


def check_each(value: int | tuple[int, ...], name: str, shapes: Shapes) -> None:
    """A tuple has one value for each attention axis."""
    axes = len(shapes.key)
    if isinstance(value, tuple) and len(value) != axes:
        raise ValueError(f"{name} must be an int or one int for each of the {axes} attention axes; got {value}.")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) == len(target) and all(size in (1, whole) for size, whole in zip(shape, target, strict=True))


def per_batch(value: int | Array) -> int | Array:
    """Lays a value for each batch index out against a block `(*batch, N, T, S)`, in the dtype of positions."""
    if isinstance(value, int):
        return value
    value, held = jnp.asarray(value), jnp.iinfo(jnp.int32)
    limits = jnp.iinfo(value.dtype)  # of a wider dtype, the largest number is no limit too
    value = jnp.clip(value, max(held.min, limits.min), min(held.max, limits.max)).astype(jnp.int32)
    return value[..., None, None, None] if value.ndim else value


def ahead(index: jax.Array, by: int | Array) -> jax.Array:
    """`index + by`, or the largest number of 32 bits where that is beyond it."""
    moved = index + by
    if isinstance(by, int) and by <= 0:
        return moved
    return jnp.where((by > 0) & (moved < index), jnp.iinfo(jnp.int32).max, moved)


def widened(ids: Any) -> Any:
    """Ids, or one, in 32 bits at least, so that those of fewer can be compared with any number."""
    return ids if isinstance(ids, int) or ids.dtype.itemsize >= 4 else jnp.asarray(ids).astype(jnp.int32)


def _as_shape(shape: int | Sequence[int], name: str) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    return tuple(static_int(size, name, least=0) or 0 for size in sizes)


def _as_mask(value: Any, symbol: str) -> Mask:
    if isinstance(value, Mask):
        return value
    raise TypeError(
        f"`{symbol}` combines a Mask with another Mask; got {type(value).__name__}. Wrap a bool array as "
        "attnlib.masks.Dense(array)."
    )
