"""The four attention layers of Keras <-> attnlib: the same shapes, other names and order."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib.convert._layouts import as_array, flat, nested, to_jax, to_numpy
from attnlib.convert._module_fields import projections
from attnlib.convert._shape_check import Expected, check

OUT = "attention_output"  # what Keras calls the projection "out"
MULTI_HEAD, SINGLE_HEAD = {"MultiHeadAttention", "GroupedQueryAttention"}, {"AdditiveAttention", "Attention"}
SCALARS = ("scale", "concat_score_weight")
# Of Keras' get_weights.
ORDER = [f"{name}/{kind}" for name in ("query", "key", "gate", "value", OUT) for kind in ("kernel", "bias")]


def from_keras(
    layer: Any, path: str | None = None, *, score_mode: str | None = None
) -> dict[str, dict[str, jax.Array]] | dict[str, jax.Array]:
    """The parameters of an attention layer of Keras 3, from the layer or from a saved file.

    Args:
      layer: a built `MultiHeadAttention`, `GroupQueryAttention`, `Attention` or `AdditiveAttention`, on any backend;
        or the path of a `.keras` or `.weights.h5` file (with the package h5py), where neither the model nor Keras is
        needed.
      path: the layer in that file: its name, or where there are layers in layers and names occur twice its group, as
        "layers/encoder/attention".
      score_mode: of an `Attention` with one scalar in a file, which does not tell whether that is the scale
        ("dot") or the concat_score_weight ("concat").

    Returns:
      For `attnlib.MultiHeadAttention` and `multi_head_attention`, `{"query" | "key" | "value" | "out" [| "gate"]:
      {"kernel"[, "bias"]}}`; for `attnlib.DotProductAttention`, `{["scale"][, "concat_score_weight"]}`; for
      `attnlib.AdditiveAttention`, `{["scale"]}`; the same numbers.

    Raises:
      ValueError: the layer is not built; there is no such layer in the file, or more than one; or entries are missing,
        unexpected (as those of LoRA and quantization) or misshapen; all are listed.
      TypeError: the layer is none of these.

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
            raise ValueError("pass the layer's name or path in the file, from_keras(file, path).")
        kind, entries = _from_file(os.fspath(layer), path, score_mode)
    elif path is not None or score_mode is not None:
        raise ValueError("path and score_mode are for a file; a layer knows its own.")
    else:
        kind, entries = _from_layer(layer)
    if kind == "multi-head":
        _check(entries, "the entries do not fit Keras' MultiHeadAttention or GroupQueryAttention")
        return to_jax(nested(_renamed(entries, OUT, "out")))
    shapes: Expected = dict.fromkeys(SCALARS, ())
    if kind == "AdditiveAttention" or (kind == "single-head" and np.shape(entries.get("scale", 0))):
        shapes = {"scale": ("D",)}
    expected = {name: shape for name, shape in shapes.items() if name in entries}
    check(entries, expected, "the entries do not fit Keras' Attention or AdditiveAttention")
    return to_jax(entries)


def to_keras(params: Mapping[str, Any], layer: Any = None) -> list[np.ndarray]:
    """The weights of the Keras layer with these parameters: the inverse of `from_keras`.

    Args:
      params: of attnlib's layer, from which Keras' is told: multi-head if there are projections.
      layer: a built layer of Keras, which is given them by `layer.set_weights`; default: none.

    Returns:
      NumPy arrays in the order of Keras' `get_weights`.

    Raises:
      ValueError: the layer is not built; or the parameters do not fit it (or any such layer): what is missing,
        unexpected, as norms, or misshapen is listed.

    Example:
      >>> import jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
      >>> [array.shape for array in attnlib.convert.to_keras(params)][:4]
      [(8, 2, 4), (2, 4), (8, 2, 4), (2, 4)]
    """
    entries = _renamed(flat(params), "out", OUT)
    if layer is not None:
        expected = {name: np.shape(value) for name, value in _from_layer(layer)[1].items()}
        check(entries, expected, f"the parameters do not fit {layer.name}")
        arrays = [to_numpy(entries[name]) for name in expected]
        layer.set_weights(arrays)
        return arrays
    if set(entries) <= set(SCALARS):
        vector = len(entries) == 1 and np.ndim(entries.get("scale", 0)) == 1
        expected = dict.fromkeys(entries, ("D",) if vector else ())
        check(entries, expected, "the parameters do not fit Keras' Attention or AdditiveAttention")
        return [to_numpy(entries[name]) for name in SCALARS if name in entries]
    _check(entries, "the parameters do not fit Keras' MultiHeadAttention or GroupQueryAttention")
    return [to_numpy(entries[name]) for name in ORDER if name in entries]


