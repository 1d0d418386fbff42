"""One named case of attention: shapes of operands, and factories of everything else that a call takes.

Every size of a case is distinct along its axes where the case allows it, so that a wrong axis cannot pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib import scores


class Draw:
    """Draws arrays for a case: normal floats in its dtype, bools, small integers.

    They are put on the device, since `jnp.asarray` compiles a program for each shape.
    """

    def __init__(self, seed: int, dtype: str):
        self._rng, self.dtype = np.random.default_rng(seed), dtype

    def __call__(self, *shape: int) -> jax.Array:
        return jax.device_put(self._rng.normal(size=shape).astype(jnp.dtype(self.dtype)))

    def bools(self, *shape: int, rate: float = 0.6) -> jax.Array:
        return jax.device_put(self._rng.random(shape) < rate)

    def integers(self, low: int, high: int, *shape: int) -> jax.Array:
        return jax.device_put(self._rng.integers(low, high, shape).astype(np.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """Operand shapes, and factories of everything else that an attention call takes."""

    name: str
    query: tuple[int, ...] = (2, 5, 3, 4)
    key: tuple[int, ...] = (2, 7, 3, 4)
    value: tuple[int, ...] = (2, 7, 3, 6)
    dtype: str = "float32"
    score: Callable[[Draw], Any] = lambda draw: scores.Dot()
    mask: Callable[[Draw], Any] | None = None
    bias: tuple[int, ...] | None = None
    score_mod: Callable[[Draw], Any] | None = None
    sink: tuple[int, ...] | None = None
    positions: Callable[[Draw], tuple[Any, Any]] | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    second_order: bool = False  # also compared in second derivatives, which cost most to compile
    values_only: bool = False  # its derivatives are compared in the slow tests only

    def __str__(self) -> str:
        return self.name


GROUPED = dict(query=(2, 5, 6, 4), key=(2, 7, 2, 4), value=(2, 7, 2, 3))
GRID = dict(query=(2, 3, 4, 2, 6), key=(2, 5, 2, 2, 6), value=(2, 5, 2, 2, 7))  # two attention axes
SQUARE = dict(query=(2, 7, 3, 4), key=(2, 7, 3, 4), value=(2, 7, 3, 6))
WHOLE = (2, 3, 5, 7)  # the weights of the default shapes
# An implementation sees a mask through three methods alone (which pairs, which tiles, padded). So derivatives are made
# for each way a mask is laid out, not for each kind: none, static with full, partial and empty tiles, an array a batch
# index or head, a length that is traced, nothing. For the others, values show that the three methods agree. Likewise,
# additive scores are the most costly to differentiate, so few cases do.
VALUES = dict(values_only=True)


def of_length(length: int) -> dict[str, Any]:
    """Operands of another number of keys."""
    return dict(key=(2, length, 3, 4), value=(2, length, 3, 6))
