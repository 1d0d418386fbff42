"""What becomes of a cache in programs: one compilation, in place, derivatives, half precision, overflow, refusals."""

import dataclasses

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_same
from test_cache import FORMS, HEADS, TOKENS, WINDOW, empty, tokens, whole

import attnlib
from attnlib import KVCache, scores

BATCH = (2,)
HELD = {"plain": dict(), "ragged": dict(ragged=True), "ring": dict(window=WINDOW), "int8": dict(dtype=jnp.int8)}
HELD |= {"ragged ring": dict(window=WINDOW, ragged=True)}
on_every_held = pytest.mark.parametrize("held", HELD)


def at(arrays, *where):
    return [x[..., slice(*where), :, :] for x in arrays]


# One program, in place


@on_every_held
def test_all_steps_are_one_program(held):
    traced = []

    def step(cache, *arrays):
        traced.append(1)
        return cache.decode(*arrays)

    compiled, cache = jax.jit(step, donate_argnums=0), empty(BATCH, **HELD[held])
    for n in range(TOKENS):
        _, cache = compiled(cache, *at(tokens(BATCH), n, n + 1))
    assert len(traced) == 1 and compiled._cache_size() == 1
    assert np.all(np.asarray(cache.length) == TOKENS)


@pytest.mark.measured
@on_every_held
@pytest.mark.parametrize("new", [1, 3])
def test_appending_is_in_place(held, new):
    """The donated arrays are the new ones, and nothing of their size is made besides."""
    cache = KVCache.create((2,), 4096, 2, 16, **HELD[held])
    arrays = jnp.ones((2, new, 2, 16))
    append = jax.jit(lambda cache, key, value: cache.append(key, value), donate_argnums=0)
    memory = append.lower(cache, arrays, arrays).compile().memory_analysis()
    size = cache.key.nbytes + cache.value.nbytes
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 20
    assert append(cache, arrays, arrays).key.shape == cache.key.shape
    assert cache.key.is_deleted() and cache.value.is_deleted()


@pytest.mark.measured
def test_a_step_makes_no_copy_of_the_cache():
    """Nor does it when it attends, and the output does not keep the old arrays alive."""
    cache = KVCache.create((2,), 4096, 2, 16)
    arrays = [jnp.ones((2, 1, heads, 16)) for heads in (4, 2, 2)]
    step = jax.jit(lambda cache, *arrays: cache.decode(*arrays), donate_argnums=0)
    compiled = step.lower(cache, *arrays).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.key.nbytes + cache.value.nbytes
    copies = [line for line in compiled.as_text().splitlines() if "= f32[2,4096,2,16]" in line and " copy(" in line]
    assert not copies


@pytest.mark.measured
def test_a_ring_costs_the_same_however_long_the_sequence():
    """The arrays of a step are those of the window; the prompt's own length is all that prefill adds."""
    cache = jax.eval_shape(lambda: KVCache.create((1,), 64, 2, 16, window=64))
    assert {x.shape for x in jax.tree.leaves(cache)} == {(1, 64, 2, 16), ()}
    new = jax.ShapeDtypeStruct((1, 1, 2, 16), jnp.float32)
    _, after = jax.eval_shape(lambda cache, x: cache.decode(x, x, x), cache, new)
    assert jax.tree.leaves(after) == jax.tree.leaves(cache)
    compiled = jax.jit(lambda cache, x: cache.decode(x, x, x)).lower(cache, new).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2 * 16 * 4 * 8


# A pytree


def test_survives_scan_vmap_and_tree_map():
    arrays = tokens(BATCH)
    expected = whole(*arrays)
    steps = [jnp.moveaxis(x, 1, 0)[:, :, None] for x in arrays]
    scanned = jax.jit(lambda cache, steps: jax.lax.scan(lambda cache, x: cache.decode(*x)[::-1], cache, steps))
    cache, outputs = scanned(empty(BATCH), steps)
    assert_close(jnp.moveaxis(outputs[:, :, 0], 0, 1), expected, length=TOKENS)
    assert int(cache.length) == TOKENS

    single = jax.jit(jax.vmap(lambda cache, *x: cache.decode(*x)))
    outputs, ragged = single(empty(BATCH, ragged=True), *arrays)
    assert_close(outputs, expected, length=TOKENS)
    assert_same(dataclasses.replace(ragged, length=cache.length), cache)

    halved = jax.tree.map(lambda x: x[:1] if x.ndim else x, cache)
    assert halved.batch_shape == (1,) and halved.window is None and halved.capacity == TOKENS


