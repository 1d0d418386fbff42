"""Checks of single values that decide a program: sizes, switches, numbers."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def size(value: Any, name: str, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:  # floats, and tracers, whose value is not known
        raise TypeError(f"{name} must be an int, known when the program is compiled; got {value!r}.") from error
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}.")
    return number


def static_bool(value: Any, name: str) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a Python bool, known when the program is compiled; got a traced value. Mark it static "
            f"(jax.jit(..., static_argnames={name!r})) or close over it."
        )
    raise TypeError(f"{name} must be True or False; got {value!r}.")


def static_number(value: Any, name: str) -> float:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a Python number, known when the program is compiled; got a traced value. Mark it static "
            f"(jax.jit(..., static_argnames={name!r})) or close over it."
        )
    try:
        if value is not None and np.ndim(value) == 0 and np.asarray(value).dtype.kind not in "bcmMSU":
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name} must be a number; got {value!r}.")


def positive_number(value: Any, name: str) -> float:
    number = static_number(value, name)
    if not (number > 0.0 and math.isfinite(number)):
        raise ValueError(f"{name} must be a positive finite number; got {number}.")
    return number


def is_number(value: Any) -> bool:
    """Whether it is an array of numbers, or a Python number that JAX can hold."""
    if isinstance(value, int):
        return -(2**31) <= value < 2**31
    if isinstance(value, (float, complex)):
        return True
    if isinstance(value, type) or not hasattr(value, "dtype"):
        return False
    return bool(jnp.issubdtype(value.dtype, jnp.number) or value.dtype == jnp.bool_)
