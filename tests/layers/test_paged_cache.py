"""A cache in pages gives what lists of tokens give, whatever is appended, forked, truncated and released before."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_model import PagedModel, attend, random_tokens
from conftest import assert_close, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused

import attnlib
from attnlib import KVCache, PagedKVCache, masks, scores

BATCH, HEADS, KV_HEADS, FEATURES, VALUE_FEATURES = 3, 4, 2, 4, 3
PAGES, PAGE, CAPACITY, NEW = 5, 2, 6, 3


def empty(num_sequences=BATCH, capacity=CAPACITY, num_pages=PAGES, page_size=PAGE, **options):
    return PagedKVCache.create(
        num_sequences, capacity, KV_HEADS, FEATURES, num_pages=num_pages, page_size=page_size,
        value_dim=VALUE_FEATURES, **options,
    )  # fmt: skip


def tokens(keys, batch=BATCH, count=8):
    shapes = (HEADS, FEATURES), (KV_HEADS, FEATURES), (KV_HEADS, VALUE_FEATURES)
    # NumPy's: JAX compiles a program for each slice that a test takes.
    return [np.asarray(keys.normal(batch, count, *shape)) for shape in shapes]


# Any edits

SEQUENCES = st.integers(0, BATCH - 1)
STEPS = st.lists(
    st.tuples(
        st.tuples(SEQUENCES, SEQUENCES),  # fork: source and target, which may be equal
        st.lists(st.sampled_from([0, 0, 0, 1, 2, 5]), min_size=BATCH, max_size=BATCH),  # tokens to forget
        st.lists(st.sampled_from([False] * 5 + [True]), min_size=BATCH, max_size=BATCH),  # to release, even if empty
        st.lists(st.integers(0, NEW), min_size=BATCH, max_size=BATCH),  # tokens to append
    ),
    min_size=1,
    max_size=12,
)


@jax.jit
def edit(cache, fork, forgotten, released, lengths, query, key, value):
    """(the cache after edits, attention of one query of each sequence to all its tokens, the free pages)."""
    cache = cache.fork(*fork)
    cache = cache.truncate(cache.length - forgotten).release(released).release(released)
    cache = cache.append(key, value, lengths)
    return cache, cache.attend(query, jnp.minimum(cache.length, 1)), cache.free_pages


def step(cache, arrays, start, lengths, *, fork=(0, 0), forgotten=(0, 0, 0), released=(False, False, False)):
    """`edit`, with the tokens from `start` on; the query is the last token's."""
    _, key, value = (x[:, start : start + NEW] for x in arrays)
    last = start + np.maximum(np.array(lengths) - 1, 0)
    query = jnp.take_along_axis(arrays[0], last[:, None, None, None], 1)
    return edit(cache, fork, *map(np.array, (forgotten, released, lengths)), query, key, value)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_any_edits_are_those_of_lists(steps, seed):
    """After each step the last token of each sequence attends to all of them. Too few pages, or too long: NaN."""
    draw = np.random.default_rng(seed)
    cache, model = empty(), PagedModel(BATCH, PAGES, PAGE, CAPACITY)
    for fork, forgotten, released, lengths in steps:
        query, _, _ = random_tokens(draw, (BATCH, 1), HEADS, KV_HEADS, FEATURES, VALUE_FEATURES)
        _, key, value = random_tokens(draw, (BATCH, NEW), HEADS, KV_HEADS, FEATURES, VALUE_FEATURES)
        cache, output, free = edit(cache, fork, *map(np.array, (forgotten, released, lengths)), query, key, value)
        model.fork(*fork)
        for b in range(BATCH):
            model.truncate(b, 0 if released[b] else max(len(model.tokens[b]) - forgotten[b], 0))
        model.append([list(zip(key[b], value[b], strict=True))[: lengths[b]] for b in range(BATCH)])
        assert cache.length.tolist() == [len(tokens) for tokens in model.tokens]
        assert free == model.free_pages
        expected = np.stack([attend(query[b, 0], model.tokens[b], VALUE_FEATURES) for b in range(BATCH)])
        assert_close(output[:, 0], expected, length=CAPACITY)


