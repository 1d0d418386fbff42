"""Non-finite content of queries, keys and values: rows that attend it become NaN, and no others.

A masked pair has a weight of 0 and a cotangent of 0, but 0 * NaN is NaN: in a matrix product, one bad key would reach
every row and every gradient. So if there is a mask, non-finite numbers are replaced first, and rows that attend them
are made NaN afterwards. The reference does the same in its own code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlib._autodiff.custom_rule import finite_entries


class SanitizedOperands(NamedTuple):
    """Finite operands, and where they were not finite."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bad_queries: jax.Array  # (..., K, G, T)
    bad_keys: jax.Array  # (..., K, S): by key or value


def sanitize(query: jax.Array, key: jax.Array, value: jax.Array) -> SanitizedOperands:
    """The operands with ones in place of non-finite numbers; not zeros, since a score may divide by a norm."""
    finite = [jnp.isfinite(query), jnp.isfinite(key), finite_entries(value)]
    query, key, value = (jnp.where(f, x, 1) for f, x in zip(finite, (query, key, value), strict=True))
    bad_query, bad_key, bad_value = (~jnp.all(f, -1) for f in finite)
    return SanitizedOperands(query, key, value, bad_query, bad_key | bad_value)


def finite_rows(array: jax.Array) -> jax.Array:
    """Whether all entries along the last axis are finite."""
    return jnp.all(jnp.isfinite(array), -1)
