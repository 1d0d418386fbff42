"""When two values compute the same: the keys by which programs are kept and found again.

JAX keeps a compiled program under the structure of its arguments and under its static values, and compares both with
`==`. That says "the same" of things which compute differently: of two classes of `jax.tree_util.register_dataclass`
with equal fields, of `1` and `True`, of `0.0` and `-0.0`. A key made here is equal to another one only where nothing
that could tell the two values apart is hidden; what cannot be looked into is compared by identity. So a key may miss a
program that would have served, which costs a compilation, and never finds one that would not.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

# Python's `==` tells values of one of these types apart.
_EXACT = frozenset({bool, int, str, bytes, type(None), type(...), type(NotImplemented)})
_PyTreeDef = type(jax.tree.structure(0))


class Same:
    """A key that is equal for one object alone."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value  # held, so that no other object gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return object.__hash__(self.value)

    def __repr__(self) -> str:
        return f"Same({self.value!r})"


def node_types(tree: Any) -> tuple[type, ...]:
    """The classes of the nodes of a pytree, or of a structure, from the top down."""
    found: list[type] = []
    pending: list[Any] = [tree if isinstance(tree, _PyTreeDef) else jax.tree.structure(tree)]
    while pending:
        node = pending.pop()
        data = node.node_data()
        if data is not None:
            found.append(data[0])
            pending.extend(node.children())
    return tuple(found)


def value_key(value: Any) -> Hashable:
    """A key of a static value: equal for values of one type that cannot be told apart."""
    kind: Any = type(value)
    if kind in _EXACT:
        return kind, value
    if isinstance(value, float):  # by its bits: 0.0 is not -0.0, and a NaN is itself
        return kind, float(value).hex()
    if isinstance(value, complex):
        return kind, value.real.hex(), value.imag.hex()
    if isinstance(value, (tuple, list)):
        return kind, *map(value_key, value)
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(value_key, value))
    if isinstance(value, dict):
        return kind, *((value_key(name), value_key(item)) for name, item in value.items())
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return kind, str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, _PyTreeDef):
        return kind, value, node_types(value)
    if isinstance(value, (ClosedJaxpr, Jaxpr)):
        consts = getattr(value, "consts", ())
        return kind, program_key(getattr(value, "jaxpr", value)), *map(value_key, consts)
    if isinstance(value, types.FunctionType):
        return function_key(value)
    if isinstance(value, functools.partial):
        return kind, value_key(value.func), value_key(value.args), value_key(value.keywords)
    if _is_of_jax(kind) and not isinstance(value, type):
        inside = _key_inside_jax(value)
        if inside is not None:
            return inside
    if isinstance(value, type) or kind.__eq__ is object.__eq__ or kind.__hash__ is None:
        return Same(value)
    if dataclasses.is_dataclass(kind):
        return kind, *(value_key(getattr(value, field.name)) for field in dataclasses.fields(kind))
    try:
        hash(value)
    except TypeError:
        return Same(value)
    return kind, value


def program_key(jaxpr: Any) -> Hashable:
    """A key of a jaxpr: its equations one by one, their parameters by value, inner jaxprs likewise.

    Derivative rules, callbacks and all else that is a function is compared by identity: nothing shows what it does.
    """
    numbers: dict[Any, int] = {}

    def variable(of: Any) -> Hashable:
        return numbers.setdefault(of, len(numbers)), of.aval

    def atom(of: Any) -> Hashable:
        return (of.aval, value_key(of.val)) if hasattr(of, "val") else numbers[of]

    inputs = tuple(map(variable, jaxpr.constvars)), tuple(map(variable, jaxpr.invars))
    equations = tuple(
        (
            equation.primitive,
            tuple(map(atom, equation.invars)),
            tuple((name, value_key(value)) for name, value in sorted(equation.params.items())),
            value_key(equation.effects),
            _context_key(equation.ctx),
            tuple(map(variable, equation.outvars)),
        )
        for equation in jaxpr.eqns
    )
    return inputs, equations, tuple(map(atom, jaxpr.outvars))


def function_key(function: types.FunctionType) -> Hashable:
    """A key of a function: itself, and the plain values that it reads from outside, which may change under it.

    JAX wraps a user's derivative rule and callback anew in each trace: such a wrapper is looked into.
    """
    if _is_of_jax(function) and function.__closure__:
        names = function.__code__.co_freevars
        if function.__qualname__.startswith("_memoize."):
            names = tuple(name for name in names if name == "fn")  # the rest is what it remembers
        cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        return function.__code__, *(value_key(_contents(cells[name])) for name in names)
    return Same(function), *_values_read(function)


def _values_read(function: types.FunctionType) -> Iterator[Hashable]:
    outside = [_contents(cell) for cell in function.__closure__ or ()]
    outside += [function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__]
    for value in outside:
        plain = type(value) in _EXACT or type(value) in (float, complex, tuple)
        yield value_key(value) if plain else Same(value)


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function, and those written inside it, look up outside."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const))
    return (*code.co_names, *inner)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_of_jax(of: Any) -> bool:
    return (of.__module__ or "").startswith("jax.")


def _key_inside_jax(value: Any) -> Hashable:
    """A key of what a wrapper of JAX's holds; None of objects that are not known."""
    name = type(value).__name__
    if name == "WrappedFun":  # a function and how its arguments and results are flattened
        return name, value_key(value.f), value_key(value.transforms), value_key(value.params)
    if name in ("Unhashable", "Hashable", "TypedNdArray"):  # a static argument; a constant
        return name, value_key(value.val)
    if name == "ClosedRule":  # of custom_vmap
        return name, value_key(value.rule)
    if name in ("Store", "EqualStore", "DebugInfo") or isinstance(value, jax.core.Trace):
        return name  # where a trace puts its results, and for whom: no part of the program
    return None


def _context_key(context: Any) -> Hashable:
    """Under which settings an equation was traced."""
    slots = [name for name in getattr(type(context), "__slots__", ()) if not name.startswith("__")]
    return tuple(value_key(getattr(context, name, None)) for name in slots) or Same(context)
