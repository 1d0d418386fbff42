"""Calls with `context`: transformations of JAX around them, layers, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnlib
from attnlib import masks, positions, scores

pytestmark = pytest.mark.devices

DEVICES, LENGTH = 4, 24
RING = attnlib.Context("x", exchange="ring")
ZIGZAG = attnlib.Context("x", "zigzag", "ring")


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("x",), axis_types=(kind,), devices=jax.devices()[:DEVICES])


def operands(*lead, length=LENGTH):
    draw = np.random.default_rng(0)
    shapes = (*lead, 2, length, 4, 3), (*lead, 2, length, 2, 3), (*lead, 2, length, 2, 5)
    return tuple(jax.device_put(draw.normal(size=shape).astype(np.float32)) for shape in shapes)


def attend(context, **options):
    return lambda q, k, v: attnlib.dot_product_attention(
        q, k, v, is_causal=True, context=context, attention_axes=-3, **options
    )


def values_and_gradients(function):
    def run(*args):
        return function(*args), jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1, 2))(*args)

    return jax.jit(run)


TRANSFORMS = {
    "vmap": lambda function: jax.vmap(function),
    "remat": lambda function: jax.vmap(jax.checkpoint(function)),
    "scan": lambda function: lambda *args: jax.lax.scan(lambda c, x: (c, jax.checkpoint(function)(*x)), None, args)[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_transformations(transform, inside):
    """Around a call that shards by itself, and inside a `shard_map` of the user's."""
    made, args = TRANSFORMS[transform](attend(RING, block_sizes=(4, 5))), operands(3)
    with jax.set_mesh(mesh_of()):
        if inside:
            spec = P(None, None, "x")
            made = jax.shard_map(made, in_specs=spec, out_specs=spec)
        got = values_and_gradients(made)(*args)
    want = values_and_gradients(jax.vmap(attend(None, implementation="reference")))(*args)
    assert_close(jax.tree.map(np.asarray, got), want, length=LENGTH)


@pytest.mark.parametrize("context", [RING, attnlib.Context("x", exchange="gather"), ZIGZAG], ids=str)
def test_masked_content_does_not_matter(context):
    """NaN in keys that nothing attends reaches no result and no gradient; in one that rows attend, these rows alone."""
    q, k, v = operands()
    order = positions.zigzag(LENGTH, DEVICES) if context.order == "zigzag" else np.arange(LENGTH)
    real = jnp.arange(LENGTH) < 17
    mask = masks.Lengths(key=17)
    poisoned = [jnp.where(real[:, None, None], x, jnp.nan)[:, order] for x in (k, v)]

    def call(q, k, v, context=context, **options):
        return attnlib.dot_product_attention(q, k, v, mask=mask & masks.Causal(), context=context, **options)

    with jax.set_mesh(mesh_of()):
        got = values_and_gradients(call)(q[:, order], *poisoned)
        attended = jax.jit(call)(q[:, order], k.at[:, 20].set(jnp.nan)[:, order], v.at[:, 10].set(jnp.nan)[:, order])
    want = values_and_gradients(lambda *args: call(*args, context=None))(q, k, v)
    assert_close(jax.tree.map(np.asarray, got), jax.tree.map(lambda x: x[:, order], want), length=LENGTH)
    rows = np.isnan(np.asarray(attended)).any((0, 2, 3))
    np.testing.assert_array_equal(rows, order >= 10)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_output_is_sharded_like_the_query(kind):
    q, k, v = operands()
    with jax.set_mesh(mesh_of(kind)):
        placed = [jax.device_put(x, P(None, "x")) for x in (q, k, v)]
        for args in (placed, (q, k, v)):  # on an Explicit mesh, the call shards what is whole
            output, lse = jax.jit(attend(RING, return_lse=True))(*args)
            for result, spec in ((output, P(None, "x")), (lse, P(None, None, "x"))):
                assert result.sharding.is_equivalent_to(NamedSharding(mesh_of(kind), spec), result.ndim)


def test_one_device_needs_no_exchange():
    q, k, v = operands()
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        got = attend(ZIGZAG)(q, k, v)
    np.testing.assert_array_equal(got, attend(None)(q, k, v))


