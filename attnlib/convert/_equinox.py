"""equinox.nn.MultiheadAttention <-> attnlib: linear layers as PyTorch's, each with a bias or not."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnlib.convert._layouts import flat, kernel_of, matrix_of, nested, out_kernel_of, out_matrix_of, to_jax
from attnlib.convert._shape_check import check, expected_entries

NAMES = {"query": "query_proj", "key": "key_proj", "value": "value_proj", "out": "output_proj"}
WEIGHTS = {
    "query_proj.weight": ("N*D", "C"), "key_proj.weight": ("N*D", "Ck"), "value_proj.weight": ("N*E", "Cv"),
    "output_proj.weight": ("O", "N*E"),
}  # fmt: skip


def from_equinox(module: Any) -> dict[str, dict[str, jax.Array]]:
    """The parameters of an `equinox.nn.MultiheadAttention`, for `attnlib.multi_head_attention`.

    Equinox' module is for one example, `(T, C)`, and batches are for `jax.vmap`; attnlib's layer takes both.

    Args:
      module: the module; its arrays may be traced.

    Returns:
      `{"query" | "key" | "value" | "out": {"kernel"[, "bias"]}}`, the same numbers in another layout. Each of the four
      has a bias or not, as `multi_head_attention` allows; of `attnlib.MultiHeadAttention` use_bias is for all.

    Raises:
      ValueError: arrays of the module are missing or misshapen; all are listed.
      TypeError: it is no such module.

    Example:
      >>> import equinox, jax, attnlib
      >>> module = equinox.nn.MultiheadAttention(num_heads=2, query_size=8, key=jax.random.key(0))
      >>> attnlib.convert.from_equinox(module)["query"]["kernel"].shape
      (8, 2, 4)
    """
    if not all(hasattr(module, name) for name in ("num_heads", *NAMES.values())):
        raise TypeError(f"module must be an equinox.nn.MultiheadAttention; got {type(module).__name__}.")
    heads = module.num_heads
    linears = [(name, getattr(module, name)) for name in NAMES.values()]
    arrays = {f"{name}.{kind}": getattr(linear, kind) for name, linear in linears for kind in ("weight", "bias")}
    entries = {name: array for name, array in arrays.items() if array is not None}
    biases = [{name.replace("weight", "bias"): shape[:1]} for name, shape in WEIGHTS.items()]
    used = expected_entries(entries, WEIGHTS, *biases)
    check(entries, used, "the arrays do not fit an equinox.nn.MultiheadAttention", N=heads)
    made = {}
    for name, theirs in NAMES.items():
        weight, bias = arrays[f"{theirs}.weight"], arrays[f"{theirs}.bias"]
        made[f"{name}/kernel"] = (out_kernel_of if name == "out" else kernel_of)(weight, heads)
        if bias is not None:
            made[f"{name}/bias"] = bias if name == "out" else bias.reshape(heads, -1)
    return to_jax(nested(made))


def to_equinox(params: Mapping[str, Any], module: Any) -> Any:
    """An `equinox.nn.MultiheadAttention` with these parameters: the inverse of `from_equinox`.

    Args:
      params: of attnlib's layer, with projections alone and no grouped heads.
      module: a module of the same sizes and biases; it stays as it is.

    Returns:
      A module like it, with the parameters.

    Raises:
      ValueError: the parameters do not fit the module; what is missing, unexpected or misshapen is listed.
      TypeError: it is no such module.

    Example:
      >>> import equinox, jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2, use_bias=False)
      >>> module = equinox.nn.MultiheadAttention(num_heads=2, query_size=8, key=jax.random.key(1))
      >>> attnlib.convert.to_equinox(params, module).query_proj.weight.shape
      (8, 8)
    """
    import equinox

    entries = flat(params)
    expected = {name: np.shape(array) for name, array in flat(from_equinox(module)).items()}
    check(entries, expected, "the parameters do not fit this equinox.nn.MultiheadAttention")
    entries = to_jax(entries)
    for name, theirs in NAMES.items():
        kernel = entries[f"{name}/kernel"]
        linear = getattr(module, theirs)
        new = equinox.tree_at(lambda x: x.weight, linear, (out_matrix_of if name == "out" else matrix_of)(kernel))
        if linear.bias is not None:
            new = equinox.tree_at(lambda x: x.bias, new, entries[f"{name}/bias"].reshape(-1))
        module = equinox.tree_at(operator.attrgetter(theirs), module, new)
    return module
