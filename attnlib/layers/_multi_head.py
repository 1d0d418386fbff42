"""Multi-head attention with projections: the parameters and the function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from attnlib._api import attention
from attnlib._core import axes as _axes
from attnlib._core.array_types import Array, BoolMask, Rng
from attnlib._core.context import Context, check_context
from attnlib._core.operand_checks import check_key, compute_dtype
from attnlib._core.options import LayerOptions, takes_options
from attnlib._core.suggestions import suggests_arguments
from attnlib._core.validation import check_int
from attnlib.layers._inputs import (
    Params,
    apply_projection,
    combine_masks,
    context_positions,
    default_operands,
    module_axes,
    promote_dtypes,
    set_key_positions,
    zero_padding,
)
from attnlib.layers._memory import attend_with_memory
from attnlib.layers._projections import (
    Initializer,
    check_score_name,
    default_bias_init,
    default_kernel_init,
    multi_head_parameters,
    normalization,
)
from attnlib.positions import rotary_embedding
from attnlib.scores import Additive, Dot, Score

Rotary = bool | Callable[..., jax.Array]


@suggests_arguments
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
    use_scale: bool = False,
    normalize_qk: bool | str = False,
    use_sink: bool = False,
    num_memory: int = 0,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
    out_kernel_init: Initializer | None = None,
    out_bias_init: Initializer | None = None,
    scale_init: Initializer | None = None,
    param_dtype: Any = jnp.float32,
) -> dict[str, dict[str, jax.Array]]:
    """Parameters for `multi_head_attention`, as nested dicts of arrays.

    Args:
      rng: a JAX random key.
      query_features: last axis of the query.
      num_heads: query heads N.
      key_dim: features D of a head of query and key; default query_features // num_heads.
      value_dim: features E of a head of value; default key_dim.
      num_kv_heads: key/value heads K, a divisor of N (grouped-query attention; 1: multi-query); default N.
      key_features, value_features: last axes of key and value; default query_features and key_features.
      output_shape: the last axis or axes of the output; default query_features.
      use_bias: whether projections have a bias.
      use_gate: whether a sigmoid gate, computed from the query, multiplies the output of attention.
      score: "dot", "additive" (adds a learned scale `(N, D)`) or a `Score`.
      use_scale: whether score="dot" has a learned scale for each head, initially 1 / sqrt(D).
      normalize_qk: learned norms of query and key: "layer" or True as in Flax, "rms", or False.
      use_sink: whether each head has a learned sink, a logit without a value, initially 0.
      num_memory: the number M of learned keys and values for each key/value head, which every query attends.
      kernel_init, bias_init: initialisers `(rng, shape, dtype)`; each kernel is initialised as a matrix.
      out_kernel_init, out_bias_init: initialisers of the output projection; default kernel_init, bias_init.
      scale_init: initialiser of the scale; default glorot uniform with score="additive", 1 / sqrt(D) with use_scale.
      param_dtype: dtype of the parameters.

    Returns:
      `{"query" | "key" | "value" | "out" [| "gate"]: {"kernel"[, "bias"]}[, "score": {"scale"}]
      [, "query_norm": {"scale"}, "key_norm": {"scale"}][, "sink": {"logit"}]
      [, "memory": {"key", "value"}]}`.

    Raises:
      ValueError, TypeError: a size is not a positive int, or does not fit the other sizes.

    Example:
      >>> import jax, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 32, num_heads=4, num_kv_heads=2)
      >>> params["key"]["kernel"].shape
      (32, 2, 8)

    Source: Vaswani et al., "Attention Is All You Need" (2017); Ainslie et al., "GQA" (2023); memory: Sukhbaatar et al.,
      "Augmenting Self-attention with Persistent Memory" (2019).
    """
    check_key(rng, "rng")
    query_features = check_int(query_features, "query_features", minimum=1)
    key_features = query_features if key_features is None else check_int(key_features, "key_features", minimum=1)
    value_features = key_features if value_features is None else check_int(value_features, "value_features", minimum=1)
    groups = multi_head_parameters(
        query_features, key_features, value_features, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim,
        num_kv_heads=num_kv_heads, output_shape=output_shape, use_bias=use_bias, use_gate=use_gate, score=score,
        use_scale=use_scale, normalize_qk=normalize_qk, use_sink=use_sink, num_memory=num_memory,
        kernel_init=kernel_init, bias_init=bias_init, out_kernel_init=out_kernel_init, out_bias_init=out_bias_init,
        scale_init=scale_init,
    )  # fmt: skip
    params: dict[str, dict[str, jax.Array]] = {}
    for group, specs in groups.items():
        rngs = [rng] * len(specs)
        if "kernel" in specs or group == "memory":
            rng, *rngs = jax.random.split(rng, 3)
        named = zip(rngs, specs.items(), strict=False)
        params[group] = {name: spec.initialize(own_rng, param_dtype) for own_rng, (name, spec) in named}
    return params


@takes_options(without={"return_lse": ""})
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
    sliding_window: int | None = None,
    rotary: Rotary = False,
    normalize_qk: bool | str = False,
    dtype: Any = None,
    **options: Unpack[LayerOptions],
) -> Any:
    """Multi-head attention with query, key, value and output projections, as a function of their parameters.

    `attnlib.MultiHeadAttention` computes this function.

    Args:
      params: from `init_multi_head_attention`, or the "params" of a module; their shapes give heads and features.
      query: `(*batch and attention axes, C)`, rank 2 or more; for one sequence axis `(B, T, C)`.
      key: `(..., C_key)`; default: query (self-attention).
      value: `(..., C_value)`, with the key's positions; default: key.
      score: "dot" (scaled by `params["score"]`, or by 1 / sqrt(key_dim) without it), "additive" (scaled by
        `params["score"]`) or a `Score`.
      attention_axes: numbered in query, key and value as passed (the last sequence axis is -2). Default: every axis
        but the first and the features; for rank 2 (no batch axis) the first.
      query_mask: bool, query's shape without features, or ones to broadcast; True = real. Padding attends nothing.
      key_mask: bool, key's shape without features, or ones to broadcast; True = real. No query attends padding.
      sliding_window: w masks keys w or more positions away on either side (flat row-major positions), as in Keras.
      rotary: whether query and key get rotary positions: True, or a function with the arguments of
        `attnlib.positions.rotary_embedding`, such as a `functools.partial` of it with a base and scaling.
      normalize_qk: the norms of query and key in `params`: "layer" or True, "rms", or False. They precede rotary
        positions.
      dtype: dtype of the computation; default: promoted from inputs and parameters.
      {names}: as in `dot_product_attention`. Rotary positions use query_positions and key_positions too. Without key,
        key_positions default to query_positions. precision applies to the projections too. sink requires params without
        a learned sink. With memory in params, every query attends it whatever the mask; bias, score_mod and rotary
        positions do not change its logits, and normalize=False is refused.

    Returns:
      output `(*query's leading axes, *output_shape)`, or (output, weights) with weights
      `(*batch, N, *query axes, *key axes)`; with memory `(*batch, N, T, M + S)`, for one attention axis.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> params = attnlib.init_multi_head_attention(jax.random.key(0), 32, num_heads=4)
      >>> attnlib.multi_head_attention(params, jnp.ones((2, 10, 32)), is_causal=True).shape
      (2, 10, 32)

    Source: Vaswani et al., "Attention Is All You Need" (2017).
    """
    output, weights, _ = apply_multi_head(
        params, query, key, value, score=score, attention_axes=attention_axes, query_mask=query_mask,
        key_mask=key_mask, sliding_window=sliding_window, rotary=rotary, normalize_qk=normalize_qk, dtype=dtype,
        **options,
    )  # fmt: skip
    return output if weights is None else (output, weights)


@jax.named_scope("attnlib.multi_head_attention")
def apply_multi_head(
    params: Params,
    query: Array,
    key: Array | None,
    value: Array | None,
    *,
    score: str | Score,
    attention_axes: int | Sequence[int] | None,
    query_mask: Any,
    key_mask: Any,
    sliding_window: int | None,
    rotary: Rotary,
    normalize_qk: bool | str,
    dtype: Any,
    attend: Callable[..., Any] = attention,
    **options: Unpack[LayerOptions],
) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
    """(output, weights or None, outputs of the projections by name, for activity regularizers).

    `attend` has the arguments of `attention`; a layer that decodes passes the attention of its cache.
    """
    set_key_positions(options, key)
    key, value = default_operands(query, key, value)
    _check_params(params, normalize_qk, options.get("sink"))
    axes = module_axes(attention_axes, query.ndim)
    mask = combine_masks(options.get("mask"), query_mask, key_mask, sliding_window, axes, query.shape, key.shape)
    options["mask"] = mask
    query, key, value, params = promote_dtypes(query, key, value, params, dtype)
    if "sink" in params:
        options["sink"] = params["sink"]["logit"]
    # A projection's gradient multiplies its input: NaN in padding would reach it, though no query attends padding.
    query, key, value = zero_padding(query, query_mask), zero_padding(key, key_mask), zero_padding(value, key_mask)

    precision = options.get("precision")
    activations = {
        name: apply_projection(array, params[name], name, precision)
        for name, array in (("query", query), ("key", key), ("value", value))
    }
    operands = dict(activations)
    norm = normalization(normalize_qk)
    for name, positions in (("query", options.get("query_positions")), ("key", options.get("key_positions"))):
        if norm is not None:
            operands[name] = _normalize_heads(operands[name], params[f"{name}_norm"]["scale"], norm)
        if name == "query" and "memory" in params:  # memory has no positions
            attend = functools.partial(attend_with_memory, attend, params["memory"], operands[name])
        operands[name] = _apply_rotary(operands[name], rotary, positions, axes, options.get("context"))
    results = attend(*operands.values(), score=_score(score, params), attention_axes=axes.attention, **options)
    attended, weights = results if options.get("return_weights") else (results, None)
    if "gate" in params:
        activations["gate"] = jax.nn.sigmoid(apply_projection(query, params["gate"], "gate", precision))
        attended = attended * activations["gate"]
    activations["out"] = apply_projection(attended, params["out"], "out", precision, num_axes=2)
    return activations["out"], weights, activations


def _normalize_heads(x: jax.Array, scale: jax.Array, norm: str) -> jax.Array:
    """Normalizes each head over its features, in float32 at least.

    Sources: Ba et al. (2016) for "layer"; Zhang and Sennrich (2019) for "rms".
    """
    wide = x.astype(compute_dtype(x))
    if norm == "layer":
        wide = wide - jnp.mean(wide, -1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    wide, scale = _axes.align_ranks(wide, scale.astype(wide.dtype))
    return (wide * scale).astype(x.dtype)


def _apply_rotary(
    x: jax.Array, rotary: Rotary, positions: Array | None, axes: _axes.Axes, context: str | Context | None
) -> jax.Array:
    if not callable(rotary) and not isinstance(rotary, bool):
        raise TypeError(
            f"rotary must be True, False or a function such as functools.partial(attnlib.positions.rotary_embedding, "
            f"base=5e5); got {rotary!r}."
        )
    if not rotary:
        return x
    if positions is not None and positions.ndim > 1:  # (*batch, length) -> the layout of x
        positions = jnp.moveaxis(positions, -1, axes.attention[0])
    embed = rotary if callable(rotary) else rotary_embedding
    where: Any = positions
    if positions is None and context is not None:
        where = context_positions(check_context(context, "context"), x, axes)
    return embed(x, where, attention_axes=axes.attention)


def _score(score: str | Score, params: Params) -> Score:
    if isinstance(score, Score):
        return score
    scale = params["score"]["scale"] if "score" in params else None
    if check_score_name(score) == "dot":
        return Dot(scale)
    if scale is None:
        raise ValueError(
            'score="additive" needs params["score"]["scale"] (N, D), as init_multi_head_attention(..., '
            'score="additive") returns it.'
        )
    return Additive(scale)


def _check_params(params: Any, normalize_qk: bool | str, sink: Any) -> None:
    names = ("query", "key", "value", "out")
    if not isinstance(params, Mapping) or any(name not in params for name in names):
        got = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        remedy = ' Pass variables["params"].' if isinstance(params, Mapping) and "params" in params else ""
        raise ValueError(
            f"params must be a mapping with {', '.join(names)}, as init_multi_head_attention returns it; got {got}."
            f"{remedy}"
        )
    if any(hasattr(leaf, "unbox") for leaf in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "unbox"))):
        raise TypeError(
            "params must hold arrays; got boxes of partitioning metadata. Pass flax.linen.meta.unbox(params)."
        )
    for name in ("query_norm", "key_norm"):
        if (name in params) != bool(normalization(normalize_qk)):
            verb = "hold" if name in params else "lack"
            raise ValueError(
                f"params {verb} {name}, which does not fit normalize_qk={normalize_qk!r}. Pass the same normalize_qk "
                "to init_multi_head_attention and multi_head_attention."
            )
    if "sink" in params and sink is not None:
        raise ValueError("params hold a learned sink. Leave sink=None, or remove the sink from params.")
