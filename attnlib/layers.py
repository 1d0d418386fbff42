"""Attention layers as pure functions over explicit parameters: projections around attention.

Parameters are plain nested dicts of arrays, the same tree that the linen modules declare:

    query | key | value   kernel (C, N, D), bias (N, D)      N heads; key and value have K heads, value E features
    out                   kernel (N, E, *O), bias (*O)
    gate                  kernel (C, N, E), bias (N, E)      with use_gate
    score                 scale (N, D)                       with score="additive"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlib import _axes, _checks
from attnlib._dimensions import (
    Dimensions,
    Initializer,
    default_bias_init,
    default_kernel_init,
    positive,
    projection_inits,
    vector_glorot_uniform,
)
from attnlib._mask import Mask
from attnlib._types import Array, Bias, BoolMask, Rng
from attnlib.attention import attention
from attnlib.masks import KeyPadding, QueryPadding, SlidingWindow
from attnlib.scores import Additive, Dot, Score

__all__ = ["init_multi_head_attention", "multi_head_attention"]

Params = Mapping[str, Any]


def init_multi_head_attention(
    rng: Rng,
    query_features: int,
    *,
    num_heads: int,
    key_dim: int | None = None,
    value_dim: int | None = None,
    num_kv_heads: int | None = None,
    key_features: int | None = None,
    value_features: int | None = None,
    output_shape: int | Sequence[int] | None = None,
    use_bias: bool = True,
    use_gate: bool = False,
    score: str | Score = "dot",
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
    out_kernel_init: Initializer | None = None,
    out_bias_init: Initializer | None = None,
    scale_init: Initializer = vector_glorot_uniform,
    param_dtype: Any = jnp.float32,
) -> dict[str, dict[str, jax.Array]]:
    """Parameters for `multi_head_attention`, an explicit tree of arrays.

    Args:
      rng: a JAX random key.
      query_features: last axis of the query.
      num_heads: query heads N.
      key_dim: features D of a head of query and key; default query_features // num_heads.
      value_dim: features E of a head of value; default key_dim.
      num_kv_heads: key/value heads K, a divisor of N (grouped-query attention; 1: multi-query); default N.
      key_features, value_features: last axes of key and value; default query_features, and the key's.
      output_shape: the output's last axis, or several; default query_features.
      use_bias: whether projections have a bias.
      use_gate: whether a sigmoid gate computed from the query multiplies the attention output.
      score: "dot", "additive" (adds a learned scale `(N, D)`) or a `Score`.
      kernel_init, bias_init: initialisers `(rng, shape, dtype)`; kernels are initialised as matrices.
      out_kernel_init, out_bias_init: those of the output projection; default kernel_init, bias_init.
      scale_init: initialiser of the scale of score="additive"; default glorot uniform.
      param_dtype: dtype of the parameters.

    Returns:
      `{"query" | "key" | "value" | "out" [| "gate"]: {"kernel"[, "bias"]}[, "score": {"scale"}]}`.

    Raises:
      ValueError, TypeError: a size is not a positive int or does not fit the others.

    Example:
      >>> import jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 32, num_heads=4, num_kv_heads=2)
      >>> params["key"]["kernel"].shape
      (32, 2, 8)

    Source: Vaswani et al., "Attention Is All You Need" (2017); Ainslie et al., "GQA" (2023).
    """
    query_features = positive(query_features, "query_features")
    key_features = query_features if key_features is None else positive(key_features, "key_features")
    value_features = key_features if value_features is None else positive(value_features, "value_features")
    dimensions = Dimensions.resolve(
        query_features, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, num_kv_heads=num_kv_heads,
        output_shape=output_shape, use_gate=use_gate,
    )  # fmt: skip
    projections = dimensions.projections(query_features, key_features, value_features)
    params: dict[str, dict[str, jax.Array]] = {}
    for name, projection in projections.items():
        rng, kernel_rng, bias_rng = jax.random.split(rng, 3)
        inits = projection_inits(name, kernel_init, bias_init, out_kernel_init, out_bias_init)
        params[name] = {"kernel": projection.init_kernel(kernel_rng, inits[0], param_dtype)}
        if use_bias:
            params[name]["bias"] = projection.init_bias(bias_rng, inits[1], param_dtype)
    if has_score_parameters(score):
        shape = (dimensions.num_heads, dimensions.key_dim)
        params["score"] = {"scale": scale_init(rng, shape, param_dtype)}
    return params


def has_score_parameters(score: str | Score) -> bool:
    if isinstance(score, Score) or score == "dot":
        return False
    if score == "additive":
        return True
    raise ValueError(f'score must be "dot", "additive" or an attnlib.scores.Score; got {score!r}.')


def multi_head_attention(
    params: Params,
    query: Array,
    key: Array | None = None,
    value: Array | None = None,
    *,
    score: str | Score = "dot",
    attention_axes: int | Sequence[int] | None = None,
    query_mask: BoolMask | None = None,
    key_mask: BoolMask | None = None,
    mask: BoolMask | Mask | None = None,
    bias: Bias | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Rng | None = None,
    return_weights: bool = False,
    dtype: Any = None,
    precision: Any = None,
    logits_soft_cap: float | None = None,
    implementation: str | Sequence[str] | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> Any:
    """Multi-head attention with its projections: what `attnlib.MultiHeadAttention` applies, on explicit parameters.

    Args:
      params: from `init_multi_head_attention` (or a module's "params"); heads and features are read off its shapes.
      query: `(*batch and attention axes, C)`, rank 2 or more; for one sequence axis `(B, T, C)`.
      key: `(..., C_key)`; default: query (self-attention).
      value: `(..., C_value)`, with the key's positions; default: key.
      score: "dot" (scaled by 1 / sqrt(key_dim)), "additive" (scale in `params["score"]`) or a `Score`.
      attention_axes: numbered in query, key and value as passed (the last sequence axis is -2). Default: every axis
        but the first and the features; for rank 2 (no batch axis) the first.
      query_mask: bool, query's shape without features (or ones to broadcast), True = real; others attend nothing.
      key_mask: bool, key's shape without features, True = real; others are attended by none.
      mask: bool array or `Mask` over `(*batch, N, *query axes, *key axes)`, as in `dot_product_attention`.
      bias: added to the logits, shapes as for mask.
      is_causal: also mask keys after the query.
      sliding_window: w masks keys w or more positions away on either side (flat row-major positions), as in Keras.
      dropout_rate, dropout_rng: as in `dot_product_attention`.
      return_weights: also return the weights `(*batch, N, *query axes, *key axes)`.
      dtype: to compute in; default: promoted from inputs and parameters.
      precision, logits_soft_cap, implementation, block_sizes: as in `dot_product_attention`.

    Returns:
      output `(*query's leading axes, *output_shape)`, or (output, weights).

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 32, num_heads=4)
      >>> attnlib.multi_head_attention(params, jnp.ones((2, 10, 32)), is_causal=True).shape
      (2, 10, 32)

    Source: Vaswani et al., "Attention Is All You Need" (2017).
    """
    output, weights, _ = project_and_attend(
        params, query, key, value, score=score, attention_axes=attention_axes, query_mask=query_mask,
        key_mask=key_mask, mask=mask, bias=bias, is_causal=is_causal, sliding_window=sliding_window,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, return_weights=return_weights, dtype=dtype,
        precision=precision, logits_soft_cap=logits_soft_cap, implementation=implementation, block_sizes=block_sizes,
    )  # fmt: skip
    return (output, weights) if return_weights else output


def project_and_attend(
    params: Params,
    query: Array,
    key: Array | None,
    value: Array | None,
    *,
    score: str | Score,
    attention_axes: int | Sequence[int] | None,
    query_mask: Any,
    key_mask: Any,
    mask: Any,
    sliding_window: int | None,
    dtype: Any,
    **options: Any,
) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """The layer: (output, weights if asked for, what each projection gave, for activity regularisers)."""
    key, value = default_operands(query, key, value)
    _check_projections(params)
    axes = module_axes(attention_axes, query, key, value)
    joined = joined_mask(mask, query_mask, key_mask, sliding_window, axes, query.shape, key.shape)
    query, key, value, params = _promote(query, key, value, params, dtype)
    # Padding is cleared before it is projected: the gradient of a kernel multiplies it even where it attends nothing.
    query, key, value = _cleared(query, query_mask), _cleared(key, key_mask), _cleared(value, key_mask)

    precision = options["precision"]
    made = {
        "query": _project(query, params["query"], "query", precision),
        "key": _project(key, params["key"], "key", precision),
        "value": _project(value, params["value"], "value", precision),
    }
    results = attention(
        *made.values(), score=_score(score, params), mask=joined, attention_axes=axes.attention, **options
    )
    attended, weights = results if options["return_weights"] else (results, None)
    if "gate" in params:
        made["gate"] = jax.nn.sigmoid(_project(query, params["gate"], "gate", precision))
        attended = attended * made["gate"]
    made["out"] = _project(attended, params["out"], "out", precision, contracted=2)
    return made["out"], weights, made


def single_head_attention(score: Score, query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Attention of arrays `(*batch and attention axes, features)` without a heads axis, in masks and weights too."""
    axes = module_axes(options.pop("attention_axes"), query, key, value)
    query_mask, key_mask = options.pop("query_mask"), options.pop("key_mask")
    mask, bias = options.pop("mask"), options.pop("bias")
    if _checks.is_array(mask):
        mask = _with_head_axis(mask, axes)
    if _checks.is_array(bias):
        bias = _with_head_axis(bias, axes)
    mask = joined_mask(mask, query_mask, key_mask, None, axes, query.shape, key.shape)
    query, key, value = _cleared(query, query_mask), _cleared(key, key_mask), _cleared(value, key_mask)
    query, key, value = (x[..., None, :] for x in (query, key, value))
    results = attention(
        query, key, value, score=score, mask=mask, bias=bias, attention_axes=axes.attention, **options
    )
    if not options["return_weights"]:
        return results[..., 0, :]
    output, weights = results
    return output[..., 0, :], jnp.squeeze(weights, len(axes.batch))


