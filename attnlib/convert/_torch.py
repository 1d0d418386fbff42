"""torch.nn.MultiheadAttention <-> attnlib. Weights of PyTorch are (outputs, inputs): y = W x."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from attnlib._core.validation import check_int
from attnlib.convert._layouts import (
    as_array,
    flatten,
    kernel_of,
    matrix_of,
    out_kernel_of,
    out_matrix_of,
    to_jax,
    to_numpy,
    unflatten,
)
from attnlib.convert._shape_check import check_shapes, expected_entries

State = Mapping[str, Any] | str | os.PathLike[str]

QKV = ("query", "key", "value")
BIASES = {"query/bias": ("N", "D"), "key/bias": ("N", "D"), "value/bias": ("N", "D"), "out/bias": ("N*D",)}
MEMORY = {"memory/key": (1, "N", "D"), "memory/value": (1, "N", "D")}


def from_torch(state_dict: State, num_heads: int, prefix: str = "") -> dict[str, dict[str, jax.Array]]:
    """The parameters of a `torch.nn.MultiheadAttention`, for `attnlib.multi_head_attention`.

    Parameters do not depend on `batch_first`; inputs of attnlib have the batch first. Kernels are fused
    (`in_proj_weight`), or separate if kdim or vdim differ from embed_dim.

    Args:
      state_dict: tensors or arrays by name, of the module or of a model; or the path of a safetensors file, which needs
        the package safetensors.
      num_heads: heads N, which a state dict does not contain.
      prefix: the name of the module in the model, such as "encoder.layers.0.self_attn"; other entries are ignored.

    Returns:
      `{"query" | "key" | "value" | "out": {"kernel"[, "bias"]}}`, the same numbers in another layout. `bias_k` and
      `bias_v` become `"memory": {"key", "value"}`.

    Raises:
      ValueError: entries are missing, unexpected or misshapen; the error lists all of them.
      TypeError: an entry does not hold floating-point numbers.

    Example:
      >>> import numpy as np, jax.numpy as jnp, attnlib
      >>> tensors = {"in_proj_weight": np.ones((24, 8)), "out_proj.weight": np.ones((8, 8)),
      ...            "in_proj_bias": np.zeros(24), "out_proj.bias": np.zeros(8)}
      >>> params = attnlib.convert.from_torch(tensors, num_heads=2)
      >>> params["query"]["kernel"].shape
      (8, 2, 4)
      >>> attnlib.multi_head_attention(params, jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """
    num_heads = check_int(num_heads, "num_heads", minimum=1)
    entries, prefix = select_prefix(state_dict, prefix)
    expected: dict[str, tuple[str, ...]] = {"out_proj.weight": ("N*D", "N*D")}
    if any(f"{name}_proj_weight" in entries for name in "qkv"):
        features = {"q": "N*D", "k": "Ck", "v": "Cv"}
        expected |= {f"{name}_proj_weight": ("N*D", inputs) for name, inputs in features.items()}
    else:
        expected |= {"in_proj_weight": ("3*N*D", "N*D")}
    used = expected_entries(
        entries,
        expected,
        {"in_proj_bias": ("3*N*D",), "out_proj.bias": ("N*D",)},
        dict.fromkeys(("bias_k", "bias_v"), (1, 1, "N*D")),
    )
    context = f"the entries do not fit a torch.nn.MultiheadAttention of {num_heads} heads"
    check_shapes(entries, used, context, prefix=prefix, N=num_heads)
    if "in_proj_weight" in entries:
        matrices = _thirds(entries["in_proj_weight"])
    else:
        matrices = [entries[f"{name}_proj_weight"] for name in "qkv"]
    params = {f"{name}/kernel": kernel_of(matrix, num_heads) for name, matrix in zip(QKV, matrices, strict=True)}
    params["out/kernel"] = out_kernel_of(entries["out_proj.weight"], num_heads)
    if "in_proj_bias" in entries:
        for name, bias in zip(QKV, _thirds(entries["in_proj_bias"]), strict=True):
            params[f"{name}/bias"] = bias.reshape(num_heads, -1)
        params["out/bias"] = entries["out_proj.bias"]
    if "bias_k" in entries:  # one more key and value after the projections, with its features in heads
        for name, memory in (("key", entries["bias_k"]), ("value", entries["bias_v"])):
            params[f"memory/{name}"] = memory.reshape(1, num_heads, -1)
    return to_jax(unflatten(params))


def to_torch(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """The state dict of a `torch.nn.MultiheadAttention`: the inverse of `from_torch`.

    `module.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(params).items()})` loads it. For
    bfloat16, use `torch.from_dlpack(jnp.asarray(array))`: PyTorch does not take bfloat16 from NumPy.

    Args:
      params: parameters that fit PyTorch's module: N heads of query, key and value with D features each, N * D features
        of query and output, a bias in all projections or in none.
      prefix: the prefix of the names, as in `from_torch`.

    Returns:
      NumPy arrays by name: `in_proj_weight`, or `q_proj_weight`, `k_proj_weight` and `v_proj_weight` if key or value
      have other features than the query; `out_proj.weight`; `in_proj_bias` and `out_proj.bias`; `bias_k` and `bias_v`
      of a memory of one key.

    Raises:
      ValueError: the parameters have entries that PyTorch's module lacks, such as grouped heads, a gate, or norms.

    Example:
      >>> import jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
      >>> {name: array.shape for name, array in attnlib.convert.to_torch(params).items()}
      {'in_proj_weight': (24, 8), 'out_proj.weight': (8, 8), 'in_proj_bias': (24,), 'out_proj.bias': (8,)}
    """
    entries = flatten(params)
    kernels = {
        "query/kernel": ("N*D", "N", "D"), "key/kernel": ("Ck", "N", "D"), "value/kernel": ("Cv", "N", "D"),
        "out/kernel": ("N", "D", "N*D"),
    }  # fmt: skip
    expected = expected_entries(entries, kernels, BIASES, MEMORY)
    check_shapes(entries, expected, "the parameters do not fit a torch.nn.MultiheadAttention")
    matrices = [to_numpy(matrix_of(entries[f"{name}/kernel"])) for name in QKV]
    if matrices[0].shape == matrices[1].shape == matrices[2].shape:
        state_dict = {"in_proj_weight": np.concatenate(matrices)}
    else:
        state_dict = {f"{name}_proj_weight": matrix for name, matrix in zip("qkv", matrices, strict=True)}
    state_dict["out_proj.weight"] = to_numpy(out_matrix_of(entries["out/kernel"]))
    if "out/bias" in entries:
        state_dict["in_proj_bias"] = np.concatenate([to_numpy(entries[f"{name}/bias"]).reshape(-1) for name in QKV])
        state_dict["out_proj.bias"] = to_numpy(entries["out/bias"])
    if "memory/key" in entries:
        state_dict |= {f"bias_{n[0]}": to_numpy(entries[f"memory/{n}"]).reshape(1, 1, -1) for n in ("key", "value")}
    return {with_dot(prefix) + name: array for name, array in state_dict.items()}


def select_prefix(state: State, prefix: str) -> tuple[dict[str, Any], str]:
    """(the entries with the prefix, which is removed from their names; the prefix with a dot)."""
    prefix = with_dot(prefix)
    if isinstance(state, (str, os.PathLike)):
        return _from_safetensors(state, prefix), prefix
    if not isinstance(state, Mapping):
        raise TypeError(
            f"the state dict must be a mapping of names to arrays or the path of a safetensors file; got "
            f"{type(state).__name__}."
        )
    return {
        name.removeprefix(prefix): as_array(value) for name, value in state.items() if name.startswith(prefix)
    }, prefix


def with_dot(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else f"{prefix}."


def _from_safetensors(path: str | os.PathLike[str], prefix: str) -> dict[str, Any]:
    """The entries with the prefix; other entries are not read."""
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  (a file is not a mapping)
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def _thirds(array: Any) -> list[Any]:
    third = array.shape[0] // 3
    return [array[n * third : (n + 1) * third] for n in range(3)]