@pytest.mark.parametrize("exchange", ["ring", "gather", "heads", None])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 8), (0, 8), (8, 0)], ids=str)
def test_few_positions(exchange, lengths):
    """With one row on a device, the row of a bias is no row for all devices."""
    draw = np.random.default_rng(0)
    q, k = (jax.device_put(draw.normal(size=(2, length, 4, 3)).astype(np.float32)) for length in lengths)
    bias, mask = (
        jax.device_put(draw.normal(size=(1, 4, *lengths)).astype(np.float32)),
        jax.device_put(draw.random(lengths) < 0.7),
    )
    for given in (bias, bias[:, :, :1]):
        call = functools.partial(attnlib.dot_product_attention, q, k, k, bias=given, mask=mask, is_causal=True)
        with jax.set_mesh(mesh_of()):
            got = call(context=attnlib.Context("x", exchange=exchange))
        np.testing.assert_allclose(np.asarray(got), call(), rtol=0, atol=1e-5)


# Layers.


LAYERS = {
    "rotary": dict(rotary=True, num_kv_heads=2, sliding_window=9),
    "additive, gate": dict(score="additive", use_gate=True, use_sink=True, num_memory=3),
    "buckets": dict(score_mod=attnlib.BucketedPositionBias()),
}


@pytest.mark.parametrize("fields", LAYERS)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_layers_have_positions_in_the_whole_sequence(fields, inside):
    plain = attnlib.MultiHeadAttention(num_heads=4, key_dim=6, **LAYERS[fields])
    layer = plain.clone(context=ZIGZAG)
    x = jax.device_put(np.random.default_rng(0).normal(size=(2, LENGTH, 8)).astype(np.float32))
    real = jnp.arange(LENGTH)[None] < jnp.asarray([[LENGTH], [19]])
    variables = plain.init(jax.random.key(0), x)
    order = positions.zigzag(LENGTH, DEVICES)

    def apply(variables, x, real):
        return layer.apply(variables, x, is_causal=True, key_mask=real)

    with jax.set_mesh(mesh_of()):
        if inside:
            spec = P(None, "x")
            apply = jax.shard_map(apply, in_specs=(P(), spec, spec), out_specs=spec)
        got = jax.jit(apply)(variables, x[:, order], real[:, order])
    want = plain.apply(variables, x, is_causal=True, key_mask=real)
    assert_close(np.asarray(got)[:, positions.inverse_zigzag(LENGTH, DEVICES)], want, length=LENGTH)


def test_axial_rotary_positions_of_a_part():
    plain = attnlib.MultiHeadAttention(num_heads=2, key_dim=8, rotary=True)
    x = jax.device_put(np.random.default_rng(0).normal(size=(2, 8, 3, 8)).astype(np.float32))
    variables = plain.init(jax.random.key(0), x)
    layer = plain.clone(context=RING)
    spec = P(None, "x")
    with jax.set_mesh(mesh_of()):
        mapped = jax.shard_map(lambda v, x: layer.apply(v, x), in_specs=(P(), spec), out_specs=spec)
        got = jax.jit(mapped)(variables, x)
    assert_close(np.asarray(got), plain.apply(variables, x), length=LENGTH)


def test_layers_of_flax():
    x = jax.device_put(np.random.default_rng(0).normal(size=(2, LENGTH, 8)).astype(np.float32))
    attend = functools.partial(attnlib.attention_fn, context="x")
    layer, plain = (nn.MultiHeadDotProductAttention(4, attention_fn=fn) for fn in (attend, attnlib.attention_fn))
    variables, mask = plain.init(jax.random.key(0), x), nn.make_causal_mask(x[..., 0])
    with jax.set_mesh(mesh_of()):
        got = jax.jit(layer.apply)(variables, x, mask=mask)
    assert_close(np.asarray(got), plain.apply(variables, x, mask=mask), length=LENGTH)


