"""The four attention layers of Keras <-> attnlib: equal shapes, other names and another order."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib.convert._layouts import as_array, flatten, to_jax, to_numpy, unflatten
from attnlib.convert._module_fields import projections
from attnlib.convert._shape_check import Expected, check_shapes

OUT = "attention_output"  # the name of the projection "out" in Keras
MULTI_HEAD, SINGLE_HEAD = {"MultiHeadAttention", "GroupedQueryAttention"}, {"AdditiveAttention", "Attention"}
SCALARS = ("scale", "concat_score_weight")
# The order of Keras' get_weights.
ORDER = [f"{name}/{kind}" for name in ("query", "key", "gate", "value", OUT) for kind in ("kernel", "bias")]


def from_keras(
    layer: Any, path: str | None = None, *, score_mode: str | None = None
) -> dict[str, dict[str, jax.Array]] | dict[str, jax.Array]:
    """The parameters of an attention layer of Keras 3, from the layer or from a saved file.

    Args:
      layer: a built `MultiHeadAttention`, `GroupQueryAttention`, `Attention` or `AdditiveAttention`, on any backend; or
        the path of a `.keras` or `.weights.h5` file. A file needs the package h5py, but neither the model nor Keras.
      path: the layer in the file: its name, or its group, such as "layers/encoder/attention", if several layers have
        this name.
      score_mode: required for an `Attention` with one scalar in a file, which is the scale ("dot") or the
        concat_score_weight ("concat").

    Returns:
      For `attnlib.MultiHeadAttention` and `multi_head_attention`, `{"query" | "key" | "value" | "out" [| "gate"]:
      {"kernel"[, "bias"]}}`; for `attnlib.DotProductAttention`, `{["scale"][, "concat_score_weight"]}`; for
      `attnlib.AdditiveAttention`, `{["scale"]}`; the same numbers.

    Raises:
      ValueError: the layer is not built; the file has no such layer, or several; or entries are missing, unexpected
        (such as those of LoRA and quantization) or misshapen; the error lists all of them.
      TypeError: `layer` is another layer.

    Example:
      >>> import os, tempfile, h5py, numpy as np, attnlib
      >>> path = os.path.join(tempfile.mkdtemp(), "a.weights.h5")
      >>> with h5py.File(path, "w") as file:  # as model.save_weights(path) does
      ...     file["layers/additive_attention/vars/0"] = np.ones(8)
      >>> attnlib.convert.from_keras(path, "additive_attention")["scale"].shape
      (8,)
    """
    if isinstance(layer, (str, os.PathLike)):
        if path is None:
            raise ValueError("path must name the layer in the file: from_keras(file, path).")
        kind, entries = _entries_of_file(os.fspath(layer), path, score_mode)
    elif path is not None or score_mode is not None:
        raise ValueError("path and score_mode are for a file; leave them None for a layer.")
    else:
        kind, entries = _entries_of_layer(layer)
    if kind == "multi-head":
        _check_multi_head(entries, "the entries do not fit Keras' MultiHeadAttention or GroupQueryAttention")
        return to_jax(unflatten(_rename(entries, OUT, "out")))
    shapes: Expected = dict.fromkeys(SCALARS, ())
    if kind == "AdditiveAttention" or (kind == "single-head" and np.shape(entries.get("scale", 0))):
        shapes = {"scale": ("D",)}
    expected = {name: shape for name, shape in shapes.items() if name in entries}
    check_shapes(entries, expected, "the entries do not fit Keras' Attention or AdditiveAttention")
    return to_jax(entries)


def to_keras(params: Mapping[str, Any], layer: Any = None) -> list[np.ndarray]:
    """The weights of a Keras layer: the inverse of `from_keras`.

    Args:
      params: parameters of attnlib's layer. Parameters with projections belong to a multi-head layer.
      layer: a built layer of Keras, which `layer.set_weights` updates; default: none.

    Returns:
      NumPy arrays in the order of Keras' `get_weights`.

    Raises:
      ValueError: the layer is not built, or the parameters do not fit a Keras layer; the error lists missing,
        unexpected and misshapen entries.

    Example:
      >>> import jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
      >>> [array.shape for array in attnlib.convert.to_keras(params)][:4]
      [(8, 2, 4), (2, 4), (8, 2, 4), (2, 4)]
    """
    entries = _rename(flatten(params), "out", OUT)
    if layer is not None:
        expected = {name: np.shape(value) for name, value in _entries_of_layer(layer)[1].items()}
        check_shapes(entries, expected, f"the parameters do not fit {layer.name}")
        arrays = [to_numpy(entries[name]) for name in expected]
        layer.set_weights(arrays)
        return arrays
    if set(entries) <= set(SCALARS):
        vector = len(entries) == 1 and np.ndim(entries.get("scale", 0)) == 1
        expected = dict.fromkeys(entries, ("D",) if vector else ())
        check_shapes(entries, expected, "the parameters do not fit Keras' Attention or AdditiveAttention")
        return [to_numpy(entries[name]) for name in SCALARS if name in entries]
    _check_multi_head(entries, "the parameters do not fit Keras' MultiHeadAttention or GroupQueryAttention")
    return [to_numpy(entries[name]) for name in ORDER if name in entries]


def _check_multi_head(entries: Mapping[str, Any], context: str) -> None:
    """Checks the entries of a multi-head layer, by their names in Keras."""
    expected = projections(_rename(entries, OUT, "out"))
    check_shapes(entries, _rename(expected, "out", OUT), context)


def _rename(entries: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The entries with the projection `old` renamed to `new`."""
    return {re.sub(rf"^{old}(?=/|$)", new, name): array for name, array in entries.items()}