def test_the_first_of_two_writers_keeps_a_shared_page(keys):
    """The first sequence takes four pages, and the one that is left suffices for the copy that the third writes to."""
    arrays = tokens(keys)
    cache, _, free = step(empty(), arrays, 0, (3, 1, 0))
    cache, _, free = step(cache, arrays, 3, (2, 0, 0), fork=(1, 2))
    assert free == 1
    cache, output, free = step(cache, arrays, 1, (0, 1, 1))
    assert free == 0 and cache.length.tolist() == [5, 2, 2] and len(np.unique(cache.table[1:, 0])) == 2
    for b in (1, 2):
        key, value = (jnp.concatenate([x[1:2, :1], x[b : b + 1, 1:2]], 1) for x in arrays[1:])
        expected = attend(arrays[0][b, 1], list(zip(key[0], value[0], strict=True)), VALUE_FEATURES)
        assert_close(output[b, 0], expected, length=2)


# As a KVCache


def both(dtype="float32", num_pages=9, **options):
    """A cache in pages and a KVCache of the same tokens, five, three and none in each sequence."""
    paged = empty(num_pages=num_pages, capacity=8, dtype=dtype)
    plain = KVCache.create(
        (BATCH,), 8, KV_HEADS, FEATURES, value_dim=VALUE_FEATURES, dtype=dtype, ragged=True, **options
    )
    return paged, plain


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_every_option_is_that_of_a_cache(dtype, keys):
    arrays, mask, bias = tokens(keys), keys.bools(BATCH, 1, 3, 8), keys.normal(1, HEADS, 1, 8)
    slopes, reach = keys.normal(HEADS), jnp.array([0, 1, 2, 4])
    options = dict(
        score=scores.Additive(), mask=masks.Dense(mask) | masks.Prefix(2), bias=bias, sink=keys.normal(HEADS),
        score_mod=attnlib.modifiers.ALiBi(slopes), return_weights=True, return_lse=True,
    )  # fmt: skip

    def near(batch, head, query, key):
        return query - key <= reach[head] + batch

    @jax.jit
    def each(arrays):
        results = []
        for cache in both(dtype):
            cache = cache.append(*(x[:, :5] for x in arrays[1:]), jnp.array([5, 3, 0]))
            made, cache = cache.decode(*(x[:, 5:] for x in arrays), jnp.array([2, 3, 1]), **options)
            moved = cache.attend(arrays[0][:, 5:].swapaxes(0, 1), jnp.array([2, 3, 1]), attention_axes=0, mask=near)
            results.append((made, moved, cache.length.astype(jnp.float32)))
        return results

    paged, plain = each(arrays)
    assert_close(paged, plain, length=8)
    assert paged[0][0].dtype == jnp.float32 and np.isfinite(paged[0][0]).all()


def test_gradients_are_those_of_a_cache(keys):
    """Also of a page that two sequences share, of what was forgotten, and of tokens that find no page: none."""
    arrays = tokens(keys)

    def loss(arrays, caches):
        total = 0.0
        for cache in caches:
            cache = cache.append(*(x[:, :5] for x in arrays[1:]), jnp.array([5, 3, 0]))
            indices = jnp.array([0, 1, 0])
            cache = cache.select(indices).truncate(jnp.array([5, 1, 4]))
            output, cache = cache.decode(*(x[:, 5:] for x in arrays), jnp.array([3, 2, 0]))
            total += jnp.sum(jnp.sin(output)) + jnp.sum(cache.attend(arrays[0][:, :1])[2])
        return total

    paged, plain = (jax.jit(jax.value_and_grad(functools.partial(loss, caches=[c])))(arrays) for c in both())
    assert_close(paged, plain, length=64)
    assert not jnp.any(paged[1][1][1, 1:5]) and jnp.all(jnp.any(paged[1][1][0], (1, 2)))


def test_a_cache_full_of_nan_is_an_empty_one(keys):
    arrays, cache = tokens(keys), empty()
    poisoned = cache.replace(key=cache.key + jnp.nan, value=cache.value + jnp.nan)
    assert_same(*(step(x, arrays, 0, (3, 1, 0))[1] for x in (poisoned, cache)))


# Too few pages


