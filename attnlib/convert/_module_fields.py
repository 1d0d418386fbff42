"""The fields of a module, inferred from its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnlib.convert._layouts import flatten
from attnlib.convert._shape_check import check_shapes, expected_entries

KERNELS = {
    "query/kernel": ("C", "N", "D"), "key/kernel": ("Ck", "K", "D"), "value/kernel": ("Cv", "K", "E"),
    "out/kernel": ("N", "E", "*O"),
}  # fmt: skip
BIASES = {"query/bias": ("N", "D"), "key/bias": ("K", "D"), "value/bias": ("K", "E"), "out/bias": ("*O",)}
GATE, GATE_BIAS = {"gate/kernel": ("C", "N", "E")}, {"gate/bias": ("N", "E")}
NORMS = {"query_norm/scale": ("D",), "key_norm/scale": ("D",)}
SINK = {"sink/logit": ("N",)}
MEMORY = {"memory/key": ("M", "K", "D"), "memory/value": ("M", "K", "E")}


def projections(entries: Mapping[str, Any]) -> dict[str, Sequence[int | str]]:
    """The expected shapes of the projections. Either all of them have a bias, or none."""
    biases = {**BIASES, **GATE_BIAS} if "gate/kernel" in entries else BIASES
    return expected_entries(entries, KERNELS, GATE, biases)


def module_fields(params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that an `attnlib.MultiHeadAttention` needs for these parameters.

    Args:
      params: from `init_multi_head_attention` or a `from_` function.

    Returns:
      `{"num_heads": N, "num_kv_heads": K, "key_dim": D, "value_dim": E, "output_shape": O, "use_bias": bool}`, and
      `use_gate`, `score` or `use_scale`, `normalize_qk`, `use_sink` and `num_memory` if they have parameters.
      normalize_qk is "layer", as in Flax; "rms" has the same parameters.

    Raises:
      ValueError: parameters are missing, unexpected or misshapen; the error lists all of them. A module needs a bias in
        all projections or in none; `multi_head_attention` does not.

    Example:
      >>> import jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 32, num_heads=4, num_kv_heads=2)
      >>> layer = attnlib.MultiHeadAttention(**attnlib.convert.module_fields(params))
      >>> layer.num_heads, layer.num_kv_heads, layer.key_dim
      (4, 2, 8)
    """
    entries = flatten(params)
    additive = np.ndim(entries.get("score/scale", 0)) == 2
    score = {"score/scale": ("N", "D") if additive else ("N",)}
    used = expected_entries(entries, projections(entries), NORMS, SINK, MEMORY, score)
    sizes = check_shapes(entries, used, "the parameters do not fit an attnlib.MultiHeadAttention")
    letters = {"num_heads": "N", "num_kv_heads": "K", "key_dim": "D", "value_dim": "E", "output_shape": "*O"}
    fields: dict[str, Any] = {name: sizes[letter] for name, letter in letters.items()}
    fields["use_bias"] = "out/bias" in entries
    if "gate/kernel" in entries:
        fields["use_gate"] = True
    if "score/scale" in entries:
        fields |= {"score": "additive"} if additive else {"use_scale": True}
    if "query_norm/scale" in entries:
        fields["normalize_qk"] = "layer"
    if "sink/logit" in entries:
        fields["use_sink"] = True
    if "memory/key" in entries:
        fields["num_memory"] = sizes["M"]
    return fields
