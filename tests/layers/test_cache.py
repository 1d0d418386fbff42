"""A cache decodes what the whole pass gives, however the tokens are split, for every score, mask and modifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import assert_close, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from score_catalogue import definition

import attnlib
from attnlib import KVCache, masks, scores

BATCH, TOKENS, HEADS, KV_HEADS, FEATURES, VALUE_FEATURES = (2, 3), 11, 4, 2, 4, 3
SLOPES = np.array([0.5, 0.25, 0.1, 0.3], np.float32)
SCALE = np.linspace(0.5, 1.5, FEATURES, dtype=np.float32)
SINK = np.array([0.3, -1.0, 2.0, 0.0], np.float32)
WINDOW = 4


def squares(query, key):
    return -jnp.sum((query - key) ** 2)


def alibi(logit, batch, head, query, key):
    return logit - jnp.asarray(SLOPES)[head] * jnp.abs(query - key).astype(logit.dtype)


CUSTOM = scores.Custom(squares)
OPTIONS = {
    "dot": dict,
    "additive": lambda: dict(score=scores.Additive(SCALE)),
    "custom": lambda: dict(score=CUSTOM),
    "score_mod": lambda: dict(score_mod=alibi),
    "sink": lambda: dict(sink=jnp.asarray(SINK)),
    "soft cap, tiles": lambda: dict(logits_soft_cap=2.0, implementation="blockwise", block_sizes=(2, 4)),
    "masks of positions": lambda: dict(
        mask=masks.Predicate(lambda q, k: (q + k) % 3 != 0) | masks.SlidingWindow(1, 0) | masks.Prefix(2)
    ),
}


@functools.cache
def tokens(batch=BATCH):
    """(query, key, value) of the whole; NumPy's, since JAX compiles a program for each slice that a test takes."""
    numbers = np.random.default_rng(0)
    shapes = (HEADS, FEATURES), (KV_HEADS, FEATURES), (KV_HEADS, VALUE_FEATURES)
    return [numbers.normal(size=(*batch, TOKENS, *shape)).astype(np.float32) for shape in shapes]


def empty(batch=BATCH, capacity=TOKENS, **options):
    return KVCache.create(batch, capacity, KV_HEADS, FEATURES, value_dim=VALUE_FEATURES, **options)


def whole(query, key, value, window=None, score=None, mask=None, **options):
    """All at once, by the masks of the whole."""
    if window is not None:
        near = masks.SlidingWindow(window - 1, 0)
        mask = near if mask is None else mask & near
    return attnlib.attention(
        query, key, value, score=scores.Dot() if score is None else score, is_causal=True, attention_axes=-3, mask=mask,
        **options,
    )  # fmt: skip


@functools.cache
def whole_of(name, window):
    return jax.jit(lambda *arrays: whole(*arrays, window, **OPTIONS[name]()))(*tokens())


@functools.cache
def decoder(name):
    """`decode`, compiled: again only for other numbers of tokens and other forms of the cache."""
    return jax.jit(lambda cache, lengths, *arrays: cache.decode(*arrays, lengths, **OPTIONS[name]()))


CHUNKS = 6, 3, 1  # few sizes: each is a program to compile


def parts(sizes, chunks=CHUNKS):
    """Slices of these sizes, as far as the tokens reach, and then of the rest."""
    start = 0
    while start < TOKENS:
        size = next(size for size in (*sizes[:1], *chunks) if size <= TOKENS - start)
        sizes = sizes[1:]
        yield slice(start, start + size)
        start += size


