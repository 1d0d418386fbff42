"""The mesh axes along which arrays inside `jax.shard_map` vary.

The type of such an array names these axes (`jax.typeof(x)`, {V:data}), and JAX requires equal ones wherever it requires
equal shapes. Most operations of JAX cast their operands. The transpose of a cast sums the cotangent over the axes.
Outside of `shard_map` no axis varies, and the functions of this module return their arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

Names = frozenset[str]
_NONE: Names = frozenset()


def varying_axes(*arrays: Any) -> Names:
    """The axes along which at least one of the arrays or avals varies."""
    axes = _NONE
    for array in arrays:
        aval = array.aval if isinstance(array, jax.core.Tracer) else array  # only traced arrays vary
        manual = getattr(aval, "manual_axis_type", None)  # `vma` until jax 0.10
        axes |= getattr(aval, "vma", None) or _NONE if manual is None else manual.varying
    return axes


def cast_to_varying(array: Any, axes: Iterable[str]) -> Any:
    """The array, typed as varying along these axes too."""
    missing = tuple(sorted(set(axes) - varying_axes(array)))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    pvary: Any = getattr(jax.lax, "pvary")  # noqa: B009  (of jax 0.8)
    return pvary(array, missing)


def cast_to_common_axes(arrays: Sequence[Any]) -> Sequence[Any]:
    """The arrays, typed as varying along all axes along which one of them varies."""
    axes = varying_axes(*arrays)
    return [cast_to_varying(array, axes) for array in arrays] if axes else arrays


def type_varying(shape: tuple[int, ...], dtype: Any, weak_type: bool, axes: Names) -> Any:
    """The type of an array that varies along these axes."""
    plain = jax.ShapeDtypeStruct(shape, dtype, weak_type=weak_type)
    return jax.make_jaxpr(lambda x: cast_to_varying(x, axes))(plain).out_avals[0] if axes else plain
