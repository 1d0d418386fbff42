"""How every class of the package becomes a pytree, and how a function of pytrees is jitted.

JAX holds two classes of `jax.tree_util.register_dataclass` for the same structure where their fields and static values
are equal, and then runs the program of one for the other. Here a structure names its class, and tells static values
apart as `identity.value_key` does. A class that a user registered with JAX is safe too: the key of each program
(`jit`) holds the classes of all that is given.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from flax import serialization

from attnlib._core.identity import node_types, value_key

Kind = TypeVar("Kind", bound=type)


def register(kind: Kind, static: Sequence[str] = ()) -> Kind:
    """Makes a class a pytree; a decorator.

    The children are its fields, those of a dataclass or else all attributes, but for those named in `static` or marked
    with the metadata `static`, and for the plain values that `Pytree` describes where that is the base class.
    """
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    names = [field.name for field in fields]
    fixed = frozenset({*static, *(field.name for field in fields if field.metadata.get("static"))})
    static_types = kind.static_types if issubclass(kind, Pytree) else None

    def flatten(node: Any) -> tuple[list[Any], _Static]:
        layout, values = [], []
        plain: list[tuple[str, Any]] = []
        for name in names or vars(node):
            value = getattr(node, name)
            if name in fixed or (static_types is not None and _is_plain(value, static_types)):
                plain.append((name, value))
            else:
                layout.append(name)
                values.append(value)
        children = tuple(layout)
        foreign = foreign_types(values)
        if plain or foreign:
            return values, _Static(children, tuple(plain), foreign)
        if children not in bare:
            bare[children] = _Static(children, (), ())
        return values, bare[children]

    bare: dict[tuple[str, ...], _Static] = {}  # what is remembered: making it takes longer than all else here

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], _Static]:
        values, static = flatten(node)
        keys = map(jax.tree_util.GetAttrKey, static.children)
        return list(zip(keys, values, strict=True)), static

    def unflatten(static: _Static, children: Iterable[Any]) -> Any:
        node: Any = object.__new__(kind)  # no checks: JAX unflattens with tracers and placeholders
        for name, value in (*zip(static.children, children, strict=True), *static.plain):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
    _safe.add(kind)
    return kind


def register_of_one_kind(kind: Kind) -> Kind:
    """Makes a dataclass a pytree that JAX itself flattens, which is faster; a decorator.

    For a class that stands in no other's place, and whose static values each are of one type, none of them a float
    that may be -0.0 or NaN: JAX tells no more apart.
    """
    jax.tree_util.register_dataclass(kind)
    _children[kind] = operator.attrgetter(*(f.name for f in dataclasses.fields(kind) if not f.metadata.get("static")))
    return kind


_children: dict[type, Callable[[Any], tuple[Any, ...]]] = {}  # of the classes of `register_of_one_kind`
_safe: set[type] = {type(None)}  # leaves that stay leaves, and nodes whose structure names their class


def foreign_types(values: Iterable[Any]) -> tuple[type, ...]:
    """The classes of the nodes inside the values whose structures do not name them, from the top down."""
    found: tuple[type, ...] = ()
    for value in values:
        if type(value) not in _safe:
            if type(value) in _children:
                found += foreign_types(_children[type(value)](value))
            elif not jax.tree_util.all_leaves([value]):
                found += node_types(value)
            elif type(value).__module__.partition(".")[0] in ("builtins", "jax", "jaxlib", "numpy"):
                _safe.add(type(value))
    return found


def serializable(kind: Kind) -> Kind:
    """Lets `flax.serialization` save and restore a registered dataclass, by the names of its fields; a decorator."""
    names = [field.name for field in dataclasses.fields(kind) if not field.metadata.get("static")]

    def to_state(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(node, name)) for name in names}

    def from_state(node: Any, state: dict[str, Any]) -> Any:
        if state.keys() != set(names):
            raise ValueError(f"the state of a {kind.__name__} must have {', '.join(names)}; got {', '.join(state)}.")
        entries = {n: serialization.from_state_dict(getattr(node, n), state[n], name=n) for n in names}
        return dataclasses.replace(node, **entries)

    serialization.register_serialization_state(kind, to_state, from_state)
    return kind


class _Static:
    """The part of a node that is no child; equal to another one only if both are certain to mean the same."""

    __slots__ = ("children", "key", "plain")

    def __init__(self, children: tuple[str, ...], plain: tuple[tuple[str, Any], ...], foreign: tuple[type, ...]):
        self.children, self.plain = children, plain
        self.key = children, foreign, *[value_key(value) for _, value in plain]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.plain)


class _SignatureOfInit:
    """The signature of a class, which `__new__` would hide."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        init: Any = getattr(owner, "__init__")  # noqa: B009 (not a use of an instance's, as mypy takes it for)
        if init is object.__init__:
            return inspect.Signature()
        own, *others = inspect.signature(init).parameters.values()
        del own
        return inspect.Signature(others)


class Pytree:
    """A base class whose subclasses are pytrees without more ado, unless their author registered them with JAX.

    Arrays, numbers and other pytrees are children, and traced; texts, functions, types and what is marked
    `dataclasses.field(metadata={"static": True})` are static.
    """

    static_types: ClassVar[tuple[type, ...]] = ()  # of what else is static
    __signature__: ClassVar[Any] = _SignatureOfInit()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Not when the class is made: decorators, such as those of JAX that register it, come after that.
        if cls not in _seen:
            _seen.add(cls)
            try:
                register(cls)
            except ValueError as error:
                if "Duplicate" not in str(error):
                    raise
        return super().__new__(cls)


_seen: set[type] = set()


def _is_plain(value: Any, static_types: tuple[type, ...]) -> bool:
    if value is None:
        return type(None) in static_types
    if isinstance(value, tuple):
        return bool(static_types) and all(_is_plain(item, static_types) for item in value)
    if isinstance(value, (str, bytes, enum.Enum, type, np.dtype, *static_types)):
        return True
    return callable(value) and jax.tree_util.all_leaves([value])


def jit(function: Callable[..., Any], *, static_argnames: Sequence[str] = ()) -> Callable[..., Any]:
    """`jax.jit` of a function of one tuple, with the classes of what it holds as a part of the key of each program."""

    def keyed(arrays: Any, *args: Any, foreign: tuple[type, ...], **kwargs: Any) -> Any:
        del foreign
        return function(arrays, *args, **kwargs)

    keyed.__name__ = function.__name__
    jitted = jax.jit(keyed, static_argnames=(*static_argnames, "foreign"))

    @functools.wraps(function)
    def call(arrays: Any, *args: Any, **kwargs: Any) -> Any:
        return jitted(arrays, *args, foreign=foreign_types(arrays), **kwargs)

    vars(call).update({name: getattr(jitted, name) for name in ("_cache_size", "clear_cache")})
    return call
