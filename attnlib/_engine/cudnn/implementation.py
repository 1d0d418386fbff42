"""cuDNN's fused attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

The kernel computes dot products of half-precision operands under the masks that it knows: causal, a causal window,
lengths. Every other problem is refused (`_REASONS`, `_unsupported` and `_native` give the reasons).

The adapter corrects three things around the kernel, in linear memory:

  padded rows   the kernel computes a row without keys as if it had one key; its output is replaced by 0
  NaN           the kernel multiplies masked values by weights of 0, and 0 * NaN is NaN. If there is a mask, non-finite
                numbers are replaced before the call, and rows that attend them are made NaN, without gradient, after it
  scale         a traced scale, or one for each head, is multiplied into the query; see `_scaled`

cuDNN has a backward pass, and neither forward mode nor second derivatives: these are computed by another implementation
(`fallback_derivatives.py`). The backward pass runs the forward kernel again; XLA merges both if they are in one program
and not in a loop. cuDNN may add gradients up in any order: two runs agree bit for bit only with
`XLA_FLAGS=--xla_gpu_deterministic_ops=true`.

XLA needs the same sharding of query, key and value, and none of positions. This is known only at run time, so it is not
refused here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlib._core.nan_where import nan_where
from attnlib._core.problem import AttentionProblem, AttentionResult, Estimate, Implementation
from attnlib._core.sizes import is_static
from attnlib._engine.cudnn.fallback_derivatives import with_fallback_derivatives
from attnlib._engine.cudnn.kernel import CudnnConfig, call, kernel
from attnlib._engine.nonfinite import sanitize
from attnlib.masks import Causal, Lengths, Prefix, SlidingWindow
from attnlib.masks._base import And, Mask, all_of
from attnlib.scores import Dot

# (queries, keys) of a tile of its kernels, approximately: cuDNN chooses among several kernels itself.
_TILE = 128, 128


def cudnn(general: Implementation, off_platform: bool) -> Implementation:
    """The implementation; `general` computes the derivatives that cuDNN lacks.

    The device of a program is not known while it is traced. If it is lowered for another platform than CUDA, `general`
    runs it if `off_platform` is set, as for an automatic choice. Otherwise lowering fails, as for a choice by name.
    """

    def fallback_fn(problem: AttentionProblem) -> jax.Array:
        return general.run(problem).output

    def run(problem: AttentionProblem) -> AttentionResult:
        return AttentionResult(with_fallback_derivatives(problem, _output, fallback_fn, off_platform), None, None)

    return Implementation("cudnn", _SUPPORTS, _unsupported, run, _estimate, _REASONS)


def _estimate(problem: AttentionProblem) -> Estimate:
    """The output, and finite copies of the operands if there is a mask."""
    operands = (problem.query, problem.key, problem.value) if problem.mask is not None else ()
    numbers = sum(operand.size for operand in operands) + problem.rows * problem.value.shape[-1]
    # Two products, and for the softmax a maximum, a difference, an exponential, a sum and a rounding.
    flops_per_pair = 2 * problem.query.shape[-1] + 2 * problem.value.shape[-1] + 5
    heads = math.prod(problem.batch) * problem.kv_heads * problem.groups
    return Estimate(numbers * problem.value.dtype.itemsize, heads * problem.pairs_computed(*_TILE) * flops_per_pair)


# What is refused. Facts of the call are checked first, so that the reason is the same on every machine. jax.nn is asked
# last, since its answer depends on the GPU and on the version of cuDNN (head sizes over 128 need Hopper or later).


_SUPPORTS = frozenset(("mask", "precision"))
_LSE = (
    "jax.nn rounds its lse to half precision and gives it no gradient; set return_lse=False, sink=None and "
    "normalize=True"
)
_REASONS = {
    "bias": (
        "its bias is rounded to half precision, must be as large as all pairs, and may not hold -inf; "
        "leave bias=None, or use masks.Causal, SlidingWindow or Lengths for what it masks"
    ),
    "score_mod": "it computes no function of the user; leave score_mod=None",
    "dropout_rate": "it cannot drop the entries that dropout_rng determines; set dropout_rate=0",
    "logits_soft_cap": "it has no soft cap; leave logits_soft_cap=None",
    "return_weights": "it never holds the weights; set return_weights=False",
    "return_lse": _LSE,
    "sink": _LSE,
    "normalize": _LSE,
    "block_sizes": "it chooses its own blocks; leave block_sizes=None",
}


def _unsupported(problem: AttentionProblem) -> str | None:
    checks = _unsupported_score, _unsupported_operands, _unsupported_mask, _unsupported_here
    return next((reason for check in checks if (reason := check(problem)) is not None), None)


def _unsupported_score(problem: AttentionProblem) -> str | None:
    if type(problem.score) is not Dot:
        return f"it computes dot products only; the score is {type(problem.score).__name__}"
    if problem.precision not in (None, "default", jax.lax.Precision.DEFAULT):
        return f"it multiplies in one precision, its own; leave precision=None, not {problem.precision!r}"
    return None


def _unsupported_operands(problem: AttentionProblem) -> str | None:
    query, key, value = problem.query, problem.key, problem.value
    if not is_static(*query.shape, *key.shape, *value.shape):
        return "its kernel needs a number for every size, and some are symbolic; export numbers for them"
    dtypes = [str(operand.dtype) for operand in (query, key, value)]
    if len(set(dtypes)) > 1 or dtypes[0] not in ("float16", "bfloat16"):
        return f"query, key and value must all be float16 or all bfloat16; they are {', '.join(dtypes)}"
    assert isinstance(problem.score, Dot)
    if problem.score.scale is not None and dtypes[0] == "float16":
        return "a query multiplied by a scale may leave the range of float16; leave scale=None, or use bfloat16"
    features = query.shape[-1]
    if value.shape[-1] != features:
        return f"query and value must have equally many features; they have {features} and {value.shape[-1]}"
    if features == 0 or features % 8 or features > 256:
        return f"features must be a multiple of 8 and at most 256; there are {features}"
    if min(problem.query_length, problem.key_length) <= 1 or math.prod(problem.batch) == 0:
        # One position alone is where cuDNN versions differ (PyTorch issue 138529), and nothing to be fast at.
        lengths = problem.query_length, problem.key_length
        return f"it needs at least two queries, two keys and a batch entry; there are {(*problem.batch, *lengths)}"
    if any(map(_explicitly_sharded, (query, key, value))):
        return "jax.nn has no rule to shard it over explicit mesh axes; make them jax.sharding.AxisType.Auto"
    return None


def _explicitly_sharded(operand: Any) -> bool:
    sharding = getattr(operand if isinstance(operand, jax.ShapeDtypeStruct) else jax.typeof(operand), "sharding", None)
    return any(axis is not None for axis in getattr(sharding, "spec", ()))


def _unsupported_mask(problem: AttentionProblem) -> str | None:
    native = _native(problem)
    return native if isinstance(native, str) else None


def _unsupported_here(problem: AttentionProblem) -> str | None:
    """The reason why jax.nn refuses the problem on this machine, or None if it does not."""
    native = _native(problem)
    assert isinstance(native, CudnnMask)
    heads, kv_heads, features = problem.kv_heads * problem.groups, problem.kv_heads, problem.query.shape[-1]
    query = jax.ShapeDtypeStruct((1, problem.query_length, heads, features), problem.query.dtype)
    key = jax.ShapeDtypeStruct((1, problem.key_length, kv_heads, features), problem.key.dtype)
    lengths = [jax.ShapeDtypeStruct((1,), jnp.int32)] * sum(native.static.lengths)
    try:
        jax.eval_shape(partial(call, native.static), query, key, key, *lengths)
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, NotImplementedError):
            return f"jax.nn.dot_product_attention refuses it on this machine: {error}"
        return f"it needs an NVIDIA GPU, and jax[cuda12] or jax[cuda13] installed; jax.nn says: {error}"
    except ValueError as error:
        return f"jax.nn.dot_product_attention refuses it: {error}"
    return None


# What the kernel knows of masks


class CudnnMask(NamedTuple):
    """A mask in terms of the kernel; the masks of queries and of keys have the form `position < length`."""

    static: CudnnConfig
    queries: list[Mask]
    keys: list[Mask]


def _native(problem: AttentionProblem) -> CudnnMask | str:
    """The problem's mask, split at `&`; or the reason why the kernel does not support it."""
    if not (problem.query_positions.is_implicit and problem.key_positions.is_implicit):
        return "it counts positions from 0; leave query_positions=None and key_positions=None"
    causal = False
    lefts, rights = [problem.query_length], [problem.key_length]  # bounds so wide are none
    queries: list[Mask] = []
    keys: list[Mask] = []
    for part in _conjuncts(problem.mask):
        if isinstance(part, Causal):
            if not isinstance(part.offset, int) or part.offset != 0:
                return "its causal mask begins at the first query and key; leave Causal(offset=0)"
            if part.axis is not None and len(problem.key_shape) > 1:
                return f"it knows one order of positions, not Causal(axis={part.axis}) among several; leave axis=None"
            causal = True
        elif isinstance(part, SlidingWindow):
            for side, found in ((part.left, lefts), (part.right, rights)):
                if isinstance(side, int):
                    found.append(side)
                elif side is not None:
                    return "its windows are ints, the same for all heads; use SlidingWindow(left, 0) with an int"
        elif isinstance(part, Lengths):
            queries += [] if part.query is None else [Lengths(query=part.query)]
            keys += [] if part.key is None else [Lengths(key=part.key)]
        elif isinstance(part, Prefix):
            keys.append(part)
        else:
            # jax.nn would add a finite number to all masked logits: that takes quadratic memory, larger logits of
            # masked keys exceed the number, and rows that attend nothing would average masked values.
            return (
                f"it knows causal masks, windows and lengths joined by `&`, not {type(part).__name__}; use "
                "masks.Lengths where padding is at the end"
            )
    causal = causal or min(rights) == 0
    left = min(lefts) if min(lefts) < problem.query_length - 1 else None
    if not causal and (left is not None or min(rights) < problem.key_length - 1):
        return "its windows are causal ones; use SlidingWindow(left, 0)"
    if left is not None and (queries or keys or problem.query_length > problem.key_length):
        return "a window with lengths, or with more queries than keys, may leave it rows without keys; leave one out"
    return CudnnMask(CudnnConfig(causal, left, (bool(queries), bool(keys))), queries, keys)


