"""The abstract `Mask`, and its operators `&`, `|` and `~`."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.axes import AttentionShape, align_ranks
from attnlib._core.block_positions import BlockPositions
from attnlib._core.pytree import Pytree
from attnlib._core.tile_kinds import FULL, TileKinds, TileRanges, classify
from attnlib._core.validation import check_int, check_int_or_ints, per_axis


@dataclasses.dataclass(frozen=True, eq=False)
class Mask(Pytree):
    """The pairs of query and key positions that may attend; abstract.

    A subclass implements `evaluate(query, key)`; `classify_tiles(query, key)`, to skip tiles; and `check(shapes)`, if
    it holds arrays. A mask is a pytree: arrays and masks in its fields are traced, plain values are static.

    `entries` names the fields with an entry for each "query", each "key" or each of the "pairs". Where the sequence is
    sharded (`context=`), these arrays are sharded with it, and devices hold the whole of all others.
    """

    static_types = (bool, int, type(None))
    entries: ClassVar[Mapping[str, str]] = {}

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        """The mask on a block: bool, broadcastable to `(*batch, N, T, S)`, True = attend."""
        raise NotImplementedError(f"{type(self).__name__} needs the method evaluate(query, key).")

    def evaluate_heads(
        self, query: BlockPositions, key: BlockPositions, cut: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """`evaluate` for some batch indices and heads, which `cut` takes from a block of all."""
        return cut(self.evaluate(query, key))

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        """Whether each tile is EMPTY (no pair attends), FULL (all pairs attend) or PARTIAL.

        The result decides the program, so it depends on static values only. PARTIAL is always correct: the mask is then
        evaluated for each pair.
        """
        del query, key
        return classify(empty=False, full=False)

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        """The same mask, with arrays of pairs folded and padded to `sizes`, so that tiles are slices of them."""
        del query, key, sizes
        return self

    def check(self, shapes: AttentionShape) -> None:
        """Raises ValueError if the arrays of this mask do not fit the operands."""

    @property
    def may_close_over_arrays(self) -> bool:
        """Whether `closure_converted` must be called."""
        return any(isinstance(part, Mask) and part.may_close_over_arrays for part in vars(self).values())

    @property
    def has_function(self) -> bool:
        """Whether a part of the mask is evaluated for the heads of a tile alone, since it may cost much."""
        return any(isinstance(part, Mask) and part.has_function for part in vars(self).values())

    def closure_converted(self, shapes: AttentionShape) -> Mask:
        """The mask for a call of such sizes, with the arrays that its functions capture as leaves of the pytree."""
        copy: Mask = object.__new__(type(self))
        for name, value in vars(self).items():
            new = value.closure_converted(shapes) if isinstance(value, Mask) else value
            object.__setattr__(copy, name, new)
        return copy

    def as_array(
        self,
        query_shape: int | Sequence[int],
        key_shape: int | Sequence[int],
        *,
        heads: int | None = None,
        batch: int | Sequence[int] | None = None,
    ) -> jax.Array:
        """The mask as a bool array `(*query_shape, *key_shape)`, after `(*batch, 1 or N)` if it depends on these.

        Args:
          query_shape: the lengths of the query attention axes, or an int for a single axis.
          key_shape: the lengths of the key attention axes, likewise.
          heads: the number of query heads, for a `Function` that depends on the head; default: unknown.
          batch: the sizes of the batch axes, or an int for a single axis, for a `Function` that depends on the batch
            index; default: a single axis of unknown size.

        Returns:
          A bool array to pass as `mask=`; True = attend.

        Raises:
          ValueError: a `Function` depends on heads or batch, and they are not given.

        >>> from attnlib import masks
        >>> masks.Causal().as_array(2, 3).astype(int)
        Array([[1, 0, 0],
               [1, 1, 0]], dtype=int32)
        """
        query_shape, key_shape = _as_shape(query_shape, "query_shape"), _as_shape(key_shape, "key_shape")
        query, key = BlockPositions(query_shape, "query"), BlockPositions(key_shape, "key")
        block = self.with_sizes(query_shape, key_shape, heads, batch).evaluate(query, key)
        block = jnp.broadcast_to(block, (*block.shape[:-2], query.total, key.total))
        return block.reshape(*block.shape[:-2], *query_shape, *key_shape)

    def with_sizes(self, query_shape: tuple[int, ...], key_shape: tuple[int, ...], heads: Any, batch: Any) -> Mask:
        """The mask outside of a call, for so many heads and batch entries; None: unknown."""
        if not self.may_close_over_arrays:
            return self
        unknown: Any = None
        heads = check_int(heads, "heads", minimum=1, optional=True)
        sizes = (unknown,) if batch is None else per_axis(check_int_or_ints(batch, "batch", minimum=0), 1)
        return self.closure_converted(AttentionShape(sizes, heads, query_shape, key_shape, (0, 0), None))

    def plot(
        self,
        query_shape: int | Sequence[int],
        key_shape: int | Sequence[int],
        *,
        block_sizes: tuple[int, int] | None = None,
        ax: Any = None,
        heads: int | None = None,
        batch: int | Sequence[int] | None = None,
    ) -> Any:
        """Draws the mask on matplotlib axes, with tiles of `block_sizes` if given, and returns the axes.

        Requires the `notebooks` extra. `attnlib.plot.mask` describes the arguments.
        """
        from attnlib import plot

        return plot.mask(self, query_shape, key_shape, block_sizes=block_sizes, ax=ax, heads=heads, batch=batch)

    def mapped(self, convert: Callable[[Any, str | None], Any]) -> Mask:
        """The mask with `convert(value, its entry in entries)` for each value that is not a mask, unchecked."""
        copy: Mask = object.__new__(type(self))
        for name, value in vars(self).items():
            new = value.mapped(convert) if isinstance(value, Mask) else convert(value, self.entries.get(name))
            object.__setattr__(copy, name, new)
        return copy

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
class _BinaryMask(Mask):
    left: Mask
    right: Mask

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return self.join(self.left.evaluate(query, key), self.right.evaluate(query, key))

    def evaluate_heads(
        self, query: BlockPositions, key: BlockPositions, cut: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        if not self.has_function:
            return super().evaluate_heads(query, key, cut)
        return self.join(self.left.evaluate_heads(query, key, cut), self.right.evaluate_heads(query, key, cut))

    def join(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """The block of both, of their blocks."""
        raise NotImplementedError

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        return type(self)(self.left.pad_to(query, key, sizes), self.right.pad_to(query, key, sizes))

    def check(self, shapes: AttentionShape) -> None:
        self.left.check(shapes)
        self.right.check(shapes)


@dataclasses.dataclass(frozen=True, eq=False)
class And(_BinaryMask):
    """`left & right`."""

    def join(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return all_of(left, right)

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        return np.minimum(self.left.classify_tiles(query, key), self.right.classify_tiles(query, key))


@dataclasses.dataclass(frozen=True, eq=False)
class Or(_BinaryMask):
    """`left | right`."""

    def join(self, left: jax.Array, right: jax.Array) -> jax.Array:
        left, right = align_ranks(left, right)
        return left | right

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        return np.maximum(self.left.classify_tiles(query, key), self.right.classify_tiles(query, key))


@dataclasses.dataclass(frozen=True, eq=False)
class Not(Mask):
    """`~mask`."""

    mask: Mask

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        return ~self.mask.evaluate(query, key)

    def evaluate_heads(
        self, query: BlockPositions, key: BlockPositions, cut: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        return ~self.mask.evaluate_heads(query, key, cut) if self.has_function else cut(self.evaluate(query, key))

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        return FULL - self.mask.classify_tiles(query, key)

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        return Not(self.mask.pad_to(query, key, sizes))

    def check(self, shapes: AttentionShape) -> None:
        self.mask.check(shapes)


def all_of(*blocks: jax.Array) -> jax.Array:
    """The conjunction of blocks of a mask, which may have different ranks; without any, all True."""
    return functools.reduce(operator.and_, align_ranks(*blocks or (jnp.ones((1, 1), bool),)))


def set_fields(mask: Mask, /, **values: Any) -> None:
    """Sets fields of a frozen mask in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(mask, name, value)


def _as_shape(shape: int | Sequence[int], name: str) -> tuple[int, ...]:
    return per_axis(check_int_or_ints(shape, name, minimum=0, symbolic=True), 1)


def _as_mask(value: Any, symbol: str) -> Mask:
    if isinstance(value, Mask):
        return value
    wrapped = (
        "a function as attnlib.masks.Function(fn)" if callable(value) else "a bool array as attnlib.masks.Dense(array)"
    )
    raise TypeError(f"`{symbol}` combines a Mask with another Mask; got {type(value).__name__}. Wrap {wrapped}.")


def entries_of_leaves(mask: Mask) -> list[str]:
    """For each array of a mask, whether it has an entry for each "query", "key" or of "pairs", or else "whole"."""
    return [_entry(mask, path) for path, _ in jax.tree_util.tree_leaves_with_path(mask)]


def _entry(mask: Any, path: Sequence[Any]) -> str:
    for key in path:
        name = getattr(key, "name", None)
        if not isinstance(mask, Mask) or name is None:
            break
        if name in mask.entries:
            return mask.entries[name]
        mask = getattr(mask, name)
    return "whole"