def _with_head_axis(array: Array, axes: _axes.Axes) -> jax.Array:
    """Inserts an axis of one head where a mask or bias has batch axes; of lower rank it broadcasts as it is."""
    pairs = 2 * len(axes.attention)
    return jnp.expand_dims(jnp.asarray(array), -pairs - 1) if array.ndim > pairs else jnp.asarray(array)


def _cleared(operand: Any, mask: Any) -> jax.Array:
    return jnp.asarray(operand) if mask is None else jnp.where(mask[..., None], operand, 0)


def default_operands(query: Array, key: Array | None, value: Array | None) -> tuple[Array, Array]:
    key = query if key is None else key
    value = key if value is None else value
    _checks.arrays(query=query, key=key, value=value)
    return key, value


def module_axes(attention_axes: int | Sequence[int] | None, query: Array, key: Array, value: Array) -> _axes.Axes:
    """Resolves attention axes counted in arrays that have no heads axis."""
    if query.ndim < 2:
        raise ValueError(f"query must have rank 2 or more, (*batch and attention axes, features); got {query.shape}.")
    for name, operand in (("key", key), ("value", value)):
        if operand.ndim != query.ndim:
            raise ValueError(
                f"query, key and value must have the same rank; got query {query.shape} and {name} {operand.shape}."
            )
    return _axes.normalize(_checks.static_axes(attention_axes), query.ndim, trailing=1)


