"""Operands of a layer: defaults, axes, padding, dtypes and projections."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.context import Context, Layout, check_lengths, mesh_axis
from attnlib._core.operand_checks import check_arrays, check_axes
from attnlib._core.options import LayerOptions
from attnlib._core.validation import check_array, check_int
from attnlib.masks import KeyPadding, QueryPadding, SlidingWindow
from attnlib.masks._arrays import as_mask
from attnlib.masks._base import Mask

Params = Mapping[str, Any]


def default_operands(query: Array, key: Array | None, value: Array | None) -> tuple[Array, Array]:
    """Key and value; the key defaults to the query, the value to the key. Checks that their ranks are equal."""
    key = query if key is None else key
    value = key if value is None else value
    check_arrays(query=query, key=key, value=value)
    if query.ndim < 2:
        raise ValueError(f"query must have rank 2 or more, (*batch and attention axes, features); got {query.shape}.")
    for name, operand in (("key", key), ("value", value)):
        if operand.ndim != query.ndim:
            raise ValueError(
                f"query, key and value must have the same rank; got query {query.shape} and {name} {operand.shape}."
            )
    return key, value


def set_key_positions(options: LayerOptions, key: Array | None) -> None:
    """Sets the default of `key_positions`: in self-attention, keys have the positions of the queries."""
    if key is None and options.get("key_positions") is None:
        options["key_positions"] = options.get("query_positions")


def module_axes(attention_axes: int | Sequence[int] | None, rank: int) -> _axes.Axes:
    """The attention axes of an operand of this rank, without a heads axis."""
    return _axes.normalize(check_axes(attention_axes), rank, trailing=1)


def context_positions(context: Context | None, operand: Array, axes: _axes.Axes) -> Array | list[Array] | None:
    """The positions in the whole sequence of what an operand with a context holds, one array for each attention axis.

    None: 0, 1, 2...
    """
    assert context is not None
    devices, manual = mesh_axis(context.axis_name, (operand,))
    if not manual and context.order == "contiguous":
        return None
    first, *others = axes.attention_shape(operand.shape)
    length = first * devices if manual else first
    check_lengths(context, devices, {"the input": length})
    layout = Layout(length, devices, context.order)
    if manual:
        positions: Array = layout.positions(jax.lax.axis_index(context.axis_name))
    else:
        positions = layout.order_of_positions().astype(np.int32)
    return [positions, *(np.arange(size, dtype=np.int32) for size in others)] if others else positions


def combine_masks(
    mask: Any,
    query_mask: Any,
    key_mask: Any,
    sliding_window: int | None,
    axes: _axes.Axes,
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
) -> Mask | None:
    """The conjunction of all masks of a layer, or None. A padding mask has the layout of its operand."""
    masks: list[Mask] = []
    if query_mask is not None:
        masks.append(QueryPadding(_padding(query_mask, "query_mask", axes, query_shape)))
    if key_mask is not None:
        masks.append(KeyPadding(_padding(key_mask, "key_mask", axes, key_shape)))
    if sliding_window is not None:
        distance = check_int(sliding_window, "sliding_window", minimum=1) - 1
        masks.append(SlidingWindow(distance, distance))
    pair_mask = as_mask(mask)
    if pair_mask is not None:
        masks.append(pair_mask)
    return functools.reduce(operator.and_, masks) if masks else None


def _padding(mask: Any, name: str, axes: _axes.Axes, operand_shape: tuple[int, ...]) -> jax.Array:
    """Transposes a padding mask of an operand to `(*batch, *attention axes)`."""
    check_array(mask, name, kind="bool", remedy=f"Write {name}.astype(bool), where True = real.")
    leading = operand_shape[:-1]
    if mask.ndim != len(leading) or not _axes.broadcasts(mask.shape, leading):
        raise ValueError(
            f"{name} must have the shape of its operand without features, {leading}, or ones to broadcast; got "
            f"{mask.shape}."
        )
    shape = [full if axis in axes.attention else mask.shape[axis] for axis, full in enumerate(leading)]
    return jnp.transpose(jnp.broadcast_to(mask, shape), (*axes.batch, *axes.attention))


def zero_padding(operand: Any, mask: Any) -> jax.Array:
    """The operand with zeros in its padding."""
    return jnp.asarray(operand) if mask is None else jnp.where(mask[..., None], operand, 0)


def promote_dtypes(query: Any, key: Any, value: Any, params: Params, dtype: Any) -> tuple[Any, Any, Any, Params]:
    """Operands and parameters in `dtype`, by default their common dtype."""
    arrays = (query, key, value, dict(params))
    try:
        with jax.numpy_dtype_promotion("standard"):  # layers promote under strict promotion too
            dtype = jnp.result_type(*jax.tree.leaves(arrays)) if dtype is None else jnp.dtype(dtype)
    except (TypeError, ValueError) as error:  # JAX promotes no 8-bit dtype
        raise TypeError(f"dtype must be a floating-point dtype, and 8-bit inputs require it; got {dtype!r}.") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point dtype; got {dtype}.")
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), arrays)


def apply_projection(inputs: jax.Array, affine: Params, name: str, precision: Any, num_axes: int = 1) -> jax.Array:
    """Contracts the last `num_axes` axes of the inputs with the first axes of the kernel, and adds the bias."""
    kernel = affine["kernel"]
    if kernel.shape[:num_axes] != inputs.shape[-num_axes:]:
        raise ValueError(
            f"{name} must have {kernel.shape[:num_axes]} features, as its kernel {kernel.shape}; got an input of shape "
            f"{inputs.shape}. Initialize new parameters for this input, or project the input to these features."
        )
    axes = tuple(range(inputs.ndim - num_axes, inputs.ndim)), tuple(range(num_axes))
    output = jax.lax.dot_general(inputs, kernel, (axes, ((), ())), precision=precision)
    if "bias" not in affine:
        return output
    output, bias = _axes.align_ranks(output, affine["bias"])
    return output + bias
