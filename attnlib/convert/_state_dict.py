"""State dicts with any names <-> attnlib: fused or separate projections, with or without grouped heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attnlib._core.validation import check_int
from attnlib.convert._layouts import (
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
from attnlib.convert._torch import QKV, State, select_prefix, with_dot

Names = str | Sequence[str]


def from_state_dict(
    state_dict: State,
    num_heads: int,
    num_kv_heads: int | None = None,
    *,
    qkv: Names = "qkv",
    out: str = "proj",
    kernel: str = ".weight",
    bias: str = ".bias",
    inputs_first: bool = False,
    interleaved: bool = False,
    prefix: str = "",
) -> dict[str, dict[str, jax.Array]]:
    """Parameters for `attnlib.multi_head_attention` from linear layers of any names.

    Query, key and value have one fused projection with `(N + 2 K) * D` outputs, as in vision transformers and GPT, or
    three projections, as in BERT and Llama. The defaults are the names of timm's `Attention`.

    Args:
      state_dict: tensors or arrays by name, or the path of a safetensors file.
      num_heads: query heads N.
      num_kv_heads: key/value heads K; default N.
      qkv: the name of the fused layer, or the names of the layers of query, key and value.
      out: the name of the output projection.
      kernel, bias: suffixes of the names; the bias of a layer is optional.
      inputs_first: whether kernels are (inputs, outputs), as in GPT-2's Conv1D and flax.linen.Dense; otherwise they are
        (outputs, inputs), as in torch.nn.Linear.
      interleaved: whether a fused layer has for each key/value head N / K queries, the key and the value, as in BLOOM,
        GPT-NeoX and Falcon; otherwise it has all queries, then all keys, then all values.
      prefix: the name of the module in the model, such as "blocks.0.attn"; other entries are ignored.

    Returns:
      `{"query" | "key" | "value" | "out": {"kernel"[, "bias"]}}`, the same numbers in another layout.

    Raises:
      ValueError: entries are missing, unexpected or misshapen; the error lists all of them. Or K does not divide N.
      TypeError: an entry does not hold floating-point numbers.

    Example:
      >>> import numpy as np, attnlib
      >>> tensors = {"attn.qkv.weight": np.ones((16, 8)), "attn.proj.weight": np.ones((8, 8))}
      >>> params = attnlib.convert.from_state_dict(tensors, num_heads=2, num_kv_heads=1, prefix="attn")
      >>> params["key"]["kernel"].shape
      (8, 1, 4)
    """
    layout = _QkvLayout(num_heads, num_heads if num_kv_heads is None else num_kv_heads, qkv, inputs_first, interleaved)
    entries, prefix = select_prefix(state_dict, prefix)
    expected: dict[str, tuple[str, ...]] = {}
    biases = []
    for name, outputs in layout.outputs.items():
        expected[name + kernel] = layout.order(outputs, layout.inputs[name])
        biases.append({name + bias: (outputs,)})
    expected[out + kernel] = layout.order("O", "N*E" if layout.separate else "N*D")
    biases.append({out + bias: ("O",)})
    context = f"the entries do not fit attention with {layout.heads} query heads and {layout.kv_heads} key/value heads"
    used = expected_entries(entries, expected, *biases)
    check_shapes(entries, used, context, prefix=prefix, N=layout.heads, K=layout.kv_heads)
    params: dict[str, Any] = {}
    for name in layout.outputs:
        for kind, suffix in (("kernel", kernel), ("bias", bias)):
            if name + suffix in entries:
                array = entries[name + suffix]
                array = array.transpose() if inputs_first and kind == "kernel" else array
                params |= {f"{part}/{kind}": x for part, x in layout.split(name, array).items()}
    matrix = entries[out + kernel]
    params["out/kernel"] = out_kernel_of(matrix.transpose() if inputs_first else matrix, layout.heads)
    if out + bias in entries:
        params["out/bias"] = entries[out + bias]
    return to_jax(unflatten(params))


def to_state_dict(
    params: Mapping[str, Any],
    *,
    qkv: Names = "qkv",
    out: str = "proj",
    kernel: str = ".weight",
    bias: str = ".bias",
    inputs_first: bool = False,
    interleaved: bool = False,
    prefix: str = "",
) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`: NumPy arrays by name.

    Args:
      params: the parameters of `query`, `key`, `value` and `out`. A fused layer needs equal input features and equal
        features of a head.
      qkv, out, kernel, bias, inputs_first, interleaved, prefix: as in `from_state_dict`.

    Returns:
      `{name: array}`, the kernel and the optional bias of each layer.

    Raises:
      ValueError: the parameters have other entries, such as a gate or norms, or do not fit one fused layer.

    Example:
      >>> import jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2, use_bias=False)
      >>> names = dict(qkv=("q_proj", "k_proj", "v_proj"), out="o_proj")
      >>> {name: array.shape for name, array in attnlib.convert.to_state_dict(params, **names).items()}
      {'q_proj.weight': (8, 8), 'k_proj.weight': (8, 8), 'v_proj.weight': (8, 8), 'o_proj.weight': (8, 8)}
    """
    entries = flatten(params)
    fused = isinstance(qkv, str)
    key_features, value_features, value_dim = ("C", "C", "D") if fused else ("Ck", "Cv", "E")
    kernels = {
        "query/kernel": ("C", "N", "D"), "key/kernel": (key_features, "K", "D"),
        "value/kernel": (value_features, "K", value_dim), "out/kernel": ("N", value_dim, "O"),
    }  # fmt: skip
    biases = {"query/bias": ("N", "D"), "key/bias": ("K", "D"), "value/bias": ("K", value_dim)}
    groups = [biases] if fused else [{name: shape} for name, shape in biases.items()]
    used = expected_entries(entries, kernels, *groups, {"out/bias": ("O",)})
    layers = "one fused layer" if fused else "linear layers"
    sizes = check_shapes(entries, used, f"the parameters do not fit {layers} of qkv")
    layout = _QkvLayout(sizes["N"], sizes["K"], qkv, inputs_first, interleaved)
    state_dict = {}
    for name in layout.outputs:
        matrix = layout.join(name, {part: matrix_of(entries[f"{part}/kernel"]) for part in QKV})
        state_dict[name + kernel] = matrix.transpose() if inputs_first else matrix
        if f"{layout.parts[name][0]}/bias" in entries:
            vectors = {part: entries[f"{part}/bias"].reshape(-1) for part in layout.parts[name]}
            state_dict[name + bias] = layout.join(name, vectors)
    matrix = out_matrix_of(entries["out/kernel"])
    state_dict[out + kernel] = matrix.transpose() if inputs_first else matrix
    if "out/bias" in entries:
        state_dict[out + bias] = entries["out/bias"]
    return {with_dot(prefix) + name: to_numpy(array) for name, array in state_dict.items()}