def joined_mask(
    mask: Any,
    query_mask: Any,
    key_mask: Any,
    sliding_window: int | None,
    axes: _axes.Axes,
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
) -> Mask | None:
    """One mask of all that a layer is given, padding masks being laid out as their operands are."""
    parts: list[Mask] = []
    if query_mask is not None:
        parts.append(QueryPadding(_padding(query_mask, "query_mask", axes, query_shape)))
    if key_mask is not None:
        parts.append(KeyPadding(_padding(key_mask, "key_mask", axes, key_shape)))
    if sliding_window is not None:
        reach = positive(sliding_window, "sliding_window") - 1
        parts.append(SlidingWindow(reach, reach))
    given = _checks.mask(mask)
    if given is not None:
        parts.append(given)
    joined = None
    for part in parts:
        joined = part if joined is None else joined & part
    return joined


def _padding(mask: Any, name: str, axes: _axes.Axes, operand_shape: tuple[int, ...]) -> jax.Array:
    """(user's leading axes) -> (*batch, *attention axes)."""
    if not _checks.is_array(mask):
        raise TypeError(f"{name} must be a bool array; got {type(mask).__name__}.")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{name} must be bool (True = real); got {mask.dtype}. Write {name}.astype(bool).")
    leading = operand_shape[:-1]
    if mask.ndim != len(leading) or any(size not in (1, full) for size, full in zip(mask.shape, leading, strict=True)):
        raise ValueError(
            f"{name} must have the shape of its operand without features, {leading}, or ones to broadcast; got "
            f"{mask.shape}."
        )
    whole = [full if axis in axes.attention else mask.shape[axis] for axis, full in enumerate(leading)]
    return jnp.transpose(jnp.broadcast_to(mask, whole), (*axes.batch, *axes.attention))


def _score(score: str | Score, params: Params) -> Score:
    if not has_score_parameters(score):
        return Dot() if isinstance(score, str) else score
    if "score" not in params:
        raise ValueError(
            'score="additive" needs params["score"]["scale"] (N, D); make them with '
            'init_multi_head_attention(..., score="additive").'
        )
    return Additive(params["score"]["scale"])


def _check_projections(params: Any) -> None:
    names = ("query", "key", "value", "out")
    if not isinstance(params, Mapping) or any(name not in params for name in names):
        got = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"params must be a mapping with {', '.join(names)}, as init_multi_head_attention makes it; got {got}."
        )
    if any(hasattr(leaf, "unbox") for leaf in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "unbox"))):
        raise TypeError(
            "params must hold arrays; got some in boxes of partitioning metadata. Pass flax.linen.meta.unbox(params)."
        )


def _promote(query: Any, key: Any, value: Any, params: Params, dtype: Any) -> tuple[Any, Any, Any, Params]:
    arrays = (query, key, value, dict(params))
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):  # a layer promotes inputs and parameters whatever the setting
            dtype = jnp.result_type(*jax.tree.leaves(arrays))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point dtype; got {dtype}.")
    return jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), arrays)


def _project(inputs: jax.Array, affine: Params, name: str, precision: Any, contracted: int = 1) -> jax.Array:
    kernel = affine["kernel"]
    if kernel.shape[:contracted] != inputs.shape[-contracted:]:
        raise ValueError(
            f"{name} was made for {kernel.shape[:contracted]} features, its kernel being {kernel.shape}; got an input "
            f"of shape {inputs.shape}."
        )
    axes = tuple(range(inputs.ndim - contracted, inputs.ndim)), tuple(range(contracted))
    output = jax.lax.dot_general(inputs, kernel, (axes, ((), ())), precision=precision)
    return output + affine["bias"] if "bias" in affine else output
