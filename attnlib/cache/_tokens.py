"""New tokens: their canonical layout, with the token axis third from the end, their number and their positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.operand_checks import check_arrays, check_axes, is_concrete
from attnlib._core.sizes import decide, is_static
from attnlib._core.validation import check_array

if TYPE_CHECKING:
    from attnlib.cache._kv_cache import KVCache
    from attnlib.cache._paged import PagedKVCache


def new_positions(first: Any, num_valid: int | jax.Array, num_new: int) -> jax.Array:
    """Positions of new tokens, from `first` on, `(n,)` or `(*batch, n)`; negative for tokens that are not real."""
    start, end = (jnp.asarray(x, jnp.int32)[..., None] for x in (first, num_valid))
    index, start, end = _axes.align_ranks(jnp.arange(num_new, dtype=jnp.int32), start, end)
    return jnp.where(index < end, start + index, -1)


def valid_token_count(cache: KVCache | PagedKVCache, lengths: Any, num_new: int) -> int | jax.Array:
    """The number of new tokens that are real: an int, or ints `(*batch)`."""
    if lengths is None:
        return num_new
    check_array(lengths, "lengths", kind="integer")
    if cache.length.shape != cache.batch_shape:
        raise ValueError("lengths needs a cache with a length for each sequence: create it with ragged=True.")
    if lengths.shape != cache.batch_shape:
        raise ValueError(f"lengths must have shape (*batch) = {cache.batch_shape}; got {lengths.shape}.")
    if (
        is_static(num_new)
        and is_concrete(lengths)
        and not np.all((np.asarray(lengths) >= 0) & (np.asarray(lengths) <= num_new))
    ):
        raise ValueError(f"lengths must be in 0..{num_new}, for {num_new} tokens; got {lengths}.")
    return jnp.clip(jnp.asarray(lengths, jnp.int32), 0, num_new)


def canonical_tokens(array: Any, name: str, rank: int, attention_axes: Any) -> tuple[jax.Array, int]:
    """(the array with its token axis third from the end, the index of that axis in the argument)."""
    check_arrays(**{name: array})
    if array.ndim != rank:
        raise ValueError(
            f"{name} must have rank {rank} to fit the cache, (*batch, tokens, heads, features); got {array.shape}."
        )
    checked = check_axes(-3 if attention_axes is None else attention_axes)
    token_axes = _axes.normalize(checked, rank, trailing=2).attention
    if len(token_axes) != 1:
        raise ValueError(
            f"attention_axes must be one axis, the axis of the tokens; got {attention_axes!r}. Append along one axis "
            "and treat the others as batch axes, or flatten them."
        )
    return jnp.moveaxis(array, token_axes[0], -3), token_axes[0]


def check_new_tokens(
    array: Any, name: str, batch_shape: tuple[int, ...], heads_and_features: tuple[int, ...], attention_axes: Any
) -> jax.Array:
    """New keys or values in canonical layout, with the batch axes, heads and features of the cache."""
    array, _ = canonical_tokens(array, name, len(batch_shape) + 3, attention_axes)
    heads, features = heads_and_features
    if array.shape != (*batch_shape, array.shape[-3], heads, features):
        expected = ", ".join(map(str, [*batch_shape, "n", heads, features]))
        raise ValueError(
            f"{name} must have shape (*batch, n, heads, features) = ({expected}) to fit the cache; got {array.shape}, "
            "with the token axis third from the end."
        )
    return array


def common_token_count(**arrays: jax.Array) -> int:
    """The number of tokens, which must be equal in all arrays."""
    counts = {name: array.shape[-3] for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        received = ", ".join(map(str, counts.values()))
        raise ValueError(f"{', '.join(counts)} must have equally many tokens; got {received}.")
    return next(iter(counts.values()))


def check_capacity(cache: KVCache | PagedKVCache, num_valid: int | jax.Array, num_new: int, remedy: str) -> None:
    """Raises ValueError if new tokens are known to exceed the capacity; otherwise the results become NaN."""
    total = 0 if isinstance(num_valid, jax.Array) else num_new  # a lower bound, without the traced length
    if is_static(num_new) and is_concrete(cache.length) and is_concrete(num_valid):
        total = int(np.max(np.asarray(cache.length) + np.asarray(num_valid), initial=0))
    if decide(lambda: total > cache.capacity, otherwise=False):
        raise ValueError(
            f"the capacity of the cache is {cache.capacity} tokens; appending these tokens needs {total}. {remedy}"
        )
