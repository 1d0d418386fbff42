"""Tokens of a cache are forgotten, and sequences are selected: what follows is as if they had never been there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_model import RingModel, attend, random_tokens
from conftest import assert_close, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused

import attnlib
from attnlib import KVCache, masks

BATCH, TOKENS, HEADS, KV_HEADS, FEATURES, VALUE_FEATURES = 3, 9, 4, 2, 4, 3
DTYPES = ("float32", "bfloat16", "int8")


def tokens(keys, batch=BATCH, count=TOKENS):
    shapes = (HEADS, FEATURES), (KV_HEADS, FEATURES), (KV_HEADS, VALUE_FEATURES)
    # NumPy's: JAX compiles a program for each slice that a test takes.
    return [np.asarray(keys.normal(batch, count, *shape)) for shape in shapes]


def empty(batch=BATCH, capacity=TOKENS, **options):
    return KVCache.create((batch,), capacity, KV_HEADS, FEATURES, value_dim=VALUE_FEATURES, **options)


@jax.jit
def decode(cache, lengths, *arrays):
    return cache.decode(*arrays, lengths)


def cut(arrays, *place):
    return [x[:, slice(*place)] for x in arrays]


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_truncate_the_forgotten_tokens_do_not_matter(dtype, keys):
    """Six tokens, the last four of them wrong, even NaN: cut back to two, then the right ones."""
    right, wrong = tokens(keys), [jnp.full_like(x, jnp.nan) for x in tokens(keys)]
    cache = empty(dtype=dtype)
    _, two = decode(cache, None, *cut(right, 0, 2))
    _, six = decode(two, None, *cut(wrong, 0, 4))
    back = jax.jit(KVCache.truncate)(six, 2)
    assert back.length == 2
    made, after = decode(back, None, *cut(right, 2, TOKENS))
    expected, same = decode(two, None, *cut(right, 2, TOKENS))
    assert_same((made, after), (expected, same))


def test_a_ragged_cache_truncates_each_sequence(keys):
    """Also back to nothing, and not at all where there are fewer tokens."""
    arrays = tokens(keys)
    cache = empty(ragged=True).append(*cut(arrays[1:], 0, 6), jnp.array([6, 4, 2]))
    back = cache.truncate(jnp.array([3, 0, 5]))
    assert back.length.tolist() == [3, 0, 2]
    assert cache.truncate(3).length.tolist() == [3, 3, 2]
    next_tokens = [jnp.stack([x[0, 3:6], x[1, 0:3], x[2, 2:5]]) for x in arrays]
    made, _ = decode(back, jnp.array([3, 3, 3]), *next_tokens)
    whole = attnlib.dot_product_attention(*arrays, is_causal=True)
    assert_close(made, jnp.stack([whole[0, 3:6], whole[1, 0:3], whole[2, 2:5]]), length=TOKENS)


def test_tokens_beyond_the_capacity_stay_refused(keys):
    """Under jit they may have overwritten others: NaN, until all tokens are forgotten."""
    arrays = tokens(keys)
    _, cache = decode(empty(capacity=6), None, *cut(arrays, 0, 4))
    _, cache = decode(cache, None, *cut(arrays, 4, 8))
    assert np.all(np.isnan(decode(cache.truncate(3), None, *cut(arrays, 3, 4))[0]))
    made, _ = decode(cache.truncate(0), None, *cut(arrays, 0, 1))
    assert_close(made, attnlib.dot_product_attention(*cut(arrays, 0, 1)), length=2)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selected_sequences_go_on_as_they_would(dtype, ragged, keys):
    arrays = tokens(keys)
    lengths = jnp.array([5, 3, 4]) if ragged else None
    cache = empty(dtype=dtype, ragged=ragged).append(*cut(arrays[1:], 0, 5), lengths)
    indices = jnp.array([2, 0, 0, 1])
    chosen = jax.jit(KVCache.select)(cache, indices)
    made, after = decode(chosen, None, *(x[indices] for x in cut(arrays, 5, 7)))
    expected, whole = decode(cache, None, *cut(arrays, 5, 7))
    assert_close(made, expected[indices], length=TOKENS)
    assert after.batch_shape == (4,) and after.key.dtype == cache.key.dtype
    assert_same(after.length, whole.length[indices] if ragged else whole.length)


def test_select_keeps_a_ring_and_other_batch_axes(keys):
    arrays = [keys.normal(3, 2, 7, *x.shape[2:]) for x in tokens(keys)]
    cache = KVCache.create((3, 2), 4, KV_HEADS, FEATURES, value_dim=VALUE_FEATURES, window=3)
    _, cache = cache.decode(*(x[:, :, :5] for x in arrays))
    chosen = cache.select(jnp.array([1, 1]))
    assert chosen.window == 3 and chosen.batch_shape == (2, 2)
    made, _ = chosen.decode(*(x[jnp.array([1, 1]), :, 5:] for x in arrays))
    expected, _ = cache.decode(*(x[:, :, 5:] for x in arrays))
    assert_close(made, expected[jnp.array([1, 1])], length=TOKENS)


@pytest.mark.parametrize("ragged", [False, True])
def test_an_index_beyond_the_batch_gives_nan(ragged, keys):
    arrays = tokens(keys)
    cache = empty(ragged=ragged).append(*cut(arrays[1:], 0, 2))
    chosen = jax.jit(KVCache.select)(cache, jnp.array([0, 3, -1]))
    made, _ = decode(chosen, None, *cut(arrays, 2, 3))
    assert np.isfinite(made[0]).all() and np.isnan(made[1:]).all()


def test_under_vmap_and_scan(keys):
    """Speculative decoding: each step appends three tokens and keeps as many as were accepted."""
    arrays = tokens(keys, count=12)
    accepted = jnp.array([2, 1, 3, 1])

    @jax.jit
    def run(arrays):
        def step(cache, kept):
            here = [jax.lax.dynamic_slice_in_dim(x, cache.length, 3, 1) for x in arrays]
            output, after = cache.decode(*here)
            return after.truncate(cache.length + kept), output

        return jax.lax.scan(step, empty(capacity=12), accepted)

    cache, made = run(arrays)
    assert cache.length == 7
    whole = attnlib.dot_product_attention(*arrays, is_causal=True)
    starts = np.cumsum([0, 2, 1, 3])
    assert_close(np.asarray(made), np.stack([whole[:, n : n + 3] for n in starts]), length=12)
    caches = jax.vmap(lambda n: cache.truncate(n))(jnp.array([5, 2]))
    assert caches.length.tolist() == [5, 2]


# Rings

RING, WINDOW, NEW = 5, 3, 4  # more new tokens than the ring can take before it reads
STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, NEW), min_size=BATCH, max_size=BATCH),  # tokens to append
        st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 20]), min_size=BATCH, max_size=BATCH),  # tokens to forget
    ),
    min_size=1,
    max_size=10,
)


@jax.jit
def truncate_and_decode(cache, forgotten, lengths, query, *arrays):
    cache = cache.truncate(cache.length - forgotten)
    output, cache = cache.decode(query, *arrays, lengths)
    return cache, output, cache.attend(query[:, -1:], jnp.minimum(cache.length, 1))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_a_ring_goes_back_as_far_as_it_has_the_tokens(steps, seed):
    """Against lists of tokens: NaN for exactly the queries that need a token that another has overwritten."""
    draw = np.random.default_rng(seed)
    cache = empty(capacity=RING, window=WINDOW, ragged=True)
    models = [RingModel(RING, WINDOW) for _ in range(BATCH)]
    for lengths, forgotten in steps:
        query, key, value = random_tokens(draw, (BATCH, NEW), HEADS, KV_HEADS, FEATURES, VALUE_FEATURES)
        cache, output, last = truncate_and_decode(cache, np.array(forgotten), np.array(lengths), query, key, value)
        expected, expected_last = np.zeros_like(output), np.zeros_like(last)
        for b, model in enumerate(models):
            model.truncate(max(len(model.tokens) - forgotten[b], 0))
            for n in range(lengths[b]):
                model.append([(key[b, n], value[b, n])])
                expected[b, n] = attend(query[b, n], model.visible(len(model.tokens) - 1), VALUE_FEATURES)
            if model.tokens:
                expected_last[b, 0] = attend(query[b, -1], model.visible(len(model.tokens) - 1), VALUE_FEATURES)
        assert cache.length.tolist() == [len(model.tokens) for model in models]
        assert_close((output, last), (jnp.asarray(expected), jnp.asarray(expected_last)), length=WINDOW)


def test_a_ring_goes_back_in_scan(keys):
    """Speculative decoding: each step appends three tokens and keeps one, in the room that the ring has for it."""
    arrays = tokens(keys, count=12)
    whole = attnlib.dot_product_attention(*arrays, mask=masks.SlidingWindow(WINDOW - 1, 0), return_lse=True)

    @jax.jit
    def run(cache, arrays):
        def step(cache, _):
            results, after = cache.decode(*(jax.lax.dynamic_slice_in_dim(x, cache.length, 3, 1) for x in arrays),
                                          return_weights=True, return_lse=True)  # fmt: skip
            return after.truncate(cache.length + 1), results

        return jax.lax.scan(step, cache.truncate(cache.length), length=3)

    _, cache = decode(empty(capacity=RING, window=WINDOW), None, *cut(arrays, 0, 6))
    after, (made, weights, lse) = run(cache, arrays)
    assert after.length == 9 and after.num_lost == 6 and np.isfinite(weights).all()
    assert_close(made, jnp.stack([whole[0][:, n : n + 3] for n in range(6, 9)]), length=TOKENS)
    assert_close(lse, jnp.stack([whole[1][:, :, n : n + 3] for n in range(6, 9)]), length=TOKENS)
    back = jax.jit(KVCache.truncate)(after, 7)
    results, _ = back.decode(*cut(arrays, 7, 9), return_weights=True, return_lse=True)
    output, weights, lse = (np.isnan(x) for x in results)
    for found in (output, weights.swapaxes(1, 2), lse.swapaxes(1, 2)):
        assert found[:, 0].all() and not found[:, 1].any()


def ring(**options):
    cache = empty(capacity=RING, window=WINDOW, **options)
    return cache.append(*(jnp.ones((BATCH, 9, KV_HEADS, size)) for size in (FEATURES, VALUE_FEATURES)))


def test_a_ring_knows_what_it_can_take_back():
    assert ring().truncate(6).length == 6 and ring().truncate(0).length == 0
    assert ring(ragged=True).truncate(jnp.array([0, 9, 6])).length.tolist() == [0, 9, 6]
    picked = ring(ragged=True).truncate(jnp.array([0, 9, 6])).select(jnp.array([2, 0]))
    assert picked.length.tolist() == [6, 0]
    with pytest.raises(ValueError, match="truncate to 5 tokens needs tokens"):  # of the one that was last before
        picked.truncate(jnp.array([5, 0]))
    assert_same(ring().append(jnp.ones((BATCH, 0, KV_HEADS, FEATURES)), jnp.ones((BATCH, 0, KV_HEADS, VALUE_FEATURES))),
                ring())  # fmt: skip
    twice = ring().truncate(8).append(*(jnp.ones((BATCH, 1, KV_HEADS, size)) for size in (FEATURES, VALUE_FEATURES)))
    with pytest.raises(ValueError, match="the first 4 are lost"):
        twice.truncate(8).truncate(5)


WRONG = {
    "a ring": (
        lambda: ring().truncate(5),
        ValueError,
        "truncate to 5 tokens needs tokens in the window of 3 that newer ones have overwritten: the first 4 are lost. "
        "A full ring goes back by at most capacity - window + 1 = 3 tokens. Create the cache with a larger capacity, "
        "or truncate to 0.",
    ),
    "a ragged ring": (lambda: ring(ragged=True).truncate(jnp.array([0, 9, 1])), ValueError, "truncate to 1 tokens"),
    "below 0": (lambda: empty().truncate(-1), ValueError, "lengths must be at least 0; got -1"),
    "a float": (lambda: empty().truncate(2.0), TypeError, "lengths must be an int"),
    "one each, not ragged": (
        lambda: empty().truncate(jnp.ones(3, int)),
        ValueError,
        "ragged=True has a length for each",
    ),
    "others, ragged": (lambda: empty(ragged=True).truncate(jnp.ones(2, int)), ValueError, "shape () or (3,); got (2,)"),
    "an index": (lambda: empty().select(jnp.array([0, 3])), ValueError, "indices must be in 0..2, for 3 sequences"),
    "an index from the end": (lambda: empty().select(jnp.array([-1])), ValueError, "indices must be in 0..2"),
    "one index": (lambda: empty().select(jnp.array(1)), ValueError, "indices must have shape (n,)"),
    "bools": (lambda: empty().select(jnp.ones(3, bool)), TypeError, "indices must be an integer array"),
    "a dtype": (lambda: empty(dtype="float7"), TypeError, "dtype must be one of"),
    "no batch": (lambda: KVCache.create((), 3, 1, 2).select(jnp.array([0])), ValueError, "a cache with a batch axis"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_refused_with_the_remedy(name):
    assert_refused(WRONG[name])
