"""Modifiers of logits to pass as `score_mod`: biases by position, without an array of all pairs, and a soft cap.

A modifier is a function of the scalars (logit, batch, head, query_position, key_position), which the library batches.
Modifiers compose like functions: `lambda logit, *indices: cap(alibi(logit, *indices), *indices)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.pytree import register
from attnlib._core.validation import check_array, check_bool, check_int, check_number
from attnlib.modifiers._base import ValidatedScoreMod

__all__ = ["ALiBi", "BucketedBias", "RelativeBias", "SoftCap", "alibi_slopes"]


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slopes of ALiBi: a geometric sequence from 2**(-8 / N) down to 2**-8.

    If N is no power of two, these are the slopes for the largest power of two below N, followed by every second slope
    for twice as many heads.

    Args:
      num_heads: the number of query heads N.

    Returns:
      float32 `(N,)`, a NumPy array.

    Raises:
      ValueError: num_heads is below 1.

    Example:
      >>> from attnlib import modifiers
      >>> modifiers.alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]

    Source: Press, Smith and Lewis, "Train Short, Test Long" (2022).
    """
    num_heads = check_int(num_heads, "num_heads", minimum=1)
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    extra_slopes = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, extra_slopes[: num_heads - power]]).astype(np.float32)


@register
@dataclasses.dataclass(frozen=True, eq=False)
class ALiBi(ValidatedScoreMod):
    """logit - slope of the head * |query position - key position|.

    Args:
      slopes: `(N,)`, one for each query head, such as `alibi_slopes(N)`; differentiable.

    >>> import jax, jax.numpy as jnp, attnlib
    >>> from attnlib import modifiers
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))
    >>> alibi = modifiers.ALiBi(modifiers.alibi_slopes(4))
    >>> attnlib.dot_product_attention(query, key, value, score_mod=alibi, is_causal=True).shape
    (2, 10, 4, 8)

    Source: Press, Smith and Lewis, "Train Short, Test Long" (2022).
    """

    slopes: Array

    def __call__(self, logit: jax.Array, batch: Any, head: Any, query_position: Any, key_position: Any) -> jax.Array:
        del batch
        distance = jnp.abs(query_position - key_position).astype(logit.dtype)
        return logit - _entry(self.slopes, head, logit) * distance

    def check(self, heads: int, axes: int) -> None:
        _check_one_axis("ALiBi", axes)
        check_array(self.slopes, "ALiBi slopes", kind="floating")
        if np.shape(self.slopes) != (heads,):
            raise ValueError(
                f"ALiBi slopes must be ({heads},), one for each query head; got shape {np.shape(self.slopes)}. "
                f"Write modifiers.alibi_slopes({heads})."
            )