def test_nnx_modules():
    """The native module, with the gradients of its parameters, and the linen module in Flax's bridge."""
    x = jax.device_put(np.random.default_rng(0).normal(size=(2, LENGTH, 8)).astype(np.float32))
    native = [attnlib.nnx.MultiHeadAttention(4, 8, context=c, decode=False, rngs=nnx.Rngs(0)) for c in ("x", None)]
    bridged = [nnx.bridge.ToNNX(attnlib.MultiHeadAttention(4, context=c), rngs=nnx.Rngs(0)) for c in ("x", None)]

    def loss(module, x):
        return jnp.sum(jnp.sin(module(x)))

    with jax.set_mesh(mesh_of()):
        got = nnx.value_and_grad(loss)(native[0], x), bridged[0].lazy_init(x)(x)
    want = nnx.value_and_grad(loss)(native[1], x), bridged[1].lazy_init(x)(x)
    assert_close(jax.tree.map(np.asarray, got), want, length=LENGTH * x.shape[-1])


# Errors.


class Loose(scores.Score):
    def __init__(self, table):
        self.table = table

    def block(self, query, key, precision=None):
        return scores.Dot(self.table).block(query, key, precision)


class Padded(masks.Mask):
    def __init__(self, table):
        self.table = table

    def evaluate(self, query, key):
        return key.cut(query.cut(self.table, -2), -1)

    def pad_to(self, query, key, sizes):
        return self


REFUSED = {
    "unknown axis": (dict(context="y"), ["context axis 'y' is unknown", "'x'", "jax.set_mesh"]),
    "length": (dict(context="x", length=26), ["multiple of the 4 devices along 'x'", "got 26", "Pad it to 28"]),
    "length of zigzag": (dict(context=ZIGZAG, length=28), ["twice the 4 devices", "got 28", "Pad it to 32"]),
    "key heads": (dict(context=attnlib.Context("x", exchange="heads")), ["4 devices", "2 key heads"]),
    "weights": (dict(context="x", return_weights=True), ["return_weights=False"]),
    "reference": (dict(context=RING, implementation="reference"), ["it does not support context"]),
    "arrays of a mask": (dict(context=RING, mask=Padded(jnp.ones((LENGTH, LENGTH), bool))), ["Padded", "`entries`"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_refusals(name, inside):
    options, words = REFUSED[name]
    options = dict(options)
    q, k, v = operands(length=options.pop("length", LENGTH))

    def call(q, k, v):
        return attnlib.dot_product_attention(q, k, v, **options)

    if inside and name == "length":
        pytest.skip("parts of equal length cannot be wrong")
    with jax.set_mesh(mesh_of()), pytest.raises(ValueError) as error:
        if inside:
            call = jax.shard_map(call, in_specs=P(None, "x"), out_specs=P(None, "x"))
        call(q, k, v)
    for word in words:
        assert word in str(error.value)


def test_no_mesh():
    with pytest.raises(ValueError, match="there is no current mesh"):
        attend("x")(*operands())


def test_scores_whose_heads_are_unknown():
    q, k, v = operands()
    with jax.set_mesh(mesh_of()), pytest.raises(ValueError, match="class attribute `heads`"):
        attnlib.attention(
            q, jnp.repeat(k, 2, -2), jnp.repeat(v, 2, -2), score=Loose(jnp.ones(4)),
            context=attnlib.Context("x", exchange="heads"),
        )  # fmt: skip


def test_caches_and_inspect_take_no_context():
    x = jnp.ones((2, 8, 8))
    layer = attnlib.MultiHeadAttention(num_heads=2, decode=True, context="x")
    with pytest.raises(ValueError, match="decode=True takes no context"):
        layer.init(jax.random.key(0), x)
    cache = attnlib.KVCache.create((2,), 8, num_kv_heads=2, key_dim=4)
    with pytest.raises(TypeError, match="context cannot be given"):
        cache.attend(jnp.ones((2, 1, 2, 4)), context="x")
    with pytest.raises(TypeError, match="context cannot be given"):
        attnlib.inspect.top_keys(x[..., None], x[..., None], k=1, context="x")


def test_wrong_contexts():
    for made in (dict(order="random"), dict(exchange="mail")):
        with pytest.raises(ValueError, match=next(iter(made))):
            attnlib.Context("x", **made)
    with pytest.raises(TypeError, match="axis_name"):
        attnlib.Context(("x", "y"))
    with pytest.raises(TypeError, match="context must be the name of a mesh axis"):
        attnlib.dot_product_attention(*operands(), context=3)
    for function in (positions.zigzag, positions.inverse_zigzag):
        with pytest.raises(ValueError, match="multiple of twice the devices, 8; got 12"):
            function(12, 4)
