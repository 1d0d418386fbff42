"""What is no case of the table, inside `jax.shard_map` with its check of types and on a mesh with Explicit axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Keys, assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnlib
from attnlib import inspect, masks, modifiers

pytestmark = pytest.mark.devices

DATA, BOTH, WHOLE = P("data"), P("data", None, "model"), P()
TABLE = jnp.asarray(np.arange(7) % 3 != 1)


def sum_of(tree):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(tree))


def with_gradient(function):
    """(the results, the gradients of query, key and value)."""
    return lambda q, k, v, table: (
        function(q, k, v, table),
        jax.grad(lambda *x: sum_of(function(*x, table)), (0, 1, 2))(q, k, v),
    )


def gradient_of_table(function):
    return lambda q, k, v, table: jax.grad(lambda table: sum_of(function(q, k, v, table)))(table)


def attend(q, k, v, table=None, **options):
    return attnlib.dot_product_attention(q, k, v, implementation="blockwise", block_sizes=(3, 4), **options)


def captures(implementation):
    """A score_mod that captures an array, with a derivative rule, calls of jitted functions, a branch and a loop."""

    def function(q, k, v, table):
        def modify(logit, batch, head, i, j):
            logit = jax.nn.relu(logit) + jnp.where(i > j, table[head], jnp.clip(table, 0, 1)[head])
            logit = jax.lax.cond(i == j, lambda: logit, lambda: 0.5 * logit + table[0])
            return jax.lax.fori_loop(0, 2, lambda _, x: x + 0.1 * table[head], logit)

        return attnlib.dot_product_attention(q, k, v, score_mod=modify, implementation=implementation)

    return function


def second_derivative(q, k, v, table):
    """Of a table that the operands and a modifier are made with: reverse over reverse, and forward over reverse."""

    def loss(table):
        return sum_of(attend(q * table[None, None, :, None], k, v, score_mod=modifiers.ALiBi(table), sink=table))

    gradient = jax.grad(loss)
    return jax.grad(lambda table: jnp.sum(gradient(table) ** 2))(table), jax.jvp(gradient, (table,), (table,))[1]


def second_derivative_of_scale(q, k, v, table):
    """Of the scale of additive scores, reverse over reverse. XLA of jax 0.12 is sensitive to how its loops start."""

    def loss(table):
        scale = jnp.linspace(0.1, 0.5, 8) * table[0]
        return sum_of(attnlib.additive_attention(q[:, :, :2], k, v, scale=scale, implementation="blockwise"))

    return jax.grad(lambda table: jnp.sum(jnp.sin(jax.grad(loss)(table))))(table)


def tangent(q, k, v, table):
    return jax.jvp(lambda q, k, v: attend(q, k, v, sink=table, is_causal=True), (q, k, v), (jnp.cos(q), k, v))


def layers_in_turn(q, k, v, table):
    def layer(x, _):
        return jax.checkpoint(lambda x: attend(x, k, k, sink=table))(x), None

    return jax.lax.scan(layer, q, None, length=2)[0]


def inspected(q, k, v, table):
    bias = modifiers.ALiBi(table)
    return (
        inspect.attention_received(q, k, mean=True, is_causal=True),
        inspect.attention_entropy(q, k, score_mod=bias, sink=table),
        inspect.attention_rows(q, k, rows=[1, 4], score_mod=bias),
        inspect.top_keys(q, k, k=2)[0],
    )


def cached(q, k, v, table, **options):
    cache = attnlib.KVCache.create(q.shape[:1], 8, k.shape[-2], 8, **options)
    first, cache = cache.decode(q[:, :4], k[:, :4], v[:, :4])
    cache = cache.append(k[:, 4:5], v[:, 4:5]).append(k[:, :1], v[:, :1]).truncate(5)
    return first, cache.attend(q[:, 4:5], score_mod=modifiers.ALiBi(table))


def cached_in_pages(q, k, v, table):
    """The pool has no batch axis, and the parts of the batch share it."""
    cache = attnlib.PagedKVCache.create(q.shape[0], 8, k.shape[-2], 8, num_pages=9, page_size=4)
    first, cache = cache.decode(q[:, :4], k[:, :4], v[:, :4])
    cache = cache.append(k[:, 4:5], v[:, 4:5])
    return first, cache.attend(q[:, 4:5], score_mod=modifiers.ALiBi(table))


def merged(q, k, v, table):
    output, lse = attend(q, k, v, return_lse=True)
    return attnlib.merge_attention([output, output], [lse, lse])


def module(q, k, v, table):
    layer = attnlib.MultiHeadAttention(
        2, score_mod=attnlib.BucketedPositionBias(), rotary=True, use_sink=True, normalize_qk=True, use_bias=False,
        num_memory=3,
    )  # fmt: skip
    params = layer.init(jax.random.key(0), jnp.ones((1, 5, 8)))
    return jax.grad(lambda scale: sum_of(layer.apply(jax.tree.map(lambda x: x * scale, params), q[:, :, 0])))(table[0])


# (function, whether its results are one array for all devices, as the gradient of a replicated table is)
FUNCTIONS = {
    "captures, reference": (gradient_of_table(captures("reference")), True),
    "captures, blockwise": (gradient_of_table(captures("blockwise")), True),
    "predicate": (lambda q, k, v, _: attend(q, k, v, mask=masks.Predicate(lambda i, j: TABLE[j] | (i > 3))), False),
    "second derivative": (second_derivative, True),
    "second derivative of the scale": (second_derivative_of_scale, True),
    "tangent": (tangent, False),
    "vmap": (with_gradient(lambda q, k, v, table: jax.vmap(attend)(q, k, v)), False),
    "scan of checkpoints": (with_gradient(layers_in_turn), False),
    "inspect": (with_gradient(inspected), False),
    "cache": (with_gradient(cached), False),
    "pages": (with_gradient(cached_in_pages), False),
    "ragged cache": (lambda *x: cached(*x, ragged=True), False),
    "ring": (lambda *x: cached(*x, window=4, dtype=jnp.int8), False),
    "merge": (merged, False),
    "module": (module, True),
}  # fmt: skip


def operands():
    draw = Keys(0).normal
    return draw(4, 5, 4, 8), draw(4, 7, 2, 8), draw(4, 7, 2, 8), draw(4)


def mesh_of(axis_type, *sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, ("data", "model")[: len(sizes)], devices=devices, axis_types=(axis_type,) * len(sizes))


def sharded(name, mode):
    """(the function, its arguments, the mesh)."""
    function, whole = FUNCTIONS[name]
    args = operands()
    if mode == "shard_map":
        specs = (DATA, DATA, DATA, WHOLE)
        mesh = mesh_of(AxisType.Auto, 2)
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=WHOLE if whole else DATA), args, mesh
    spec = DATA if name == "module" else BOTH  # a projection of the module takes all heads
    mesh = mesh_of(AxisType.Explicit, 2, 2)
    specs = (spec, spec, spec, WHOLE)
    return function, [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)], mesh


# What these compile on Explicit axes is in programs of test_sharded_modes.py; by default they are traced.
TRACED = {
    "second derivative", "second derivative of the scale", "tangent", "vmap", "scan of checkpoints", "inspect", "merge",
    "ragged cache", "captures, reference",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TRACED))
def test_types_on_explicit_axes(name):
    function, args, mesh = sharded(name, "explicit")
    with jax.set_mesh(mesh):
        made = jax.eval_shape(function, *args)
    expected = jax.eval_shape(function, *operands())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=[pytest.mark.slow] * (mode == "explicit" and name in TRACED))
        for name in FUNCTIONS
        for mode in ("shard_map", "explicit")
    ],
)
def test_numbers(name, mode):
    function, args, mesh = sharded(name, mode)
    expected = jax.jit(FUNCTIONS[name][0])(*operands())
    with jax.set_mesh(mesh):
        made = jax.jit(function)(*args)
    assert_close(jax.tree.map(np.asarray, made), jax.tree.map(np.asarray, expected), length=32)


def test_eager_calls_on_explicit_axes():
    """With and without a mesh that is set, and with slopes that are sharded too."""
    q, k, v, slopes = operands()
    mesh = mesh_of(AxisType.Explicit, 2, 2)
    expected = attend(q, k, v, score_mod=modifiers.ALiBi(slopes))
    q, k, v = (jax.device_put(x, NamedSharding(mesh, BOTH)) for x in (q, k, v))
    slopes = jax.device_put(slopes, NamedSharding(mesh, P("model")))
    without = attend(q, k, v, score_mod=modifiers.ALiBi(slopes))
    with jax.set_mesh(mesh):
        made = attend(q, k, v, score_mod=modifiers.ALiBi(slopes))
    for output in (made, without):
        assert output.sharding.is_equivalent_to(NamedSharding(mesh, BOTH), output.ndim)
        assert_close(np.asarray(output), np.asarray(expected), length=7)


@pytest.mark.parametrize(
    ("operand", "spec", "text"),
    [
        (
            0,
            P(None, "model"),
            r"query \(4, 8, 4, 8\) is sharded along axis 1, an axis to attend over.*'model'",
        ),
        (1, P("data", "model"), r"key .* axis 1.*jax.reshard\(key, P\('data', None, None, None\)\)"),
        (2, P(None, ("data", "model")), r"value .* axis 1, an axis to attend over"),
        (1, P(None, None, None, "model"), "key .* axis 3, the features"),
    ],
)
def test_sharded_sequences_are_refused(operand, spec, text):
    mesh = mesh_of(AxisType.Explicit, 2, 2)
    with jax.set_mesh(mesh):
        x = [jnp.ones((4, 8, 4, 8))] * 3
        x[operand] = jax.device_put(x[operand], NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match=text):
            attend(*x)
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(jax.grad(lambda x: jnp.sum(attend(*x))), x)


def test_dropout_of_shards():
    """A key that all devices share gives all shards the same pattern; one that each derives, its own."""
    weights = attnlib.dot_product_attention

    def dropped(x, key):
        return weights(x, x, x, dropout_rate=0.5, dropout_rng=key, return_weights=True)[1] == 0

    def with_own_key(x, key):
        return dropped(x, jax.random.fold_in(key, jax.lax.axis_index("data")))

    x, key = jnp.ones((4, 8, 1, 2)), jax.random.key(0)
    specs = dict(mesh=mesh_of(AxisType.Auto, 4), in_specs=(DATA, WHOLE), out_specs=DATA)
    same, different = (jax.jit(jax.shard_map(f, **specs))(x, key) for f in (dropped, with_own_key))
    for shard in range(1, 4):
        assert (same[shard] == same[0]).all()
        assert not (different[shard] == different[0]).all()
    assert (same[:1] == jax.jit(dropped)(x[:1], key)).all()
    assert abs(float(different.mean()) - 0.5) < 0.15