@register
@dataclasses.dataclass(frozen=True, eq=False)
class RelativeBias(ValidatedScoreMod):
    """logit + table[distance along each attention axis, head]: Swin's bias, over any number of axes.

    Args:
      table: `(2 * M_1 - 1, ..., 2 * M_n - 1, N)` for n attention axes. The distance is query position minus key
        position, clipped to -(M - 1) .. M - 1; entry M - 1 is for distance 0. If M is the length of the axis, no
        distance is clipped.

    >>> import jax, jax.numpy as jnp, attnlib
    >>> from attnlib import modifiers
    >>> window = jax.random.normal(jax.random.key(0), (2, 7, 7, 4, 8))  # (batch, height, width, heads, features)
    >>> bias = modifiers.RelativeBias(jnp.zeros((13, 13, 4)))
    >>> attnlib.dot_product_attention(window, window, window, score_mod=bias).shape
    (2, 7, 7, 4, 8)

    Source: Shaw et al., "Self-Attention with Relative Position Representations" (2018), clipping; Liu et al., "Swin
    Transformer" (2021).
    """

    table: Array

    def __call__(self, logit: jax.Array, batch: Any, head: Any, query_position: Any, key_position: Any) -> jax.Array:
        del batch
        query, key = (x if isinstance(x, tuple) else (x,) for x in (query_position, key_position))
        sizes = np.shape(self.table)[:-1]
        index = [jnp.clip(q - k + size // 2, 0, size - 1) for q, k, size in zip(query, key, sizes, strict=True)]
        return logit + _entry(self.table, (*index, head), logit)

    def check(self, heads: int, axes: int) -> None:
        check_array(self.table, "RelativeBias table", kind="floating")
        *sizes, last = np.shape(self.table) or (0,)
        if len(sizes) != axes or last != heads or any(size % 2 == 0 for size in sizes):
            raise ValueError(
                f"RelativeBias table must be (2 * M - 1 for each of {axes} attention axes, {heads} query heads), where "
                f"2 * M - 1 is odd; got shape {np.shape(self.table)}."
            )


@register
@dataclasses.dataclass(frozen=True, eq=False)
class BucketedBias(ValidatedScoreMod):
    """logit + table[bucket of the distance, head]: T5's bias, over one axis.

    Half of the buckets of a direction hold one distance each. The others grow logarithmically in size up to
    `max_distance`. The last bucket holds all larger distances.

    Args:
      table: `(buckets, N)`.
      bidirectional: whether earlier keys have half of the buckets and later keys the other half. Otherwise all later
        keys share the bucket of distance 0, which suits causal attention.
      max_distance: approximately the first distance of the last bucket.

    >>> import jax, jax.numpy as jnp, attnlib
    >>> from attnlib import modifiers
    >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))
    >>> bias = modifiers.BucketedBias(jnp.zeros((32, 4)), bidirectional=False)
    >>> attnlib.dot_product_attention(query, key, value, score_mod=bias, is_causal=True).shape
    (2, 10, 4, 8)

    Source: Raffel et al., "Exploring the Limits of Transfer Learning" (T5, 2020).
    """

    table: Array
    bidirectional: bool = dataclasses.field(default=True, metadata={"static": True})
    max_distance: int = dataclasses.field(default=128, metadata={"static": True})

    def __call__(self, logit: jax.Array, batch: Any, head: Any, query_position: Any, key_position: Any) -> jax.Array:
        del batch
        bucket = self.bucket(key_position - query_position, np.shape(self.table)[0])
        return logit + _entry(self.table, (bucket, head), logit)

    def check(self, heads: int, axes: int) -> None:
        _check_one_axis("BucketedBias", axes)
        check_array(self.table, "BucketedBias table", kind="floating")
        shape, minimum = np.shape(self.table), 4 if check_bool(self.bidirectional, "BucketedBias bidirectional") else 2
        if len(shape) != 2 or shape[1] != heads or shape[0] < minimum or shape[0] % (minimum // 2):
            raise ValueError(
                f"BucketedBias table must be (buckets, {heads} query heads), with at least {minimum} buckets, and an "
                f"even number if bidirectional; got shape {shape}."
            )
        single = shape[0] // minimum
        if check_int(self.max_distance, "BucketedBias max_distance", minimum=1) <= single:
            raise ValueError(
                f"BucketedBias max_distance must be above {single}, the distances with buckets of their own; got "
                f"{self.max_distance}."
            )

    def bucket(self, distance: jax.Array, buckets: int) -> jax.Array:
        """The bucket of a distance, key position minus query position, among `buckets`."""
        first: Any = 0
        if self.bidirectional:
            buckets //= 2
            first, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
        else:
            distance = jnp.maximum(-distance, 0)
        single = buckets // 2
        # Compares integers, because the rounding of a logarithm could move a distance at a bound to another bucket.
        bounds = _log_bounds(single, buckets - single, self.max_distance)
        return first + jnp.minimum(distance, single) + sum((distance >= bound).astype(jnp.int32) for bound in bounds)


@dataclasses.dataclass(frozen=True)
class SoftCap:
    """cap * tanh(logit / cap), which bounds logits to (-cap, cap), to compose with other modifiers.

    >>> from attnlib import modifiers
    >>> cap, alibi = modifiers.SoftCap(50.0), modifiers.ALiBi(modifiers.alibi_slopes(4))
    >>> def capped_first(logit, *indices):
    ...     return alibi(cap(logit, *indices), *indices)

    Source: Bello et al. (2016); Gemma Team, "Gemma 2" (2024).
    """

    cap: float | jax.Array

    def __post_init__(self) -> None:
        if not isinstance(self.cap, jax.Array):
            object.__setattr__(self, "cap", check_number(self.cap, "SoftCap cap", positive=True))
        elif self.cap.shape != () or not jnp.issubdtype(self.cap.dtype, jnp.floating):
            raise TypeError(f"SoftCap cap must be a number; got {self.cap!r}.")

    def __call__(self, logit: jax.Array, *where: Any) -> jax.Array:
        del where
        cap = jnp.asarray(self.cap).astype(logit.dtype)
        return cap * jnp.tanh(logit / cap)


def _log_bounds(single: int, count: int, max_distance: int) -> Sequence[int]:
    """The first distance of each bucket of growing size after the first one, which begins at `single`.

    Distance d is in the bucket floor(count * log(d / single) / log(max_distance / single)), or else in the last one.
    """
    ratio = max_distance / single
    return [math.ceil(single * ratio ** (n / count) - 1e-9) for n in range(1, count)]


def _check_one_axis(name: str, axes: int) -> None:
    if axes != 1:
        raise ValueError(f"{name} needs one attention axis; got {axes}. Use modifiers.RelativeBias for several axes.")


def _entry(table: Array, index: Any, logit: jax.Array) -> jax.Array:
    """The entry of a table in the dtype of the logit."""
    return jnp.asarray(table).astype(logit.dtype)[index]
