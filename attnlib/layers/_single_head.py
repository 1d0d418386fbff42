"""Attention of arrays without a heads axis, as of Keras' two single-head layers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from attnlib._api import attention
from attnlib._core.array_types import Array
from attnlib._core.operand_checks import is_array
from attnlib.layers._inputs import combine_masks, module_axes, zero_padding
from attnlib.layers._multi_head import _with_head_axis
from attnlib.scores import Score


def single_head_attention(score: Score, query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Attention of arrays `(*batch and attention axes, features)` without a heads axis, in masks and weights too."""
    axes = module_axes(options.pop("attention_axes"), query)
    query_mask, key_mask = options.pop("query_mask"), options.pop("key_mask")
    mask, bias = options.pop("mask"), options.pop("bias")
    if is_array(mask):
        mask = _with_head_axis(mask, axes)
    if is_array(bias):
        bias = _with_head_axis(bias, axes)
    mask = combine_masks(mask, query_mask, key_mask, None, axes, query.shape, key.shape)
    query, key, value = zero_padding(query, query_mask), zero_padding(key, key_mask), zero_padding(value, key_mask)
    query, key, value = (x[..., None, :] for x in (query, key, value))
    results = attention(query, key, value, score=score, mask=mask, bias=bias, attention_axes=axes.attention, **options)
    if not options["return_weights"]:
        return results[..., 0, :]
    output, weights = results
    return output[..., 0, :], jnp.squeeze(weights, len(axes.batch))
