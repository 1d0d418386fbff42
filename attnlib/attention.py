"""Attention as pure functions: check, fold, choose an implementation, run it, unfold.

Layout (DESIGN, Words): query `(*batch and attention axes, N, D)`, key `(..., K, D)`, value `(..., K, E)`, output
`(..., N, E)`; weights `(*batch, N, *query axes, *key axes)`; lse `(*batch, N, *query axes)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnlib import _axes, _checks, _choose, _dropout
from attnlib._choose import Explanation
from attnlib._mask import Shapes
from attnlib._problem import Problem, compute_dtype
from attnlib._types import Array, Bias, BoolMask, Key, Query, Rng, Value
from attnlib.masks import Causal, Mask
from attnlib.scores import Additive, Dot, Score

__all__ = ["Explanation", "additive_attention", "attention", "dot_product_attention", "explain", "merge_attention"]


def dot_product_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    scale: float | Array | None = None,
    mask: BoolMask | Mask | None = None,
    bias: Bias | None = None,
    is_causal: bool = False,
    attention_axes: int | Sequence[int] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Rng | None = None,
    logits_soft_cap: float | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    block_sizes: tuple[int, int] | None = None,
    precision: Any = None,
) -> Any:
    """Multi-head dot-product attention over any axes: softmax(scale * query key^T + bias) value.

    Args:
      query: `(*batch and attention axes, N, D)`; for one sequence axis `(B, T, N, D)`.
      key: `(..., K, D)`, N a multiple of K: query head n reads key/value head n // (N // K). Lengths along attention
        axes may differ from the query's; batch axes are equal or 1.
      value: `(..., K, E)`, with the key's positions; E may differ from D.
      scale: scalar, or `(N,)` for one a head; default 1 / sqrt(D).
      mask: bool, True = attend, of the weights' rank `(*batch, N, *query axes, *key axes)` with ones where it
        broadcasts, or of rank at most the number of query and key axes; or a `masks.Mask`. Default: all attend all.
      bias: added to the scaled logits; shapes as for mask. Differentiable.
      is_causal: also mask keys after the query (flat row-major positions, aligned at the first ones).
      attention_axes: the axes attended over, numbered in query, key and value as passed (the last sequence axis is
        -3). Default: every axis but the first, heads and features; for rank 3 (no batch axis) the first.
      dropout_rate: fraction of weights to drop after softmax, in [0, 1); the rest is scaled by 1 / (1 - rate).
      dropout_rng: a JAX random key; needed where dropout_rate > 0.
      logits_soft_cap: c replaces logits x (after bias) by c * tanh(x / c); positive. Default: none.
      return_weights: also return the weights that were used (after dropout).
      return_lse: also return the log-sum-exp of the logits over the keys.
      implementation: "blockwise" (tiles; memory linear in the lengths), "reference" (all pairs at once), "cudnn" (the
        fused kernel of NVIDIA GPUs, for half-precision operands and causal masks, windows and lengths), or several to
        try in order; default: cudnn on a GPU where it can, else chosen by size, see `attnlib.explain`.
      block_sizes: (queries, keys) of a tile of "blockwise"; default: chosen.
      precision: of matrix products, as in `jax.lax.Precision`.

    Returns:
      output `(..., N, E)` in value's dtype; or (output, weights), (output, lse), (output, weights, lse). Weights
      `(*batch, N, *query axes, *key axes)` and lse `(*batch, N, *query axes)` are float32 at least. A query that may
      attend nothing has output 0, weights 0 and lse -inf; masked keys and values may hold anything, NaN included.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))  # each (B, T, N, D)
      >>> attnlib.dot_product_attention(query, key, value, is_causal=True).shape
      (2, 10, 4, 8)

    Source: Vaswani et al., "Attention Is All You Need" (2017); grouped heads: Ainslie et al., "GQA" (2023).
    """
    return attention(
        query, key, value, score=Dot(scale), mask=mask, bias=bias, is_causal=is_causal,
        attention_axes=attention_axes, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        logits_soft_cap=logits_soft_cap, return_weights=return_weights, return_lse=return_lse,
        implementation=implementation, block_sizes=block_sizes, precision=precision,
    )  # fmt: skip


def additive_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    scale: float | Array | None = None,
    mask: BoolMask | Mask | None = None,
    bias: Bias | None = None,
    is_causal: bool = False,
    attention_axes: int | Sequence[int] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Rng | None = None,
    logits_soft_cap: float | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    block_sizes: tuple[int, int] | None = None,
    precision: Any = None,
) -> Any:
    """Multi-head additive (Bahdanau) attention over any axes: softmax(sum_d scale_d tanh(q_d + k_d) + bias) value.

    Args:
      query: `(*batch and attention axes, N, D)`; for one sequence axis `(B, T, N, D)`.
      key: `(..., K, D)`, N a multiple of K.
      value: `(..., K, E)`.
      scale: scalar, `(D,)` or `(N, D)`; default 1.
      mask, bias, is_causal, attention_axes, dropout_rate, dropout_rng, logits_soft_cap, return_weights, return_lse,
        implementation, block_sizes, precision: as in `dot_product_attention`.

    Returns:
      As `dot_product_attention`.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 2, 10, 1, 8))
      >>> output, weights = attnlib.additive_attention(query, key, key, scale=jnp.ones(8), return_weights=True)
      >>> output.shape, weights.shape
      ((2, 10, 1, 8), (2, 1, 10, 10))

    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate" (2015).
    """
    return attention(
        query, key, value, score=Additive(scale), mask=mask, bias=bias, is_causal=is_causal,
        attention_axes=attention_axes, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        logits_soft_cap=logits_soft_cap, return_weights=return_weights, return_lse=return_lse,
        implementation=implementation, block_sizes=block_sizes, precision=precision,
    )  # fmt: skip


def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    score: Score,
    mask: BoolMask | Mask | None = None,
    bias: Bias | None = None,
    is_causal: bool = False,
    attention_axes: int | Sequence[int] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Rng | None = None,
    logits_soft_cap: float | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    block_sizes: tuple[int, int] | None = None,
    precision: Any = None,
) -> Any:
    """Attention with any score: softmax(score(query, key) + bias) value.

    Args:
      query: `(*batch and attention axes, N, D)`.
      key: `(..., K, D_key)`; D_key may differ from D where the score allows it.
      value: `(..., K, E)`.
      score: an `attnlib.scores.Score`: Dot, Additive, Concat, Bilinear or Custom; its arrays are differentiable.
      mask, bias, is_causal, attention_axes, dropout_rate, dropout_rng, logits_soft_cap, return_weights, return_lse,
        implementation, block_sizes, precision: as in `dot_product_attention`.

    Returns:
      As `dot_product_attention`.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query, key = jax.random.normal(jax.random.key(0), (2, 2, 10, 1, 8))
      >>> distance = attnlib.scores.Custom(lambda q, k: -jnp.sum((q - k) ** 2))
      >>> attnlib.attention(query, key, key, score=distance).shape
      (2, 10, 1, 8)

    Source: the scores of Luong, Pham and Manning, "Effective Approaches to Attention-based NMT" (2015), and others.
    """
    arrays, static = _arguments(
        query, key, value, score, mask, bias, is_causal, attention_axes, dropout_rate, dropout_rng, logits_soft_cap,
        return_weights, return_lse, implementation, block_sizes, precision,
    )  # fmt: skip
    return _attend(*arrays, **static)


def explain(
    query: Query | jax.ShapeDtypeStruct,
    key: Key | jax.ShapeDtypeStruct,
    value: Value | jax.ShapeDtypeStruct,
    *,
    score: Score | None = None,
    **options: Any,
) -> Explanation:
    """Says what `attention(query, key, value, score=score, **options)` would run, without running it.

    Args:
      query, key, value: as in `attention`; `jax.ShapeDtypeStruct`s will do.
      score: default `scores.Dot()`.
      **options: the options of `attention`; `scale` is the score's.

    Returns:
      An `Explanation`: print it. It names the implementation, its tiles, its memory, the operations and bytes of a
      forward pass, and says why each other would not run.

    Raises:
      ValueError, TypeError: as the call itself would.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
      >>> print(attnlib.explain(query, query, query, is_causal=True))
      implementation: blockwise
      tiles: 1024 queries x 512 keys, 20 of 32 computed
      memory: about 8.4 MB of temporaries in a forward pass
      cost: about 2.75 GFLOP, 4.19 MB read and written
      not reference: blockwise is likely faster at this size
      not cudnn: query, key and value must all be float16 or all bfloat16; they are float32, float32, float32
    """
    if "scale" in options:
        raise TypeError("explain takes the scale inside the score: score=attnlib.scores.Dot(scale).")
    defaults: dict[str, Any] = dict(
        mask=None, bias=None, is_causal=False, attention_axes=None, dropout_rate=0.0, dropout_rng=None,
        logits_soft_cap=None, return_weights=False, return_lse=False, implementation=None, block_sizes=None,
        precision=None,
    )  # fmt: skip
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"explain got unknown options {sorted(unknown)}; known are {sorted(defaults)}.")
    score = Dot() if score is None else score
    arrays, static = _arguments(query, key, value, score, **{**defaults, **options})
    asked = static.pop("implementation")
    problem = jax.eval_shape(lambda *args: _fold(*args, **static)[0], *arrays)
    return _choose.explain(problem, asked)


def merge_attention(
    outputs: Sequence[Array] | Array,
    lses: Sequence[Array] | Array,
    *,
    attention_axes: int | Sequence[int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint sets of keys into attention over their union, exactly and differentiably.

    The output is sum_i exp(lse_i - lse) output_i, with lse the log-sum-exp of the parts' lses.

    Args:
      outputs: parts `(*batch and attention axes, N, E)`, all of one shape; a sequence, or stacked along a first axis.
      lses: their lses `(*batch, N, *query axes)`, from `return_lse=True`.
      attention_axes: as in the calls that made the parts.

    Returns:
      (output, lse) of the union, shaped as the parts. Where no part may attend anything: 0 and -inf.

    Raises:
      ValueError: no parts, or shapes that do not belong together.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))
      >>> parts = [attnlib.dot_product_attention(query, key[:, s], value[:, s], return_lse=True)
      ...          for s in (slice(0, 6), slice(6, 10))]
      >>> output, lse = attnlib.merge_attention(*zip(*parts))
      >>> bool(jnp.allclose(output, attnlib.dot_product_attention(query, key, value), atol=1e-5))
      True

    Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021); Dao et al., "FlashAttention" (2022).
    """
    outputs, lses = list(outputs), list(lses)
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attention needs at least one output and as many lses; got {len(outputs)} and {len(lses)}."
        )
    _checks.arrays(**{f"outputs[{i}]": part for i, part in enumerate(outputs)})
    _checks.arrays(**{f"lses[{i}]": part for i, part in enumerate(lses)})
    shape, lse_shape = outputs[0].shape, lses[0].shape
    _checks.rank(outputs[0], "outputs[0]")
    axes = _axes.normalize(_checks.static_axes(attention_axes), len(shape), trailing=2)
    expected = (*axes.batch_shape(shape), shape[-2], *axes.attention_shape(shape))
    for i, (part, lse) in enumerate(zip(outputs, lses, strict=True)):
        if part.shape != shape or lse.shape != expected:
            raise ValueError(
                f"merge_attention needs outputs of one shape, here {shape}, and lses (*batch, N, *query axes), here "
                f"{expected}; got outputs[{i}] {part.shape} and lses[{i}] {lse.shape}."
            )

    stacked = jnp.stack([lse.astype(compute_dtype(lse)) for lse in lses])
    highest = jax.lax.stop_gradient(jnp.max(stacked, 0))
    highest = jnp.where(highest == -jnp.inf, 0, highest)
    terms = jnp.exp(stacked - highest)
    total = jnp.sum(terms, 0)
    safe = jnp.where(total == 0, 1, total)
    flat = (*lse_shape[: len(axes.batch) + 1], math.prod(axes.attention_shape(shape)), 1)
    joined = jnp.zeros((), stacked.dtype)
    for share, part in zip(terms / safe, outputs, strict=True):
        share = _axes.unfold_output(share.reshape(flat), axes, axes.attention_shape(shape))
        joined = joined + share * part.astype(stacked.dtype)
    return joined.astype(outputs[0].dtype), jnp.where(total == 0, -jnp.inf, jnp.log(safe) + highest)


