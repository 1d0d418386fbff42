"""New tokens as the cache takes them: their axis third from the end, their number, their positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnlib._core import axes as _axes
from attnlib._core.operand_checks import check_arrays, check_axes


def new_positions(first: Any, count: int | jax.Array, new: int) -> jax.Array:
    """Positions of so many new tokens from the first on, `(n,)` or `(*batch, n)`; below 0 where they are not real."""
    place = jnp.arange(new, dtype=jnp.int32)
    real = place < jnp.asarray(count, jnp.int32)[..., None]
    return jnp.where(real, jnp.asarray(first, jnp.int32)[..., None] + place, -1)


def canonical_tokens(array: Any, name: str, rank: int, attention_axes: Any) -> tuple[jax.Array, int]:
    """(the array with its axis of tokens third from the end, where that axis was)."""
    check_arrays(**{name: array})
    if array.ndim != rank:
        raise ValueError(
            f"{name} must have rank {rank} to fit the cache, batch axes, tokens, heads, features; got {array.shape}."
        )
    asked = check_axes(-3 if attention_axes is None else attention_axes)
    attended = _axes.normalize(asked, rank, trailing=2).attention
    if len(attended) != 1:
        raise ValueError(
            f"attention_axes must be one axis, that of the tokens; got {attention_axes!r}. Several cannot be cached: "
            "append along one of them, the others being batch axes, or flatten them."
        )
    return jnp.moveaxis(array, attended[0], -3), attended[0]


def common_token_count(**arrays: jax.Array) -> int:
    counts = {name: array.shape[-3] for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(map(str, counts.values()))
        raise ValueError(f"{', '.join(counts)} must have equally many tokens; got {found}.")
    return next(iter(counts.values()))
