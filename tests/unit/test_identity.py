"""A compiled program serves only the computation it was compiled for: every identity that the package relies on."""

import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COMPLETE, by_name
from flax import serialization

import attnlib
from attnlib import masks, scores
from attnlib._core.identity import program_key, value_key
from attnlib._core.pytree import Pytree

X, Y = (np.random.default_rng(n).normal(size=(1, 3, 1, 2)).astype(np.float32) for n in range(2))


# Classes


def pytree_classes():
    """Every class of the package whose instances JAX takes apart."""
    found = set()
    for module in pkgutil.walk_packages(attnlib.__path__, "attnlib."):
        if module.name.startswith("attnlib.demo"):
            continue
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if not kind.__module__.startswith("attnlib") or typing.is_typeddict(kind):
                continue
            if jax.tree.structure(instance(kind)).node_data() is not None:
                found.add(kind)
    return sorted(found, key=lambda kind: kind.__qualname__)


def instance(kind, size=None):
    """An instance with an array in each field, or True where it is static; or of `size` fields of a plain class."""
    if issubclass(kind, tuple):
        return kind(*[np.ones(1)] * len(getattr(kind, "_fields", ()))) if hasattr(kind, "_fields") else kind()
    if issubclass(kind, Pytree):
        kind.__new__(kind)  # registers it
    made = object.__new__(kind)
    for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        object.__setattr__(made, field.name, True if field.metadata.get("static") else np.ones(1))
    return made


def test_no_two_classes_have_one_structure():
    structures = {kind: jax.tree.structure(instance(kind)) for kind in pytree_classes()}
    assert {
        scores.Dot,
        masks.Causal,
        attnlib.KVCache,
        attnlib.PagedKVCache,
        attnlib.modifiers.ALiBi,
    } <= structures.keys()
    assert len(structures) > 30
    for (one, a), (other, b) in itertools.combinations(structures.items(), 2):
        assert a != b, f"{one} and {other} have equal structures: register both with attnlib._core.pytree"


def test_a_class_keeps_its_structure():
    for kind in pytree_classes():
        one, other = (jax.tree.structure(instance(kind)) for _ in range(2))
        assert one == other and hash(one) == hash(other), kind
        assert hash(one.node_data()) == hash(other.node_data()), kind


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(scores.Score):
    """A user's score, which nothing registers but its base class."""

    scale: object
    power: int = dataclasses.field(default=1, metadata={"static": True})

    def block(self, query, key, precision=None):
        return self.scale * jnp.einsum("...kgtd,...ksd->...kgts", query, key) ** self.power


class Plain(masks.Mask):
    """A user's mask that is no dataclass."""

    def __init__(self, limit, name):
        self.limit, self.name = limit, name

    def evaluate(self, query, key):
        assert self.name == "plain"
        return key.position < self.limit


def test_a_base_class_registers_its_subclasses():
    leaves, tree = jax.tree.flatten(Scaled(jnp.ones(()), 3))
    assert len(leaves) == 1 and jax.tree.unflatten(tree, leaves).power == 3
    mask = Plain(jnp.int32(2), "plain")
    assert jax.tree.leaves(mask) == [2]
    assert str(inspect.signature(Scaled)) == "(scale: object, power: int = 1) -> None" or "scale" in str(
        inspect.signature(Scaled)
    )
    assert str(inspect.signature(Plain)) == "(limit, name)"
    for implementation in COMPLETE:
        step = jax.jit(
            lambda score, mask, how=implementation: attnlib.attention(
                X, Y, Y, score=score, mask=mask, **by_name(how), return_weights=True
            )[1]
        )
        weights = step(Scaled(jnp.float32(2.0)), mask)
        assert np.all(np.asarray(weights)[..., 2] == 0) and np.allclose(np.asarray(weights).sum(-1), 1)


class Unhashable:
    """Equal to others of its class, as an array may be, and without a hash that would say so."""

    def __eq__(self, other):
        return isinstance(other, Unhashable)

    def __hash__(self):
        raise TypeError("unhashable")

    def __repr__(self):
        return "Unhashable"


