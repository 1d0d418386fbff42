"""Cache keys of static values: equal keys guarantee equal programs.

JAX caches a compiled program under the treedefs of its arguments and its static values, and compares both with `==`.
`==` holds for values that compute differently: two classes of `jax.tree_util.register_dataclass` with equal fields, `1`
and `True`, `0.0` and `-0.0`. The keys of this module differ for such values. A value with contents that the module
cannot read is compared by identity. A key may therefore miss a cached program, which costs a compilation, but it never
finds a wrong program.
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

# Types for which `==` distinguishes all values of the same type.
_EXACT = frozenset({bool, int, str, bytes, type(None), type(...), type(NotImplemented)})
_PyTreeDef = type(jax.tree.structure(0))


class ObjectKey:
    """The key of an object that is compared by identity."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value  # the reference keeps the id from being reused

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectKey) and other.value is self.value

    def __hash__(self) -> int:
        return object.__hash__(self.value)

    def __repr__(self) -> str:
        return f"ObjectKey({self.value!r})"


def node_types(tree: Any) -> tuple[type, ...]:
    """The classes of the nodes of a pytree or treedef, from the root down."""
    classes: list[type] = []
    pending: list[Any] = [tree if isinstance(tree, _PyTreeDef) else jax.tree.structure(tree)]
    while pending:
        node = pending.pop()
        data = node.node_data()
        if data is not None:
            classes.append(data[0])
            pending.extend(node.children())
    return tuple(classes)


def value_key(value: Any) -> Hashable:
    """The key of a static value."""
    kind: Any = type(value)
    if kind in _EXACT:
        return kind, value
    if isinstance(value, float):  # by its bits: 0.0 differs from -0.0, and NaN equals NaN
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
    if _is_from_jax(kind) and not isinstance(value, type):
        key = _jax_object_key(value)
        if key is not None:
            return key
    if isinstance(value, type) or kind.__eq__ is object.__eq__ or kind.__hash__ is None:
        return ObjectKey(value)
    if dataclasses.is_dataclass(kind):
        return kind, *(value_key(getattr(value, field.name)) for field in dataclasses.fields(kind))
    try:
        hash(value)
    except TypeError:
        return ObjectKey(value)
    return kind, value


def program_key(jaxpr: Any) -> Hashable:
    """The key of a jaxpr: its equations with their parameters and inner jaxprs, by value.

    Functions among the parameters, such as derivative rules and callbacks, are compared by identity.
    """
    numbers: dict[Any, int] = {}

    def variable(var: Any) -> Hashable:
        return numbers.setdefault(var, len(numbers)), var.aval

    def atom(var: Any) -> Hashable:
        return (var.aval, value_key(var.val)) if hasattr(var, "val") else numbers[var]

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
    """The key of a function: its identity, and the plain values that it reads from outside, which may change.

    JAX wraps a user's derivative rule or callback anew in each trace. Such a wrapper has the key of its contents.
    """
    if _is_from_jax(function) and function.__closure__:
        names = function.__code__.co_freevars
        if function.__qualname__.startswith("_memoize."):
            names = tuple(name for name in names if name == "fn")  # the other cells hold cached results
        cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        return function.__code__, *(value_key(_contents(cells[name])) for name in names)
    return ObjectKey(function), *_external_value_keys(function)


def _external_value_keys(function: types.FunctionType) -> Iterator[Hashable]:
    """The keys of the values that a function reads from its closure and its globals."""
    values = [_contents(cell) for cell in function.__closure__ or ()]
    values += [function.__globals__[name] for name in _global_names(function.__code__) if name in function.__globals__]
    for value in values:
        is_plain = type(value) in _EXACT or type(value) in (float, complex, tuple)
        yield value_key(value) if is_plain else ObjectKey(value)


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The global names in a function and in the functions defined inside it."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _global_names(const))
    return (*code.co_names, *inner)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _is_from_jax(function_or_class: Any) -> bool:
    return (function_or_class.__module__ or "").startswith("jax.")


def _jax_object_key(value: Any) -> Hashable:
    """The key of an object of a class that JAX wraps values in, or None for any other class."""
    name = type(value).__name__
    if name == "WrappedFun":  # a function, and the transforms that flatten its arguments and results
        return name, value_key(value.f), value_key(value.transforms), value_key(value.params)
    if name in ("Unhashable", "Hashable", "TypedNdArray"):  # a static argument; a constant
        return name, value_key(value.val)
    if name == "ClosedRule":  # of custom_vmap
        return name, value_key(value.rule)
    if name in ("Store", "EqualStore", "DebugInfo") or isinstance(value, jax.core.Trace):
        return name  # bookkeeping of a trace, which does not change the program
    return None


def _context_key(context: Any) -> Hashable:
    """The key of the settings under which an equation was traced."""
    slots = [name for name in getattr(type(context), "__slots__", ()) if not name.startswith("__")]
    return tuple(value_key(getattr(context, name, None)) for name in slots) or ObjectKey(context)
