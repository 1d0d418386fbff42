"""Sizes of axes, which may be symbolic (`jax.export.symbolic_shape`).

A program with symbolic sizes is traced once and serves every size. A symbolic size computes like an int, and `==` is
right in the sense of JAX: sizes that may differ are not equal. JAX raises an error for any other comparison whose
answer depends on the numbers. So every comparison of sizes that does not raise an error for the user is made through
this module, and states what holds for every size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

# The oldest supported JAX has the error in `jax.core`.
_errors: Any = jax.errors if hasattr(jax.errors, "InconclusiveDimensionOperation") else jax.core
_Inconclusive: type[Exception] = _errors.InconclusiveDimensionOperation
_REMEDY = (
    "Sizes of this call are symbolic. State what holds for them in "
    "jax.export.symbolic_shape(..., constraints=['n >= 2']), or write numbers."
)


def is_static(*sizes: Any) -> bool:
    """Whether all sizes are numbers."""
    return not any(map(export.is_symbolic_dim, sizes))


def decide(comparison: Callable[[], bool], *, otherwise: bool) -> bool:
    """The answer of a comparison of sizes; `otherwise` if it is not the same for all sizes."""
    try:
        return bool(comparison())
    except _Inconclusive:
        return otherwise


def state_bound(size: Any, minimum: int) -> str:
    """What to write if a symbolic size may be too small."""
    return f"Write jax.export.symbolic_shape(..., constraints=['{size} >= {minimum}']) if that holds."


@contextlib.contextmanager
def explains_symbolic_sizes() -> Iterator[None]:
    """Adds a note on what to write to errors of JAX about a comparison of symbolic sizes."""
    try:
        yield
    except _Inconclusive as error:
        if _REMEDY not in getattr(error, "__notes__", ()):  # an inner function may have added it
            error.add_note(_REMEDY)
        raise


def static_product(sizes: Sequence[int]) -> int:
    """The product of the sizes, where a symbolic size counts as one."""
    return math.prod(size for size in sizes if is_static(size))


def as_scalar(size: int, dtype: Any = np.int32) -> Any:
    """The size as an integer that arrays compute with: of NumPy, or traced if the size is symbolic."""
    return np.dtype(dtype).type(size) if is_static(size) else jnp.asarray(size).astype(dtype)
