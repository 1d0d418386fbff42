"""How the arrays of the keys get from device to device, and what collects behind them comes home.

  ring     keys of the neighbours are sent at once, and just those that a device needs. If a device needs others too,
           all keys go around the ring of devices.
  gather   each device gathers all keys, in their natural order.

What travels is sent on before it is used, and what comes home arrives before it is added to, so both overlap with the
computation between. Sums are made in a fixed order: two runs are bitwise equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.context import Layout
from attnlib._engine.context.schedule import Schedule

Arrays = list[jax.Array]


class Visit(NamedTuple):
    """Keys that are here."""

    source: Any  # the device that they come from
    shifts: tuple[int, ...]  # how far before this device that one may be
    first: int  # which tile of its keys the first one here is


# `step(state, arrays of the keys, visit) -> (state, parts of what comes home)`
Step = Callable[[Any, Arrays, Visit], tuple[Any, Arrays]]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The exchange of a schedule along a mesh axis.

    Attributes:
      layout: which positions of the keys each device holds.
    """

    axis_name: str
    schedule: Schedule
    layout: Layout

    def circulate(
        self, step: Step, state: Any, travelling: Arrays, axes: Sequence[int], totals: Arrays, total_axes: Sequence[int]
    ) -> tuple[Any, Arrays]:
        """Runs a step for all keys that a device needs.

        Args:
          travelling: arrays of the keys of this device, with their axis of keys in `axes`.
          totals: what parts are added to, likewise with `total_axes`.
        """
        if not self.schedule.turns:
            return state, totals
        if self.schedule.devices != self.layout.devices:
            return self._gathered(step, state, travelling, axes, totals, total_axes)
        if self.schedule.is_direct:
            return self._direct(step, state, travelling, axes, totals, total_axes)
        return self._around(step, state, travelling, totals)

    def _gathered(self, step: Step, state: Any, travelling: Arrays, axes: Any, totals: Arrays, total_axes: Any) -> Any:
        arrays = [self._gather(x, axis) for x, axis in zip(travelling, axes, strict=True)]
        state, parts = step(state, arrays, Visit(0, (0,), 0))
        home = [self._scatter(x, axis) for x, axis in zip(parts, total_axes, strict=True)]
        return state, _sums(totals, home)

    def _direct(self, step: Step, state: Any, travelling: Arrays, axes: Any, totals: Arrays, total_axes: Any) -> Any:
        for turn in self.schedule.turns:
            first, end = self.schedule.keys_of(turn)
            parts = [jax.lax.slice_in_dim(x, first, end, axis=axis) for x, axis in zip(travelling, axes, strict=True)]
            tile = turn.first if self.layout.parts == 1 else 0
            visit = Visit(self._source(turn.shift), (turn.shift,), tile)
            state, parts = step(state, self._sent(parts, turn.shift), visit)
            home = self._sent(parts, -turn.shift)
            totals = [_added(total, x, first, axis) for total, x, axis in zip(totals, home, total_axes, strict=True)]
        return state, totals

    def _around(self, step: Step, state: Any, travelling: Arrays, totals: Arrays) -> Any:
        first, count = self.schedule.run
        shifts = tuple(range(first, first + count))

        def turn(carry: Any, number: Any) -> tuple[Any, None]:
            state, travelling, totals = carry
            following, arrived = self._sent(travelling, 1), self._sent(totals, 1)
            state, parts = step(state, travelling, Visit(self._source(first + number), shifts, 0))
            return (state, following, _sums(arrived, parts)), None

        carry = state, self._sent(travelling, first), totals
        carry, _ = jax.lax.scan(turn, carry, jnp.arange(count - 1, dtype=jnp.int32))
        state, travelling, totals = carry
        totals = self._sent(totals, 1)
        state, parts = step(state, travelling, Visit(self._source(first + count - 1), shifts, 0))
        return state, self._sent(_sums(totals, parts), 1 - count - first)

    def _source(self, shift: Any) -> Any:
        return (jax.lax.axis_index(self.axis_name) - shift) % self.layout.devices

    def _sent(self, arrays: Arrays, by: int) -> Arrays:
        """The arrays of the device that is `by` before this one."""
        devices = self.layout.devices
        if by % devices == 0:
            return arrays
        pairs = [(device, (device + by) % devices) for device in range(devices)]
        return [jax.lax.ppermute(x, self.axis_name, pairs) for x in arrays]

    def _gather(self, array: jax.Array, axis: int) -> jax.Array:
        gathered = jax.lax.all_gather(array, self.axis_name, axis=axis % array.ndim, tiled=True)
        return self._reordered(gathered, axis, np.argsort(self.layout.numbers().reshape(-1)))

    def _scatter(self, array: jax.Array, axis: int) -> jax.Array:
        """The transpose of `_gather`."""
        array = self._reordered(array, axis, self.layout.numbers().reshape(-1))
        return jax.lax.psum_scatter(array, self.axis_name, scatter_dimension=axis % array.ndim, tiled=True)

    def _reordered(self, array: jax.Array, axis: int, order: np.ndarray) -> jax.Array:
        return array if self.layout.parts == 1 else take_parts(array, axis, order)


def take_parts(array: jax.Array, axis: int, order: np.ndarray) -> jax.Array:
    """The array with the equal parts of an axis in another order."""
    axis %= array.ndim
    shape = array.shape
    parts = array.reshape(*shape[:axis], len(order), shape[axis] // len(order), *shape[axis + 1 :])
    return jnp.take(parts, order, axis=axis).reshape(shape)


def _sums(totals: Arrays, parts: Arrays) -> Arrays:
    return [total + part for total, part in zip(totals, parts, strict=True)]


def _added(total: jax.Array, part: jax.Array, first: int, axis: int) -> jax.Array:
    """The total with a part added from the entry `first` of an axis on."""
    length = part.shape[axis]
    if length == total.shape[axis]:
        return total + part
    sums = jax.lax.slice_in_dim(total, first, first + length, axis=axis) + part
    return jax.lax.dynamic_update_slice_in_dim(total, sums, first, axis)
