"""Attention as pure functions, and what a call of them would run.

Layout (docs/concepts/shapes-and-axes.md): query `(*batch and attention axes, N, D)`, key `(..., K, D)`, value
`(..., K, E)`, output `(..., N, E)`; weights `(*batch, N, *query axes, *key axes)`; lse `(*batch, N, *query axes)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from attnlib._core.array_types import Array, Bias, BoolMask, Key, Query, Rng, Value
from attnlib._core.suggestions import suggests_arguments
from attnlib._engine import call as _call
from attnlib._engine import dispatch as _choose
from attnlib._engine.dispatch import Explanation
from attnlib._engine.merge import merge_attention
from attnlib.masks import Mask
from attnlib.scores import Additive, Dot, Score

ScoreMod = Callable[..., Any]

__all__ = ["Explanation", "additive_attention", "attention", "dot_product_attention", "explain", "merge_attention"]


@suggests_arguments
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
    score_mod: ScoreMod | None = None,
    sink: float | Array | None = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    implementation: str | Sequence[str] | None = None,
    block_sizes: tuple[int, int] | None = None,
    precision: Any = None,
) -> Any:
    """Multi-head dot-product attention over any axes: softmax(scale * query key^T + bias) value.

    Args:
      query: `(*batch and attention axes, N, D)`; for one sequence axis `(B, T, N, D)`. Heads first, `(B, N, T, D)`, may
        be a legal shape too, for something else: `attnlib.explain` prints what each axis was taken for.
      key: `(..., K, D)`, N a multiple of K: query head n reads key/value head n // (N // K). Lengths along attention
        axes may differ from the query's; batch axes are equal or 1.
      value: `(..., K, E)`, with the key's positions; E may differ from D.
      scale: scalar, or `(N,)` for one a head; default 1 / sqrt(D).
      mask: bool, True = attend, of the weights' rank `(*batch, N, *query axes, *key axes)` with ones where it
        broadcasts, or of rank at most the number of query and key axes; or a `masks.Mask`. Default: all attend all.
        A mask that leaves a query nothing, as one with False = attend may, is no error: its lse is -inf. Of real keys,
        `(B, S)`, write `masks.KeyPadding(mask)`: where B is T the array itself passes for `(T, S)`.
      bias: added to the scaled logits; shapes as for mask. Differentiable.
      is_causal: also mask keys after the query (flat row-major positions, aligned at the first ones).
      attention_axes: the axes attended over, numbered in query, key and value as passed (the last sequence axis is
        -3). Default: every axis but the first, heads and features; for rank 3 (no batch axis) the first.
      dropout_rate: fraction of weights to drop after softmax, in [0, 1); the rest is scaled by 1 / (1 - rate).
      dropout_rng: a JAX random key; needed where dropout_rate > 0.
      logits_soft_cap: c replaces logits x (after bias) by c * tanh(x / c); positive. Default: none.
      score_mod: `score_mod(logit, batch, head, query_position, key_position) -> logit`, all scalars, applied to every
        logit after bias and soft cap (batch: a tuple unless there is one batch axis; positions: tuples where there are
        several attention axes). Arrays that it captures are traced and differentiable. See `attnlib.modifiers`.
      sink: scalar or `(N,)`, the logit of one more key that has no value: it takes a share of every row's weight, and
        counts in the lse. Differentiable; 0 gives softmax-off-by-one. Default: none.
      query_positions, key_positions: ints `(*batch, length)` or `(length,)`, with one attention axis: the positions
        that masks of positions, is_causal and score_mod see; what has one below 0 is left out. Default: 0, 1, 2...
      return_weights: also return the weights that were used (after dropout).
      return_lse: also return the log-sum-exp of the logits over the keys.
      implementation: "blockwise" (tiles; memory linear in the lengths), "reference" (all pairs at once), "cudnn" (the
        fused kernel of NVIDIA GPUs, for half-precision operands and causal masks, windows and lengths), or several to
        try in order; default: cudnn on a GPU where it can, else chosen by size, see `attnlib.explain`.
      block_sizes: (queries, keys) of a tile of "blockwise"; default: chosen.
      precision: of matrix products, as in `jax.lax.Precision`.

    Returns:
      output `(..., N, E)` in value's dtype (float64, NumPy's too, is float32 without jax_enable_x64); or (output,
      weights), (output, lse), (output, weights, lse). Weights `(*batch, N, *query axes, *key axes)` and lse
      `(*batch, N, *query axes)` are float32 at least. A query that may attend nothing has output 0, weights 0 and lse
      -inf; masked keys and values may hold anything, NaN included.

    Raises:
      ValueError, TypeError: an argument does not fit; the message names it, what was expected, and the remedy.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 8))  # each (B, T, N, D)
      >>> attnlib.dot_product_attention(query, key, value, is_causal=True).shape
      (2, 10, 4, 8)

    Source: Vaswani et al., "Attention Is All You Need" (2017); grouped heads: Ainslie et al., "GQA" (2023);
      score_mod: Dong et al., "Flex Attention" (2024); sink: Xiao et al., "Efficient Streaming Language Models with
      Attention Sinks" (2023), Miller, "Attention Is Off By One" (2023).
    """
    return attention(
        query, key, value, score=Dot(scale), mask=mask, bias=bias, is_causal=is_causal,
        attention_axes=attention_axes, dropout_rate=dropout_rate, dropout_rng=dropout_rng,
        logits_soft_cap=logits_soft_cap, score_mod=score_mod, sink=sink, query_positions=query_positions,
        key_positions=key_positions, return_weights=return_weights, return_lse=return_lse,
        implementation=implementation, block_sizes=block_sizes, precision=precision,
    )  # fmt: skip


@suggests_arguments
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
    score_mod: ScoreMod | None = None,
    sink: float | Array | None = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
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
      mask, bias, is_causal, attention_axes, dropout_rate, dropout_rng, logits_soft_cap, score_mod, sink,
        query_positions, key_positions, return_weights, return_lse, implementation, block_sizes, precision: as in
        `dot_product_attention`.

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
        logits_soft_cap=logits_soft_cap, score_mod=score_mod, sink=sink, query_positions=query_positions,
        key_positions=key_positions, return_weights=return_weights, return_lse=return_lse,
        implementation=implementation, block_sizes=block_sizes, precision=precision,
    )  # fmt: skip


@suggests_arguments
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
    score_mod: ScoreMod | None = None,
    sink: float | Array | None = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
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
      mask, bias, is_causal, attention_axes, dropout_rate, dropout_rng, logits_soft_cap, score_mod, sink,
        query_positions, key_positions, return_weights, return_lse, implementation, block_sizes, precision: as in
        `dot_product_attention`.

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
    arrays, static = _call.arguments(
        query, key, value, score, mask, bias, is_causal, attention_axes, dropout_rate, dropout_rng, logits_soft_cap,
        score_mod, sink, query_positions, key_positions, return_weights, return_lse, implementation, block_sizes,
        precision,
    )  # fmt: skip
    return _call.attend(arrays, **static)


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
      An `Explanation`: print it. It names the implementation, what each axis was taken for, its tiles, its memory, the
      operations and bytes of a forward pass, and says why each other would not run.

    Raises:
      ValueError, TypeError: as the call itself would.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
      >>> print(attnlib.explain(query, query, query, is_causal=True))
      implementation: blockwise
      axes: batch (1,), queries (4096,), keys (4096,), 1 heads, 64 features
      tiles: 1024 queries x 512 keys, 20 of 32 computed
      memory: about 8.4 MB of temporaries in a forward pass
      cost: about 2.75 GFLOP, 4.19 MB read and written
      not reference: blockwise is likely faster at this size
      not cudnn: query, key and value must all be float16 or all bfloat16; they are float32, float32, float32
    """
    options = _call.options("explain", options)
    score = Dot() if score is None else score
    arrays, static = _call.arguments(query, key, value, score, **options)
    asked = static.pop("implementation")
    problem = jax.eval_shape(lambda arrays: _call.canonicalize(arrays, **static)[0], arrays)
    return _choose.explain(problem, asked)
