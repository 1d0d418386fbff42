"""flax.linen.MultiHeadDotProductAttention and flax.nnx.MultiHeadAttention <-> attnlib: the same shapes, two names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnlib.convert._layouts import flat, nested, to_jax
from attnlib.convert._shape_check import check, expected_entries

NAMES = {"query_ln/scale": "query_norm/scale", "key_ln/scale": "key_norm/scale"}
# Of NNX, linen having no grouped heads.
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
      `{"query" | "key" | "value" | "out": {"kernel"[, "bias"]}}`, and where the layer has normalize_qk
      `{"query_norm" | "key_norm": {"scale"}}`, for attnlib's normalize_qk="layer"; the same arrays.

    Raises:
      ValueError: entries are missing, unexpected or misshapen; all are listed.
      TypeError: `params` are neither, hold boxes of partitioning metadata or no floating-point numbers.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, attnlib
      >>> x, theirs = jnp.ones((2, 5, 8)), nn.MultiHeadDotProductAttention(num_heads=2, normalize_qk=True)
      >>> variables = theirs.init(jax.random.key(0), x)
      >>> params = attnlib.convert.from_flax(variables["params"])
      >>> output = attnlib.multi_head_attention(params, x, normalize_qk="layer")
      >>> bool(jnp.allclose(output, theirs.apply(variables, x), atol=1e-5))
      True
    """
    theirs = {**NAMES, **{name: name for name in (*KERNELS, *BIASES)}}
    entries = flat(_pure(params))
    norms = dict.fromkeys(NAMES, ("D",))
    check(
        entries, expected_entries(entries, KERNELS, BIASES, norms), "the entries do not fit a multi-head layer of Flax"
    )
    return to_jax(nested({theirs[name]: array for name, array in entries.items()}))


def to_flax(params: Mapping[str, Any], into: Any = None) -> Any:
    """The parameters of the Flax layer with these parameters: the inverse of `from_flax`.

    Args:
      params: of attnlib's layer, with projections and norms ("layer", which Flax has) alone.
      into: a `flax.nnx.MultiHeadAttention` or its state, which is given them in place; default: none.

    Returns:
      `into`; or where there is none a dict of dicts, the "params" of `flax.linen.MultiHeadDotProductAttention`, which
      with grouped heads only NNX has.

    Raises:
      ValueError: the parameters have what Flax' layers have not, as a gate, or do not fit `into`; all is listed.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=2)
      >>> layer.apply({"params": attnlib.convert.to_flax(params)}, jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """
    entries = flat(params)
    norms = dict.fromkeys(NAMES.values(), ("D",))
    check(
        entries,
        expected_entries(entries, KERNELS, BIASES, norms),
        "the parameters do not fit a multi-head layer of Flax",
    )
    theirs = {ours: name for name, ours in NAMES.items()}
    made = {theirs.get(name, name): array for name, array in entries.items()}
    if into is None:
        return to_jax(nested(made))
    from flax import nnx

    expected = {name: np.shape(array) for name, array in flat(_pure(into)).items()}
    check(made, expected, f"the parameters do not fit this {type(into).__name__}")
    state = nnx.state(into, nnx.Param) if isinstance(into, nnx.Module) else into
    nnx.replace_by_pure_dict(state, to_jax(nested(made)))
    if isinstance(into, nnx.Module):
        nnx.update(into, state)
    return into


def _pure(params: Any) -> Any:
    """Nested dicts of arrays; of NNX the parameters alone, without caches and random streams."""
    from flax import nnx

    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    return nnx.to_pure_dict(nnx.filter_state(params, nnx.Param)) if isinstance(params, nnx.State) else params
