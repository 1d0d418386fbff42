"""What is not finite reaches the rows that attend it, and no others.

What a mask leaves out has weights of zero, and cotangents of zero, but 0 * NaN is NaN: in products with it, one bad key
would be in every row, and in every gradient. So where there is a mask, what is not finite is replaced before anything
is computed of it, and the rows that do attend it are made NaN after. The reference does so too, in its own words.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SanitizedOperands(NamedTuple):
    """Operands without what is not finite, and where it was."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bad_queries: jax.Array  # (..., K, G, T)
    bad_keys: jax.Array  # (..., K, S): by key or value


def sanitize(query: jax.Array, key: jax.Array, value: jax.Array) -> SanitizedOperands:
    """With ones in place of what is not finite, and not zeros, since a score may divide by a norm."""
    finite = [jnp.isfinite(x) for x in (query, key, value)]
    query, key, value = (jnp.where(f, x, 1) for f, x in zip(finite, (query, key, value), strict=True))
    bad_query, bad_key, bad_value = (~jnp.all(f, -1) for f in finite)
    return SanitizedOperands(query, key, value, bad_query, bad_key | bad_value)


def finite_rows(array: jax.Array) -> jax.Array:
    """Whether all entries along the last axis are finite."""
    return jnp.all(jnp.isfinite(array), -1)