def test_equal_static_values_of_two_types_are_told_apart():
    pairs = [
        (1, True), (1, 1.0), (0.0, -0.0), ((1,), (True,)), ("a", b"a"), (jax.tree.structure(0), None),
        (complex(0, 0.0), complex(0, -0.0)), (functools.partial(max, 1), functools.partial(max, True)),
    ]  # fmt: skip
    for one, other in pairs:
        assert value_key(one) != value_key(other), (one, other)
        assert value_key(one) == value_key(one)
    assert value_key(float("nan")) == value_key(float("nan"))
    assert jax.tree.structure(Scaled(1.0, 1)) != jax.tree.structure(Scaled(1.0, True))


def test_an_object_without_a_hash_is_the_same_as_itself_alone():
    one, other = Unhashable(), Unhashable()
    assert value_key(one) == value_key(one) != value_key(other)
    assert repr(value_key(one)) == "ObjectKey(Unhashable)"


def test_a_function_is_another_once_a_variable_that_it_reads_has_a_value():
    def function():
        return later

    before = value_key(function)
    later = 1
    assert value_key(function) != before


def test_a_function_is_known_by_what_it_reads():
    """Who changes a number in one cell of a notebook and runs another one again gets the new number."""
    width = 1

    def near(query, key):
        return key <= query + width

    outputs = []
    for width in (1, 2, 1):  # noqa: B007
        _, weights = attnlib.dot_product_attention(X, Y, Y, mask=masks.Predicate(near), return_weights=True)
        outputs.append(np.asarray(weights)[0, 0, 0] > 0)
    assert [list(row) for row in outputs] == [[True, True, False], [True, True, True], [True, True, False]]


# Many classes, each with numbers of its own, on each way into the engine


