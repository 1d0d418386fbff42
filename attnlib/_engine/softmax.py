"""Softmax over keys that arrive in blocks: a running maximum and a running sum (Milakov and Gimelshein 2018)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SoftmaxState(NamedTuple):
    """What is known of each row after some blocks; a row that has seen no finite logit has highest -inf, sum 0."""

    row_max: jax.Array  # (..., T)
    row_sum: jax.Array  # (..., T): sum of exp(logit - highest)
    output: jax.Array  # (..., T, E): sum of exp(logit - highest) * value, before division


def finite_max(row_max: jax.Array) -> jax.Array:
    """What to subtract in an exponent: the maximum, or 0 where it is -inf, so that exp(-inf - base) is 0, not NaN."""
    return jnp.where(row_max == -jnp.inf, 0, row_max)


def normalize(state: SoftmaxState) -> tuple[jax.Array, jax.Array]:
    """(output, lse); 0 and -inf for a row that has seen nothing."""
    empty = state.row_sum == 0
    row_sum = jnp.where(empty, 1, state.row_sum)
    lse = jnp.where(empty, -jnp.inf, jnp.log(row_sum) + finite_max(state.row_max))
    return state.output / row_sum[..., None], lse
