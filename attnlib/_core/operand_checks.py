"""Checks of the operands and options of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape, Axes
from attnlib._core.problem import Asked, Implementation
from attnlib._core.sizes import is_static
from attnlib._core.validation import (
    check_array,
    check_int_or_ints,
    check_ints,
    check_number,
    check_positions,
    is_array,
    is_safe_float32,
)

_PRECISIONS = str, jax.lax.Precision, jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset
_USUAL = frozenset(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def check_arrays(**operands: Any) -> None:
    """Raises TypeError unless every operand is a floating-point array."""
    for name, value in operands.items():
        if isinstance(value, jax.Array) and value.dtype in _USUAL:
            continue  # the fast path of eager calls
        if isinstance(value, (list, tuple)) and any(map(is_array, value)):
            raise TypeError(
                f"{name} must be a floating-point array; got {type(value).__name__}. Pass arrays one by one. Keras' "
                "layer([query, value, key]) is layer(query, key, value) here."
            )
        check_array(value, name, kind="floating")


def is_concrete(value: Any) -> bool:
    """Whether this process can read the value: it is not traced, and all of it is addressable."""
    return not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)


def check_axes(attention_axes: Any) -> int | tuple[int, ...] | None:
    """`attention_axes` as a hashable value. `_axes.normalize` checks the range."""
    if attention_axes is None:
        return None
    return check_int_or_ints(attention_axes, "attention_axes", expected="an int, a sequence of ints or None")


def check_dropout_rate(value: Any) -> float:
    rate = check_number(value, "dropout_rate")
    if not 0.0 <= rate < 1.0:  # NaN too
        raise ValueError(f"dropout_rate must be in [0, 1); got {rate}. It is the fraction of weights to drop.")
    return rate


def check_dropout(rate: Any, rng: Any) -> float:
    """The dropout rate as a float in [0, 1). A rate above 0 needs a key."""
    if rng is None and type(rate) is float and rate == 0.0:
        return rate
    rate = check_dropout_rate(rate)
    if rng is None:
        if rate > 0.0:
            raise ValueError(
                f"dropout_rate={rate} needs dropout_rng; got None. Pass dropout_rng=jax.random.key(seed), a new one "
                "each step, or dropout_rate=0.0 when evaluating."
            )
    else:
        check_key(rng, "dropout_rng")
    return rate


def check_key(value: Any, name: str) -> None:
    """Raises TypeError unless the value is a random key, typed or raw."""
    if is_array(value):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.shape == ():
            return
        if value.dtype == jnp.uint32 and value.ndim == 1:
            return
    received = f"{value.dtype}{list(value.shape)}" if is_array(value) else type(value).__name__
    raise TypeError(f"{name} must be one JAX random key, jax.random.key(seed); got {received}.")


def check_explicit_positions(query: Any, key: Any, shapes: AttentionShape) -> None:
    if len(shapes.query) > 1:
        raise ValueError(
            f"query_positions and key_positions need one attention axis; got {len(shapes.query)}. Attend over one "
            "axis, or mask with masks.Dense."
        )
    for name, value, length in (("query", query, shapes.query), ("key", key, shapes.key)):
        if value is not None:
            check_positions(value, f"{name}_positions", shapes.batch, length, name)


def check_sink(value: Any) -> Any:
    """A number as a float. Floating-point arrays and None pass."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (is_safe_float32(value) or value in (math.inf, -math.inf)):
            raise ValueError(f"sink must be infinite or in [-1e30, 1e30], for float32; got {value}.")
        return float(value)
    return check_array(value, "sink", kind="floating", optional=True, convert=(float,))


def check_sink_shape(value: Any, heads: int) -> None:
    if value is not None and np.shape(value) not in ((), (heads,)):
        raise ValueError(f"sink must have shape () or ({heads},), one for each query head; got {np.shape(value)}.")


def check_normalization(normalize: bool, sink: Any) -> None:
    if not normalize and sink is not None:
        raise ValueError(
            "a sink changes what weights are divided by, and normalize=False divides by nothing. Leave sink=None (in a "
            "layer use_sink=False), or normalize=True."
        )


def check_soft_cap(value: Any) -> float | None:
    return check_number(value, "logits_soft_cap", positive=True, optional=True)


