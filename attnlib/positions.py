"""Positions put into queries and keys before attention: rotary embedding and its scalings to longer contexts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.validation import check_bool, check_number, check_positive_number, check_size, is_number

__all__ = ["LinearScaling", "NTKScaling", "RotaryScaling", "YaRNScaling", "rotary_embedding"]


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary embedding treats contexts `factor` times as long as those trained on; abstract.

    Args:
      factor: new length over old length, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        if not check_number(self.factor, "factor") >= 1:
            raise ValueError(f"factor must be at least 1, new length over old length; got {self.factor}.")

    def frequencies(self, base: float, size: int) -> np.ndarray:
        """Radians a position of each of `size / 2` pairs of features."""
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """What the rotated features are multiplied by."""
        return 1.0


class LinearScaling(RotaryScaling):
    """Position interpolation: every position is divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    def frequencies(self, base: float, size: int) -> np.ndarray:
        return _frequencies(base, size) / self.factor


class NTKScaling(RotaryScaling):
    """NTK-aware: the base grows so that the slowest pair is slowed by `factor`, the fastest not at all.

    `base * factor**(size / (size - 2))` (bloc97, 2023; Peng et al. 2023, arXiv:2309.00071, section 3.1).
    """

    def frequencies(self, base: float, size: int) -> np.ndarray:
        return _frequencies(base * self.factor ** (size / max(size - 2, 1)), size)


@dataclasses.dataclass(frozen=True)
class YaRNScaling(RotaryScaling):
    """YaRN: pairs that turn often keep their speed, those that never turn whole are slowed, with a ramp between.

    Rotated features are multiplied by `0.1 ln(factor) + 1`, so logits by its square (Peng et al. 2023,
    arXiv:2309.00071, sections 3.2 to 3.4). The ramp is linear in the number of the pair, as in the models released with
    it, where the paper's formula is linear in its turns.

    Args:
      factor: new length over old length, at least 1.
      original_length: the length trained on.
      fast, slow: how many turns over `original_length` a pair makes at least to keep its speed, at most to be slowed by
        `factor`.
    """

    original_length: int
    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.original_length, "original_length", least=1)
        check_positive_number(self.fast, "fast"), check_positive_number(self.slow, "slow")

    def frequencies(self, base: float, size: int) -> np.ndarray:
        if base <= 1:
            raise ValueError(f"base must be above 1 with YaRNScaling, so that pairs differ in speed; got {base}.")
        kept = _frequencies(base, size)
        # The pairs that turn so often, found from turns = length * base**(-2 pair / size) / (2 pi).
        first, last = (
            size * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(base))
            for turns in (self.fast, self.slow)
        )
        low, high = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        slowed = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
        return kept * (1 - slowed) + kept / self.factor * slowed

    @property
    def magnitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1