def _conjuncts(mask: Mask | None) -> list[Mask]:
    if isinstance(mask, And):
        return _conjuncts(mask.left) + _conjuncts(mask.right)
    return [] if mask is None else [mask]


# The call: a problem that is not refused -> output (*batch, K, G, T, E)


def _output(problem: AttentionProblem, training: bool) -> jax.Array:
    native = _native(problem)
    assert isinstance(native, CudnnMask), native
    real_queries, real_keys = _real(problem, native.queries, -2), _real(problem, native.keys, -1)
    query, key, value = (
        jnp.broadcast_to(x, (*problem.batch, *x.shape[len(problem.batch) :]))
        for x in (problem.query, problem.key, problem.value)
    )
    everything = jnp.ones((1,) * (len(problem.batch) + 3), bool)
    rows = real_queries[..., None, None, :] if native.queries else everything  # (*batch, 1, 1, T)
    if native.keys:
        rows = rows & real_keys[..., None, None, :1]  # some key is real if the first is
    non_finite = None
    if problem.mask is not None:
        query, key, value, bad_queries, bad_keys = sanitize(query, key, value)
        non_finite = rows & (bad_queries | _attends(native.static, bad_keys & real_keys[..., None, :], query.shape[-2]))
        query = jnp.where(real_queries[..., None, None, :, None], query, 1)
        key, value = (jnp.where(real_keys[..., None, :, None], x, 1) for x in (key, value))

    lengths = [
        # At least one, since the kernel's softmax of no keys is undefined; `rows` masks what this adds.
        jnp.maximum(jnp.sum(real, -1, dtype=jnp.int32), 1).reshape(-1)
        for real, given in zip((real_queries, real_keys), native.static.lengths, strict=True)
        if given
    ]
    static = native.static._replace(training=training)
    output = kernel(static, _laid_out(_scaled(problem, query), 2), _laid_out(key, 1), _laid_out(value, 1), lengths)
    output = jnp.swapaxes(output, 1, 2).reshape(query.shape).astype(problem.dtype)
    if non_finite is not None:
        # By `where`, so that no derivative passes through the rows that are replaced.
        output = jnp.where(rows[..., None], nan_where(non_finite[..., None], output), 0)
    return output