@pytest.mark.parametrize("held", ["int8", "ragged ring"])
def test_survives_flax_serialization(held):
    arrays = tokens(BATCH)
    cache = empty(BATCH, **HELD[held]).append(*at(arrays, 8)[1:])
    restored = flax.serialization.from_bytes(empty(BATCH, **HELD[held]), flax.serialization.to_bytes(cache))
    assert_same(restored, cache)
    last = at(arrays, 8, 9)
    assert_same(restored.decode(*last), cache.decode(*last))
    state = flax.serialization.to_state_dict(cache)
    older = flax.serialization.from_state_dict(cache, {name: state[name] for name in state if name != "num_lost"})
    assert_same(older, cache)


# Derivatives


@pytest.mark.parametrize("form", ["plain", "ring", "ring with room"])
def test_gradients_are_those_of_the_whole(form):
    """By queries, by the tokens of a prompt, by those of a ring that overwrites, by those appended one by one."""
    arrays = tokens(BATCH)
    score = scores.Additive(jnp.ones(4)) if form == "plain" else scores.Dot()  # each kind is costly to compile

    def split(*arrays):
        cache, outputs = empty(BATCH, **FORMS[form]), []
        for bounds in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 11)):
            output, cache = cache.decode(*at(arrays, *bounds), score=score)
            outputs.append(output)
        return jnp.concatenate(outputs, -3)

    def gradients(function):
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(3 * function(*x))), (0, 1, 2)))(*arrays)

    expected = gradients(lambda *x: whole(*x, FORMS[form].get("window"), score=score))
    assert_close(gradients(split), expected, length=TOKENS**2)


def test_gradients_by_what_the_cache_holds():
    query, key, value = tokens(BATCH)
    cache = empty(BATCH, ragged=True, capacity=TOKENS + 3).append(*at((key, value), 8))
    lengths = jnp.array([3, 1])

    def split(query, held_key, held_value, key, value):
        filled = cache.replace(key=held_key, value=held_value)
        return jnp.sum(jnp.sin(filled.decode(query, key, value, lengths)[0]))

    def joined(query, held_key, held_value, key, value):
        key, value = jnp.concatenate([held_key[:, :8], key], 1), jnp.concatenate([held_value[:, :8], value], 1)
        filler = jnp.zeros((2, 8, HEADS, query.shape[-1]))
        output = whole(jnp.concatenate([filler, query], 1), key, value)[:, 8:]
        real = (jnp.arange(3)[None] < lengths[:, None])[..., None, None]
        return jnp.sum(jnp.sin(jnp.where(real, output, 0)))

    operands = (query[:, 8:], cache.key, cache.value, key[:, 8:], value[:, 8:])
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2, 3, 4)))(*operands) for f in (split, joined))
    assert_close(found, expected, length=TOKENS)
    assert not jnp.any(found[1][:, 8:]) and not jnp.any(found[3][1, 1:])


def test_int8_has_no_gradient_by_what_is_stored_and_says_so():
    query, key, value = tokens(BATCH)

    def loss(query, key, stop=False):
        key = jax.lax.stop_gradient(key) if stop else key
        return jnp.sum(empty(BATCH, dtype=jnp.int8).decode(query, key, value)[0] ** 2)

    with pytest.raises(TypeError, match="no derivative through an int8 cache"):
        jax.grad(loss, 1)(query, key)
    by_query, by_key = jax.grad(loss, (0, 1))(query, key, True)
    assert jnp.any(by_query) and not jnp.any(by_key)


# Fewer bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_whole_of_rounded_tokens(dtype):
    """Nothing is lost but what storing loses, for float32 queries in float32; any split rounds the same."""
    query, key, value = tokens(BATCH)
    cache = empty(BATCH, dtype=dtype)
    assert cache.key.dtype == cache.value.dtype == dtype
    rounded = [x.astype(dtype).astype(jnp.float32) for x in (key, value)]
    output, cache = cache.decode(query, key, value)
    assert output.dtype == query.dtype
    assert_close(output, whole(query, *rounded), length=TOKENS)
    low = cache.attend(query.astype(dtype))
    assert low.dtype == dtype
    assert_close(low, whole(query.astype(dtype), *(x.astype(dtype) for x in rounded)), factor=1)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e4])
