"""Validation at the border, and the wording of its errors: argument, what was expected, what came, the remedy."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core import axes as _axes
from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape, Axes
from attnlib._core.problem import Asked, Implementation
from attnlib._core.suggestions import require_static
from attnlib._core.validation import check_number, check_positions, check_positive_number, is_safe_float32

_PRECISIONS = str, jax.lax.Precision, jax.lax.DotAlgorithm, jax.lax.DotAlgorithmPreset


_USUAL = frozenset(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))


def is_array(value: Any) -> bool:
    known = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return isinstance(value, known) or hasattr(value, "__jax_array__")


def check_arrays(**operands: Any) -> None:
    """Raises TypeError unless every operand is an array of real floating-point numbers."""
    for name, value in operands.items():
        if isinstance(value, jax.Array) and value.dtype in _USUAL:
            continue  # most calls: this is on the way of each
        if not is_array(value):
            if isinstance(value, (list, tuple)) and any(map(is_array, value)):
                remedy = "Pass arrays one by one; Keras' layer([query, value, key]) is layer(query, key, value) here."
            else:
                remedy = "Convert it with jnp.asarray."
            raise TypeError(f"{name} must be an array; got {type(value).__name__}. {remedy}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"{name} must hold real floating-point numbers; got {value.dtype}{list(value.shape)}. Convert it with "
                f"{name}.astype(jnp.float32)."
            )


def is_concrete(value: Any) -> bool:
    """Whether a value can be looked at: it is not traced, and this process has all of it."""
    return not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)


def check_axes(attention_axes: Any) -> int | tuple[int, ...] | None:
    """`attention_axes` as a hashable value; out of range is `_axes.normalize`'s to say."""
    if attention_axes is None:
        return None
    require_static(attention_axes, "attention_axes", "an int or a tuple of ints")
    try:
        if isinstance(attention_axes, (Sequence, np.ndarray)) and np.shape(attention_axes) != ():
            return tuple(map(_axis, attention_axes))
        return _axis(attention_axes)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"attention_axes must be an int, a sequence of ints or None; got {attention_axes!r}."
        ) from error


