"""equinox.nn.MultiheadAttention <-> attnlib: linear layers in PyTorch's layout, each with or without a bias."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnlib.convert._layouts import flatten, kernel_of, matrix_of, out_kernel_of, out_matrix_of, to_jax, unflatten
from attnlib.convert._shape_check import check_shapes, expected_entries

NAMES = {"query": "query_proj", "key": "key_proj", "value": "value_proj", "out": "output_proj"}
WEIGHTS = {
    "query_proj.weight": ("N*D", "C"), "key_proj.weight": ("N*D", "Ck"), "value_proj.weight": ("N*E", "Cv"),
    "output_proj.weight": ("O", "N*E"),
}  # fmt: skip


def from_equinox(module: Any) -> dict[str, dict[str, jax.Array]]:
    """The parameters of an `equinox.nn.MultiheadAttention`, for `attnlib.multi_head_attention`.

    The module of Equinox takes one example `(T, C)`; the layer of attnlib takes batches as well.

    Args:
      module: the module; its arrays may be traced.

    Returns:
      `{"query" | "key" | "value" | "out": {"kernel"[, "bias"]}}`, the same numbers in another layout. Some projections
      may lack a bias: `multi_head_attention` takes such parameters, `attnlib.MultiHeadAttention` does not.

    Raises:
      ValueError: arrays of the module are missing or misshapen; the error lists all of them.
      TypeError: `module` is not an `equinox.nn.MultiheadAttention`.

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
    check_shapes(entries, used, "the arrays do not fit an equinox.nn.MultiheadAttention", N=heads)
    params = {}
    for name, linear_name in NAMES.items():
        weight, bias = arrays[f"{linear_name}.weight"], arrays[f"{linear_name}.bias"]
        params[f"{name}/kernel"] = (out_kernel_of if name == "out" else kernel_of)(weight, heads)
        if bias is not None:
            params[f"{name}/bias"] = bias if name == "out" else bias.reshape(heads, -1)
    return to_jax(unflatten(params))


def to_equinox(params: Mapping[str, Any], module: Any) -> Any:
    """An `equinox.nn.MultiheadAttention` with these parameters: the inverse of `from_equinox`.

    Args:
      params: parameters of attnlib's layer, with projections only and without grouped heads.
      module: a module of the same sizes and biases; it is not changed.

    Returns:
      A copy of the module with the parameters.

    Raises:
      ValueError: the parameters do not fit the module; the error lists missing, unexpected and misshapen entries.
      TypeError: `module` is not an `equinox.nn.MultiheadAttention`.

    Example:
      >>> import equinox, jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2, use_bias=False)
      >>> module = equinox.nn.MultiheadAttention(num_heads=2, query_size=8, key=jax.random.key(1))
      >>> attnlib.convert.to_equinox(params, module).query_proj.weight.shape
      (8, 8)
    """
    import equinox

    entries = flatten(params)
    expected = {name: np.shape(array) for name, array in flatten(from_equinox(module)).items()}
    check_shapes(entries, expected, "the parameters do not fit this equinox.nn.MultiheadAttention")
    entries = to_jax(entries)
    for name, linear_name in NAMES.items():
        linear = getattr(module, linear_name)
        weight = (out_matrix_of if name == "out" else matrix_of)(entries[f"{name}/kernel"])
        linear = equinox.tree_at(lambda x: x.weight, linear, weight)
        if linear.bias is not None:
            linear = equinox.tree_at(lambda x: x.bias, linear, entries[f"{name}/bias"].reshape(-1))
        module = equinox.tree_at(operator.attrgetter(linear_name), module, linear)
    return module