def test_too_few_pages_is_an_error_where_it_is_known(keys):
    """Three pages are free. The second sequence takes two, so that the third finds one of two."""
    arrays = tokens(keys)
    cache, _, _ = step(empty(), arrays, 0, (3, 0, 0))
    lengths = (0, 3, 3)
    with pytest.raises(ValueError, match=r"too few pages are free: 3 of 5, for the new tokens of sequence 2\. Release"):
        cache.append(*(x[:, :NEW] for x in arrays[1:]), jnp.array(lengths))
    cache, output, free = step(cache, arrays, 0, lengths)
    assert cache.length.tolist() == [3, 3, 3] and free == 1
    assert np.isfinite(output[:2]).all() and np.isnan(output[2]).all()


def test_a_sequence_without_pages_comes_back_at_its_last_full_page(keys):
    """It takes no pages while it is spoilt, and gives back the one that is partly filled."""
    arrays = tokens(keys)
    cache, _, _ = step(empty(), arrays, 0, (3, 3, 1))
    cache, output, free = step(cache, arrays, 3, (2, 0, 0))
    assert cache.length.tolist() == [5, 3, 1] and free == 1 and np.isnan(output[0]).all()
    cache, output, free = step(cache, arrays, 1, (1, 0, 2))  # the free page goes to the third sequence
    assert free == 0 and np.isnan(output[0]).all() and np.isfinite(output[1:]).all()
    assert np.isnan(step(cache, arrays, 1, (0, 0, 0), forgotten=(3, 0, 0))[1][0]).all()
    _, output, _ = step(cache, arrays, 2, (1, 0, 0), forgotten=(4, 3, 0))
    expected = attnlib.dot_product_attention(*(x[:1, :3] for x in arrays), is_causal=True)
    assert_close(output[0], expected[0, 2:3], length=3)


# Programs


def test_steps_are_one_program_in_scan_and_vmap(keys):
    arrays = tokens(keys)
    whole = attnlib.dot_product_attention(*arrays, is_causal=True)
    traced = []

    def decode(cache, *arrays):
        traced.append(1)
        return cache.decode(*arrays)

    compiled, cache = jax.jit(decode, donate_argnums=0), empty(num_pages=12, capacity=8)
    for n in range(6):
        output, cache = compiled(cache, *(x[:, n : n + 1] for x in arrays))
        assert_close(output, whole[:, n : n + 1], length=8)
    assert len(traced) == 1
    rest = [jnp.moveaxis(x[:, 6:], 1, 0)[:, :, None] for x in arrays]
    scanned = jax.jit(lambda cache, steps: jax.lax.scan(lambda cache, x: cache.decode(*x)[::-1], cache, steps))
    cache, outputs = scanned(cache, rest)
    assert_close(jnp.moveaxis(outputs[:, :, 0], 0, 1), whole[:, 6:], length=8)

    caches = jax.tree.map(lambda x: jnp.stack([x, x]), empty(num_pages=12, capacity=8))
    made, caches = jax.jit(jax.vmap(decode))(caches, *(jnp.stack([x, x[::-1]]) for x in arrays))
    assert_close(made, jnp.stack([whole, whole[::-1]]), length=8)
    assert caches.length.tolist() == [[8] * BATCH] * 2


@pytest.mark.measured
def test_appending_is_in_place():
    """The donated pool is the new one, and nothing of its size is made besides. Forks and truncation copy no token."""
    cache = PagedKVCache.create(2, 4096, 2, 16, num_pages=600, dtype="int8")
    new = jnp.ones((2, 3, 2, 16))
    size = cache.key.nbytes + cache.value.nbytes
    memory = jax.jit(PagedKVCache.append, donate_argnums=0).lower(cache, new, new).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 20
    edits = jax.jit(lambda cache, n: cache.fork(n, 1 - n).truncate(n).release(cache.length > n), donate_argnums=0)
    memory = edits.lower(cache, 0).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size / 100


def test_survives_flax_serialization(keys):
    arrays = tokens(keys)
    cache, _, _ = step(empty(), arrays, 0, (3, 0, 1))
    restored = flax.serialization.from_bytes(empty(), flax.serialization.to_bytes(cache))
    assert_same(restored, cache)
    assert_same(*(step(x, arrays, 3, (1, 0, 2), fork=(0, 1)) for x in (restored, cache)))