class _QkvLayout:
    """The layout of heads in the outputs of the layers of query, key and value."""

    def __init__(self, heads: int, kv_heads: int, qkv: Names, inputs_first: bool, interleaved: bool) -> None:
        self.heads = check_int(heads, "num_heads", minimum=1)
        self.kv_heads = check_int(kv_heads, "num_kv_heads", minimum=1)
        self.inputs_first, self.interleaved = inputs_first, interleaved
        self.separate = not isinstance(qkv, str)
        names = [qkv] if isinstance(qkv, str) else list(qkv)
        if len(names) not in (1, 3):
            raise ValueError(f"qkv must be the name of one fused layer or the names of three layers; got {qkv!r}.")
        if interleaved and self.separate:
            raise ValueError("interleaved is a layout of one fused layer; qkv names three layers.")
        parts = [[part] for part in QKV] if self.separate else [list(QKV)]
        outputs = ["N*D", "K*D", "K*E"] if self.separate else [f"{heads + 2 * kv_heads}*D"]
        self.parts = dict(zip(names, parts, strict=True))
        self.outputs = dict(zip(names, outputs, strict=True))
        self.inputs = dict(zip(names, ("C", "Ck", "Cv"), strict=False))

    def order(self, outputs: str, inputs: str) -> tuple[str, str]:
        return (inputs, outputs) if self.inputs_first else (outputs, inputs)

    def split(self, name: str, array: Any) -> dict[str, Any]:
        """The kernel (outputs, C) or bias (outputs,) of a layer -> kernels or biases of its parts in attnlib."""
        if self.separate:
            (part,) = self.parts[name]
            return {part: self._split_heads(array, self.heads if part == "query" else self.kv_heads)}
        n, k = self.heads, self.kv_heads
        heads = array.reshape(n + 2 * k, -1, *array.shape[1:])
        if self.interleaved:
            groups = heads.reshape(k, n // k + 2, *heads.shape[1:])
            pieces = [groups[:, :-2].reshape(n, *heads.shape[1:]), groups[:, -2], groups[:, -1]]
        else:
            pieces = [heads[:n], heads[n : n + k], heads[n + k :]]
        return {
            part: self._split_heads(piece.reshape(-1, *array.shape[1:]), piece.shape[0])
            for part, piece in zip(QKV, pieces, strict=True)
        }

    def join(self, name: str, arrays: Mapping[str, Any]) -> np.ndarray:
        """The inverse of `split`: matrices (outputs, C) or vectors (outputs,) of the parts -> one array."""
        pieces = [np.asarray(arrays[part]) for part in self.parts[name]]
        if not self.interleaved:
            return np.concatenate(pieces)
        groups = [piece.reshape(self.kv_heads, -1, *piece.shape[1:]) for piece in pieces]
        return np.concatenate(groups, 1).reshape(-1, *pieces[0].shape[1:])

    @staticmethod
    def _split_heads(array: Any, heads: int) -> Any:
        return kernel_of(array, heads) if array.ndim == 2 else array.reshape(heads, -1)