def _entries_of_layer(layer: Any) -> tuple[str, dict[str, Any]]:
    """("multi-head" or the class name, the weights of a layer by their names in Keras, in Keras' order)."""
    names = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__.split(".")[0] in ("keras", "tf_keras")}
    if not names & (MULTI_HEAD | SINGLE_HEAD) or not hasattr(layer, "weights"):
        raise TypeError(
            "layer must be a MultiHeadAttention, GroupQueryAttention, Attention or AdditiveAttention of Keras, or the "
            f"path of a file; got {type(layer).__name__}."
        )
    if not layer.built:
        raise ValueError(f"the layer {layer.name} has no weights yet: build the layer, or call it once.")
    multi_head = bool(names & MULTI_HEAD)
    parts = 2 if multi_head else 1
    # The arrays are copied because a training step of Keras on JAX donates them.
    entries = {"/".join(x.path.split("/")[-parts:]): np.array(as_array(x.value)) for x in layer.weights}
    kind = "multi-head" if multi_head else "AdditiveAttention" if "AdditiveAttention" in names else "Attention"
    return kind, entries


# A file has a group for each layer, nested like the layers. "vars" in a group has the numbered arrays of the layer, and
# in files of newer versions the name of the layer.


def _entries_of_file(file: str, path: str, score_mode: str | None) -> tuple[str, dict[str, Any]]:
    import h5py

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            source: Any = io.BytesIO(archive.read("model.weights.h5"))
    else:
        source = file
    with h5py.File(source, "r") as root:
        group = _find_group(root, path, file)
        attributes = {name.lstrip("_"): name for name in group}  # the names of attributes of the Keras layer
        if "query_dense" in attributes:
            entries: dict[str, Any] = {}
            for part in ("query", "key", "gate", "value", "output"):
                name = attributes.get(f"{part}_dense")
                if name is not None:
                    entries |= _read_arrays(group[name], OUT if part == "output" else part, ("kernel", "bias"))
            return "multi-head", entries
        inner = sorted(set(group) - {"vars", "seed_generator"})
        if inner:
            raise ValueError(f"{path} in {file} is no attention layer: it holds {', '.join(inner)}.")
        return "single-head", _single_head_entries(group, path, score_mode)


def _single_head_entries(group: Any, path: str, score_mode: str | None) -> dict[str, Any]:
    if score_mode not in (None, "dot", "concat"):
        raise ValueError(f'score_mode must be None, "dot" or "concat"; got {score_mode!r}.')
    entries = _read_arrays(group, "", SCALARS)
    if [array.shape for array in entries.values()] != [()]:
        return entries
    if score_mode is None:
        raise ValueError(
            f'{path} holds one scalar, the scale or the concat_score_weight: pass score_mode="dot" or score_mode='
            '"concat".'
        )
    return {"scale" if score_mode == "dot" else "concat_score_weight": entries["scale"]}


def _read_arrays(group: Any, part: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of a layer by name. Arrays beyond `names` are named by their number."""
    entries = {}
    for number in sorted(group.get("vars", {}), key=int):
        name = names[int(number)] if int(number) < len(names) else f"variable {number}"
        dataset = group["vars"][number]
        dtype = jnp.bfloat16 if dataset.attrs.get("dtype") == "bfloat16" else None
        entries[f"{part}/{name}" if part else name] = np.array(dataset, dtype)
    return entries


def _find_group(root: Any, path: str, file: str) -> Any:
    """The group of a layer, found by the path of the group or by the name of the layer."""
    import h5py

    layers: dict[str, str] = {}  # group -> name; the name of a layer may be the group of another layer

    def visit(group: str, node: Any) -> None:
        inner = group.endswith(("_dense", "/_softmax", "/_dropout_layer"))
        if isinstance(node, h5py.Group) and "vars" in node and not inner:
            layers[group] = str(node["vars"].attrs.get("name", ""))

    root.visititems(visit)
    if "/" in path and path in layers:
        return root[path]
    matches = [group for group, name in layers.items() if path == name or f"/{group}".endswith(f"/{path}")]
    if len(matches) == 1:
        return root[matches[0]]
    listed = ", ".join(f"{group} (named {name})" for group, name in layers.items() if group in matches or not matches)
    count = f"{len(matches)} layers {path!r}; pass the group of one" if matches else f"no layer {path!r}; there are"
    raise ValueError(f"{file} has {count}: {listed}.")
