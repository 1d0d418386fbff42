"""Attention of arrays without a heads axis, as in the single-head layers of Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from attnlib._api import attention
from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.options import LayerOptions
from attnlib._core.validation import is_array
from attnlib.layers._inputs import combine_masks, default_operands, module_axes, set_key_positions, zero_padding
from attnlib.scores import Score


def single_head_attention(
    score: Score,
    query: Array,
    key: Array | None,
    value: Array | None,
    *,
    attention_axes: int | Sequence[int] | None,
    query_mask: Any,
    key_mask: Any,
    **options: Unpack[LayerOptions],
) -> tuple[jax.Array, jax.Array | None]:
    """(output, weights or None) of operands `(*batch and attention axes, features)`.

    Masks, biases and weights have no heads axis either.
    """
    set_key_positions(options, key)
    key, value = default_operands(query, key, value)
    axes = module_axes(attention_axes, query.ndim)
    mask = _insert_head_axis(options.get("mask"), axes)
    options["mask"] = combine_masks(mask, query_mask, key_mask, None, axes, query.shape, key.shape)
    options["bias"] = _insert_head_axis(options.get("bias"), axes)
    operands = zero_padding(query, query_mask), zero_padding(key, key_mask), zero_padding(value, key_mask)
    results: Any = attention(
        *(operand[..., None, :] for operand in operands), score=score, attention_axes=axes.attention, **options
    )
    output, weights = results if options.get("return_weights") else (results, None)
    return output[..., 0, :], None if weights is None else jnp.squeeze(weights, len(axes.batch))


def _insert_head_axis(array: Any, axes: _axes.Axes) -> Any:
    """An array with an axis for one head after its batch axes; an array without batch axes broadcasts unchanged."""
    pair_axes = 2 * len(axes.attention)
    return jnp.expand_dims(array, -pair_axes - 1) if is_array(array) and array.ndim > pair_axes else array
