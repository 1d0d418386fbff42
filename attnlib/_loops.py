"""What loops over blocks need, whatever they compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def nought(array: jax.Array) -> jax.Array:
    """Zeros that vary over devices and are sharded as the array is, which carries of a loop must be."""
    return jnp.where(jnp.isfinite(array), array, 0) * 0
