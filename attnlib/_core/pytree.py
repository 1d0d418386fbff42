"""Registration of the package's classes as pytrees, and a `jit` whose cache distinguishes classes.

JAX gives equal treedefs to two classes of `jax.tree_util.register_dataclass` whose fields and static values are equal,
and then runs the program of one class for the other. The treedefs made here contain the class, and compare static
values by `identity.value_key`. For classes that a user registered with JAX, `jit` adds the classes of all arguments to
its cache key.
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
    """A decorator that makes a class a pytree.

    The children are the fields of a dataclass, or all attributes of another class. These are static instead: fields in
    `static`, fields with the metadata `static`, and in a subclass of `Pytree` the plain values described there.
    """
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    names = [field.name for field in fields]
    static_names = frozenset({*static, *(field.name for field in fields if field.metadata.get("static"))})
    static_types = kind.static_types if issubclass(kind, Pytree) else None

    def flatten(node: Any) -> tuple[list[Any], _Static]:
        children, values = [], []
        plain: list[tuple[str, Any]] = []
        for name in names or vars(node):
            value = getattr(node, name)
            if name in static_names or (static_types is not None and _is_plain(value, static_types)):
                plain.append((name, value))
            else:
                children.append(name)
                values.append(value)
        foreign = foreign_types(values)
        if plain or foreign:
            return values, _Static(tuple(children), tuple(plain), foreign)
        return values, without_plain_values(tuple(children))

    without_plain_values = functools.cache(lambda children: _Static(children, (), ()))  # slower than the rest

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], _Static]:
        values, static = flatten(node)
        keys = map(jax.tree_util.GetAttrKey, static.children)
        return list(zip(keys, values, strict=True)), static

    def unflatten(static: _Static, children: Iterable[Any]) -> Any:
        node: Any = object.__new__(kind)  # without checks, because JAX unflattens with tracers and placeholders
        for name, value in (*zip(static.children, children, strict=True), *static.plain):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
    _identified.add(kind)
    return kind


def register_with_jax(kind: Kind) -> Kind:
    """A decorator that makes a dataclass a pytree with JAX's own registration, which flattens faster.

    Use it only if no argument takes objects of another class in place of this class, and if `==` distinguishes the
    static values: each has a single type, and no float is -0.0 or NaN.
    """
    jax.tree_util.register_dataclass(kind)
    _get_children[kind] = operator.attrgetter(
        *(f.name for f in dataclasses.fields(kind) if not f.metadata.get("static"))
    )
    return kind


_get_children: dict[type, Callable[[Any], tuple[Any, ...]]] = {}  # for the classes of `register_with_jax`
_identified: set[type] = {type(None)}  # classes of leaves, and of nodes whose treedef contains the class


def foreign_types(values: Iterable[Any]) -> tuple[type, ...]:
    """The classes of all nodes in the values whose treedefs do not contain their class, from the root down."""
    classes: tuple[type, ...] = ()
    for value in values:
        if type(value) not in _identified:
            if type(value) in _get_children:
                classes += foreign_types(_get_children[type(value)](value))
            elif not jax.tree_util.all_leaves([value]):
                classes += node_types(value)
            elif type(value).__module__.partition(".")[0] in ("builtins", "jax", "jaxlib", "numpy"):
                _identified.add(type(value))
    return classes


def serializable(kind: Kind) -> Kind:
    """A decorator that lets `flax.serialization` save and restore a registered dataclass by field names."""
    names = [field.name for field in dataclasses.fields(kind) if not field.metadata.get("static")]

    def to_state(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(getattr(node, name)) for name in names}

    def from_state(node: Any, state: dict[str, Any]) -> Any:
        # A field that is None may be missing, so that older states stay valid when a class gets an optional field.
        needed = {name for name in names if getattr(node, name) is not None}
        if not needed <= state.keys() <= set(names):
            raise ValueError(f"the state of a {kind.__name__} must have {', '.join(names)}; got {', '.join(state)}.")
        entries = {n: serialization.from_state_dict(getattr(node, n), state[n], name=n) for n in state}
        return dataclasses.replace(node, **entries)

    serialization.register_serialization_state(kind, to_state, from_state)
    return kind


class _Static:
    """The static part of a node. Two of them are equal only if their values and classes are equal."""

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


class SignatureOfInit:
    """The signature of `__init__`, in place of that of `Pytree.__new__` or of a metaclass."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        init: Any = getattr(owner, "__init__")  # noqa: B009 (mypy rejects `owner.__init__`)
        if init is object.__init__:
            return inspect.Signature()
        _, *parameters = inspect.signature(init).parameters.values()  # without self
        return inspect.Signature(parameters)


class Pytree:
    """A base class whose subclasses are pytrees. A subclass may be registered with JAX instead.

    Arrays, numbers and other pytrees are children, which are traced. Strings, functions, types and fields with
    `dataclasses.field(metadata={"static": True})` are static.
    """

    static_types: ClassVar[tuple[type, ...]] = ()  # further types of static values
    __signature__: ClassVar[Any] = SignatureOfInit()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Not in `__init_subclass__`, which runs before the decorators that may register the class with JAX.
        if cls not in _instantiated:
            _instantiated.add(cls)
            try:
                register(cls)
            except ValueError as error:
                if "Duplicate" not in str(error):
                    raise
        return super().__new__(cls)


_instantiated: set[type] = set()


def _is_plain(value: Any, static_types: tuple[type, ...]) -> bool:
    if value is None:
        return type(None) in static_types
    if isinstance(value, tuple):
        return bool(static_types) and all(_is_plain(item, static_types) for item in value)
    if isinstance(value, (str, bytes, enum.Enum, type, np.dtype, *static_types)):
        return True
    return callable(value) and jax.tree_util.all_leaves([value])


def jit(function: Callable[..., Any], *, static_argnames: Sequence[str] = ()) -> Callable[..., Any]:
    """`jax.jit` of a function whose first argument is a tuple. The classes in this tuple are part of the cache key."""

    def with_classes(arrays: Any, *args: Any, foreign: tuple[type, ...], **kwargs: Any) -> Any:
        del foreign
        # The current mesh, set anew: before jax 0.12 the cache of traces distinguishes no mesh, which is the state of
        # a program that sets none, from an empty one, with which JAX differentiates and lowers. All functions inside
        # would be traced twice.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return function(arrays, *args, **kwargs)

    with_classes.__name__ = function.__name__
    jitted = jax.jit(with_classes, static_argnames=(*static_argnames, "foreign"))

    @functools.wraps(function)
    def call(arrays: Any, *args: Any, **kwargs: Any) -> Any:
        return jitted(arrays, *args, foreign=foreign_types(arrays), **kwargs)

    vars(call).update({name: getattr(jitted, name) for name in ("_cache_size", "clear_cache")})
    return call
