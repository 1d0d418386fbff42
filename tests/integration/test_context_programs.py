"""What is compiled and sent where one sequence is on several devices, and what `explain` says of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnlib
from attnlib import masks, scores
from attnlib._autodiff.linear_map import call_traced_once
from attnlib._core.context import Layout
from attnlib._core.tile_kinds import EMPTY
from attnlib._engine.context.schedule import Schedule

pytestmark = pytest.mark.devices

DEVICES = 8
COLLECTIVES = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def mesh_of(devices=DEVICES, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices])


def operands(length=64, heads=8, kv_heads=8, dtype="float32"):
    draw = np.random.default_rng(0)
    shapes = (2, length, heads, 4), (2, length, kv_heads, 4), (2, length, kv_heads, 6)
    return tuple(jax.device_put(draw.normal(size=shape).astype(dtype)) for shape in shapes)


def collectives(function, *args):
    sharding = NamedSharding(mesh_of(), P(None, "x"))
    args = [jax.device_put(x, sharding) if x.ndim == 4 else x for x in args]
    with jax.set_mesh(mesh_of()):
        text = jax.jit(function).lower(*args).compile().as_text()
    return set(COLLECTIVES.findall(text))


def attend(exchange="ring", order="contiguous", **options):
    options = {"context": attnlib.Context("x", order, exchange), **options}
    return lambda q, k, v: attnlib.dot_product_attention(q, k, v, **options)


def gradient(function):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1, 2))


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_ring_permutes_alone(order):
    assert collectives(gradient(attend(order=order, is_causal=True)), *operands()) == {"collective-permute"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_and_heads_stay_sharded(kind):
    """Over other axes of the mesh, without further collectives."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "x"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, NamedSharding(mesh, P("data", "x", "model"))) for x in operands()]
        compiled = jax.jit(gradient(attend(is_causal=True))).lower(*args).compile()
        made = compiled(*args)
    assert set(COLLECTIVES.findall(compiled.as_text())) == {"collective-permute"}
    for got, want in zip(made, gradient(attend(is_causal=True, context=None))(*operands()), strict=True):
        assert got.sharding.is_equivalent_to(args[0].sharding, 4)
        np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=1e-5)


def test_ring_sums_gradients_of_replicated_parameters():
    def loss(scale, q, k, v):
        return jnp.sum(attend(scale=scale)(q, k, v))

    assert collectives(jax.grad(loss), jnp.ones(8), *operands()) == {"collective-permute", "all-reduce"}


@pytest.mark.parametrize(
    ("exchange", "expected"), [("gather", {"all-gather", "reduce-scatter"}), ("heads", {"all-to-all"})]
)
def test_other_exchanges(exchange, expected):
    found = collectives(gradient(attend(exchange)), *operands())
    # XLA of CPUs may split a reduce-scatter.
    assert found == expected or found == (expected - {"reduce-scatter"}) | {"all-reduce"}


def sent(function, *args):
    """[(shape, dtype)] of what a program permutes, once for each turn."""
    with jax.set_mesh(mesh_of()):
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return list(_permuted(jaxpr, 1))


def _permuted(jaxpr, times):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            aval = equation.invars[0].aval
            yield from [(aval.shape, aval.dtype.name)] * times
        for one in _programs(equation):
            yield from _permuted(one, times * equation.params.get("length", 1))


def _programs(equation):
    if (function := equation.params.get("function")) and "rule" in equation.params:  # of `call_with_rule`
        avals = [atom.aval for atom in equation.invars]
        yield jax.make_jaxpr(lambda *args: call_traced_once(function, *args), axis_env=[("x", DEVICES)])(*avals).jaxpr
    for value in equation.params.values():
        for one in value if isinstance(value, tuple) else (value,):
            inside = getattr(one, "jaxpr", one)
            if hasattr(inside, "eqns"):
                yield inside


def in_shard_map(mask, length, dtype="float32", **options):
    """The program of one device, whose jaxpr shows what is sent."""

    def call(q, k, v):
        return attnlib.dot_product_attention(
            q, k, v, mask=mask, context=attnlib.Context("x", exchange="ring"), block_sizes=(4, 4), **options
        )

    mapped = jax.shard_map(call, in_specs=P(None, "x"), out_specs=P(None, "x"), check_vma=False)
    return mapped, operands(length, dtype=dtype)


def test_ring_sends_each_chunk_once_in_its_own_dtype():
    function, args = in_shard_map(None, 64, "bfloat16")
    shapes = {(2, 8, 8, 4), (2, 8, 8, 6)}
    found = sent(function, *args)
    assert len(found) == 2 * (DEVICES - 1)
    assert {dtype for _, dtype in found} == {"bfloat16"}
    assert {shape for shape, _ in found} == shapes


