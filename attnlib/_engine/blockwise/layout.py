"""The layout of an array in memory, pinned where a program is compiled at once.

JAX does not export a layout constraint, because it does not promise that later versions of XLA understand it. The
constraint changes no number, only the speed on a CPU. So the primitive of this module leaves it out of exports.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_pin_layout = Primitive("attnlib_pin_layout")


def pin_layout(array: jax.Array) -> jax.Array:
    """The array in row-major layout; otherwise XLA may choose another layout."""
    result: jax.Array = _pin_layout.bind(array)
    return result


def _row_major(array: Any) -> Any:
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def _lower(context: Any, array: Any) -> Any:
    exporting = context.module_context.lowering_parameters.for_export
    return mlir.lower_fun((lambda array: array) if exporting else _row_major, multiple_results=False)(context, array)


def _batch(args: Any, dims: Any) -> Any:
    return pin_layout(jnp.moveaxis(args[0], dims[0], 0)), 0


_pin_layout.def_impl(_row_major)
_pin_layout.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(_pin_layout, _lower)
ad.deflinear2(_pin_layout, lambda cotangent, array: [pin_layout(cotangent)])
batching.primitive_batchers[_pin_layout] = _batch
