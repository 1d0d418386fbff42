"""`attention_fn` for the multi-head modules of Flax: their projections around attnlib's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attnlib._api import dot_product_attention
from attnlib._core.array_types import Array
from attnlib._core.context import Context


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
    context: str | Context | None = None,
) -> jax.Array:
    """Drop-in `attention_fn` for `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    It takes the arguments of these modules and returns the same output, in memory linear in the lengths. Only a fully
    masked query differs: its output is zero, and in Flax the mean of all values. `attnlib.MultiHeadAttention` has the
    other options of `attnlib.dot_product_attention`.

    Args:
      query: `(*batch, T, N, D)`.
      key: `(*batch, S, K, D)`, K dividing N.
      value: `(*batch, S, K, E)`.
      bias: broadcastable to `(*batch, N, T, S)`, added to the logits.
      mask: broadcastable to `(*batch, N, T, S)`; True or nonzero = attend, as in `flax.linen.make_causal_mask`.
      broadcast_dropout: must be False with dropout. Flax's default True drops the same weights for all batch indices
        and heads.
      dropout_rng: a JAX random key; required with dropout.
      dropout_rate: fraction of weights to drop, unless `deterministic`.
      deterministic: whether dropout is off.
      dtype: dtype of the computation; default: promoted from query, key and value.
      precision: precision of matrix products, as in `jax.lax.Precision`.
      module: the module that sows the weights `(*batch, N, T, S)` into "intermediates" as "attention_weights", after
        dropout (in Flax before dropout); default: none.
      force_fp32_for_softmax: ignored; softmax is in float32 at least.
      einsum_dot_general: refused: the engine computes its matrix products itself.
      qk_attn_weights_einsum: refused likewise.
      attn_weights_value_einsum: refused likewise.
      promote_dtype: the function that promotes query, key and value in `flax.nnx`; default: as in `flax.linen`.
      is_causal: whether to mask keys after the query.
      implementation: as in `attnlib.dot_product_attention`; set it by `functools.partial(attention_fn, ...)`.
      context: as in `attnlib.dot_product_attention`; set it by `functools.partial` too.
      input_positions: positions for rotary embedding in `flax.nnx`; refused: this function has no rotary embedding.

    Returns:
      `(*batch, T, N, E)`.

    Raises:
      ValueError: a refused option is set.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, attnlib
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attnlib.attention_fn)
      >>> x = jnp.ones((2, 10, 16))
      >>> layer.init_with_output(jax.random.key(0), x, mask=nn.make_causal_mask(x[..., 0]))[0].shape
      (2, 10, 16)
    """
    del force_fp32_for_softmax  # logits and softmax are in float32 at least
    einsums = dict(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    for name, einsum in einsums.items():
        if einsum is not None:
            raise ValueError(f"attnlib.attention_fn computes its matrix products itself; leave {name}=None.")
    if input_positions is not None:
        raise ValueError(
            "attnlib.attention_fn has no rotary embedding; leave input_positions=None. Apply "
            "attnlib.positions.rotary_embedding to query and key, or use attnlib.MultiHeadAttention(rotary=True)."
        )
    rate = 0.0 if deterministic else dropout_rate
    if rate and broadcast_dropout:
        raise ValueError(
            "attnlib.attention_fn drops each weight independently, not the same weights for all batch indices and "
            "heads; set broadcast_dropout=False in the module."
        )
    if promote_dtype is None:
        query, key, value = nn.dtypes.promote_dtype(query, key, value, dtype=dtype)
    else:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    bias, mask = _expand_rank(bias, query.ndim), _as_bool(_expand_rank(mask, query.ndim))
    output = dot_product_attention(
        query, key, value, bias=bias, mask=mask, is_causal=is_causal, attention_axes=-3, dropout_rate=rate,
        dropout_rng=dropout_rng if rate else None, precision=precision, return_weights=module is not None,
        implementation=implementation, context=context,
    )  # fmt: skip
    if module is None:
        return output
    output, weights = output
    module.sow(*_collection(module), weights)
    return output


def _expand_rank(array: Array | None, rank: int) -> Array | None:
    """The array with leading axes of size 1 up to the rank of the weights, since Flax broadcasts from the right."""
    return None if array is None else jnp.reshape(array, (1,) * (rank - jnp.ndim(array)) + jnp.shape(array))


def _as_bool(mask: Array | None) -> Array | None:
    return mask if mask is None or mask.dtype == jnp.bool_ else mask != 0


def _collection(module: Any) -> tuple[Any, str]:
    if isinstance(module, nn.Module):
        return "intermediates", "attention_weights"
    from flax import nnx

    return nnx.Intermediate, "attention_weights"