def numpy_weights(logits, allowed):
    weights = np.where(allowed, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    return weights / weights.sum(-1, keepdims=True)


def a_score(n):
    """A class with one field, whose logits are its number times the field times the product."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Numbered(scores.Score):
        scale: object

        def block(self, query, key, precision=None):
            return (n / 50) * self.scale * jnp.einsum("...kgtd,...ksd->...kgts", query, key)

    return jax.tree_util.register_dataclass(Numbered) if n % 2 else Numbered


def a_mask(n):
    """A class with one field, that leaves out the pairs whose number is not among the bits of its own."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Numbered(masks.Mask):
        shift: object

        def evaluate(self, query, key):
            pair = query.array_index * 3 + key.array_index + self.shift
            return ((n >> pair) & 1).astype(bool) | (key.array_index == query.array_index)

    return jax.tree_util.register_dataclass(Numbered) if n % 2 else Numbered


def through_attention(**options):
    return attnlib.attention(X, Y, Y, **{"score": scores.Dot(1.0), **options}, return_weights=True)[1][0, 0]


def through_a_module(score="dot", **options):
    layer = attnlib.MultiHeadAttention(num_heads=1, use_bias=False, score=score)
    kernel = jnp.eye(2)
    params = {name: {"kernel": kernel[:, None]} for name in ("query", "key", "value")}
    params["out"] = {"kernel": kernel[None]}
    if score == "dot":  # which divides by the square root of the two features
        params["query"] = {"kernel": kernel[:, None] * 2**0.5}
    return layer.apply({"params": params}, X[:, :, 0], Y[:, :, 0], **options, return_weights=True)[1][0, 0]


def through_a_cache(**options):
    cache = attnlib.KVCache.create((1,), 3, num_kv_heads=1, key_dim=2).append(Y, Y)
    options = {"score": scores.Dot(1.0), **options}
    return cache.attend(X, **options, is_causal=False, return_weights=True)[1][0, 0]


WAYS = dict(attention=through_attention, module=through_a_module, cache=through_a_cache)
# They end in the same jitted function, where 65 classes of each kind meet by default; in the slow tests 200 on each
# way.
many_classes = pytest.mark.parametrize(
    ("way", "count"),
    [
        ("attention", 30), ("module", 20), ("cache", 15),
        *(pytest.param(way, 200, marks=pytest.mark.slow) for way in WAYS),
    ],
)  # fmt: skip


@many_classes
def test_many_scores_give_their_own_numbers(way, count):
    products = X[0, :, 0] @ Y[0, :, 0].T
    for n in range(count):
        made = WAYS[way](score=a_score(n)(jnp.float32(1.5)))
        np.testing.assert_allclose(made, numpy_weights(1.5 * n / 50 * products, True), atol=1e-5, err_msg=str(n))


@many_classes
def test_many_masks_give_their_own_numbers(way, count):
    products = X[0, :, 0] @ Y[0, :, 0].T
    pairs = np.arange(9).reshape(3, 3) + 1
    for n in range(1, count + 1):
        made = WAYS[way](mask=a_mask(n)(jnp.int32(1)))
        allowed = ((n >> pairs) & 1).astype(bool) | np.eye(3, dtype=bool)
        np.testing.assert_allclose(made, numpy_weights(products, allowed), atol=1e-5, err_msg=str(n))


@pytest.mark.parametrize("implementation", COMPLETE)
def test_dot_and_additive_never_meet(implementation):
    """Of one shape, one after the other: the case in which 0.1.0 returned the one's numbers for the other."""
    x, y = (np.random.default_rng(n).normal(size=(1, 2, 3, 2, 4)).astype(np.float32) for n in range(2))
    query, key = (array[0].reshape(6, 2, 4).swapaxes(0, 1) for array in (x, y))
    logits = dict(
        dot=query @ key.swapaxes(1, 2) / 2, additive=np.tanh(query[:, :, None] + key[:, None]).sum(-1)
    )  # fmt: skip
    functions = dict(dot=attnlib.dot_product_attention, additive=attnlib.additive_attention)
    for name, function in functions.items():
        made = function(x, y, y, attention_axes=(1, 2), **by_name(implementation), return_weights=True)[1]
        want = numpy_weights(logits[name], True)
        np.testing.assert_allclose(made.reshape(2, 6, 6), want, atol=1e-5, err_msg=name)


# Functions


def scaled(factor):
    """The identity, whose derivative is a factor: nothing of it shows in the program."""

    @jax.custom_vjp
    def same(y):
        return y

    same.defvjp(lambda y: (y, None), lambda _, g: (g * factor,))
    return same


def tilted(factor):
    """The same with a tangent."""

    @jax.custom_jvp
    def same(y):
        return y

    same.defjvp(lambda primals, tangents: (primals[0], factor * tangents[0]))
    return same


def called_back(factor):
    """A number that only the host knows."""

    def number():
        return np.float32(factor)

    @jax.custom_jvp
    def added(y):
        return y + jax.pure_callback(number, jax.ShapeDtypeStruct((), y.dtype))

    added.defjvp(lambda primals, tangents: (added(*primals), tangents[0]))
    return lambda y: y * added(y)


def by_module(query, function):
    layer = attnlib.MultiHeadAttention(num_heads=1, use_bias=False, score_mod=lambda y, *_: function(y))
    kernel = jnp.eye(2)
    names = ("query", "key", "value")
    params = {**{name: {"kernel": kernel[:, None]} for name in names}, "out": {"kernel": kernel[None]}}
    return layer.apply({"params": params}, query[:, :, 0], Y[:, :, 0])


def by_cache(query, function):
    cache = attnlib.KVCache.create((1,), 3, num_kv_heads=1, key_dim=2).append(Y, Y)
    return cache.attend(query, score_mod=lambda y, *_: function(y))


def by_score_mod(implementation, query, function):
    return attnlib.dot_product_attention(query, Y, Y, score_mod=lambda y, *_: function(y), **by_name(implementation))


def by_custom_score(implementation, query, function):
    table = jnp.ones(2)  # captured

    def fn(q, k):
        return function(jnp.sum(q * k * table))

    return attnlib.attention(query, Y, Y, score=scores.Custom(fn), **by_name(implementation))


PLACES = dict(
    module=by_module,
    cache=by_cache,
    **{f"score_mod, {name}": functools.partial(by_score_mod, name) for name in COMPLETE},
    **{f"Custom, {name}": functools.partial(by_custom_score, name) for name in COMPLETE},
)


@pytest.mark.parametrize("place", PLACES)
def test_a_new_rule_is_a_new_program(place):
    def total(query, function):
        return jnp.sum(PLACES[place](query, function) ** 2)

    once = np.asarray(jax.grad(total)(X, lambda y: y))
    assert np.abs(once).max() > 1e-3
    for factor in (1.0, 10.0, 0.0):
        np.testing.assert_allclose(jax.grad(total)(X, scaled(factor)), factor * once, atol=1e-5)
        tangent = jax.jvp(lambda query, f=factor: total(query, tilted(f)), (X,), (np.ones_like(X),))[1]
        np.testing.assert_allclose(tangent, factor * once.sum(), atol=1e-4)
    values = [float(total(X, called_back(factor))) for factor in (1.0, 10.0, 0.0)]
    assert len(set(np.round(values, 6))) == 3, values


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def powers(y, exponent):
    """Its program is the same for every exponent, its rule is not."""
    return y


powers.defjvp(lambda exponent, primals, tangents: (primals[0], exponent * tangents[0]))


# What the program of a function shows, and what it hides: a pair computes something else.
PAIRS = {
    "vjp rules": [scaled(1.0), scaled(2.0)],
    "jvp rules": [tilted(1.0), tilted(2.0)],
    "callbacks": [called_back(1.0), called_back(2.0)],
    "zeros of two signs": [lambda y: y * 0.0, lambda y: y * -0.0],
    "static arguments of one rule": [lambda y: powers(y, 1.0), lambda y: powers(y, 2.0)],
    "rules inside loops": [
        lambda y: jax.lax.scan(lambda c, _: (RULES[0](c), None), y, None, length=2)[0],
        lambda y: jax.lax.scan(lambda c, _: (RULES[1](c), None), y, None, length=2)[0],
    ],
    "rules inside jit": [jax.jit(lambda y: RULES[0](y)), jax.jit(lambda y: RULES[1](y))],
    "effects": [lambda y: (jax.debug.callback(print, y), y)[1], lambda y: (jax.debug.callback(repr, y), y)[1]],
}
RULES = scaled(1.0), scaled(2.0)

# Each is traced anew in every call, with wrappers of JAX's that are new each time: it is the same program all the same.
SAME = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "a vjp rule": RULES[0],
    "a jvp rule": tilted(1.0),
    "a callback": called_back(1.0),
    "a constant": lambda y: jnp.where(y > 0, y, jnp.nan),
    "a branch": lambda y: jax.lax.cond(y > 0, jax.nn.relu, jnp.sin, y),
    "a loop": lambda y: jax.lax.scan(lambda c, _: (jax.nn.relu(c), None), y, None, length=2)[0],
    "a table": lambda y: y + jnp.arange(3.0)[jnp.int32(y)],
    "random numbers": lambda y: y + jax.random.normal(jax.random.key(0)),
    "a derivative": lambda y: jax.grad(jax.nn.softplus)(y),
    "printing": lambda y: (jax.debug.print("{}", y), y)[1],
}


