"""Checks of arguments. Each error names the argument, what it must be, what was passed, and what to write."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np

from attnlib._core.array_types import Array
from attnlib._core.axes import AttentionShape, align_ranks, broadcasts
from attnlib._core.sizes import is_static
from attnlib._core.suggestions import require_static, require_static_flag

T = TypeVar("T")

# Each kind of array: its name in errors, its dtypes, and the dtype that a remedy converts to.
_KINDS: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "floating": ("a floating-point array", (jnp.floating,), "jnp.float32"),
    "integer": ("an integer array", (jnp.integer,), "jnp.int32"),
    "real": ("an array of real numbers", (jnp.floating, jnp.integer), "jnp.float32"),
    "bool": ("a bool array", (jnp.bool_,), "bool"),
}


def is_array(value: Any) -> bool:
    types = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return isinstance(value, types) or hasattr(value, "__jax_array__")


def check_array(
    value: Any,
    name: str,
    *,
    kind: Literal["floating", "integer", "real", "bool"],
    shapes: Sequence[tuple[int, ...]] = (),
    optional: bool = False,
    convert: tuple[type, ...] = (),
    remedy: str = "",
) -> Any:
    """An array of this kind and, if there are `shapes`, of one of these shapes.

    Args:
      optional: whether None passes.
      convert: Python types whose values become NumPy arrays. Text never does.
      remedy: what to write for an array of another dtype; default: a conversion.
    """
    if value is None and optional:
        return None
    if isinstance(value, convert) and not isinstance(value, str):
        value = np.asarray(value)
    if not (is_array(value) and _has_kind(value.dtype, kind)):
        number = "a number" if float in convert else "an int" if int in convert else ""
        expected = _either(number, _KINDS[kind][0], "None" * optional)
        argument, dtype = name.split()[-1], _KINDS[kind][2]
        if is_array(value):
            received = f"{value.dtype}{list(value.shape)}"
            if jnp.issubdtype(value.dtype, jnp.complexfloating):  # a conversion would drop the imaginary part
                remedy = f"Join its parts as features: jnp.concatenate([{argument}.real, {argument}.imag], -1)."
            remedy = remedy or f"Write {argument}.astype({dtype})."
        else:
            received, remedy = type(value).__name__, f"Write jnp.asarray({argument}, {dtype})."
        raise TypeError(f"{name} must be {expected}; got {received}. {remedy}")
    if shapes and value.shape not in shapes:
        raise ValueError(f"{name} must have shape {_either(*map(str, shapes))}; got {value.shape}.")
    return value


@functools.cache
def _has_kind(dtype: Any, kind: str) -> bool:
    return any(jnp.issubdtype(dtype, allowed) for allowed in _KINDS[kind][1])


def check_integer(value: Any, name: str, *, optional: bool = False) -> Any:
    """A static int, or an integer array, which may be traced."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return check_int(value, name)
    return check_array(value, name, kind="integer", optional=optional, convert=(int, Sequence))


@overload
def check_int(value: Any, name: str, *, minimum: int | None = None, optional: Literal[False] = False) -> int: ...
@overload
def check_int(value: Any, name: str, *, minimum: int | None = None, optional: Literal[True]) -> int | None: ...
def check_int(value: Any, name: str, *, minimum: int | None = None, optional: bool = False) -> int | None:
    """A static int of 32 bits, like positions. None passes if `optional`."""
    if value is None and optional:
        return None
    if type(value) is int and (-(2**31) if minimum is None else minimum) <= value < 2**31:
        return value  # before the text for errors is made
    expected = _either(f"an int{_bound(minimum)}", "None" * optional)
    require_static(value, name, expected)
    return _int(value, name, minimum, expected, value)


def check_ints(
    value: Any, name: str, *, expected: str, minimum: int | None = None, symbolic: bool = False
) -> tuple[int, ...]:
    """A sequence of static ints as a tuple; symbolic sizes pass if `symbolic`."""
    if not _is_sequence(value):
        require_static(value, name, expected)
        raise TypeError(f"{name} must be {expected}; got {value!r}.")
    if symbolic and not is_static(*value):
        return tuple(entry if not is_static(entry) else _int(entry, name, minimum, expected, value) for entry in value)
    require_static(value, name, expected)
    return tuple(_int(entry, name, minimum, expected, value) for entry in value)


def check_int_or_ints(
    value: Any, name: str, *, minimum: int | None = None, expected: str = "", symbolic: bool = False
) -> int | tuple[int, ...]:
    """A static int, or a sequence of static ints as a tuple; symbolic sizes pass if `symbolic`."""
    expected = expected or f"an int{_bound(minimum)} or a sequence of ints{_bound(minimum)}"
    if _is_sequence(value):
        return check_ints(value, name, expected=expected, minimum=minimum, symbolic=symbolic)
    if symbolic and not is_static(value):
        return cast(int, value)
    require_static(value, name, expected)
    return _int(value, name, minimum, expected, value)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _int(value: Any, name: str, minimum: int | None, expected: str, received: Any) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        remedy = f" Write int({name.split()[-1]}); `//` divides ints." if isinstance(value, float) else ""
        raise TypeError(f"{name} must be {expected}; got {received!r}.{remedy}")
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be {expected}; got {received!r}.")
    if not -(2**31) <= number < 2**31:
        raise ValueError(f"{name} must fit in 32 bits, as positions do; got {received!r}.")
    return number