def test_int8_stores_within_its_bound(magnitude, keys):
    key = keys.normal(2, 9, 3, 16) * magnitude * jnp.exp(keys.normal(2, 9, 3, 1))
    cache = KVCache.create((2,), 9, 3, 16, dtype=jnp.int8).append(key, -key)
    assert cache.key.dtype == cache.value.dtype == jnp.int8
    bound = np.abs(key).max(-1, keepdims=True) / 254 * (1 + 1e-4)  # and the rounding of float32
    for held, scale, given in ((cache.key, cache.key_scale, key), (cache.value, cache.value_scale, -key)):
        error = np.abs(np.asarray(held, np.float32) * np.asarray(scale) - given)
        assert np.all(error <= bound)
        assert np.any(error > bound / 2)  # the bound is not a loose one
        assert np.all(np.abs(held).max(-1) == 127)


def test_int8_attends_within_what_the_bound_implies():
    """Logits are off by at most e = |scale * q|_1 max|k| / 254, so weights by a factor of exp(2 e)."""
    query, key, value = tokens(BATCH)
    output, cache = empty(BATCH, dtype=jnp.int8).decode(query, key, value)
    e = np.abs(query).sum(-1).max() * query.shape[-1] ** -0.5 * np.abs(key).max() / 254
    bound = np.abs(value).max() * (np.expm1(2 * e) + 1 / 254)
    difference = np.abs(output - whole(query, key, value)).max()
    assert 1e-4 < difference < bound
    pairs = (cache.key, cache.key_scale), (cache.value, cache.value_scale)
    unpacked = [np.asarray(held, np.float32) * scale for held, scale in pairs]
    assert_close(output, whole(query, *map(jnp.asarray, unpacked)), length=TOKENS)


def test_int8_keeps_zeros_and_what_is_not_finite():
    bad = jnp.zeros((1, 4, 1, 3)).at[0, 1:, 0, 1].set(jnp.array([jnp.nan, jnp.inf, 1e-42]))
    cache = KVCache.create((1,), 4, 1, 3, dtype=jnp.int8).append(bad, bad)
    output = cache.attend(jnp.ones((1, 4, 1, 3)))
    assert not jnp.any(output[0, 0])
    assert jnp.all(jnp.isnan(output[0, 1:]))


# More than it holds


def test_overflow_is_an_error_where_it_is_known():
    query, key, value = tokens(BATCH)
    cache = empty(BATCH, capacity=6).append(*at((key, value), 5))
    message = "the capacity of the cache is 6 tokens; appending these tokens needs 7"
    with pytest.raises(ValueError, match=message):
        cache.append(*at((key, value), 5, 7))
    with pytest.raises(ValueError, match=message):
        cache.decode(*at((query, key, value), 5, 7))
    with pytest.raises(ValueError, match="needs 7"):
        jax.jit(lambda cache: cache.append(*at((key, value), 7)))(empty(BATCH, capacity=6))
    ragged = empty(BATCH, capacity=6, ragged=True).append(*at((key, value), 5), jnp.array([5, 2]))
    ragged.append(*at((key, value), 5, 9), jnp.array([1, 4]))
    with pytest.raises(ValueError, match="needs 7"):
        ragged.append(*at((key, value), 5, 9), jnp.array([2, 4]))


@pytest.mark.parametrize("ragged", [False, True])
def test_overflow_is_nan_where_it_is_not_known(ragged):
    arrays = tokens(BATCH)
    lengths = jnp.array([5, 2]) if ragged else None
    cache = empty(BATCH, capacity=6, ragged=ragged).append(*at(arrays[1:], 5), lengths)
    options = dict(return_weights=True, return_lse=True)
    results, cache = jax.jit(lambda cache, *x: cache.decode(*x, **options))(cache, *at(arrays, 5, 8))
    for result in (*results, cache.attend(arrays[0][:, -1:])):
        assert jnp.all(jnp.isnan(result[0]))
        assert jnp.all(jnp.isnan(result[1])) != ragged  # the second sequence has 5 tokens of 6
        assert jnp.all(jnp.isfinite(result[1])) or not ragged


# Refusals