def key_of(function):
    return program_key(jax.make_jaxpr(lambda y: function(y))(jnp.float32(1.0)).jaxpr)


@pytest.mark.parametrize("name", PAIRS)
def test_programs_that_differ_have_other_keys(name):
    one, other = map(key_of, PAIRS[name])
    assert one != other


@pytest.mark.parametrize("name", SAME)
def test_the_same_function_has_the_same_key(name):
    one, other = (key_of(SAME[name]) for _ in range(2))
    assert one == other and hash(one) == hash(other)


@pytest.mark.parametrize("name", ["gelu", "a vjp rule", "a callback"])
def test_the_same_function_does_not_recompile(name):
    attend = sys.modules["attnlib._engine.call"].attend
    counts = []
    for n in range(3):
        attnlib.dot_product_attention(X * n, Y, Y, score_mod=lambda y, *_: SAME[name](y))  # a new lambda each time
        counts.append(attend._cache_size())
    assert counts[0] == counts[2]


def test_parameters_of_primitives_are_told_apart():
    """Nothing that is always equal stays among them: each parameter of an equation differs from some other's."""
    programs = [
        jax.make_jaxpr(lambda x, f=function: f(x, Y, Y, implementation="blockwise"))(X).jaxpr
        for function in (attnlib.dot_product_attention, attnlib.additive_attention)
    ]
    found = [list(parameters_of_own_primitives(program)) for program in programs]
    assert found[0] and found[1]
    assert value_key(found[0]) == value_key(found[0]) != value_key(found[1])
    for params in itertools.chain(*found):
        assert params.keys() <= {"function", "rule", "linear", "forward", "transpose", "count", "jaxpr"}


def parameters_of_own_primitives(program):
    for equation in program.eqns:
        if equation.primitive.name.startswith("attnlib"):
            yield equation.params
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from parameters_of_own_primitives(inner)


def test_a_cache_of_keys_says_what_a_saved_state_lacks():
    cache = attnlib.KVCache.create((1,), 3, num_kv_heads=1, key_dim=2)
    with pytest.raises(ValueError, match="the state of a KVCache must have key, value, length"):
        serialization.from_state_dict(cache, {"key": cache.key})
