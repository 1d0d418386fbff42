"""NaN on purpose, which `jax_debug_nans` must not report."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_config: Any = jax.config  # its settings are no attributes for mypy


def nan_where(condition: jax.Array | bool, array: jax.Array) -> jax.Array:
    """The array with NaN where the condition holds."""
    if _config.jax_debug_nans and _config.jax_disable_jit:
        # Every operation runs by itself here, and is checked: a NaN that is broadcast first, as `jnp.where` does, would
        # be reported although the condition holds nowhere.
        one = jnp.where(condition, 0, 1).astype(array.dtype)
        return array * (one / one)
    return jnp.where(condition, jnp.nan, array)
