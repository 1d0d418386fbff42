"""Softmax over keys that arrive in blocks: a running maximum and a running sum (Milakov and Gimelshein 2018)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Running(NamedTuple):
    """What is known of each row after some blocks; a row that has seen no finite logit has highest -inf, sum 0."""

    highest: jax.Array  # (..., T)
    total: jax.Array  # (..., T): sum of exp(logit - highest)
    output: jax.Array  # (..., T, E): sum of exp(logit - highest) * value, before division


def base(highest: jax.Array) -> jax.Array:
    """What to subtract in an exponent: the maximum, or 0 where it is -inf, so that exp(-inf - base) is 0, not NaN."""
    return jnp.where(highest == -jnp.inf, 0, highest)


def finish(running: Running) -> tuple[jax.Array, jax.Array]:
    """(output, lse); 0 and -inf for a row that has seen nothing."""
    empty = running.total == 0
    total = jnp.where(empty, 1, running.total)
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + base(running.highest))
    return running.output / total[..., None], lse
