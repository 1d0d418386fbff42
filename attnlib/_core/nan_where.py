"""NaN on purpose, which `jax_debug_nans` must not report."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def nan_where(condition: jax.Array, array: jax.Array) -> jax.Array:
    """The array with NaN where the condition holds."""
    if jax.config.jax_debug_nans and jax.config.jax_disable_jit:
        # Every operation runs by itself here, and is checked: a NaN that is broadcast first, as `jnp.where` does, would
        # be reported although the condition holds nowhere.
        one = jnp.where(condition, 0, 1).astype(array.dtype)
        return array * (one / one)
    return jnp.where(condition, jnp.nan, array)
