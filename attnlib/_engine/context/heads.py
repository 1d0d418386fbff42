"""The exchange "heads": each device gets all positions of some heads, and computes with any implementation.

Queries, keys, values and results are exchanged all to all. Arrays with an entry for each position are gathered, and of
arrays with an axis of heads each device takes its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.axes import AttentionShape, Axes
from attnlib._core.block_positions import BlockPositions
from attnlib._core.context import Context, Layout
from attnlib._core.operand_checks import check_operands
from attnlib._core.pytree import register
from attnlib._core.tile_kinds import TileKinds, TileRanges
from attnlib._engine.context.exchange import take_parts
from attnlib._engine.context.part import WholeOperands
from attnlib.masks import Dense, Predicate
from attnlib.masks._base import Mask
from attnlib.masks._function import TracedFunction
from attnlib.modifiers._base import TracedScoreMod
from attnlib.scores import Score

if TYPE_CHECKING:
    from attnlib._engine.call import Arguments


@dataclasses.dataclass(frozen=True)
class HeadsOfDevice(WholeOperands):
    """The operands have all positions, and some of all heads.

    Attributes:
      first: the number of the first query head; traced.
      heads: the number of all query heads.
    """

    first: jax.Array
    heads: int

    def dropout_seeds(self, seeds: jax.Array) -> jax.Array:
        return jnp.concatenate([seeds, jnp.stack([self.first, self.first * 0 + self.heads]).astype(seeds.dtype)])


@register
@dataclasses.dataclass(frozen=True, eq=False)
class _HeadShifted:
    """A function of a `TracedScoreMod` that gets the number of a head among all heads."""

    function: Any
    first: jax.Array
    batch_axes: int = dataclasses.field(metadata={"static": True})

    def __call__(self, logit: jax.Array, *indices: jax.Array) -> Any:
        batch, head = indices[: self.batch_axes], indices[self.batch_axes]
        return self.function(logit, *batch, head + self.first, *indices[self.batch_axes + 1 :])


@dataclasses.dataclass(frozen=True, eq=False)
class _HeadsOfMask(Mask):
    """A mask of all heads, evaluated for the heads of a device."""

    mask: Mask
    first: jax.Array
    heads: int
    count: int

    def evaluate(self, query: BlockPositions, key: BlockPositions) -> jax.Array:
        block = self.mask.evaluate(query, key)
        if block.ndim < 3 or block.shape[-3] == 1:
            return block
        return jax.lax.dynamic_slice_in_dim(block, self.first, self.count, -3, allow_negative_indices=False)

    def classify_tiles(self, query: TileRanges, key: TileRanges) -> TileKinds:
        return self.mask.classify_tiles(query, key)

    def pad_to(self, query: BlockPositions, key: BlockPositions, sizes: tuple[int, int]) -> Mask:
        return _HeadsOfMask(self.mask.pad_to(query, key, sizes), self.first, self.heads, self.count)

    def check(self, shapes: AttentionShape) -> None:
        self.mask.check(shapes._replace(heads=self.heads))


def attend_by_heads(
    arguments: Arguments, context: Context, devices: int, attend: Callable[[Arguments, WholeOperands], Any]
) -> Any:
    """The results for the positions of this device."""
    exchange = _exchange(arguments, context, devices)
    axes, shapes = exchange.axes, exchange.shapes
    results = attend(*given_to_device(arguments, context, devices))
    output, *lse = results if isinstance(results, tuple) else (results,)
    output = exchange.returned(output, axes.attention[0], axes.rank - 2)
    rows = len(shapes.batch)
    return (output, *(exchange.returned(x, rows + 1, rows) for x in lse)) if lse else output


def heads_refusal(kv_heads: int, score: Score, devices: int) -> str | None:
    """Why the exchange cannot compute a call, and what to write; None where it can."""
    others = 'use exchange="ring" or "gather"'
    if kv_heads % devices:
        return (
            f"the {devices} devices along the axis must divide the {kv_heads} key heads. Repeat them, "
            f"jnp.repeat(key, n, -2) and likewise value, or {others}"
        )
    if type(score).heads is None and jax.tree.leaves(score):
        return (
            f"it is unknown which arrays of {type(score).__name__} have an axis of heads. Set its class attribute "
            '`heads`, such as {"scale": 1} for a field that has an axis of heads where it has one axis, or '
            f"{others}"
        )
    return None


def given_to_device(arguments: Arguments, context: Context, devices: int) -> tuple[Arguments, HeadsOfDevice]:
    """(the arguments of the heads of this device, which heads these are)."""
    exchange = _exchange(arguments, context, devices)
    exchange.check(arguments)
    return exchange.given(arguments), HeadsOfDevice(exchange.first, exchange.shapes.heads)


def _exchange(arguments: Arguments, context: Context, devices: int) -> _HeadExchange:
    axes, shapes = check_operands(*arguments[:3], arguments.options.attention_axes)
    return _HeadExchange(context, devices, axes, shapes, arguments.key.shape[-2])


@dataclasses.dataclass(frozen=True)
class _HeadExchange:
    context: Context
    devices: int
    axes: Axes
    shapes: AttentionShape
    kv_heads: int

    def check(self, arguments: Arguments) -> None:
        reason = heads_refusal(self.kv_heads, arguments.score, self.devices)
        if reason is not None:
            raise ValueError(f'context with exchange="heads" cannot compute this: {reason}.')

    @property
    def count(self) -> int:
        """How many query heads a device has."""
        return self.shapes.heads // self.devices

    @property
    def first(self) -> jax.Array:
        return jax.lax.axis_index(self.context.axis_name) * self.count

    def given(self, arguments: Arguments) -> Arguments:
        """The arguments with all positions of the heads of this device."""
        options, a, h = arguments.options, self.axes.attention[0], self.axes.rank - 2
        changed: dict[str, Any] = {"context": None}
        if options.mask is not None:
            assert isinstance(options.mask, Mask)
            changed["mask"] = self._mask(options.mask)
        if options.bias is not None:
            changed["bias"] = self._pairs(options.bias)
        if options.sink is not None and np.ndim(options.sink):
            changed["sink"] = self._own(options.sink, 0)
        if options.score_mod is not None:
            assert isinstance(options.score_mod, TracedScoreMod)
            shifted = _HeadShifted(options.score_mod.function, self.first, len(self.shapes.batch))
            changed["score_mod"] = TracedScoreMod(shifted)
        for name in ("query_positions", "key_positions"):
            if (positions := getattr(options, name)) is not None:
                changed[name] = self._gathered(positions, -1)
        query, key, value = (self._exchanged(x, a, h) for x in arguments[:3])
        score = self._score(arguments.score)
        return arguments._replace(query=query, key=key, value=value, score=score).change(**changed)

    def returned(self, array: jax.Array, positions: int, heads: int) -> jax.Array:
        """All heads of the positions of this device."""
        array = self._ordered(array, positions, natural=False)
        return jax.lax.all_to_all(array, self.context.axis_name, positions, heads, tiled=True)

    def _exchanged(self, array: Any, positions: int, heads: int) -> jax.Array:
        array = jax.lax.all_to_all(jnp.asarray(array), self.context.axis_name, heads, positions, tiled=True)
        return self._ordered(array, positions, natural=True)

    def _gathered(self, array: Any, axis: int) -> jax.Array:
        array = jnp.asarray(array)
        array = jax.lax.all_gather(array, self.context.axis_name, axis=axis % array.ndim, tiled=True)
        return self._ordered(array, axis, natural=True)

    def _ordered(self, array: jax.Array, axis: int, natural: bool) -> jax.Array:
        """The array in the natural order of positions, or back in the order of the context."""
        if self.context.order == "contiguous":
            return array
        numbers = Layout(2 * self.devices, self.devices, self.context.order).numbers().reshape(-1)
        return take_parts(array, axis, np.argsort(numbers) if natural else numbers)

    def _own(self, array: Any, axis: int) -> jax.Array:
        """The entries of the query heads of this device."""
        return jax.lax.dynamic_slice_in_dim(
            jnp.asarray(array), self.first, self.count, axis, allow_negative_indices=False
        )

    def _pairs(self, array: Any) -> jax.Array:
        array, rows = jnp.asarray(array), array.ndim - len(self.shapes.query) - len(self.shapes.key)
        has_heads = rows > 0 and array.shape[rows - 1] > 1
        # A device with one row may have a row of its own; if all devices have the same row, gathering repeats it.
        has_rows = rows >= 0 and (array.shape[rows] > 1 or self.shapes.query[0] == 1)
        if has_heads and has_rows:
            return self._exchanged(array, rows, rows - 1)
        array = self._own(array, rows - 1) if has_heads else array
        return self._gathered(array, rows) if has_rows else array

    def _mask(self, mask: Mask) -> Mask:
        if isinstance(mask, Dense):
            return Dense(self._pairs(mask.array))
        changed: dict[str, Any] = {}
        for name, value in vars(mask).items():
            side = mask.entries.get(name)
            if isinstance(value, Mask):
                changed[name] = self._mask(value)
            elif value is not None and side in ("query", "key"):
                changed[name] = self._gathered(value, value.ndim - len(getattr(self.shapes, side)))
        copy: Mask = object.__new__(type(mask))
        vars(copy).update({**vars(mask), **changed})
        if any(isinstance(part, Mask) for part in changed.values()):
            return copy
        # Arrays and functions may depend on the head.
        has_function = isinstance(mask, (Predicate, TracedFunction))
        if jax.tree.leaves(mask) or has_function or not type(mask).__module__.startswith("attnlib."):
            return _HeadsOfMask(copy, self.first, self.shapes.heads, self.count)
        return copy

    def _score(self, score: Score) -> Score:
        ranks = type(score).heads or {}
        own = {
            name: self._own(value, 0)
            for name, value in vars(score).items()
            if name in ranks and value is not None and np.ndim(value) == ranks[name]
        }
        copy: Score = object.__new__(type(score))
        vars(copy).update({**vars(score), **own})
        return copy if own else score
