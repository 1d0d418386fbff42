"""Attention over a union of sets of keys, from attention over each set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.operand_checks import check_arrays, check_axes, check_rank, compute_dtype
from attnlib._engine.softmax import merge


def merge_attention(
    outputs: Sequence[Array] | Array,
    lses: Sequence[Array] | Array,
    *,
    attention_axes: int | Sequence[int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint sets of keys into attention over their union, exactly and differentiably.

    The output is sum_i exp(lse_i - lse) output_i, with lse the log-sum-exp of the parts' lses. The outputs must be
    normalized; with normalize=False, the output over the union is the plain sum of the outputs.

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
    for name, parts in (("outputs", outputs), ("lses", lses)):
        if not isinstance(parts, Sequence):
            check_arrays(**{name: parts})
            if parts.ndim == 0:
                raise ValueError(f"{name} must be a sequence of arrays, or an array of them stacked; got a scalar.")
    outputs, lses = list(outputs), list(lses)
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attention needs at least one output and as many lses; got {len(outputs)} and {len(lses)}."
        )
    check_arrays(**{f"outputs[{i}]": part for i, part in enumerate(outputs)})
    check_arrays(**{f"lses[{i}]": part for i, part in enumerate(lses)})
    shape, lse_shape = outputs[0].shape, lses[0].shape
    check_rank(outputs[0], "outputs[0]")
    axes = _axes.normalize(check_axes(attention_axes), len(shape), trailing=2)
    expected = (*axes.batch_shape(shape), shape[-2], *axes.attention_shape(shape))
    for i, (part, lse) in enumerate(zip(outputs, lses, strict=True)):
        if part.shape != shape or lse.shape != expected:
            raise ValueError(
                f"merge_attention needs outputs of one shape, here {shape}, and lses (*batch, N, *query axes), here "
                f"{expected}; got outputs[{i}] {part.shape} and lses[{i}] {lse.shape}."
            )

    fractions, merged_lse = merge(jnp.stack([lse.astype(compute_dtype(lse)) for lse in lses], -1))
    flat = (*lse_shape[: len(axes.batch) + 1], math.prod(axes.attention_shape(shape)), 1)
    merged = jnp.zeros((), fractions.dtype)
    for fraction, part in zip(jnp.moveaxis(fractions, -1, 0), outputs, strict=True):
        fraction = _axes.unfold_output(fraction.reshape(flat), axes, axes.attention_shape(shape))
        merged = merged + fraction * part.astype(fractions.dtype)
    return merged.astype(outputs[0].dtype), merged_lse