def _arguments(
    query, key, value, score, mask, bias, is_causal, attention_axes, dropout_rate, dropout_rng, logits_soft_cap,
    return_weights, return_lse, implementation, block_sizes, precision,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Splits the arguments into traced arrays and hashable static options, refusing what cannot be either."""
    _checks.score(score)
    rate = _checks.dropout(dropout_rate, dropout_rng)
    arrays = (query, key, value, score, _checks.mask(mask), bias, dropout_rng if rate else None)
    static = dict(
        is_causal=_checks.static_bool(is_causal, "is_causal"),
        attention_axes=_checks.static_axes(attention_axes),
        dropout_rate=rate,
        logits_soft_cap=_checks.soft_cap(logits_soft_cap),
        return_weights=_checks.static_bool(return_weights, "return_weights"),
        return_lse=_checks.static_bool(return_lse, "return_lse"),
        implementation=_checks.implementation(implementation, _choose.NAMES),
        block_sizes=_checks.block_sizes(block_sizes),
        precision=precision,
    )
    _checks.arrays(query=query, key=key, value=value)
    return arrays, static


@partial(
    jax.jit,
    static_argnames=(
        "is_causal", "attention_axes", "dropout_rate", "logits_soft_cap", "return_weights", "return_lse",
        "implementation", "block_sizes", "precision",
    ),
)  # fmt: skip
def _attend(query, key, value, score, mask, bias, dropout_rng, *, return_lse, implementation, **static):
    problem, axes = _fold(query, key, value, score, mask, bias, dropout_rng, return_lse=return_lse, **static)
    output, lse, weights = _choose.choose(problem, implementation).run(problem)

    heads = query.shape[-2]
    lead = (*problem.batch, heads)
    output = output.reshape(*lead, *output.shape[-2:]).astype(value.dtype)
    results = [_axes.unfold_output(output, axes, problem.query_shape)]
    if weights is not None:
        results.append(weights.reshape(*lead, *problem.query_shape, *problem.key_shape))
    if return_lse:
        assert lse is not None
        results.append(lse.reshape(*lead, *problem.query_shape))
    return results[0] if len(results) == 1 else tuple(results)


def _fold(
    query, key, value, score, mask, bias, dropout_rng, *, is_causal, attention_axes, dropout_rate, logits_soft_cap,
    return_weights, return_lse, block_sizes, precision,
) -> tuple[Problem, _axes.Axes]:  # fmt: skip
    """Checks the shapes and brings the arguments into the canonical form."""
    _checks.rank(query, "query")
    axes = _axes.normalize(attention_axes, query.ndim, trailing=2)
    batch = _checks.operands(query, key, value, axes)
    heads, kv_heads = query.shape[-2], key.shape[-2]
    score.check(heads, query.shape[-1], key.shape[-1])
    shapes = Shapes(batch, heads, axes.attention_shape(query.shape), axes.attention_shape(key.shape))
    if mask is not None:
        mask.check(shapes)
    _checks.bias(bias, shapes)
    if is_causal:
        mask = Causal() if mask is None else mask & Causal()

    folded_query = _axes.fold_operand(query, axes)  # (*batch, N, T, D)
    lead, tail = folded_query.shape[:-3], folded_query.shape[-2:]
    problem = Problem(
        query=folded_query.reshape(*lead, kv_heads, heads // kv_heads, *tail),
        key=_axes.fold_operand(key, axes),
        value=_axes.fold_operand(value, axes),
        score=score,
        mask=mask,
        bias=None if bias is None else _axes.split_heads(_axes.fold_pairs(bias, shapes.query, shapes.key), kv_heads),
        dropout_seeds=_dropout.seeds_of(dropout_rng) if dropout_rate else None,
        batch=batch,
        query_shape=shapes.query,
        key_shape=shapes.key,
        dropout_rate=dropout_rate,
        logits_soft_cap=logits_soft_cap,
        return_weights=return_weights,
        block_sizes=block_sizes,
        precision=precision,
        return_lse=return_lse,
    )
    return problem, axes
