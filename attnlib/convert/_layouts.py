"""Conversion of arrays between libraries, of nested to flat names, and of kernels to matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_array(value: Any) -> Any:
    """A JAX or NumPy array from an array of any library. JAX arrays, traced ones too, are returned unchanged."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct, np.ndarray)):
        return value
    for method in ("detach", "cpu"):  # tensors with gradients or on accelerators have no `numpy`
        value = getattr(value, method, lambda value=value: value)()
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # PyTorch cannot convert it to NumPy
        return jnp.from_dlpack(value.contiguous())
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def to_jax(tree: Any) -> Any:
    """The tree with JAX arrays. Other arrays are copied: a training step may overwrite their memory."""

    def convert(x: Any) -> Any:
        # NumPy makes the copy, since `jnp.array` compiles a program for each shape.
        return x if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) else jax.device_put(np.array(x))

    return jax.tree.map(convert, tree)


def to_numpy(array: Any) -> np.ndarray:
    """A contiguous, writable copy."""
    return np.array(array, order="C")


def flatten(tree: Any, separator: str = "/") -> dict[str, Any]:
    """The arrays of nested mappings by path: `{"query/kernel": array, ...}`."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"the parameters must be a mapping of mappings of arrays; got {type(tree).__name__}.")
    entries: dict[str, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            entries |= {f"{name}{separator}{inner}": leaf for inner, leaf in flatten(node, separator).items()}
        elif hasattr(node, "unbox"):
            raise TypeError(f"{name} is a box of partitioning metadata. Pass flax.linen.meta.unbox(params).")
        else:
            entries[str(name)] = as_array(node)
    return entries


def unflatten(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in entries.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree


def kernel_of(matrix: Any, heads: int) -> Any:
    """A matrix (heads * features, C) -> the kernel (C, heads, features)."""
    return matrix.reshape(heads, -1, matrix.shape[1]).transpose(2, 0, 1)


def matrix_of(kernel: Any) -> Any:
    """The inverse of `kernel_of`."""
    return kernel.transpose(1, 2, 0).reshape(-1, kernel.shape[0])


def out_kernel_of(matrix: Any, heads: int) -> Any:
    """A matrix (O, heads * features) -> the kernel (heads, features, O)."""
    return matrix.transpose().reshape(heads, -1, matrix.shape[0])


def out_matrix_of(kernel: Any) -> Any:
    """The inverse of `out_kernel_of`."""
    return kernel.reshape(-1, kernel.shape[-1]).transpose()