TOKEN = jnp.ones((2, 1, 2, 4))
VALUE = jnp.ones((2, 1, 2, 3))
QUERY = jnp.ones((2, 1, 4, 4))


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: empty(2), TypeError, "batch_shape must be a sequence of ints >= 0, (2,) for two sequences; got 2"),
        (lambda: empty((2.5,)), TypeError, "batch_shape must be a sequence of ints"),
        (lambda: empty(BATCH, capacity=0), ValueError, "capacity must be an int >= 1; got 0"),
        (lambda: empty(BATCH, capacity=jnp.ones(3)), TypeError, "capacity must be an int"),
        (lambda: empty(BATCH, dtype="int4"), ValueError, "dtype must be one of float32, bfloat16, float16, int8"),
        (lambda: empty(BATCH, dtype=jnp.float64), ValueError, "got float64"),
        (lambda: empty(BATCH, window=0), ValueError, "window must be an int >= 1 or None; got 0"),
        (lambda: empty(BATCH, window=TOKENS + 1), ValueError, "capacity must be at least the window"),
        (lambda: empty(BATCH, ragged=1), TypeError, "ragged must be True or False"),
        (lambda: empty(BATCH).append(TOKEN.astype(int), VALUE), TypeError, "key must be a floating-point array"),
        (lambda: empty(BATCH).append([1.0], VALUE), TypeError, "key must be a floating-point array; got list"),
        (lambda: empty(BATCH).append(TOKEN[0], VALUE[0]), ValueError, "key must have rank 4 to fit the cache"),
        (lambda: empty(BATCH).append(TOKEN[:1], VALUE), ValueError, "(2, n, 2, 4) to fit the cache; got (1, 1, 2, 4)"),
        (lambda: empty(BATCH).append(TOKEN, TOKEN), ValueError, "value must have shape (*batch, n, heads, features)"),
        (lambda: empty(BATCH).append(QUERY, VALUE), ValueError, "(2, n, 2, 4) to fit the cache; got (2, 1, 4, 4)"),
        (lambda: empty(BATCH).append(TOKEN, VALUE[:, :0]), ValueError, "key, value must have equally many tokens"),
        (lambda: empty(BATCH).decode(QUERY[:, :0], TOKEN, VALUE), ValueError, "query, key, value must have equally"),
        (lambda: empty(BATCH).append(TOKEN, VALUE, jnp.array([1, 0])), ValueError, "create it with ragged=True"),
        (lambda: empty(BATCH, ragged=True).append(TOKEN, VALUE, jnp.ones(2)), TypeError, "lengths must be an integer"),
        (lambda: empty(BATCH, ragged=True).append(TOKEN, VALUE, jnp.array([1])), ValueError, "(*batch) = (2,)"),
        (lambda: empty(BATCH, ragged=True).append(TOKEN, VALUE, jnp.array([2, 0])), ValueError, "must be in 0..1"),
        (lambda: empty(BATCH, ragged=True).append(TOKEN, VALUE, jnp.array([-1, 0])), ValueError, "must be in 0..1"),
        (lambda: empty(BATCH).append(TOKEN, VALUE, attention_axes=(0, 1)), ValueError, "must be one axis"),
        (lambda: empty(BATCH).attend(QUERY, attention_axes=2), ValueError, "attention_axes must name axes among"),
        (lambda: empty(BATCH).attend(QUERY[..., :3]), ValueError, "equally many features"),
        (lambda: empty(BATCH).attend(QUERY[..., :3, :]), ValueError, "multiple of key heads"),
        (lambda: empty(BATCH).attend(QUERY, query_positions=jnp.arange(1)), TypeError, "query_positions cannot be"),
        (lambda: empty(BATCH).attend(QUERY, scale=2.0), TypeError, "score=attnlib.scores.Dot(scale)"),
        (lambda: empty(BATCH).attend(QUERY, colour=1), TypeError, "colour"),
        (lambda: empty(BATCH).attend(QUERY, mask=jnp.ones((1, 3), bool)), ValueError, "mask must broadcast"),
        (lambda: empty(BATCH, window=TOKENS).attend(jnp.ones((2, 2, 4, 4))), ValueError, "at most 1 queries"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong, error, text):
    with pytest.raises(error) as caught:
        wrong()
    assert text in str(caught.value)


def test_traced_lengths_are_brought_into_range():
    cache = empty(BATCH, ragged=True)
    appended = jax.jit(lambda cache, lengths: cache.append(TOKEN, VALUE, lengths))(cache, jnp.array([5, -3]))
    assert appended.length.tolist() == [1, 0]


def test_it_is_public():
    assert attnlib.KVCache is KVCache