def _real(problem: AttentionProblem, masks: list[Mask], axis: int) -> jax.Array:
    """`(*batch, positions)`: which positions of one side are not padding; the masks do not depend on the other side."""
    length = problem.query_length if axis == -2 else problem.key_length
    real = jnp.ones(length, bool)
    for mask in masks:
        block = mask.evaluate(*problem.positions)  # (*batch, 1, T, 1), (*batch, 1, 1, S), or without batch and heads
        inside = jnp.squeeze(block, -1 if axis == -2 else -2)
        real = all_of(real, inside if inside.ndim == 1 else inside[..., 0, :])
    return jnp.broadcast_to(real, (*problem.batch, length))


def _attends(static: CudnnConfig, bad: jax.Array, queries: int) -> jax.Array:
    """`(*batch, K, 1, T | 1)`: which rows attend a bad key, for bad keys `(*batch, K, S)`.

    A row attends consecutive keys, so the difference of two cumulative counts says whether one of them is bad.
    """
    if not static.causal:
        return jnp.any(bad, -1)[..., None, None]
    keys = bad.shape[-1]
    count = jnp.cumsum(bad, -1, dtype=jnp.int32)
    count = jnp.concatenate([jnp.zeros_like(count[..., :1]), count], -1)  # of bad keys among the first n
    query = jnp.arange(queries)
    attended = count[..., jnp.minimum(query + 1, keys)]
    if static.left is not None:
        attended = attended - count[..., jnp.maximum(query - static.left, 0)]
    return (attended > 0)[..., None, :]