SIZES = st.lists(st.sampled_from(CHUNKS), max_size=6)
FORMS = {
    "plain": dict(),
    "ring": dict(window=WINDOW, capacity=WINDOW),
    "ring with room": dict(window=WINDOW, capacity=WINDOW + 2),
}
on_every_form = pytest.mark.parametrize("form", FORMS)
SOME = [("dot", form) for form in FORMS] + [("additive", "plain"), ("score_mod", "ring")]


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(sizes=SIZES)
@pytest.mark.parametrize("form", ["plain", "ring with room"])
@pytest.mark.parametrize("name", OPTIONS)
def test_any_split_is_the_whole(name, form, sizes):
    """Chunks of three sizes where the score is plain; elsewhere of two, each of which is one more program."""
    query, key, value = tokens()
    chunks = CHUNKS if name == "dot" else (6, 1)
    sizes = [size if size in chunks else 1 for size in sizes]
    cache = empty(**FORMS[form])
    shapes = [x.shape for x in jax.tree.leaves(cache)]
    outputs = []
    for part in parts(sizes, chunks):
        chunk = (x[..., part, :, :] for x in (query, key, value))
        output, cache = decoder(name)(cache, None, *chunk)
        outputs.append(output)
    assert_close(np.concatenate(outputs, -3), whole_of(name, FORMS[form].get("window")), length=TOKENS)
    assert [x.shape for x in jax.tree.leaves(cache)] == shapes
    assert int(cache.length) == TOKENS


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(sizes=SIZES, seed=st.integers(0, 99))
@pytest.mark.parametrize(("name", "form"), SOME)
def test_any_ragged_split_is_the_whole(name, form, sizes, seed):
    """Each sequence advances by a length of its own; what is beyond, NaN, is neither stored nor attended."""
    arrays = [np.asarray(x) for x in tokens()]
    numbers, done = np.random.default_rng(seed), np.zeros(BATCH, int)
    cache = empty(**FORMS[form], ragged=True)
    found = np.full((*BATCH, TOKENS, HEADS, VALUE_FEATURES), np.nan, np.float32)
    for size in [*sizes, 6, 3, 6]:
        lengths = np.minimum(numbers.integers(0, size + 1, BATCH), TOKENS - done)
        place = np.arange(size)
        real = place < lengths[..., None]
        index = np.where(real, done[..., None] + place, 0)[..., None, None]
        chunk = [np.where(real[..., None, None], np.take_along_axis(x, index, -3), np.nan) for x in arrays]
        output, cache = decoder(name)(cache, jax.device_put(np.asarray(lengths, np.int32)), *map(jax.device_put, chunk))
        assert not np.any(np.asarray(output)[~real])
        for b in np.ndindex(BATCH):
            found[b][done[b] : done[b] + lengths[b]] = output[b][: lengths[b]]
        done += lengths
    reached = (np.arange(TOKENS) < done[..., None])[..., None, None]
    expected = np.where(reached, whole_of(name, FORMS[form].get("window")), np.nan)
    assert_close(found, expected, length=TOKENS)
    assert_same(np.asarray(cache.length), done.astype(np.int32))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_one_by_one_is_the_definition(window):
    """Against NumPy loops in float64, which share nothing with attnlib; the sink is one more key there."""
    query, key, value = tokens(batch=(2,))
    mask = np.tril(np.ones((TOKENS, TOKENS), bool))
    if window is not None:
        mask &= ~np.tril(mask, -window)
    distance = np.abs(np.subtract.outer(np.arange(TOKENS), np.arange(TOKENS)))
    bias = -SLOPES[:, None, None] * distance
    output, _, lse = oracle.attention(
        query, key, value, score=definition(scores.Additive(SCALE)), mask=mask, bias=bias[None]
    )
    share = 1 / (1 + np.exp(SINK[:, None] - lse))
    output = (output * np.moveaxis(share, 1, 2)[..., None]).astype(np.float32)
    options = dict(score=scores.Additive(SCALE), score_mod=alibi, sink=jnp.asarray(SINK))
    step = jax.jit(lambda cache, *arrays: cache.decode(*arrays, **options))
    cache = empty((2,), capacity=window or TOKENS, window=window)
    for at in range(TOKENS):
        found, cache = step(cache, *(x[:, at : at + 1] for x in (query, key, value)))
        assert_close(found, jnp.asarray(output[:, at : at + 1]), length=TOKENS)


@on_every_form
def test_append_then_attend_is_decode(form):
    @jax.jit
    def each(cache, query, key, value):
        _, cache = cache.decode(*(x[..., :5, :, :] for x in (query, key, value)))
        last = [x[..., 5:6, :, :] for x in (query, key, value)]
        expected, decoded = cache.decode(*last, return_weights=True, return_lse=True)
        appended = cache.append(*last[1:])
        attended = appended.attend(last[0], return_weights=True, return_lse=True)
        return (expected, decoded), (attended, appended)

    by_decode, by_attend = each(empty(**FORMS[form]), *tokens())
    assert_same(by_attend, by_decode)
    assert len(by_decode[0]) == 3


def test_attend_takes_the_last_tokens_of_each_sequence():
    query, key, value = tokens()
    lengths = jnp.array([[0, 1, 2], [3, 2, 1]])

    @jax.jit
    def program(cache, lengths):
        cache = cache.append(key[..., :6, :, :], value[..., :6, :, :])
        cache = cache.append(key[..., 6:9, :, :], value[..., 6:9, :, :], lengths)
        return cache.attend(query[..., 6:9, :, :], lengths), cache.attend(query[..., :0, :, :])

    output, nothing = program(empty(ragged=True), lengths)
    expected = whole_of("dot", None)[..., 6:9, :, :]
    real = (np.arange(3) < np.asarray(lengths)[..., None])[..., None, None]
    assert_close(output, np.where(real, expected, 0), length=TOKENS)
    assert nothing.shape == (*BATCH, 0, HEADS, VALUE_FEATURES)


