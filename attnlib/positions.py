"""Rotary position embedding of queries and keys, and its scalings to longer contexts."""

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
from attnlib._core.context import zigzag_order
from attnlib._core.operand_checks import check_axes, compute_dtype
from attnlib._core.suggestions import require_static
from attnlib._core.validation import check_array, check_bool, check_int, check_number

__all__ = [
    "LinearScaling",
    "NTKScaling",
    "RotaryScaling",
    "YaRNScaling",
    "inverse_zigzag",
    "rotary_embedding",
    "zigzag",
]


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """A scaling of rotary embedding to contexts `factor` times as long as in training; abstract.

    Args:
      factor: new length over old length, at least 1.
    """

    factor: float

    def __post_init__(self) -> None:
        if not check_number(self.factor, "factor") >= 1:
            raise ValueError(f"factor must be at least 1, new length over old length; got {self.factor}.")

    def frequencies(self, base: float, size: int) -> np.ndarray:
        """The angle per position, in radians, of each of `size / 2` pairs of features."""
        raise NotImplementedError(f"{type(self).__name__} needs the method frequencies(base, size).")

    @property
    def magnitude(self) -> float:
        """The factor of the rotated features."""
        return 1.0


class LinearScaling(RotaryScaling):
    """Position interpolation: every position is divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    def frequencies(self, base: float, size: int) -> np.ndarray:
        return _frequencies(base, size) / self.factor


class NTKScaling(RotaryScaling):
    """NTK-aware scaling: a larger base slows the slowest pair by `factor`, and the fastest pair not at all.

    The base is `base * factor**(size / (size - 2))` (bloc97, 2023; Peng et al. 2023, arXiv:2309.00071, section 3.1).
    """

    def frequencies(self, base: float, size: int) -> np.ndarray:
        return _frequencies(base * self.factor ** (size / max(size - 2, 1)), size)


@dataclasses.dataclass(frozen=True)
class YaRNScaling(RotaryScaling):
    """YaRN: fast pairs keep their frequency, slow pairs are divided by `factor`, and pairs between are interpolated.

    Rotated features are multiplied by `0.1 ln(factor) + 1`, and logits by its square (Peng et al. 2023,
    arXiv:2309.00071, sections 3.2 to 3.4). The interpolation is linear in the index of the pair, as in the released
    models. In the formula of the paper it is linear in the number of turns.

    Args:
      factor: new length over old length, at least 1.
      original_length: the length in training.
      fast: pairs with at least this many turns over `original_length` keep their frequency.
      slow: pairs with at most this many turns over `original_length` are divided by `factor`.
    """

    original_length: int
    fast: float = 32.0
    slow: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self.original_length, "original_length", minimum=1)
        check_number(self.fast, "fast", positive=True), check_number(self.slow, "slow", positive=True)

    def frequencies(self, base: float, size: int) -> np.ndarray:
        if base <= 1:
            raise ValueError(f"base must be above 1 with YaRNScaling, so that frequencies differ; got {base}.")
        original = _frequencies(base, size)
        # The indices of the pairs with these numbers of turns, from turns = length * base**(-2 pair / size) / (2 pi).
        first, last = (
            size * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(base))
            for turns in (self.fast, self.slow)
        )
        low, high = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
        return original * (1 - ramp) + original / self.factor * ramp

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
    """Rotates pairs of features by angles proportional to the position, so that dot products depend on distances only.

    Apply it to query and key before `dot_product_attention`. Pair i of a vector at position p is rotated by
    `p * base**(-2 i / features)` radians (Su et al. 2021, RoFormer, arXiv:2104.09864). With several attention axes the
    embedding is axial: each axis, in order, rotates an equal part of the features by its own positions.

    Args:
      x: query or key, `(*batch and attention axes, N, D)`, floating.
      positions: the position of each entry along the attention axis, `(T,)` or any shape that broadcasts to the batch
        and attention axes of x, such as `(B, T)`; integer or floating, traced or not. Default: 0, 1, 2... With several
        attention axes, a sequence of one such array for each axis. Decoding and packed documents need it.
      attention_axes: as for `dot_product_attention`; default: all axes except the first, heads and features.
      base: the base of the frequencies. A larger base slows the slowest pair.
      features: the number of features to rotate, the first of D. The others pass unchanged. Default: all.
      interleaved: whether pairs are (0, 1), (2, 3)... as in RoFormer, or (0, F/2), (1, F/2 + 1)... as in GPT-NeoX and
        LLaMA, where F is the number of features of an axis. The two differ in the order of features only, but trained
        weights need the order of their training.
      scaling: for contexts longer than in training, `LinearScaling`, `NTKScaling` or `YaRNScaling`.

    Returns:
      An array with the shape and dtype of x. Angles and rotation are computed in float32, or float64 if x is float64.
      In float32 the error of an angle is about 1e-7 times the position.

    Raises:
      TypeError: x is not floating, or positions are not real numbers.
      ValueError: features cannot be split into pairs for each axis, or positions do not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnlib import positions
      >>> x = jnp.ones((1, 3, 1, 2))
      >>> y = positions.rotary_embedding(x)
      >>> bool(jnp.allclose(y[0, :, 0, 0], jnp.cos(jnp.arange(3)) - jnp.sin(jnp.arange(3))))
      True
    """
    x = jnp.asarray(check_array(x, "x", kind="floating"))
    if x.ndim < 3:
        raise ValueError(f"x must be (*batch and attention axes, heads, features); got shape {x.shape}.")
    axes = _axes.normalize(check_axes(attention_axes), x.ndim, trailing=2).attention
    require_static(x.shape[-1], "the number of features of x", "an int")
    rotated = x.shape[-1] if features is None else check_int(features, "features", minimum=0)
    base = check_number(base, "base", positive=True)
    interleaved = check_bool(interleaved, "interleaved")
    if not (scaling is None or isinstance(scaling, RotaryScaling)):
        raise TypeError(f"scaling must be None or a RotaryScaling such as NTKScaling(2.0); got {scaling!r}.")
    remainder = rotated % (2 * len(axes))
    if rotated > x.shape[-1] or remainder:
        raise ValueError(
            f"features must be a multiple of {2 * len(axes)} (pairs for each of {len(axes)} attention axes) and at "
            f"most the {x.shape[-1]} of x; got {rotated}. Rotate fewer with features={rotated - remainder}."
        )
    dtype = compute_dtype(x)
    size = rotated // len(axes)
    frequencies = _frequencies(base, size) if scaling is None else scaling.frequencies(base, size)
    magnitude = 1.0 if scaling is None else scaling.magnitude
    parts = []
    for n, position in enumerate(_positions(x, positions, axes)):
        position, rates = _axes.align_ranks(position.astype(dtype)[..., None, None], jnp.asarray(frequencies, dtype))
        angles = position * rates
        part = x[..., n * size : (n + 1) * size].astype(dtype)
        parts.append(_rotate(part, magnitude * jnp.cos(angles), magnitude * jnp.sin(angles), interleaved))
    return jnp.concatenate([*(part.astype(x.dtype) for part in parts), x[..., rotated:]], -1)


def zigzag(length: int, devices: int) -> np.ndarray:
    """The positions in the order in which `attnlib.Context(axis_name, order="zigzag")` takes them.

    The sequence has 2n equal parts for n devices, and device i holds the parts i and 2n - 1 - i. Under a causal mask,
    all devices then have the same work. Reorder everything with an entry for each position by the same index: tokens,
    labels, rotary positions, segment ids and the rows of a bias, `x[:, zigzag(length, devices)]`. The columns of a bias
    stay in the order of the positions.

    Args:
      length: the number of positions, a multiple of 2 * devices.
      devices: the number of devices along the axis of the context.

    Returns:
      int32 `(length,)`, a NumPy array: entry i is the position that comes i-th.

    Raises:
      ValueError: length is no multiple of 2 * devices.

    Example:
      >>> from attnlib import positions
      >>> positions.zigzag(8, 2).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]

    Source: Zhu, "Ring Flash Attention" (2024); Llama Team, "The Llama 3 Herd of Models" (2024).
    """
    return zigzag_order(*_sizes(length, devices))


def inverse_zigzag(length: int, devices: int) -> np.ndarray:
    """The index that brings an array from the order of `zigzag` back to the order of the positions.

    Args:
      length: the number of positions, a multiple of 2 * devices.
      devices: the number of devices along the axis of the context.

    Returns:
      int32 `(length,)`, a NumPy array.

    Raises:
      ValueError: length is no multiple of 2 * devices.

    Example:
      >>> import numpy as np
      >>> from attnlib import positions
      >>> order, inverse = positions.zigzag(8, 2), positions.inverse_zigzag(8, 2)
      >>> np.arange(8)[order][inverse].tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]

    Source: as `zigzag`.
    """
    return np.argsort(zigzag_order(*_sizes(length, devices))).astype(np.int32)


def _sizes(length: Any, devices: Any) -> tuple[int, int]:
    return check_int(length, "length", minimum=0), check_int(devices, "devices", minimum=1)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _frequencies(base: float, size: int) -> np.ndarray:
    return np.asarray(base, np.float64) ** (-np.arange(0, size, 2) / max(size, 1))


def _positions(x: jax.Array, positions: Any, axes: tuple[int, ...]) -> list[jax.Array]:
    """The positions along each attention axis, which broadcast to x without heads and features."""
    leading = x.shape[:-2]
    if positions is None:
        return [_along_axis(jnp.arange(leading[axis]), axis, len(leading)) for axis in axes]
    if not (hasattr(positions, "dtype") or isinstance(positions, Sequence)):
        raise TypeError(f"positions must be an array, a sequence of one array an axis, or None; got {positions!r}.")
    arrays = [positions] if len(axes) == 1 and hasattr(positions, "dtype") else list(positions)
    if len(arrays) != len(axes):
        raise ValueError(f"positions must be one array for each of {len(axes)} attention axes; got {len(arrays)}.")
    broadcastable = []
    for axis, array in zip(axes, arrays, strict=True):
        array = jnp.asarray(check_array(array, "positions", kind="real", convert=(int, float, Sequence)))
        shape = array.shape
        if array.ndim == 1:
            array = _along_axis(array, axis, len(leading))
        if not _axes.broadcasts(array.shape, leading):
            raise ValueError(
                f"positions must broadcast to the axes of x before heads and features, {leading}, or have shape "
                f"({leading[axis]},), the length of axis {axis}; got shape {shape}."
            )
        broadcastable.append(array)
    return broadcastable


def _along_axis(array: jax.Array, axis: int, rank: int) -> jax.Array:
    return array.reshape([-1 if a == axis else 1 for a in range(rank)])
