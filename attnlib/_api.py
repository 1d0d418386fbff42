"""Attention as pure functions, and what a call of them would run.

Layout (docs/concepts/shapes-and-axes.md): query `(*batch and attention axes, N, D)`, key `(..., K, D)`, value
`(..., K, E)`, output `(..., N, E)`; weights `(*batch, N, *query axes, *key axes)`; lse `(*batch, N, *query axes)`.
"""

from __future__ import annotations

from typing import Any, TypeAlias, Unpack, overload

import jax

from attnlib._core.array_types import Array, Key, Query, Value
from attnlib._core.options import (
    AllResultsOptions,
    AttentionOptions,
    LseOptions,
    Options,
    OutputOptions,
    WeightsOptions,
    takes_options,
)
from attnlib._engine import call as _call
from attnlib._engine import dispatch as _choose
from attnlib._engine.context.explanation import explain_context
from attnlib._engine.dispatch import Explanation
from attnlib._engine.merge import merge_attention
from attnlib.scores import Additive, Dot, Score

Scale: TypeAlias = float | Array | None

__all__ = ["Explanation", "additive_attention", "attention", "dot_product_attention", "explain", "merge_attention"]


@overload
def dot_product_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[OutputOptions]
) -> jax.Array: ...
@overload
def dot_product_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[WeightsOptions]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def dot_product_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[LseOptions]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def dot_product_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[AllResultsOptions]
) -> tuple[jax.Array, jax.Array, jax.Array]: ...
@overload
def dot_product_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[AttentionOptions]
) -> Any: ...
@takes_options()
def dot_product_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    scale: Scale = None,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Multi-head dot-product attention over any axes: softmax(scale * query key^T + bias) value.

    Args:
      query: `(*batch and attention axes, N, D)`; for one sequence axis `(B, T, N, D)`. Heads first, `(B, N, T, D)`, may
        be a legal shape too, for something else: `attnlib.explain` prints what each axis was taken for.
      key: `(..., K, D)`, N a multiple of K: query head n reads key/value head n // (N // K). Lengths along attention
        axes may differ from the query's; batch axes are equal or 1.
      value: `(..., K, E)`, with the key's positions; E may differ from D.
      scale: scalar, or `(N,)` for one a head; default 1 / sqrt(D).
      {options}

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
    return _call.attend(_call.arguments(query, key, value, Dot(scale), Options(**options)))


@overload
def additive_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[OutputOptions]
) -> jax.Array: ...
@overload
def additive_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[WeightsOptions]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def additive_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[LseOptions]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def additive_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[AllResultsOptions]
) -> tuple[jax.Array, jax.Array, jax.Array]: ...
@overload
def additive_attention(
    query: Query, key: Key, value: Value, *, scale: Scale = None, **options: Unpack[AttentionOptions]
) -> Any: ...
@takes_options()
def additive_attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    scale: Scale = None,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Multi-head additive (Bahdanau) attention over any axes: softmax(sum_d scale_d tanh(q_d + k_d) + bias) value.

    Args:
      query: `(*batch and attention axes, N, D)`; for one sequence axis `(B, T, N, D)`.
      key: `(..., K, D)`, N a multiple of K.
      value: `(..., K, E)`.
      scale: scalar, `(D,)` or `(N, D)`; default 1.
      {names}: as in `dot_product_attention`.

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
    return _call.attend(_call.arguments(query, key, value, Additive(scale), Options(**options)))


@overload
def attention(query: Query, key: Key, value: Value, *, score: Score, **options: Unpack[OutputOptions]) -> jax.Array: ...
@overload
def attention(
    query: Query, key: Key, value: Value, *, score: Score, **options: Unpack[WeightsOptions]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def attention(
    query: Query, key: Key, value: Value, *, score: Score, **options: Unpack[LseOptions]
) -> tuple[jax.Array, jax.Array]: ...
@overload
def attention(
    query: Query, key: Key, value: Value, *, score: Score, **options: Unpack[AllResultsOptions]
) -> tuple[jax.Array, jax.Array, jax.Array]: ...
@overload
def attention(query: Query, key: Key, value: Value, *, score: Score, **options: Unpack[AttentionOptions]) -> Any: ...
@takes_options()
def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    score: Score,
    **options: Unpack[AttentionOptions],
) -> Any:
    """Attention with any score: softmax(score(query, key) + bias) value.

    Args:
      query: `(*batch and attention axes, N, D)`.
      key: `(..., K, D_key)`; D_key may differ from D where the score allows it.
      value: `(..., K, E)`.
      score: an `attnlib.scores.Score`; its arrays are differentiable.
      {names}: as in `dot_product_attention`.

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
    return _call.attend(_call.arguments(query, key, value, score, Options(**options)))


@takes_options(listed=("score",))
def explain(
    query: Query | jax.ShapeDtypeStruct,
    key: Key | jax.ShapeDtypeStruct,
    value: Value | jax.ShapeDtypeStruct,
    *,
    score: Score | None = None,
    **options: Unpack[AttentionOptions],
) -> Explanation:
    """Says what `attention(query, key, value, score=score, **options)` would run, without running it.

    Args:
      query, key, value: as in `attention`; `jax.ShapeDtypeStruct`s will do.
      score: default `scores.Dot()`.
      {names}: as in `attention`; `scale` is the score's.

    Returns:
      An `Explanation`: print it. It names the implementation, what each axis was taken for, its tiles, its memory, the
      operations and bytes of a forward pass, and says why each other would not run.

    Raises:
      ValueError, TypeError: as the call itself would.

    Example:
      >>> import jax, jax.numpy as jnp, attnlib
      >>> query = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
      >>> explanation = attnlib.explain(query, query, query, is_causal=True)
      >>> print(explanation)
      implementation: blockwise
      axes: batch (1,), queries (4096,), keys (4096,), 1 heads, 64 features
      tiles: 512 queries x 512 keys, 36 of 64 computed
      memory: about 6.3 MB of temporaries in a forward pass
      cost: about 2.73 GFLOP, 4.19 MB read and written
      not reference: blockwise is likely faster at this size
      ...
      >>> explanation.refusals["cudnn"]
      'query, key and value must all be float16 or all bfloat16; they are float32, float32, float32'
    """
    score = Dot() if score is None else score
    arguments = _call.arguments(query, key, value, score, Options(**options))  # type: ignore[arg-type]  # shapes will do
    if arguments.options.context is not None:
        in_context = explain_context(arguments, _call.canonicalize)
        if in_context is not None:
            return _choose.explain(in_context[0], arguments.options.implementation, in_context[1])
        arguments = arguments.change(context=None)
    problem = jax.eval_shape(lambda arguments: _call.canonicalize(arguments)[0], arguments)
    return _choose.explain(problem, arguments.options.implementation)