def test_not_causal_sees_all_that_is_held():
    @jax.jit
    def pairs(query, key, value):
        attend = functools.partial(attnlib.dot_product_attention, query, key, value, attention_axes=-3)
        cache = empty(capacity=2 * TOKENS).append(key, value)
        ring = empty(window=WINDOW, capacity=WINDOW)
        decoded, _ = ring.decode(query, key, value, is_causal=False)
        near = masks.SlidingWindow(WINDOW - 1, None)
        return (cache.attend(query, is_causal=False), attend()), (decoded, attend(mask=near))

    for made, expected in pairs(*tokens()):
        assert_close(made, expected, length=TOKENS)


def test_masks_and_biases_of_slots(keys):
    """A bool mask and a bias cover the slots; in a plain cache slots are positions."""
    mask, bias = keys.bools(*BATCH, 1, 3, TOKENS + 2), keys.normal(1, 1, HEADS, 3, TOKENS + 2)

    @jax.jit
    def each(query, key, value, mask, bias):
        results = dict(return_weights=True, return_lse=True)
        cache = empty(capacity=TOKENS + 2).append(key, value)
        made = cache.attend(query[..., -3:, :, :], mask=mask, bias=bias, **results)
        expected = attnlib.dot_product_attention(
            query[..., -3:, :, :], key, value, attention_axes=-3, bias=bias[..., :TOKENS],
            mask=masks.Dense(mask[..., :TOKENS]) & masks.Causal(TOKENS - 3), **results,
        )  # fmt: skip
        return made, expected

    (output, weights, lse), expected = each(*tokens(), mask, bias)
    weights = np.asarray(weights)
    assert_close((output, weights[..., :TOKENS], lse), expected, length=TOKENS)
    assert not np.any(weights[..., TOKENS:])


def test_slots_of_a_ring_that_overwrites_in_one_call():
    """More tokens than it can take after reading: weights are of the old slots, then of the new tokens."""

    @jax.jit
    def each(query, key, value):
        cache = empty(window=WINDOW, capacity=WINDOW).append(key[..., :6, :, :], value[..., :6, :, :])
        (_, weights), _ = cache.decode(*(x[..., 6:, :, :] for x in (query, key, value)), return_weights=True)
        return weights, whole(query, key, value, WINDOW, return_weights=True)[1]

    weights, full = map(np.asarray, each(*tokens()))
    expected = full[..., 6:, :]
    order = [position % WINDOW for position in range(2, 6)]  # of the positions 2, 3, 4, 5 that the ring holds
    assert weights.shape == (*BATCH, HEADS, 5, WINDOW + 5)
    assert_close(weights[..., [*order, *range(WINDOW, WINDOW + 5)]], expected[..., 2:], length=TOKENS)
    assert not np.any(expected[..., :2])


@pytest.mark.parametrize("axis", [0, 1, -3, (-5,)])
def test_the_axis_of_tokens_may_stand_anywhere(axis):
    """Batch axes on both sides of it; the cache has them first."""
    arrays = tokens()
    position = axis[0] if isinstance(axis, tuple) else axis
    moved = [jnp.moveaxis(x, -3, position) for x in arrays]
    cache = empty()
    output, cache = cache.decode(*moved, attention_axes=axis)
    assert_close(output, jnp.moveaxis(whole(*arrays), -3, position), length=TOKENS)
    assert_same(cache.key, arrays[1])
    again = empty().append(*moved[1:], attention_axes=axis)
    assert_same(again.attend(moved[0], attention_axes=axis), output)


def test_without_batch_axes():
    @jax.jit
    def each(*arrays):
        return empty(()).decode(*arrays), whole(*arrays), empty(()).append(*arrays[1:], jnp.int32(4))

    (output, cache), expected, part = each(*tokens(batch=()))
    assert_close(output, expected, length=TOKENS)
    assert int(part.length) == 4 and cache.length.shape == part.length.shape == ()


@pytest.mark.parametrize("form", ["plain", "ring with room"])
def test_what_empty_slots_hold_cannot_matter(form):
    query, key, value = tokens()
    cache = empty(**{"capacity": TOKENS + 4, **FORMS[form]})
    poisoned = cache.replace(key=cache.key + jnp.nan, value=cache.value + jnp.nan)

    def loss(query, cache):
        output, cache = cache.decode(*(x[..., :3, :, :] for x in (query, key, value)))
        return jnp.sum(jnp.sin(output)) + jnp.sum(cache.attend(query[..., 2:3, :, :]))

    gradient = jax.jit(jax.value_and_grad(loss))
    assert_same(gradient(query, poisoned), gradient(query, cache))
