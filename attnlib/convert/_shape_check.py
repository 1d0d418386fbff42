"""Whether named arrays have the names and shapes that a layer needs, and one error that says all of what differs.

An expected shape is a tuple of ints and products, such as `("3*N*D", "C")`. A letter stands for one size wherever it
occurs: those that the caller does not give are read off the arrays, in the order in which these are expected. A last
entry `"*O"` stands for one axis or more.
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
    entries: Mapping[str, Any], always: Expected, *together: Expected
) -> dict[str, Sequence[int | str]]:
    """What is expected: `always`, and each group of `together` of which there is a member."""
    expected = dict(always)
    for group in together:
        if any(name in entries for name in group):
            expected |= group
    return expected


def check(entries: Mapping[str, Any], expected: Expected, context: str, *, prefix: str = "", **sizes: int) -> Sizes:
    """The sizes that the letters stand for; raises ValueError with every missing, unexpected and misshapen entry.

    Args:
      entries: the arrays, by name.
      expected: their shapes, by name.
      context: what the error begins with.
      prefix: what the error puts before the names.
      **sizes: sizes of letters that are known.
    """
    solved: Sizes = dict(sizes)
    for name, shape in expected.items():
        if name in entries:
            _infer_sizes(shape, np.shape(entries[name]), solved)
    lines = []
    for name, shape in expected.items():
        want = _substitute(shape, solved)
        if name not in entries:
            lines.append(f"missing: {prefix}{name}, expected {_text(want)}")
        elif np.shape(entries[name]) != want:
            lines.append(f"misshapen: {prefix}{name}, expected {_text(want)}, got {np.shape(entries[name])}")
    unexpected = [name for name in entries if name not in expected]
    lines += [f"unexpected: {prefix}{name}, got {np.shape(entries[name])}" for name in unexpected]
    if not lines and solved.get("N", 0) % max(solved.get("K", 1), 1):
        lines = [f"the {solved['N']} heads of the query are no multiple of the {solved['K']} of key and value"]
    if lines:
        raise ValueError("\n  ".join([f"{context}:", *sorted(lines), *_remedies(expected, unexpected, prefix)]))
    for name, entry in entries.items():
        if not jnp.issubdtype(entry.dtype, jnp.floating):
            raise TypeError(f"{prefix}{name} must hold floating-point numbers; got {entry.dtype}. {context}.")
    return solved


def _remedies(expected: Expected, unexpected: Sequence[str], prefix: str) -> list[str]:
    """What to pass instead, where the names are there but further down."""
    if any(name.startswith("params/") for name in unexpected):
        return ['Pass what is under "params": variables["params"].']
    if "in_proj_weight" not in expected and any(name.endswith("in_proj_weight") for name in unexpected):
        return ["A torch.nn.MultiheadAttention has these names: attnlib.convert.from_torch(state_dict, num_heads)."]
    first = next(iter(expected))
    found = sorted(name.removesuffix(f".{first}") for name in unexpected if name.endswith(f".{first}"))
    return [f"Pass prefix={prefix + name!r}, a layer of these names." for name in found[:1]]


def _infer_sizes(shape: Sequence[int | str], got: tuple[int, ...], sizes: Sizes) -> None:
    """Reads sizes of unknown letters off a shape, where it leaves one choice."""
    fixed = _before_star(shape)
    if len(got) < len(shape) or (len(got) > len(shape) and fixed == len(shape)):
        return
    for dim, size in zip(shape[:fixed], got, strict=False):
        known, unknown = _factors(dim, sizes)
        if len(unknown) == 1 and known and size % known == 0:
            sizes[unknown[0]] = size // known
    if fixed < len(shape):
        sizes.setdefault(str(shape[-1]), got[fixed:])


def _before_star(shape: Sequence[int | str]) -> int:
    return len(shape) - (1 if shape and str(shape[-1]).startswith("*") else 0)


def _factors(dim: int | str, sizes: Sizes) -> tuple[int, list[str]]:
    """(product of what is known, letters that are not) of an int or a product."""
    factors = str(dim).split("*")
    unknown = [factor for factor in factors if not factor.isdigit() and factor not in sizes]
    known = (int(factor) if factor.isdigit() else sizes[factor] for factor in factors if factor not in unknown)
    return math.prod(known), unknown


def _substitute(shape: Sequence[int | str], sizes: Sizes) -> tuple[int | str, ...]:
    """Ints, and text where a letter is not known."""
    dims: list[int | str] = []
    for dim in shape[: _before_star(shape)]:
        known, unknown = _factors(dim, sizes)
        dims.append("*".join([str(known)] * (known != 1) + unknown) if unknown else known)
    if len(dims) < len(shape):
        dims += sizes.get(str(shape[-1]), (str(shape[-1]),))
    return tuple(dims)


def _text(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