def check_implementation(value: Any, registered: tuple[str, ...]) -> Asked:
    """An implementation or a name, or a tuple of them; each name is one of `registered`."""
    if value is None:
        return None
    single = isinstance(value, (str, Implementation))
    names = (value,) if single else value
    if not isinstance(names, Sequence) or not names or not all(isinstance(n, (str, Implementation)) for n in names):
        raise TypeError(
            f"implementation must be None, one of {', '.join(map(repr, registered))}, or a sequence of them to try in "
            f"order; got {value!r}."
        )
    for name in names:
        if isinstance(name, str) and name not in registered:
            raise ValueError(
                f"implementation {name!r} is unknown; known are {', '.join(map(repr, registered))}, and None to choose."
            )
    return value if single else tuple(names)


def check_block_sizes(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    expected = "(queries, keys), two ints >= 1, or None"
    sizes = check_ints(value, "block_sizes", minimum=1, expected=expected)
    if len(sizes) != 2:
        raise ValueError(f"block_sizes must be {expected}; got {value!r}.")
    return sizes


def check_precision(value: Any) -> Any:
    """The precision of matrix products. JAX checks the names."""
    if value is None:
        return None
    parts = value if isinstance(value, tuple) else (value,)
    for part in parts:
        if not (part is None or isinstance(part, _PRECISIONS)):
            raise TypeError(
                "precision must be None, a name, a jax.lax.Precision or jax.lax.DotAlgorithm, or a tuple of one for "
                f"each operand; got {value!r}."
            )
    return value


def check_operands(
    query: Any, key: Any, value: Any, attention_axes: int | Sequence[int] | None
) -> tuple[Axes, AttentionShape]:
    """The axes and the sizes of the operands, after checks that their ranks, heads, positions and batch axes fit."""
    check_rank(query, "query")
    dtype = compute_dtype(query, key, value)
    axes = _axes.normalize(attention_axes, query.ndim, trailing=2)
    for name, operand in (("key", key), ("value", value)):
        if operand.ndim != axes.rank:
            raise ValueError(
                f"query, key and value must have the same rank; got query {query.shape} and {name} {operand.shape}."
            )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key and value must have equally many heads (axis -2); got key {key.shape} and value {value.shape}."
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of key heads (axis -2); got {heads} and {kv_heads} in query {query.shape} "
            f"and key {key.shape}. {_heads_hint(query, key)}"
        )
    if axes.attention_shape(key.shape) != axes.attention_shape(value.shape):
        raise ValueError(
            f"key and value must have the same attention axes {axes.attention}; got key {key.shape} and value "
            f"{value.shape}."
        )
    batch = []
    for axis in axes.batch:
        size, *others = {operand.shape[axis] for operand in (query, key, value)} - {1} or {1}
        if others:
            raise ValueError(
                f"batch axis {axis} must be equal in query, key and value, or 1; got query {query.shape}, key "
                f"{key.shape} and value {value.shape}. Name it in attention_axes if it is to be attended over."
            )
        batch.append(size)
    lengths = axes.attention_shape(query.shape), axes.attention_shape(key.shape)
    return axes, AttentionShape(tuple(batch), heads, *lengths, (query.shape[-1], key.shape[-1]), dtype)


def compute_dtype(*arrays: Array) -> Any:
    """float64 if any array is float64 and x64 is enabled, else float32."""
    wide = any(array.dtype == jnp.float64 for array in arrays)
    return jax.dtypes.canonicalize_dtype(jnp.float64) if wide else jnp.float32


def _heads_hint(query: Any, key: Any) -> str:
    """The likely reason why heads do not fit, and what to write."""
    if not is_static(query.shape[-2], key.shape[-2]):
        return "Write symbolic heads as a multiple, '2*k' for query and 'k' for key in jax.export.symbolic_shape."
    if query.ndim == 3:
        return "Arrays of rank 3 are (positions, heads, features): add an axis of one head, query[..., None, :]."
    text = "The layout is (batch, positions, heads, features): if heads come first, swap axes, query.swapaxes(-3, -2)."
    return text if query.shape[-3] != key.shape[-3] else f"{text} Axis -3 is equal in both, as heads would be."


def check_rank(operand: Any, name: str) -> None:
    if operand.ndim < 3:
        raise ValueError(
            f"{name} must have rank 3 or more, (*batch and attention axes, heads, features); got {operand.shape}. Add "
            f"an axis for a single head: {name}[..., None, :]."
        )


def check_bias(value: Any) -> Any:
    remedy = "Pass a bool array as `mask`, and convert others with bias.astype(jnp.float32)."
    return check_array(value, "bias", kind="floating", optional=True, remedy=remedy)


def check_bias_shape(value: Any, shapes: AttentionShape) -> None:
    if value is not None:
        _axes.check_pairs(value.shape, "bias", shapes)
