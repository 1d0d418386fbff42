"""`attention_fn` for Flax's own multi-head modules: their projections, attnlib's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnlib._api import dot_product_attention
from attnlib._core.array_types import Array


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    implementation: str | tuple[str, ...] | None = None,
    input_positions: Array | None = None,
) -> jax.Array:
    """Drop-in `attention_fn` for `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    It takes all that those modules pass and computes the same with attnlib, in memory linear in the lengths; but a
    query that may attend nothing gives zeros, where Flax gives the mean of all values. Other options of
    `attnlib.dot_product_attention` are fields of `attnlib.MultiHeadAttention`.

    Args:
      query: `(*batch, T, N, D)`.
      key: `(*batch, S, K, D)`, K dividing N.
      value: `(*batch, S, K, E)`.
      bias: broadcastable to `(*batch, N, T, S)`, added to the logits.
      mask: likewise; True or not zero = attend, as `flax.linen.make_causal_mask` and its like give.
      broadcast_dropout: Flax's default, the same weights dropped for all batch indices and heads, is refused where
        there is dropout: set it to False in the module.
      dropout_rng: a JAX random key; needed where weights are dropped.
      dropout_rate: fraction of weights to drop, unless `deterministic`.
      deterministic: whether to drop nothing.
      dtype: of the computation; default: what query, key and value promote to.
      precision: of matrix products, as in `jax.lax.Precision`.
      module: where to sow the weights, which are square, as "attention_weights" in "intermediates": those that were
        used, after dropout (Flax's: before); default: nowhere.
      force_fp32_for_softmax: taken, and always so.
      einsum_dot_general: refused: products are the engine's own.
      qk_attn_weights_einsum: refused likewise.
      attn_weights_value_einsum: refused likewise.
      promote_dtype: how `flax.nnx` promotes query, key and value together; default: as `flax.linen` does.
      is_causal: a query attends no later key.
      implementation: as for `attnlib.dot_product_attention`; to set it, pass `functools.partial(attention_fn, ...)`.
      input_positions: of `flax.nnx`, for rotary embedding; refused, since nothing is turned here.

    Returns:
      `(*batch, T, N, E)`.

    Raises:
      ValueError: one of the refused options is given.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, attnlib
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attnlib.attention_fn)
      >>> x = jnp.ones((2, 10, 16))
      >>> layer.init_with_output(jax.random.key(0), x, mask=nn.make_causal_mask(x[..., 0]))[0].shape
      (2, 10, 16)
    """
    del force_fp32_for_softmax  # the engine computes logits and softmax in float32 at least
    products = dict(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    for name, given in products.items():
        if given is not None:
            raise ValueError(f"attnlib.attention_fn computes its own matrix products; leave {name}=None.")
    if input_positions is not None:
        raise ValueError(
            "attnlib.attention_fn turns no query and key by input_positions; call it with those that "
            "attnlib.positions.rotary_embedding gives, or write attnlib.MultiHeadAttention(rotary=True)."
        )
    rate = 0.0 if deterministic else dropout_rate
    if rate and broadcast_dropout:
        raise ValueError(
            "attnlib.attention_fn drops each weight on its own, never the same ones for all batch indices and heads; "
            "set broadcast_dropout=False in the module."
        )
    if promote_dtype is None:
        query, key, value = nn.dtypes.promote_dtype(query, key, value, dtype=dtype)
    else:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    output = dot_product_attention(
        query, key, value, bias=_whole(bias, query.ndim), mask=_as_bool(_whole(mask, query.ndim)), is_causal=is_causal,
        attention_axes=-3, dropout_rate=rate, dropout_rng=dropout_rng if rate else None, precision=precision,
        return_weights=module is not None, implementation=implementation,
    )  # fmt: skip
    if module is None:
        return output
    output, weights = output
    module.sow(*_collection(module), weights)
    return output


def _whole(array: Array | None, rank: int) -> Array | None:
    """With axes of one in front up to the rank of the weights: Flax broadcasts from the right, whatever is missing."""
    return None if array is None else jnp.reshape(array, (1,) * (rank - jnp.ndim(array)) + jnp.shape(array))


def _as_bool(mask: Array | None) -> Array | None:
    return mask if mask is None or mask.dtype == jnp.bool_ else mask != 0


def _collection(module: Any) -> tuple[Any, str]:
    if isinstance(module, nn.Module):
        return "intermediates", "attention_weights"
    from flax import nnx

    return nnx.Intermediate, "attention_weights"
