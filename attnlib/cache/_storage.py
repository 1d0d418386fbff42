"""The storage format of a KV cache, and how tokens are written; the token axis is always -3."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = ("float32", "bfloat16", "float16", "int8")
# A smaller scale would be a subnormal float32, so its token is stored as 0.
_MIN_SCALE = float(np.finfo(np.float32).tiny)


class StoredKeyValue(NamedTuple):
    """Stored keys and values `(*batch, tokens, K, D | E)`, and their int8 scales `(*batch, tokens, K, 1)`.

    The fast path of additive scores needs only 2 * key, which is cheap to recompute, so it has no storage of its own.
    """

    key: Any
    value: Any
    key_scale: Any  # None without int8
    value_scale: Any


def arrays_of(cache: Any) -> StoredKeyValue:
    """The stored arrays of a cache, which has NumPy arrays if it was loaded from a file."""
    storage = StoredKeyValue(cache.key, cache.value, cache.key_scale, cache.value_scale)
    return jax.tree.map(jnp.asarray, storage)


def check_dtype(value: Any) -> Any:
    """The dtype of a cache."""
    try:
        result = jnp.dtype(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"dtype must be one of {', '.join(_DTYPES)}; got {value!r}.") from error
    if result.name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {result.name}.")
    return result


def empty_storage(leading_shape: tuple[int, ...], key_dim: int, value_dim: int, dtype: Any) -> StoredKeyValue:
    scales = [jnp.zeros((*leading_shape, 1), jnp.float32) if dtype == jnp.int8 else None for _ in range(2)]
    return StoredKeyValue(
        jnp.zeros((*leading_shape, key_dim), dtype), jnp.zeros((*leading_shape, value_dim), dtype), *scales
    )


def quantize_like(key: jax.Array, value: jax.Array, like: StoredKeyValue) -> StoredKeyValue:
    """New tokens in the format of the storage `like`."""
    if like.key_scale is None:
        return StoredKeyValue(key.astype(like.key.dtype), value.astype(like.value.dtype), None, None)
    (key, key_scale), (value, value_scale) = _quantize_int8(key), _quantize_int8(value)
    return StoredKeyValue(key, value, key_scale, value_scale)


def dequantize(array: jax.Array, scale: jax.Array | None) -> jax.Array:
    return array if scale is None else array.astype(jnp.float32) * scale


@jax.custom_jvp
def _quantize_int8(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8, float32 scale of each token and head). A non-finite token gets a non-finite scale, and becomes NaN."""
    array = array.astype(jnp.float32)
    scale = jnp.max(jnp.abs(array), -1, keepdims=True, initial=0.0) / 127
    rounded = jnp.round(array / jnp.where(scale >= _MIN_SCALE, scale, jnp.inf))
    return jnp.where(jnp.isfinite(rounded), rounded, 0).astype(jnp.int8), scale


@_quantize_int8.defjvp
def _quantize_int8_jvp(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "keys and values have no derivative through an int8 cache. Create the cache with dtype=jnp.bfloat16, or append "
        "jax.lax.stop_gradient(key) and jax.lax.stop_gradient(value)."
    )


def write_slice(start: jax.Array, storage: jax.Array, new: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(storage, new, start, -3)


def scatter_slots(slots: jax.Array, storage: jax.Array, new: jax.Array) -> jax.Array:
    """Writes to the slots `(*batch, n)`, and drops tokens whose slot is beyond the end."""
    if slots.ndim == 1:
        return storage.at[slots].set(new, mode="drop", unique_indices=True)
    return jax.vmap(scatter_slots)(slots, storage, new)