# Refusals

KEY, VALUE, QUERY = jnp.ones((3, 1, 2, 4)), jnp.ones((3, 1, 2, 3)), jnp.ones((3, 1, 4, 4))
WRONG = {
    "batch axes": (lambda: empty((2, 3)), TypeError, "num_sequences must be an int >= 0"),
    "no pages": (lambda: empty(num_pages=0), ValueError, "num_pages must be an int >= 1; got 0"),
    "empty pages": (lambda: empty(page_size=0), ValueError, "page_size must be an int >= 1; got 0"),
    "part of a page": (lambda: empty(capacity=7), ValueError, "a multiple of page_size=2; got 7. Write capacity=8."),
    "too many tokens": (lambda: empty(num_pages=2**30), ValueError, "num_pages * page_size must be below 2**31"),
    "a dtype": (lambda: empty(dtype="int4"), ValueError, "dtype must be one of float32, bfloat16, float16, int8"),
    "beyond the capacity": (
        lambda: empty(num_pages=9).append(jnp.ones((3, 7, 2, 4)), jnp.ones((3, 7, 2, 3))),
        ValueError,
        "the capacity of the cache is 6 tokens; appending these tokens needs 7. Create the cache with a larger "
        "capacity, or release",
    ),
    "another batch": (lambda: empty().append(KEY[:2], VALUE[:2]), ValueError, "(3, n, 2, 4) to fit the cache"),
    "a value like the key": (lambda: empty().append(KEY, KEY), ValueError, "value must have shape"),
    "fewer queries": (lambda: empty().decode(QUERY[:, :0], KEY, VALUE), ValueError, "query, key, value must have"),
    "positions": (
        lambda: empty().attend(QUERY, query_positions=jnp.arange(1)), TypeError, "query_positions cannot be given",
    ),
    "lengths": (lambda: empty().append(KEY, VALUE, jnp.array([2, 0, 0])), ValueError, "lengths must be in 0..1"),
    "truncate": (lambda: empty().truncate(jnp.array([1, 2])), ValueError, "lengths must have shape () or (3,)"),
    "release an index": (lambda: empty().release(jnp.array(1)), TypeError, "which must be a bool array"),
    "release of others": (lambda: empty().release(jnp.array([True])), ValueError, "which must have shape (3,)"),
    "fork from none": (lambda: empty().fork(3, 0), ValueError, "source must be in 0..2, for 3 sequences; got [3]"),
    "fork to none": (lambda: empty().fork(0, -1), ValueError, "target must be in 0..2, for 3 sequences; got [-1]"),
    "fork of floats": (lambda: empty().fork(0.0, 1), TypeError, "source must be an int"),
    "fork to one twice": (lambda: empty().fork([0, 1], [2, 2]), ValueError, "target must have distinct sequences"),
    "fork of fewer": (lambda: empty().fork(0, [1, 2]), ValueError, "source and target must have the same shape"),
    "select": (lambda: empty().select(jnp.array([3])), ValueError, "indices must be in 0..2, for 3 sequences"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_refused_with_the_remedy(name):
    assert_refused(WRONG[name])


def test_traced_indices_beyond_the_sequences(keys):
    """A source gives NaN, a target does nothing, and neither reaches another sequence."""
    arrays = tokens(keys)
    cache, _, _ = step(empty(), arrays, 0, (2, 1, 0))
    _, output, _ = step(cache, arrays, 0, (0, 0, 0), fork=(3, 1))
    assert np.isnan(output[1]).all() and np.isfinite(output[jnp.array([0, 2])]).all()
    assert step(cache, arrays, 0, (0, 0, 0), fork=(0, 3))[0].length.tolist() == [2, 1, 0]
    chosen = jax.jit(PagedKVCache.select)(cache, jnp.array([-1, 0, 0]))
    _, output, free = step(chosen, arrays, 2, (0, 1, 0))
    assert np.isnan(output[0]).all() and np.isfinite(output[1:]).all() and free == 3
