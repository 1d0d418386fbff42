"""Heads side by side with more keys than a chunk: keys that a traced mask leaves out are not read.

The products, the derivatives and the features are those of the cases; here there are several chunks.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_case import Case
from cases import SIDE_BY_SIDE, build, context, derivatives, run, second_derivatives
from conftest import assert_close

import attnlib
from attnlib import masks, modifiers
from attnlib._engine.blockwise import decode
from attnlib._engine.blockwise.implementation import blockwise

KEYS, CHUNK = 640, 64
DECODE = blockwise("decode", "blockwise, decode")
OPERANDS = dict(query=(2, 3, 4, 5), key=(2, KEYS, 2, 5), value=(2, KEYS, 2, 3))


def few_of_many(draw):
    """Some of the first keys and of those of the fourth chunk, which differ from head to head."""
    reach = jnp.array([30, 3, 17, 9], jnp.int32)
    late = masks.Function(lambda batch, head, query, key: abs(key - 210 - query) <= reach[head])
    return late | (masks.Prefix(jnp.array([0, 7])) & masks.KeyPadding(draw.bools(2, KEYS)))


CASES = [
    Case("few of many", **OPERANDS, dtype="float64", bias=(2, 4, 1, KEYS), mask=few_of_many,
         score_mod=lambda draw: modifiers.ALiBi(0.01 * draw(4)), options=dict(dropout_rate=0.3)),
    Case("nothing", **OPERANDS, dtype="float64", mask=lambda draw: masks.Lengths(key=jnp.zeros(2, int))),
    Case("positions of a ring", **OPERANDS, dtype="float64", options=dict(is_causal=True),
         positions=lambda draw: (jnp.arange(400, 403), jnp.where(jnp.arange(KEYS) < 100, jnp.arange(KEYS) + 320, -1))),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(decode, "_CHUNK", 0)  # so that a chunk has as few keys as possible


COMPUTED = []  # one list, since programs that are compiled once write into it


@pytest.fixture
def computed(monkeypatch):
    """Whenever a product of keys is computed: the first key, and the number of keys."""
    attend = decode._attend

    def watched(plan, arrays, index):
        jax.debug.callback(lambda start: COMPUTED.append((int(start), index.sizes[1])), index.starts[1])
        return attend(plan, arrays, index)

    monkeypatch.setattr(decode, "_attend", watched)
    COMPUTED.clear()
    return COMPUTED


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_values_and_derivatives(case):
    case = dataclasses.replace(case, value=(2, KEYS, 2, 4))  # another program than those that are watched
    expected, made = derivatives(case, "reference"), derivatives(case, SIDE_BY_SIDE)
    for name in ("results", "tangent", "gradients"):
        assert_close(made[name], expected[name], length=KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives(case):
    assert_close(second_derivatives(case, SIDE_BY_SIDE), second_derivatives(case, "reference"), length=KEYS, factor=64)


@pytest.mark.parametrize(("case", "chunks"), list(zip(CASES, [{0, 2, 3}, set(), {0, 1}], strict=True)), ids=str)
def test_chunks_that_attend_nothing_are_not_read(case, chunks, computed):
    with context(case):
        operands, traced, options = build(case)
        results = run(operands, traced, options, SIDE_BY_SIDE)
        jax.effects_barrier()
        assert sorted(computed) == [(chunk * CHUNK, CHUNK) for chunk in sorted(chunks)]
        assert_close(results, run(operands, traced, options, "reference"), length=KEYS)


def test_many_keys_have_one_product(computed):
    """Known when the program is compiled, as with a static mask, or when it runs."""
    draw = np.random.default_rng(0)
    query, key, value = (jax.device_put(draw.normal(size=shape).astype(np.float32)) for shape in OPERANDS.values())
    attnlib.dot_product_attention(query, key, value, mask=masks.Causal(300), implementation=DECODE)
    attnlib.dot_product_attention(query, key, value, implementation=DECODE)
    mask = masks.Lengths(key=jnp.array([600, 3]))
    made = attnlib.dot_product_attention(query, key, value, mask=mask, implementation=DECODE)
    jax.effects_barrier()
    assert computed == [(0, KEYS)] * 3
    assert_close(
        made, attnlib.dot_product_attention(query, key, value, mask=mask, implementation="reference"), length=KEYS
    )


@pytest.mark.parametrize("content", [np.nan, np.inf, 1e30])
def test_content_of_chunks_in_use_and_of_others_cannot_matter(content, computed):
    """What is masked may hold anything; what a row attends reaches it."""
    draw = np.random.default_rng(1)
    query, key, value = (jax.device_put(draw.normal(size=shape).astype(np.float32)) for shape in OPERANDS.values())
    lengths = jnp.array([70, 3])
    real = (np.arange(KEYS) < np.array([[70], [3]]))[..., None, None]

    def attend(key, value, implementation):
        mask = masks.Lengths(key=lengths)
        return attnlib.dot_product_attention(query, key, value, mask=mask, implementation=implementation)

    expected = attend(key, value, "reference")
    poisoned = jnp.where(real, key, content), jnp.where(real, value, content)
    assert_close(attend(*poisoned, DECODE), expected, length=KEYS)
    jax.effects_barrier()
    assert sorted(computed) == [(0, CHUNK), (CHUNK, CHUNK)]
    attended = value.at[1, 2].set(np.nan)
    assert_close(attend(key, attended, DECODE), attend(key, attended, "reference"), length=KEYS)


def test_vmap_reads_what_any_entry_attends(computed):
    """A batch has one loop, over the chunks that one of its entries attends, and no branch of the rest."""
    draw = np.random.default_rng(2)
    query, key, value = (
        jax.device_put(draw.normal(size=(3, *shape)).astype(np.float32)) for shape in OPERANDS.values()
    )
    lengths = jnp.array([[5, 60], [0, 1], [200, 64]])

    def one(query, key, value, lengths, implementation=DECODE):
        mask = masks.Lengths(key=lengths)
        return attnlib.dot_product_attention(query, key, value, mask=mask, implementation=implementation)

    made = jax.jit(jax.vmap(one))(query, key, value, lengths)
    jax.effects_barrier()
    assert {start for start, _ in computed} == {0, CHUNK, 2 * CHUNK, 3 * CHUNK}
    program = jax.jit(jax.vmap(one)).lower(query, key, value, lengths).as_text()
    assert re.search("stablehlo.case", program)  # what is not finite, not a select of both
    apart = [one(*x, implementation="reference") for x in zip(query, key, value, lengths, strict=True)]
    assert_close(made, jnp.stack(apart), length=KEYS)


@pytest.mark.devices
def test_shards_have_loops_of_their_own():
    """Each device reads the keys of its own sequences, and the gradient too is that of one device."""
    draw = np.random.default_rng(3)
    shapes = ((4, *shape[1:]) for shape in OPERANDS.values())
    query, key, value = (jax.device_put(draw.normal(size=shape).astype(np.float32)) for shape in shapes)
    lengths = jnp.array([5, 260, 0, 130])

    def loss(query, key, value, lengths, implementation):
        mask = masks.Lengths(key=lengths)
        output = attnlib.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
        return jnp.sum(output**2), output

    def both(*args, implementation):
        return jax.grad(lambda *args: loss(*args, implementation), (0, 1, 2), has_aux=True)(*args)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(lambda *args: both(*args, implementation=DECODE), mesh=mesh, in_specs=spec, out_specs=spec)
    made, expected = jax.jit(sharded)(query, key, value, lengths), both(
        query, key, value, lengths, implementation="reference"
    )  # fmt: skip
    assert_close(made, expected, length=KEYS)
