"""Checks of single values that decide a program: sizes, switches, numbers."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnlib._words import untraced


def size(value: Any, name: str, least: int) -> int:
    number = _int(value, name, "an int")
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}.")
    return number


def positive(value: Any, name: str) -> int:
    number = _int(value, name, "a positive int")
    if number < 1:
        raise ValueError(f"{name} must be a positive int; got {value!r}.")
    return number


def _int(value: Any, name: str, kind: str) -> int:
    untraced(value, name, kind)
    try:
        if not isinstance(value, (bool, np.bool_)):
            return in_32_bits(operator.index(value), name)
    except TypeError:
        pass
    remedy = f" Write int({name}); `//` divides ints." if isinstance(value, float) else ""
    raise TypeError(f"{name} must be {kind}; got {value!r}.{remedy}")


def in_32_bits(value: int, name: str) -> int:
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} must fit in 32 bits, as positions do; got {value}.")
    return value


def static_bool(value: Any, name: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    untraced(value, name, "a Python bool")
    remedy = f" Write bool({name})." if hasattr(value, "dtype") and np.ndim(value) == 0 else ""
    raise TypeError(f"{name} must be True or False; got {value!r}.{remedy}")


def static_number(value: Any, name: str) -> float:
    untraced(value, name, "a Python number")
    try:
        if value is not None and np.ndim(value) == 0 and np.asarray(value).dtype.kind not in "bcmMSU":
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be a number; got {value!r}.")


def positive_number(value: Any, name: str, otherwise: str = "") -> float:
    number = static_number(value, name)
    if not (number >= 1e-30 and fits(number)):  # NaN too
        remedy = " float32 needs one between 1e-30 and 1e30." if number > 0.0 and math.isfinite(number) else ""
        raise ValueError(f"{name} must be a positive finite number{otherwise}; got {number}.{remedy}")
    return number


def fits(number: float) -> bool:
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
