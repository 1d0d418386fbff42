"""Checks of single values that decide a program: sizes, switches, numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape
from attnlib._core.suggestions import require_static


def check_size(value: Any, name: str, least: int) -> int:
    number = _int(value, name, "an int")
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}.")
    return number


def check_positive(value: Any, name: str) -> int:
    number = _int(value, name, "a positive int")
    if number < 1:
        raise ValueError(f"{name} must be a positive int; got {value!r}.")
    return number


def _int(value: Any, name: str, kind: str) -> int:
    require_static(value, name, kind)
    try:
        if not isinstance(value, (bool, np.bool_)):
            return check_32_bits(operator.index(value), name)
    except TypeError:
        pass
    remedy = f" Write int({name}); `//` divides ints." if isinstance(value, float) else ""
    raise TypeError(f"{name} must be {kind}; got {value!r}.{remedy}")


def check_32_bits(value: int, name: str) -> int:
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} must fit in 32 bits, as positions do; got {value}.")
    return value


def check_bool(value: Any, name: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    require_static(value, name, "a Python bool")
    remedy = f" Write bool({name})." if hasattr(value, "dtype") and np.ndim(value) == 0 else ""
    raise TypeError(f"{name} must be True or False; got {value!r}.{remedy}")


def check_number(value: Any, name: str) -> float:
    require_static(value, name, "a Python number")
    try:
        if value is not None and np.ndim(value) == 0 and np.asarray(value).dtype.kind not in "bcmMSU":
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be a number; got {value!r}.")


def check_positive_number(value: Any, name: str, otherwise: str = "") -> float:
    number = check_number(value, name)
    if not (number >= 1e-30 and is_safe_float32(number)):  # NaN too
        remedy = " float32 needs one between 1e-30 and 1e30." if number > 0.0 and math.isfinite(number) else ""
        raise ValueError(f"{name} must be a positive finite number{otherwise}; got {number}.{remedy}")
    return number


def is_safe_float32(number: float) -> bool:
    """Whether it is finite, with room for products, in float32."""
    return abs(number) <= 1e30


def is_number(value: Any) -> bool:
    """Whether it is an array of numbers, or a Python number that JAX can hold."""
    if isinstance(value, int):
        return -(2**31) <= value < 2**31
    if isinstance(value, (float, complex)):
        return True
    if isinstance(value, type) or not hasattr(value, "dtype"):
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.number) or value.dtype == jnp.bool_)


def check_static_int(value: Any, name: str, least: int | None = None) -> int | None:
    """An int or None; anything else is refused, since it decides the program."""
    if value is None:
        return None
    require_static(value, name, "a Python int or None")
    try:
        result = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a Python int or None (it is static); got {value!r}.") from error
    if least is not None and result < least:
        raise ValueError(f"{name} must be at least {least}; got {result}.")
    return check_32_bits(result, name)


def check_static_ints(value: Any, name: str) -> int | tuple[int, ...]:
    """A positive int, or a tuple of them, one for each attention axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    for each in values:
        if each is None or check_static_int(each, name, least=1) is None:
            raise TypeError(f"{name} must be an int or a sequence of ints; got {value!r}.")
    return tuple(map(operator.index, values)) if isinstance(value, Sequence) else operator.index(value)


def check_integer(value: Any, name: str) -> int | Array:
    """A static int, or an integer array, which is traced."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return check_32_bits(int(value), name)
    return check_integer_array(value, name)


def check_integer_array(value: Any, name: str) -> Array:
    value = _as_array(value, name)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers; got {value.dtype}{list(value.shape)}.")
    return value


def check_bool_array(value: Any, name: str) -> Array:
    value = _as_array(value, name)
    if value.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be bool (True = attend); got {value.dtype}{list(value.shape)}. Write `array.astype(bool)` "
            "for a 0/1 array, and pass additive numbers (0 and -inf) as `bias`."
        )
    return value


def _as_array(value: Any, name: str) -> Any:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    if isinstance(value, (Sequence, bool, float)) and not isinstance(value, str):
        return np.asarray(value)
    raise TypeError(f"{name} must be an array; got {type(value).__name__}.")


def check_per_batch(value: Any, name: str, shapes: AttentionShape) -> None:
    """Lengths and offsets are `()` or one for each batch index."""
    shape = np.shape(value) if value is not None else ()
    if shape and not _broadcasts(shape, shapes.batch):
        raise ValueError(f"{name} must be () or one integer for each batch index {shapes.batch}; got shape {shape}.")


def check_positions(array: Any, name: str, batch: tuple[int, ...], positions: tuple[int, ...], side: str) -> None:
    """Arrays of one entry a position are `(*batch, *axes)` or `(*axes,)`."""
    shape = tuple(array.shape)
    lead, tail = shape[: len(shape) - len(positions)], shape[len(shape) - len(positions) :]
    if tail != positions or (lead and not _broadcasts(lead, batch)):
        raise ValueError(
            f"{name} must have shape (*batch, *{side} axes) = {(*batch, *positions)} or {positions}; got {shape}."
        )


def per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """One value for each attention axis."""
    return value if isinstance(value, tuple) else (value,) * axes


def check_per_axis(value: int | tuple[int, ...], name: str, shapes: AttentionShape) -> None:
    """A tuple has one value for each attention axis."""
    axes = len(shapes.key)
    if isinstance(value, tuple) and len(value) != axes:
        raise ValueError(f"{name} must be an int or one int for each of the {axes} attention axes; got {value}.")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) == len(target) and all(size in (1, whole) for size, whole in zip(shape, target, strict=True))


def expand_per_batch(value: int | Array) -> int | Array:
    """Lays a value for each batch index out against a block `(*batch, N, T, S)`, in the dtype of positions."""
    if isinstance(value, int):
        return value
    value, held = jnp.asarray(value), jnp.iinfo(jnp.int32)
    limits = jnp.iinfo(value.dtype)  # of a wider dtype, the largest number is no limit too
    value = jnp.clip(value, max(held.min, limits.min), min(held.max, limits.max)).astype(jnp.int32)
    return value[..., None, None, None] if value.ndim else value


def saturating_add(index: jax.Array, by: int | Array) -> jax.Array:
    """`index + by`, or the largest number of 32 bits where that is beyond it."""
    moved = index + by
    if isinstance(by, int) and by <= 0:
        return moved
    return jnp.where((by > 0) & (moved < index), jnp.iinfo(jnp.int32).max, moved)


def as_at_least_int32(ids: Any) -> Any:
    """Ids, or one, in 32 bits at least, so that those of fewer can be compared with any number."""
    return ids if isinstance(ids, int) or ids.dtype.itemsize >= 4 else jnp.asarray(ids).astype(jnp.int32)