def _bound(minimum: int | None) -> str:
    return "" if minimum is None else f" >= {minimum}"


def _either(*names: str) -> str:
    """The names that are not empty, as "a, b or c"."""
    *others, last = filter(None, names)
    return f"{', '.join(others)} or {last}" if others else last


def check_bool(value: Any, name: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    require_static_flag(value, name)
    remedy = f" Write bool({name})." if hasattr(value, "dtype") and np.ndim(value) == 0 else ""
    raise TypeError(f"{name} must be True or False; got {value!r}.{remedy}")


@overload
def check_number(value: Any, name: str, *, positive: bool = False, optional: Literal[False] = False) -> float: ...
@overload
def check_number(value: Any, name: str, *, positive: bool = False, optional: Literal[True]) -> float | None: ...
def check_number(value: Any, name: str, *, positive: bool = False, optional: bool = False) -> float | None:
    """A static number as a float, in [1e-30, 1e30] if `positive`. None passes if `optional`."""
    if value is None and optional:
        return None
    if type(value) is float and (not positive or 1e-30 <= value <= 1e30):
        return value
    expected = _either("a number in [1e-30, 1e30]" if positive else "a number", "None" * optional)
    require_static(value, name, expected)
    try:
        is_real = np.ndim(value) == 0 and np.asarray(value).dtype.kind not in "bcmMSU"
        number = float(value) if is_real else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        raise TypeError(f"{name} must be {expected}; got {value!r}.")
    if positive and not 1e-30 <= number <= 1e30:  # NaN too
        raise ValueError(f"{name} must be {expected}; got {number}.")
    return number


def is_safe_float32(number: float) -> bool:
    """Whether the number is finite in float32, with a margin for products."""
    return abs(number) <= 1e30


def check_per_batch(value: Any, name: str, shapes: AttentionShape) -> None:
    """Raises ValueError unless lengths or offsets are `()` or broadcast to the batch axes."""
    shape = np.shape(value) if value is not None else ()
    if len(shape) not in (0, len(shapes.batch)) or not broadcasts(shape, shapes.batch):
        raise ValueError(f"{name} must be () or one integer for each batch index {shapes.batch}; got shape {shape}.")


def check_per_head(value: Any, name: str, shapes: AttentionShape) -> None:
    """Raises ValueError unless a number is `()` or one for each query head."""
    if value is not None and np.shape(value) not in ((), (shapes.heads,)):
        raise ValueError(
            f"{name} must be () or one integer for each of the {shapes.heads} query heads; got shape {np.shape(value)}."
        )


def check_positions(array: Any, name: str, batch: tuple[int, ...], positions: tuple[int, ...], side: str) -> None:
    """Raises ValueError unless an array of one entry a position is `(*batch, *axes)` or `(*axes,)`."""
    shape = tuple(array.shape)
    split = len(shape) - len(positions)
    if shape[split:] != positions or split not in (0, len(batch)) or not broadcasts(shape[:split], batch):
        raise ValueError(
            f"{name} must have shape (*batch, *{side} axes) = {(*batch, *positions)} or {positions}; got {shape}."
        )


def per_axis(value: T | tuple[T, ...], axes: int) -> tuple[T, ...]:
    """The values of the attention axes: a tuple as it is, an int or a text repeated."""
    return value if isinstance(value, tuple) else (value,) * axes


def check_per_axis(value: Any, name: str, shapes: AttentionShape) -> None:
    """Raises ValueError unless a tuple has one value for each attention axis."""
    axes = len(shapes.key)
    if isinstance(value, tuple) and len(value) != axes:
        kind = "a string or one string" if value and isinstance(value[0], str) else "an int or one int"
        raise ValueError(f"{name} must be {kind} for each of the {axes} attention axes; got {value}.")


def expand_per_batch(value: int | Array) -> int | Array:
    """A value for each batch index as int32, broadcastable to a block `(*batch, N, T, S)`. An int stays."""
    if isinstance(value, int):
        return value
    value = _as_int32(value, jnp.iinfo(jnp.int32).min)
    return value[..., None, None, None] if value.ndim else value


def expand_per_head(value: int | Array) -> int | Array:
    """A value for each query head as int32, broadcastable to a block `(*batch, N, T, S)`. An int stays."""
    if isinstance(value, int):
        return value
    value = _as_int32(value, -jnp.iinfo(jnp.int32).max)  # so that it has a negative
    return value[..., None, None] if value.ndim else value


def _as_int32(value: Array, least: int) -> jax.Array:
    """The numbers as int32. One beyond int32 means "no limit", so it is clipped and does not wrap around."""
    value = jnp.asarray(value)
    limits = jnp.iinfo(value.dtype)
    return jnp.clip(value, max(least, limits.min), min(jnp.iinfo(jnp.int32).max, limits.max)).astype(jnp.int32)


def saturating_add(index: jax.Array, by: int | Array) -> jax.Array:
    """`index + by`, or the largest int32 where the sum overflows."""
    index, by = align_ranks(index, by)
    total = index + by
    if isinstance(by, int) and by <= 0:
        return total
    return jnp.where((by > 0) & (total < index), jnp.iinfo(jnp.int32).max, total)


def as_at_least_int32(ids: Any) -> Any:
    """Ids in 32 bits or more. Ids of fewer bits could not be compared with every int."""
    return ids if isinstance(ids, int) or ids.dtype.itemsize >= 4 else jnp.asarray(ids).astype(jnp.int32)