def _axis(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError("a bool is not an axis")
    return operator.index(value)


def check_dropout_rate(value: Any) -> float:
    rate = check_number(value, "dropout_rate")
    if not 0.0 <= rate < 1.0:  # NaN too
        raise ValueError(f"dropout_rate must be in [0, 1); got {rate}. It is the fraction of weights to drop.")
    return rate


def check_dropout(rate: Any, rng: Any) -> float:
    """The dropout rate as a float in [0, 1), with a key where it is not 0."""
    if rng is None and type(rate) is float and rate == 0.0:
        return rate
    rate = check_dropout_rate(rate)
    if rng is None:
        if rate > 0.0:
            raise ValueError(
                f"dropout_rate={rate} needs dropout_rng; got None. Pass dropout_rng=jax.random.key(seed), a new one "
                "each step, or dropout_rate=0.0 when evaluating."
            )
    elif not is_key(rng):
        what = f"{rng.dtype}{list(rng.shape)}" if is_array(rng) else type(rng).__name__
        raise TypeError(f"dropout_rng must be one JAX random key, jax.random.key(seed); got {what}.")
    return rate


def is_key(rng: Any) -> bool:
    if not is_array(rng):
        return False
    if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng.shape == ()
    return rng.dtype == jnp.uint32 and rng.ndim == 1  # a raw key


def check_integers(value: Any, name: str) -> None:
    if value is not None and not (is_array(value) and jnp.issubdtype(value.dtype, jnp.integer)):
        what = f"{value.dtype}{list(value.shape)}" if is_array(value) else repr(value)
        raise TypeError(f"{name} must be an array of integers or None; got {what}.")


def check_explicit_positions(query: Any, key: Any, shapes: AttentionShape) -> None:
    if len(shapes.query) > 1:
        raise ValueError(
            f"query_positions and key_positions need one attention axis; there are {len(shapes.query)}, and the "
            "positions along them are theirs. Attend over one, or mask with masks.Dense."
        )
    for name, value, length in (("query", query, shapes.query), ("key", key, shapes.key)):
        if value is not None:
            check_positions(value, f"{name}_positions", shapes.batch, length, name)


def check_sink(value: Any) -> Any:
    """A number as a float; arrays of floating-point numbers and None pass."""
    if value is None or (is_array(value) and jnp.issubdtype(value.dtype, jnp.floating)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (is_safe_float32(value) or math.isinf(value)):
            raise ValueError(f"sink must be a number that float32 can hold, infinite ones included; got {value}.")
        return float(value)
    raise TypeError(
        f"sink must be a number, an array of floating-point numbers or None; got {value!r}. Write "
        "jnp.asarray(sink, jnp.float32)."
    )


def check_sink_shape(value: Any, heads: int) -> None:
    if value is not None and np.shape(value) not in ((), (heads,)):
        raise ValueError(f"sink must have shape () or ({heads},), one for each query head; got {np.shape(value)}.")


def check_soft_cap(value: Any) -> float | None:
    return None if value is None else check_positive_number(value, "logits_soft_cap", otherwise=" or None")


def check_implementation(value: Any, known: tuple[str, ...]) -> Asked:
    """A name or several that are known. An `Implementation` itself is taken too: tests ask for variants of one."""
    if value is None:
        return None
    one = isinstance(value, (str, Implementation))
    names = (value,) if one else value
    if not isinstance(names, Sequence) or not names or not all(isinstance(n, (str, Implementation)) for n in names):
        raise TypeError(
            f"implementation must be None, one of {', '.join(map(repr, known))}, or a sequence of them to try in "
            f"order; got {value!r}."
        )
    for name in names:
        if isinstance(name, str) and name not in known:
            raise ValueError(
                f"implementation {name!r} is unknown; known are {', '.join(map(repr, known))}, and None to choose."
            )
    return value if one else tuple(names)


def check_block_sizes(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    require_static(value, "block_sizes", "two Python ints")
    try:
        if not isinstance(value, (Sequence, np.ndarray)):  # to go through an array of keys is an error of its own
            raise TypeError("not a sequence")
        sizes = tuple(operator.index(size) for size in value)
    except TypeError as error:
        raise TypeError(f"block_sizes must be (queries, keys), two ints, or None; got {value!r}.") from error
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"block_sizes must be (queries, keys), two positive ints, or None; got {value!r}.")
    return sizes


def check_precision(value: Any) -> Any:
    """What a matrix product may be told; names are JAX' to know."""
    if value is None:
        return None
    parts = value if isinstance(value, tuple) else (value,)
    for part in parts:
        if not (part is None or isinstance(part, _PRECISIONS)):
            raise TypeError(
                "precision must be None, a name, a jax.lax.Precision or jax.lax.DotAlgorithm, or a tuple of one for "
                f"each operand; got {value!r}."
            )
    return value


def check_operands(
    query: Any, key: Any, value: Any, attention_axes: int | Sequence[int] | None
) -> tuple[Axes, AttentionShape]:
    """(what the axes are, the sizes) of operands whose ranks, heads, positions and batch axes fit together."""
    check_rank(query, "query")
    dtype = compute_dtype(query, key, value)
    axes = _axes.normalize(attention_axes, query.ndim, trailing=2)
    for name, operand in (("key", key), ("value", value)):
        if operand.ndim != axes.rank:
            raise ValueError(
                f"query, key and value must have the same rank; got query {query.shape} and {name} {operand.shape}."
            )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"key and value must have equally many heads (axis -2); got key {key.shape} and value {value.shape}."
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of key heads (axis -2); got {heads} and {kv_heads} in query {query.shape} "
            f"and key {key.shape}. {_layout(query, key)}"
        )
    if axes.attention_shape(key.shape) != axes.attention_shape(value.shape):
        raise ValueError(
            f"key and value must have the same attention axes {axes.attention}; got key {key.shape} and value "
            f"{value.shape}."
        )
    batch = []
    for axis in axes.batch:
        size, *others = sorted({operand.shape[axis] for operand in (query, key, value)} - {1}) or [1]
        if others:
            raise ValueError(
                f"batch axis {axis} must be equal in query, key and value, or 1; got query {query.shape}, key "
                f"{key.shape} and value {value.shape}. Name it in attention_axes if it is to be attended over."
            )
        batch.append(size)
    lengths = axes.attention_shape(query.shape), axes.attention_shape(key.shape)
    return axes, AttentionShape(tuple(batch), heads, *lengths, (query.shape[-1], key.shape[-1]), dtype)


def compute_dtype(*arrays: Array) -> Any:
    """float64 if any array is float64 (and JAX has it: NumPy's may come where it does not), else float32."""
    wide = any(array.dtype == jnp.float64 for array in arrays)
    return jax.dtypes.canonicalize_dtype(jnp.float64) if wide else jnp.float32


def _layout(query: Any, key: Any) -> str:
    """The likeliest reason of heads that do not fit."""
    if query.ndim == 3:
        return "Arrays of rank 3 are (positions, heads, features): add an axis of one head, query[..., None, :]."
    text = "The layout is (batch, positions, heads, features): if heads come first, swap axes, query.swapaxes(-3, -2)."
    return text if query.shape[-3] != key.shape[-3] else f"{text} Axis -3 is equal in both, as heads would be."


def check_rank(operand: Any, name: str) -> None:
    if operand.ndim < 3:
        raise ValueError(
            f"{name} must have rank 3 or more, (*batch and attention axes, heads, features); got {operand.shape}. Add "
            f"an axis for a single head: {name}[..., None, :]."
        )


def check_bias(value: Any) -> None:
    if value is None:
        return
    if not is_array(value):
        raise TypeError(f"bias must be an array; got {type(value).__name__}. Convert it with jnp.asarray.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"bias must hold real floating-point numbers; got {value.dtype}{list(value.shape)}. A bool array goes to "
            "`mask`."
        )


def check_bias_shape(value: Any, shapes: AttentionShape) -> None:
    if value is not None:
        _axes.check_pairs(value.shape, "bias", shapes)
