"""Conversions between the axes of the user and the folded axes of implementations.

A user's query is `(*batch and attention axes, N, D)` with the leading axes in any order. The folded query is
`(*batch, N, T, D)`: batch axes in their order, heads, and the attention axes flattened in row-major order of
`attention_axes`. Batch axes are never merged, because a merge would gather an axis that is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.sizes import is_static


@dataclass(frozen=True)
class Axes:
    """The attention axes and the batch axes of an operand of rank `rank`, as non-negative numbers."""

    rank: int
    attention: tuple[int, ...]
    batch: tuple[int, ...]

    def attention_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in self.attention)

    def batch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in self.batch)


def normalize(attention_axes: int | Sequence[int] | None, rank: int, trailing: int) -> Axes:
    """The axes of arrays of rank `rank`, whose last `trailing` axes are heads and features or features alone."""
    leading = rank - trailing
    if attention_axes is None:
        attended = tuple(range(1 if leading > 1 else 0, leading))
    else:
        attended = tuple(attention_axes) if isinstance(attention_axes, Sequence) else (attention_axes,)
        if not attended:
            raise ValueError(
                "attention_axes must name at least one axis; got (). Pass None to attend over all of them."
            )
        for axis in attended:
            if not -rank <= axis < rank or axis % rank >= leading:
                tail = "heads and features" if trailing == 2 else "features"
                raise ValueError(
                    f"attention_axes must name axes among the first {leading} of an array of rank {rank} (the last "
                    f"{trailing} hold {tail}), i.e. 0..{leading - 1} or {-rank}..{-trailing - 1}; got {axis} in "
                    f"attention_axes={attention_axes!r}. The last sequence axis is {-trailing - 1}."
                )
        attended = tuple(axis % rank for axis in attended)
    if len(set(attended)) != len(attended):
        raise ValueError(f"attention_axes must not repeat an axis; got {attention_axes!r} for rank {rank}.")
    return Axes(rank, attended, tuple(axis for axis in range(leading) if axis not in attended))


def fold_operand(array: jax.Array, axes: Axes) -> jax.Array:
    """(user's axes, N, D) -> (*batch, N, T, D)."""
    heads, features = axes.rank - 2, axes.rank - 1
    array = jnp.transpose(array, (*axes.batch, heads, *axes.attention, features))
    batch_and_head = array.shape[: len(axes.batch) + 1]
    positions = math.prod(array.shape[len(batch_and_head) : -1])
    return array.reshape(*batch_and_head, positions, array.shape[-1])


def unfold_output(array: jax.Array, axes: Axes, attention_shape: tuple[int, ...]) -> jax.Array:
    """(*batch, N, T, E) -> (user's axes, N, E)."""
    array = array.reshape(*array.shape[: len(axes.batch) + 1], *attention_shape, array.shape[-1])
    order = (*axes.batch, axes.rank - 2, *axes.attention, axes.rank - 1)
    return jnp.transpose(array, tuple(order.index(axis) for axis in range(axes.rank)))


def fold_pairs(array: Array, query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> jax.Array:
    """Flattens the query axes and the key axes of a mask or bias: (..., *query axes, *key axes) -> (..., T, S).

    Query axes that all have size 1 become an axis of size 1, which still broadcasts; so do key axes. If only some have
    size 1, they are expanded, because the flattened axis could not broadcast.
    """
    num_pair_axes = len(query_shape) + len(key_shape)
    array = array.reshape((1,) * max(0, num_pair_axes - array.ndim) + array.shape)
    batch_and_head = array.shape[: array.ndim - num_pair_axes]
    query_sizes = _ones_or_full(array.shape[len(batch_and_head) : array.ndim - len(key_shape)], query_shape)
    key_sizes = _ones_or_full(array.shape[-len(key_shape) :], key_shape)
    array = jnp.broadcast_to(array, (*batch_and_head, *query_sizes, *key_sizes))
    return array.reshape(*batch_and_head, math.prod(query_sizes), math.prod(key_sizes))


def pad_pairs(array: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    """A folded array padded to `sizes` with its last row and column; an axis of size 1 stays."""
    return pad_axis(pad_axis(array, -2, sizes[0]), -1, sizes[1])


def pad_axis(array: jax.Array, axis: int, size: int) -> jax.Array:
    """An array padded along an axis to `size` with its last entry; an axis of size 1 stays."""
    length = array.shape[axis]
    if length in (1, size) or (missing := size - length) <= 0:
        return array
    last = jax.lax.slice_in_dim(array, length - 1, None, axis=axis)
    shape = list(array.shape)
    shape[axis] = missing
    return jnp.concatenate([array, jnp.broadcast_to(last, shape)], axis)


def _ones_or_full(sizes: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
    return sizes if all(size == 1 for size in sizes) else full


def split_heads(array: jax.Array, kv_heads: int, rank: int) -> jax.Array:
    """(..., N, T, S) or (T, S) -> (..., K, N // K, T, S) of this rank, with axes of one where the array had none."""
    *batch, heads = array.shape[:-2] or (1,)
    groups = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    return array.reshape(*(1,) * (rank - len(batch) - 4), *batch, *groups, *array.shape[-2:])


def merge_groups(array: jax.Array, axis: int = -2) -> jax.Array:
    """(..., G, T, ...) -> (..., G * T, ...), where `axis`, counted from the end, is that of T."""
    shape = array.shape
    return array.reshape(*shape[: axis - 1], shape[axis - 1] * shape[axis], *shape[array.ndim + axis + 1 :])


def split_groups(array: jax.Array, sizes: tuple[int, ...], axis: int = -2) -> jax.Array:
    """(..., G * T, ...) -> (..., G, T, ...), where `axis`, counted from the end, is that of G * T."""
    return array.reshape(*array.shape[:axis], *sizes, *array.shape[array.ndim + axis + 1 :])


def align_ranks(*arrays: Any) -> tuple[Any, ...]:
    """The arrays with leading axes of one, so that all have the same rank; scalars stay.

    JAX can forbid the broadcasting of arrays of different ranks, `jax.numpy_rank_promotion("raise")`.
    """
    rank = max(map(np.ndim, arrays))
    return tuple(jnp.expand_dims(x, range(rank - x.ndim)) if 0 < np.ndim(x) < rank else x for x in arrays)


class AttentionShape(NamedTuple):
    """The sizes of an attention call, and the dtype of its logits."""

    batch: tuple[int, ...]
    heads: int
    query: tuple[int, ...]  # lengths of the attention axes
    key: tuple[int, ...]
    features: tuple[int, int]  # of query and key
    dtype: Any

    @property
    def weights(self) -> tuple[int, ...]:
        """The shape of the weights, (*batch, heads, *query axes, *key axes)."""
        return (*self.batch, self.heads, *self.query, *self.key)


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether an array of this shape broadcasts to the `target` shape."""
    aligned = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, full) for size, full in aligned)


def check_pairs(shape: tuple[int, ...], name: str, attention: AttentionShape) -> None:
    """Raises ValueError unless the `shape` of a mask or bias fits the weights (docs/concepts/shapes-and-axes.md)."""
    weights = attention.weights
    num_pair_axes = len(attention.query) + len(attention.key)
    if num_pair_axes < len(shape) < len(weights):
        raise ValueError(
            f"{name} of rank {len(shape)} is ambiguous: it must have the rank of the weights, {len(weights)} "
            f"(*batch, heads, *query axes, *key axes) = {weights}, or at most {num_pair_axes} (*query axes, *key "
            f"axes); got shape {shape}. A (batch, query, key) {name} needs an axis for heads: {name}[:, None]; a "
            f"(heads, query, key) one needs an axis for the batch: {name}[None]."
        )
    if not broadcasts(shape, weights):
        raise ValueError(
            f"{name} must broadcast to the weights (*batch, heads, *query axes, *key axes) = {weights}; got shape "
            f"{shape}. Use 1 for an axis along which it does not vary.{_pairs_hint(shape, name, attention)}"
        )


def _pairs_hint(shape: tuple[int, ...], name: str, attention: AttentionShape) -> str:
    """The likely reason why a shape does not broadcast, and what to write."""
    batch, heads, query, key, *_ = attention
    num_pair_axes = len(query) + len(key)
    if name == "mask" and batch and shape == (*batch, *key):
        return " Write a (batch, keys) mask as attnlib.masks.KeyPadding(mask); in a layer, as key_mask=mask."
    if len(shape) == num_pair_axes + len(batch) + 1 and shape[-num_pair_axes:] == (*query, *key):
        kv_heads = shape[-num_pair_axes - 1]
        groups, remainder = divmod(heads, kv_heads or heads + 1) if is_static(heads, kv_heads) else (0, 1)
        if not remainder:
            return (
                f" Repeat it for the {groups} query heads of each key head: jnp.repeat({name}, {groups}, {len(batch)})."
            )
    if shape[-num_pair_axes:] == (*key, *query):
        return " Query axes come before key axes: swap them."
    if len(query) == 1 and shape[-2:-1] == (heads,):
        return (
            " If query is (batch, heads, positions, features), swap its axes and key's and value's: x.swapaxes(-3, -2)."
        )
    return ""
