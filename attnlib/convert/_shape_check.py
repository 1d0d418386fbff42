"""A check of the names and shapes of arrays, with one error that lists all differences.

An expected shape is a tuple of ints and products, such as `("3*N*D", "C")`. A letter has one value in all shapes. The
arrays determine the values that the caller does not pass, in the order of the expected entries. A last entry `"*O"`
stands for one or more axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

Expected = Mapping[str, Sequence[int | str]]
Sizes = dict[str, Any]


def expected_entries(
    entries: Mapping[str, Any], required: Expected, *optional: Expected
) -> dict[str, Sequence[int | str]]:
    """The expected entries: `required`, and each optional group with at least one entry."""
    expected = dict(required)
    for group in optional:
        if any(name in entries for name in group):
            expected |= group
    return expected


def check_shapes(
    entries: Mapping[str, Any], expected: Expected, context: str, *, prefix: str = "", **sizes: int
) -> Sizes:
    """The values of the letters; raises ValueError with every missing, unexpected and misshapen entry.

    Args:
      entries: the arrays, by name.
      expected: their shapes, by name.
      context: the beginning of the error.
      prefix: the prefix of names in the error.
      **sizes: values of letters.
    """
    values: Sizes = dict(sizes)
    for name, shape in expected.items():
        if name in entries:
            _infer_sizes(shape, np.shape(entries[name]), values)
    lines = []
    for name, shape in expected.items():
        target = _substitute(shape, values)
        if name not in entries:
            lines.append(f"missing: {prefix}{name}, expected {_format_shape(target)}")
        elif np.shape(entries[name]) != target:
            lines.append(f"misshapen: {prefix}{name}, expected {_format_shape(target)}, got {np.shape(entries[name])}")
    unexpected = [name for name in entries if name not in expected]
    lines += [f"unexpected: {prefix}{name}, got {np.shape(entries[name])}" for name in unexpected]
    if not lines and values.get("N", 0) % max(values.get("K", 1), 1):
        lines = [f"the {values['N']} query heads are not a multiple of the {values['K']} heads of key and value"]
    if lines:
        raise ValueError("\n  ".join([f"{context}:", *sorted(lines), *_remedies(expected, unexpected, prefix)]))
    for name, entry in entries.items():
        if not jnp.issubdtype(entry.dtype, jnp.floating):
            raise TypeError(f"{prefix}{name} must hold floating-point numbers; got {entry.dtype}. {context}.")
    return values


def _remedies(expected: Expected, unexpected: Sequence[str], prefix: str) -> list[str]:
    """The remedy, if the entries have a common prefix or belong to another library."""
    if any(name.startswith("params/") for name in unexpected):
        return ['Pass what is under "params": variables["params"].']
    if "in_proj_weight" not in expected and any(name.endswith("in_proj_weight") for name in unexpected):
        return ["A torch.nn.MultiheadAttention has these names: use attnlib.convert.from_torch(state_dict, num_heads)."]
    first = next(iter(expected))
    prefixes = sorted(name.removesuffix(f".{first}") for name in unexpected if name.endswith(f".{first}"))
    return [f"Pass prefix={prefix + name!r}, a layer with these names." for name in prefixes[:1]]


def _infer_sizes(expected: Sequence[int | str], shape: tuple[int, ...], sizes: Sizes) -> None:
    """Adds the values of letters that a shape determines."""
    num_fixed = _num_fixed_axes(expected)
    if len(shape) < len(expected) or (len(shape) > len(expected) and num_fixed == len(expected)):
        return
    for dim, size in zip(expected[:num_fixed], shape, strict=False):
        product, unknown = _factors(dim, sizes)
        if len(unknown) == 1 and product and size % product == 0:
            sizes[unknown[0]] = size // product
    if num_fixed < len(expected):
        sizes.setdefault(str(expected[-1]), shape[num_fixed:])


def _num_fixed_axes(shape: Sequence[int | str]) -> int:
    return len(shape) - (1 if shape and str(shape[-1]).startswith("*") else 0)


def _factors(dim: int | str, sizes: Sizes) -> tuple[int, list[str]]:
    """(product of the factors with a value, letters without a value) of an int or a product."""
    factors = str(dim).split("*")
    unknown = [factor for factor in factors if not factor.isdigit() and factor not in sizes]
    values = (int(factor) if factor.isdigit() else sizes[factor] for factor in factors if factor not in unknown)
    return math.prod(values), unknown


def _substitute(shape: Sequence[int | str], sizes: Sizes) -> tuple[int | str, ...]:
    """The shape with values in place of letters; a product with an unknown letter remains text."""
    dims: list[int | str] = []
    for dim in shape[: _num_fixed_axes(shape)]:
        product, unknown = _factors(dim, sizes)
        dims.append("*".join([str(product)] * (product != 1) + unknown) if unknown else product)
    if len(dims) < len(shape):
        dims += sizes.get(str(shape[-1]), (str(shape[-1]),))
    return tuple(dims)


def _format_shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