def _check(entries: Mapping[str, Any], context: str) -> None:
    """Of a multi-head layer, by Keras' names."""
    expected = projections(_renamed(entries, OUT, "out"))
    check(entries, _renamed(expected, "out", OUT), context)


def _renamed(entries: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """With another name for one projection."""
    moved = {name: name.partition("/") for name in entries}
    return {new + "".join(moved[name][1:]) if moved[name][0] == old else name: x for name, x in entries.items()}


def _from_layer(layer: Any) -> tuple[str, dict[str, Any]]:
    """("multi-head" or the class' name, the layer's weights by the names that Keras gives them, in its order)."""
    names = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__.split(".")[0] in ("keras", "tf_keras")}
    if not names & (MULTI_HEAD | SINGLE_HEAD) or not hasattr(layer, "weights"):
        raise TypeError(
            "layer must be a MultiHeadAttention, GroupQueryAttention, Attention or AdditiveAttention of Keras, or the "
            f"path of a file; got {type(layer).__name__}."
        )
    if not layer.built:
        raise ValueError(f"the layer {layer.name} has no weights yet: build it, or call it once.")
    multi_head = bool(names & MULTI_HEAD)
    parts = 2 if multi_head else 1
    # Copies, since a training step of Keras on JAX donates the arrays.
    entries = {"/".join(x.path.split("/")[-parts:]): np.array(as_array(x.value)) for x in layer.weights}
    kind = "multi-head" if multi_head else "AdditiveAttention" if "AdditiveAttention" in names else "Attention"
    return kind, entries


# Files: groups of groups, one a layer; in each, "vars" holds the layer's own arrays, numbered, and, in new files, the
# layer's name.


def _from_file(file: str, path: str, score_mode: str | None) -> tuple[str, dict[str, Any]]:
    import h5py

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            source: Any = io.BytesIO(archive.read("model.weights.h5"))
    else:
        source = file
    with h5py.File(source, "r") as root:
        group = _group(root, path, file)
        attributes = {name.lstrip("_"): name for name in group}  # Keras names them as its attributes
        if "query_dense" in attributes:
            entries: dict[str, Any] = {}
            for part in ("query", "key", "gate", "value", "output"):
                own = attributes.get(f"{part}_dense")
                if own is not None:
                    kinds = ("kernel", "bias")
                    entries |= _variables(group[own], OUT if part == "output" else part, kinds)
            return "multi-head", entries
        inner = sorted(set(group) - {"vars", "seed_generator"})
        if inner:
            raise ValueError(f"{path} in {file} is no attention layer: it holds {', '.join(inner)}.")
        return "single-head", _single(group, path, score_mode)


def _single(group: Any, path: str, score_mode: str | None) -> dict[str, Any]:
    if score_mode not in (None, "dot", "concat"):
        raise ValueError(f'score_mode must be None, "dot" or "concat"; got {score_mode!r}.')
    found = _variables(group, "", SCALARS)
    if [array.shape for array in found.values()] != [()]:
        return found
    if score_mode is None:
        raise ValueError(
            f'{path} holds one scalar, which may be the scale or the concat_score_weight: pass score_mode="dot" or '
            '"concat".'
        )
    return {"scale" if score_mode == "dot" else "concat_score_weight": found["scale"]}


def _variables(group: Any, part: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of a layer by names, beyond those by their numbers."""
    made = {}
    for number in sorted(group.get("vars", {}), key=int):
        name = names[int(number)] if int(number) < len(names) else f"variable {number}"
        dataset = group["vars"][number]
        dtype = jnp.bfloat16 if dataset.attrs.get("dtype") == "bfloat16" else None
        made[f"{part}/{name}" if part else name] = np.array(dataset, dtype)
    return made


def _group(root: Any, path: str, file: str) -> Any:
    """The layer's group, by its path or by the layer's name; one name may be the group of one, the name of another."""
    import h5py

    named: dict[str, str] = {}

    def visit(group: str, node: Any) -> None:
        inner = group.endswith(("_dense", "/_softmax", "/_dropout_layer"))
        if isinstance(node, h5py.Group) and "vars" in node and not inner:
            named[group] = str(node["vars"].attrs.get("name", ""))

    root.visititems(visit)
    if "/" in path and path in named:
        return root[path]
    found = [group for group, name in named.items() if path == name or f"/{group}".endswith(f"/{path}")]
    if len(found) == 1:
        return root[found[0]]
    listed = ", ".join(f"{group} (named {name})" for group, name in named.items() if group in found or not found)
    has = f"{len(found)} layers {path!r}; pass the group of one" if found else f"no layer {path!r}; there are"
    raise ValueError(f"{file} has {has}: {listed}.")
