"""Initial carries of loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attnlib._core.varying_axes import varying_axes


def zeros_like_varying(array: jax.Array) -> jax.Array:
    """Zeros with the sharding and the varying axes of `array`, as `lax.scan` requires of its initial carry."""
    if jax.device_count() == 1 and not varying_axes(array):
        return jnp.zeros_like(array)  # the same, and faster to compile
    return jnp.where(jnp.isfinite(array), array, 0) * 0
