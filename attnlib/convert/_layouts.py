"""Arrays of any library, trees of them by name, and kernels as matrices and as attnlib has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_array(value: Any) -> Any:
    """A JAX or NumPy array of what a library holds; JAX's, traced ones too, are themselves."""
    if isinstance(value, (jax.Array, jax.ShapeDtypeStruct, np.ndarray)):
        return value
    for method in ("detach", "cpu"):  # a tensor that wants gradients, or is on an accelerator, gives no array
        value = getattr(value, method, lambda value=value: value)()
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # which PyTorch does not give to NumPy
        return jnp.from_dlpack(value.contiguous())
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def to_jax(tree: Any) -> Any:
    """JAX's arrays; others are copied, since they may be the memory of a model in training."""
    return jax.tree.map(lambda x: x if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) else jnp.array(x), tree)


def to_numpy(array: Any) -> np.ndarray:
    """A contiguous, writable copy."""
    return np.array(array, order="C")


def flat(tree: Any, separator: str = "/") -> dict[str, Any]:
    """{"query/kernel": array, ...} of nested mappings."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"the parameters must be a mapping of mappings of arrays; got {type(tree).__name__}.")
    made: dict[str, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            made |= {f"{name}{separator}{inner}": leaf for inner, leaf in flat(node, separator).items()}
        elif hasattr(node, "unbox"):
            raise TypeError(f"{name} is in a box of partitioning metadata. Pass flax.linen.meta.unbox(params).")
        else:
            made[str(name)] = as_array(node)
    return made


def nested(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in entries.items():
        *groups, name = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = leaf
    return tree


def kernel_of(matrix: Any, heads: int) -> Any:
    """(heads * features, C), which multiplies a column, -> (C, heads, features)."""
    return matrix.reshape(heads, -1, matrix.shape[1]).transpose(2, 0, 1)


def matrix_of(kernel: Any) -> Any:
    """The inverse of `kernel_of`."""
    return kernel.transpose(1, 2, 0).reshape(-1, kernel.shape[0])


def out_kernel_of(matrix: Any, heads: int) -> Any:
    """(O, heads * features) -> (heads, features, O)."""
    return matrix.transpose().reshape(heads, -1, matrix.shape[0])


def out_matrix_of(kernel: Any) -> Any:
    """The inverse of `out_kernel_of`."""
    return kernel.reshape(-1, kernel.shape[-1]).transpose()
