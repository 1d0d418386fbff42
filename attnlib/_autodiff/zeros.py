"""What loops over blocks need, whatever they compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def zeros_like_varying(array: jax.Array) -> jax.Array:
    """Zeros that vary over devices and are sharded as the array is, which carries of a loop must be."""
    if jax.device_count() == 1 and not getattr(jax.typeof(array), "vma", None):
        return jnp.zeros_like(array)  # nothing to vary over, and less to compile
    return jnp.where(jnp.isfinite(array), array, 0) * 0