def rotary_embedding(
    x: Array,
    positions: Array | Sequence[Array] | None = None,
    *,
    attention_axes: int | Sequence[int] | None = None,
    base: float = 10000.0,
    features: int | None = None,
    interleaved: bool = False,
    scaling: RotaryScaling | None = None,
) -> jax.Array:
    """Rotates pairs of features by angles that grow with the position: dot products then depend on distances alone.

    Apply it to query and key before `dot_product_attention`. Pair i of a vector at position p turns by
    `p * base**(-2 i / features)` radians (Su et al. 2021, RoFormer, arXiv:2104.09864). With several attention axes it
    is axial: the features are split evenly among the axes, in their order, and each part turns with its own axis.

    Args:
      x: query or key, `(*batch and attention axes, N, D)`, floating.
      positions: the position of each entry along the attention axis, `(T,)` or any shape that broadcasts to x's batch
        and attention axes, as `(B, T)` does; integer or floating, and traced or not. Default: 0, 1, 2... With several
        attention axes a sequence of such arrays, one an axis. Given explicitly in decoding, and where packed documents
        start anew.
      attention_axes: as for `dot_product_attention`; by default all axes but the first, heads and features.
      base: the larger, the slower the slowest pair turns.
      features: how many of the D features turn, the first ones; the rest pass unchanged. Default: all.
      interleaved: pairs are (0, 1), (2, 3)... as in RoFormer, rather than (0, F/2), (1, F/2 + 1)... as in GPT-NeoX and
        LLaMA, where F are the features of one axis. The two differ by an order of the features only; weights trained
        with one need it.
      scaling: to contexts longer than trained on: `LinearScaling`, `NTKScaling` or `YaRNScaling`.

    Returns:
      An array like x. Angles and rotation are computed in float32 (float64 if x is), so that an angle is off by about
      1e-7 of the position.

    Raises:
      TypeError: x is not floating, or positions are not numbers.
      ValueError: features that cannot be split in pairs for each axis, or positions that do not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnlib import positions
      >>> x = jnp.ones((1, 3, 1, 2))
      >>> y = positions.rotary_embedding(x)
      >>> bool(jnp.allclose(y[0, :, 0, 0], jnp.cos(jnp.arange(3)) - jnp.sin(jnp.arange(3))))
      True
    """
    if not is_number(x):
        raise TypeError(f"x must be an array of floating-point numbers; got {x!r}.")
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(f"x must be (*batch and attention axes, heads, features); got shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating; got {x.dtype}.")
    axes = _axes.normalize(attention_axes, x.ndim, trailing=2).attention
    turning = x.shape[-1] if features is None else check_size(features, "features", least=0)
    base = check_positive_number(base, "base")
    interleaved = check_bool(interleaved, "interleaved")
    if not (scaling is None or isinstance(scaling, RotaryScaling)):
        raise TypeError(f"scaling must be None or a RotaryScaling such as NTKScaling(2.0); got {scaling!r}.")
    left_over = turning % (2 * len(axes))
    if turning > x.shape[-1] or left_over:
        raise ValueError(
            f"features must be a multiple of {2 * len(axes)} (pairs for each of {len(axes)} attention axes) and at "
            f"most the {x.shape[-1]} of x; got {turning}. Rotate fewer with features={turning - left_over}."
        )
    dtype = jnp.promote_types(x.dtype, jnp.float32) if x.dtype.itemsize > 1 else jnp.float32
    size = turning // len(axes)
    frequencies = _frequencies(base, size) if scaling is None else scaling.frequencies(base, size)
    magnitude = 1.0 if scaling is None else scaling.magnitude
    parts = []
    for n, position in enumerate(_positions(x, positions, axes)):
        angles = position.astype(dtype)[..., None, None] * jnp.asarray(frequencies, dtype)
        part = x[..., n * size : (n + 1) * size].astype(dtype)
        parts.append(_rotate(part, magnitude * jnp.cos(angles), magnitude * jnp.sin(angles), interleaved))
    return jnp.concatenate([*(part.astype(x.dtype) for part in parts), x[..., turning:]], -1)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _frequencies(base: float, size: int) -> np.ndarray:
    return np.asarray(base, np.float64) ** (-np.arange(0, size, 2) / max(size, 1))


def _positions(x: jax.Array, positions: Any, axes: tuple[int, ...]) -> list[jax.Array]:
    """For each attention axis, positions that broadcast against x without heads and features."""
    lead = x.shape[:-2]
    if positions is None:
        return [_along(jnp.arange(lead[axis]), axis, len(lead)) for axis in axes]
    if not (hasattr(positions, "dtype") or isinstance(positions, Sequence)):
        raise TypeError(f"positions must be an array, a sequence of them (one an axis) or None; got {positions!r}.")
    given = [positions] if len(axes) == 1 and hasattr(positions, "dtype") else list(positions)
    if len(given) != len(axes):
        raise ValueError(f"positions must be one array for each of {len(axes)} attention axes; got {len(given)}.")
    made = []
    for axis, array in zip(axes, given, strict=True):
        if not hasattr(array, "dtype"):
            array = np.asarray(array)
        if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)):
            raise TypeError(f"positions must be integers or floating; got {array.dtype}.")
        array, shape = jnp.asarray(array), array.shape
        if array.ndim == 1:  # along its own axis, wherever that is
            array = _along(array, axis, len(lead))
        sizes = zip(array.shape[::-1], lead[::-1], strict=False)
        if array.ndim > len(lead) or any(size not in (1, whole) for size, whole in sizes):
            raise ValueError(
                f"positions must broadcast to the axes of x before heads and features, {lead}, or have one entry for "
                f"each of the {lead[axis]} places along axis {axis}; got shape {shape}."
            )
        made.append(array)
    return made


def _along(array: jax.Array, axis: int, rank: int) -> jax.Array:
    return array.reshape([-1 if a == axis else 1 for a in range(rank)])
