"""Initial carries of loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlib._core.varying_axes import cast_to_varying, varying_axes


def zeros_like_varying(array: jax.Array) -> jax.Array:
    """Zeros with the sharding and the varying axes of `array`, as `lax.scan` requires of its initial carry."""
    axes = varying_axes(array)
    if axes or jax.device_count() == 1:
        return cast_to_varying(jnp.zeros(array.shape, array.dtype), axes)
    # The compiler shards what is computed from the array like the array. Not so inside `shard_map`, where XLA of jax
    # 0.12 would compute wrong second derivatives of additive scores from this product.
    return jnp.where(jnp.isfinite(array), array, 0) * 0