@pytest.mark.parametrize(
    ("mask", "keys"),
    [
        (masks.SlidingWindow(12, 0), 12),
        (masks.SlidingWindow(8, 4), 12),
        (masks.SlidingWindow(32, 0), 32),
        (masks.SlidingWindow(0, 0), 0),
        (masks.Causal(-128), 0),
    ],
)
def test_windows_send_at_most_their_width(mask, keys):
    function, args = in_shard_map(mask, 128)  # 16 positions on a device
    found = sent(function, *args)
    assert sum(shape[-2] for shape, _ in found if shape[-1] == 4) == keys
    with jax.set_mesh(mesh_of()):
        context = attnlib.Context("x", exchange="ring")
        explanation = attnlib.explain(*args, mask=mask, context=context, block_sizes=(4, 4)).context
    assert explanation.received["ring"] == keys * 2 * 8 * (4 + 6) * 4


def test_gradients_travel_in_float32():
    function, args = in_shard_map(masks.Causal(), 64, "bfloat16")
    with jax.set_mesh(mesh_of()):
        text = jax.jit(gradient(function)).lower(*args).as_text()
    types = re.findall(r"collective_permute.*?-> tensor<[\dx]+x(\w+)>", text)
    assert {"f32", "bf16"} <= set(types)


def test_gradients_are_repeatable():
    function = gradient(attend(order="zigzag", is_causal=True, block_sizes=(3, 3)))
    with jax.set_mesh(mesh_of()):
        first, second = (jax.jit(function)(*operands()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# The critical path.


def schedule(order, length, devices, tile, mask):
    layout = Layout(length, devices, order)
    return Schedule.of(mask, ((length,), (length,)), (layout, layout), tile, implicit=True)


@pytest.mark.parametrize(("order", "least", "most"), [("zigzag", 0.97, 1.0), ("contiguous", 0.53, 0.55)])
def test_critical_path_of_64k_causal(order, least, most):
    x = jax.ShapeDtypeStruct((1, 65536, 8, 64), jnp.float32)
    with jax.set_mesh(mesh_of()):
        explanation = attnlib.explain(x, x, x, is_causal=True, context=attnlib.Context("x", order, "ring"))
    assert least <= explanation.context.balance <= most
    assert f"{explanation.context.balance:.2f}" in str(explanation)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_devices_compute_the_tiles_of_the_schedule(order):
    """A score counts the tiles that each device computes."""
    counts = np.zeros(DEVICES, int)

    def count(device):
        counts[int(device)] += 1
        return np.float32(0)

    class Counted(scores.Score):
        def block(self, query, key, precision=None):
            device = jax.lax.axis_index("x")
            zero = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), device)
            return scores.Dot().block(query, key, precision) + zero

    mask, length, tile = masks.Causal(), 128, (4, 4)

    def call(q, k, v):
        return attnlib.attention(
            q, k, v, score=Counted(), mask=mask, context=attnlib.Context("x", order, "ring"), block_sizes=tile
        )

    with jax.set_mesh(mesh_of()):
        mapped = jax.shard_map(call, in_specs=P(None, "x"), out_specs=P(None, "x"), check_vma=False)
        jax.block_until_ready(jax.jit(mapped)(*operands(length)))
    expected = (schedule(order, length, DEVICES, tile, mask).table != EMPTY).sum((1, 2, 3))
    np.testing.assert_array_equal(counts, expected)
    assert (len(set(expected)) == 1) == (order == "zigzag")


def test_choice_of_the_exchange():
    def chosen(kv_heads, heads=8, **options):
        q = jax.ShapeDtypeStruct((1, 4096, heads, 64), jnp.float32)
        k = jax.ShapeDtypeStruct((1, 4096, kv_heads, 64), jnp.float32)
        with jax.set_mesh(mesh_of()):
            return attnlib.explain(q, k, k, context="x", **options).context.exchange

    assert chosen(8) == "heads"
    assert chosen(4) == "ring"  # eight devices do not divide four heads
    assert chosen(1) == "gather"  # one key head is small beside eight query heads
    assert chosen(8, mask=masks.SlidingWindow(64, 0)) == "ring"
    assert chosen(8, bias=jax.ShapeDtypeStruct((1, 8, 4096, 4096), jnp.float32)) == "ring"


@pytest.mark.parametrize("exchange", ["ring", "gather", "heads"])
def test_explain_names_the_exchange(exchange):
    q, k, v = operands(64, 16, 8)
    with jax.set_mesh(mesh_of()):
        explanation = attnlib.explain(
            q, k, v, is_causal=True, sink=0.5, bias=jnp.ones((2, 16, 64, 1)),
            context=attnlib.Context("x", exchange=exchange),
        )  # fmt: skip
    context = explanation.context
    assert (context.devices, context.exchange) == (DEVICES, exchange)
    assert f"'x' of 8 devices, contiguous, {exchange}" in str(explanation)
    keys = 2 * 64 * 8 * (4 + 6) * 4
    assert context.received["ring"] == context.received["gather"] == keys * 7 // 8
    assert context.received["heads"] == (2 * 64 * 16 * (4 + 6) * 4 + keys) * 7 // 64
    assert explanation.implementation in ("blockwise", "reference")
    assert attnlib.explain(q, k, v).context is None
