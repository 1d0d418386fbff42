"""flax.linen.MultiHeadDotProductAttention, flax.nnx.MultiHeadAttention <-> attnlib: the norms have other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnlib.convert._layouts import flatten, to_jax, unflatten
from attnlib.convert._shape_check import check_shapes, expected_entries

NAMES = {"query_ln/scale": "query_norm/scale", "key_ln/scale": "key_norm/scale"}
# K differs from N only in NNX: linen has no grouped heads.
KERNELS = {
    "query/kernel": ("C", "N", "D"), "key/kernel": ("Ck", "K", "D"), "value/kernel": ("Cv", "K", "D"),
    "out/kernel": ("N", "D", "O"),
}  # fmt: skip
BIASES = {"query/bias": ("N", "D"), "key/bias": ("K", "D"), "value/bias": ("K", "D"), "out/bias": ("O",)}


def from_flax(params: Any) -> dict[str, dict[str, jax.Array]]:
    """The parameters of a Flax multi-head layer, for `attnlib.multi_head_attention`.

    Args:
      params: the "params" of a `flax.linen.MultiHeadDotProductAttention`, or a `flax.nnx.MultiHeadAttention` or its
        state. Arrays may be traced.

    Returns:
      `{"query" | "key" | "value" | "out": {"kernel"[, "bias"]}}`, the same arrays; with norms of query and key also
      `{"query_norm" | "key_norm": {"scale"}}`, for attnlib's normalize_qk="layer".

    Raises:
      ValueError: entries are missing, unexpected or misshapen; the error lists all of them.
      TypeError: `params` have another type, hold boxes of partitioning metadata, or do not hold floating-point numbers.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, attnlib
      >>> x, layer = jnp.ones((2, 5, 8)), nn.MultiHeadDotProductAttention(num_heads=2, normalize_qk=True)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> params = attnlib.convert.from_flax(variables["params"])
      >>> output = attnlib.multi_head_attention(params, x, normalize_qk="layer")
      >>> bool(jnp.allclose(output, layer.apply(variables, x), atol=1e-5))
      True
    """
    entries = flatten(_pure_params(params))
    expected = expected_entries(entries, KERNELS, BIASES, dict.fromkeys(NAMES, ("D",)))
    check_shapes(entries, expected, "the entries do not fit a multi-head layer of Flax")
    return to_jax(unflatten({NAMES.get(name, name): array for name, array in entries.items()}))


def to_flax(params: Mapping[str, Any], into: Any = None) -> Any:
    """The parameters of a multi-head layer of Flax: the inverse of `from_flax`.

    Args:
      params: parameters of attnlib's layer, with projections and norms of normalize_qk="layer" only.
      into: a `flax.nnx.MultiHeadAttention` or its state, to update in place; default: none.

    Returns:
      `into`; without `into` the "params" of `flax.linen.MultiHeadDotProductAttention` as nested dicts. Grouped heads
      need NNX.

    Raises:
      ValueError: the parameters do not fit `into` or have entries that Flax lacks, such as a gate; the error lists all
        of them.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=2)
      >>> layer.apply({"params": attnlib.convert.to_flax(params)}, jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """
    entries = flatten(params)
    expected = expected_entries(entries, KERNELS, BIASES, dict.fromkeys(NAMES.values(), ("D",)))
    check_shapes(entries, expected, "the parameters do not fit a multi-head layer of Flax")
    flax_names = {name: flax_name for flax_name, name in NAMES.items()}
    entries = {flax_names.get(name, name): array for name, array in entries.items()}
    if into is None:
        return to_jax(unflatten(entries))
    from flax import nnx

    shapes = {name: np.shape(array) for name, array in flatten(_pure_params(into)).items()}
    check_shapes(entries, shapes, f"the parameters do not fit this {type(into).__name__}")
    state = nnx.state(into, nnx.Param) if isinstance(into, nnx.Module) else into
    nnx.replace_by_pure_dict(state, to_jax(unflatten(entries)))
    if isinstance(into, nnx.Module):
        nnx.update(into, state)
    return into


def _pure_params(params: Any) -> Any:
    """Nested dicts of arrays; for NNX the parameters only, without caches and random streams."""
    from flax import nnx

    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    return nnx.to_pure_dict(nnx.filter_state(params, nnx.Param)) if isinstance(params, nnx.State) else params