def _scaled(problem: AttentionProblem, query: jax.Array) -> jax.Array:
    """The query times the ratio of the scale to the kernel's own scale 1 / sqrt(D), which is static.

    scale <q, k> = <ratio q, k> / sqrt(D). Only `ratio q` is rounded once more; the product is exact if the ratio is a
    power of two. JAX differentiates the product, so a scale has a gradient.
    """
    assert isinstance(problem.score, Dot)
    if problem.score.scale is None:
        return query
    ratio = jnp.asarray(problem.score.scale).astype(jnp.float32) * math.sqrt(query.shape[-1])
    if ratio.ndim == 1:
        ratio = ratio.reshape(*(1,) * len(problem.batch), problem.kv_heads, problem.groups, 1, 1)
    return (query.astype(jnp.float32) * ratio).astype(query.dtype)


def _laid_out(array: jax.Array, head_axes: int) -> jax.Array:
    """(*batch, [K, G] or K, positions, features) -> (B, positions, heads, features): jax.nn's layout, one batch axis.

    Several batch axes are merged, which gathers operands that are sharded along another axis than the first.
    """
    heads = math.prod(array.shape[-2 - head_axes : -2])
    return jnp.swapaxes(array.reshape(-1, heads, *array.shape[-2:]), 1, 2)
