"""State dicts whose names and layout the caller tells <-> attnlib: fused or separate projections, grouped heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attnlib._core.validation import check_positive
from attnlib.convert._layouts import (
    flat,
    kernel_of,
    matrix_of,
    nested,
    out_kernel_of,
    out_matrix_of,
    to_jax,
    to_numpy,
)
from attnlib.convert._shape_check import check, expected_entries
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
    """Parameters for `attnlib.multi_head_attention` from linear layers with names of your own.

    The projections may be fused to one of `(N + 2 K) * D` outputs (3 * N * D without grouped heads), as in vision
    transformers and GPT, or three, as in BERT and Llama. The defaults are the names of timm's `Attention`.

    Args:
      state_dict: of tensors or of what NumPy takes for arrays; or the path of a safetensors file.
      num_heads: query heads N.
      num_kv_heads: key/value heads K; default N.
      qkv: the fused layer's name, or those of the three layers of query, key and value.
      out: the output projection's name.
      kernel, bias: what is put behind the names; each layer may have a bias or not.
      inputs_first: whether kernels are (inputs, outputs), as in GPT-2's Conv1D and flax.linen.Dense, and not
        (outputs, inputs), as in torch.nn.Linear.
      interleaved: whether a fused layer has for each key/value head its N / K queries, then the key, then the value,
        as in BLOOM, GPT-NeoX and Falcon, and not all queries, then all keys, then all values.
      prefix: the module's name in the model, such as "blocks.0.attn"; other entries are not looked at.

    Returns:
      `{"query" | "key" | "value" | "out": {"kernel"[, "bias"]}}`, the same numbers in another layout.

    Raises:
      ValueError: entries are missing, unexpected or misshapen; all are listed. Or heads are no multiple of those of
        key and value.
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
    context = f"the entries do not fit attention of {layout.heads} heads, {layout.kv_heads} of key and value"
    used = expected_entries(entries, expected, *biases)
    check(entries, used, context, prefix=prefix, N=layout.heads, K=layout.kv_heads)
    made: dict[str, Any] = {}
    for name in layout.outputs:
        for kind, ending in (("kernel", kernel), ("bias", bias)):
            if name + ending in entries:
                array = entries[name + ending]
                array = array.transpose() if inputs_first and kind == "kernel" else array
                made |= {f"{part}/{kind}": x for part, x in layout.split(name, array).items()}
    matrix = entries[out + kernel]
    made["out/kernel"] = out_kernel_of(matrix.transpose() if inputs_first else matrix, layout.heads)
    if out + bias in entries:
        made["out/bias"] = entries[out + bias]
    return to_jax(nested(made))


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
      params: of `query`, `key`, `value` and `out`; for a fused layer all from the same features, with as many
        features of a head.
      qkv, out, kernel, bias, inputs_first, interleaved, prefix: as in `from_state_dict`.

    Returns:
      `{name: array}`, a kernel and perhaps a bias for each layer.

    Raises:
      ValueError: the parameters have what such layers have not, as a gate or norms, or do not fit one fused layer.

    Example:
      >>> import jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2, use_bias=False)
      >>> names = dict(qkv=("q_proj", "k_proj", "v_proj"), out="o_proj")
      >>> {name: array.shape for name, array in attnlib.convert.to_state_dict(params, **names).items()}
      {'q_proj.weight': (8, 8), 'k_proj.weight': (8, 8), 'v_proj.weight': (8, 8), 'o_proj.weight': (8, 8)}
    """
    entries = flat(params)
    fused = isinstance(qkv, str)
    key_features, value_features, value_dim = ("C", "C", "D") if fused else ("Ck", "Cv", "E")
    kernels = {
        "query/kernel": ("C", "N", "D"), "key/kernel": (key_features, "K", "D"),
        "value/kernel": (value_features, "K", value_dim), "out/kernel": ("N", value_dim, "O"),
    }  # fmt: skip
    biases = {"query/bias": ("N", "D"), "key/bias": ("K", "D"), "value/bias": ("K", value_dim)}
    groups = [biases] if fused else [{name: shape} for name, shape in biases.items()]
    used = expected_entries(entries, kernels, *groups, {"out/bias": ("O",)})
    sizes = check(entries, used, f"the parameters do not fit {'one fused layer' if fused else 'linear layers'} of qkv")
    layout = _QkvLayout(sizes["N"], sizes["K"], qkv, inputs_first, interleaved)
    made = {}
    for name in layout.outputs:
        matrix = layout.join(name, {part: matrix_of(entries[f"{part}/kernel"]) for part in QKV})
        made[name + kernel] = matrix.transpose() if inputs_first else matrix
        if f"{layout.parts[name][0]}/bias" in entries:
            biases_of = {part: entries[f"{part}/bias"].reshape(-1) for part in layout.parts[name]}
            made[name + bias] = layout.join(name, biases_of)
    matrix = out_matrix_of(entries["out/kernel"])
    made[out + kernel] = matrix.transpose() if inputs_first else matrix
    if "out/bias" in entries:
        made[out + bias] = entries["out/bias"]
    return {with_dot(prefix) + name: to_numpy(array) for name, array in made.items()}


class _QkvLayout:
    """How the outputs of the layers of query, key and value are shared out among heads."""

    def __init__(self, heads: int, kv_heads: int, qkv: Names, inputs_first: bool, interleaved: bool) -> None:
        self.heads, self.kv_heads = check_positive(heads, "num_heads"), check_positive(kv_heads, "num_kv_heads")
        self.inputs_first, self.interleaved = inputs_first, interleaved
        self.separate = not isinstance(qkv, str)
        names = [qkv] if isinstance(qkv, str) else list(qkv)
        if len(names) not in (1, 3):
            raise ValueError(f"qkv must be the name of one fused layer or those of three; got {qkv!r}.")
        if interleaved and self.separate:
            raise ValueError("interleaved is the layout of one fused layer; qkv names three.")
        parts = [[part] for part in QKV] if self.separate else [list(QKV)]
        outputs = ["N*D", "K*D", "K*E"] if self.separate else [f"{heads + 2 * kv_heads}*D"]
        self.parts = dict(zip(names, parts, strict=True))
        self.outputs = dict(zip(names, outputs, strict=True))
        self.inputs = dict(zip(names, ("C", "Ck", "Cv"), strict=False))

    def order(self, outputs: str, inputs: str) -> tuple[str, str]:
        return (inputs, outputs) if self.inputs_first else (outputs, inputs)

    def split(self, name: str, array: Any) -> dict[str, Any]:
        """A layer's kernel (outputs, C) or bias (outputs,) -> those of its parts, as attnlib has them."""
        if self.separate:
            (part,) = self.parts[name]
            return {part: self._as_heads(array, self.heads if part == "query" else self.kv_heads)}
        n, k = self.heads, self.kv_heads
        heads = array.reshape(n + 2 * k, -1, *array.shape[1:])
        if self.interleaved:
            groups = heads.reshape(k, n // k + 2, *heads.shape[1:])
            pieces = [groups[:, :-2].reshape(n, *heads.shape[1:]), groups[:, -2], groups[:, -1]]
        else:
            pieces = [heads[:n], heads[n : n + k], heads[n + k :]]
        return {
            part: self._as_heads(piece.reshape(-1, *array.shape[1:]), piece.shape[0])
            for part, piece in zip(QKV, pieces, strict=True)
        }

    def join(self, name: str, arrays: Mapping[str, Any]) -> np.ndarray:
        """The inverse: matrices (outputs, C) or vectors (outputs,) of the parts -> that of the layer."""
        pieces = [np.asarray(arrays[part]) for part in self.parts[name]]
        if not self.interleaved:
            return np.concatenate(pieces)
        groups = [piece.reshape(self.kv_heads, -1, *piece.shape[1:]) for piece in pieces]
        return np.concatenate(groups, 1).reshape(-1, *pieces[0].shape[1:])

    @staticmethod
    def _as_heads(array: Any, heads: int) -> Any:
        return kernel_of(array, heads) if array.ndim == 2 else array.reshape(heads, -1)
