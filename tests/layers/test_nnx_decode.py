"""The caches of the NNX module: decoding equals the whole pass, views, ragged caches, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_same
from flax import nnx
from refusals import assert_refused

import attnlib
from attnlib import masks, modifiers

HEADS, LENGTH, WIDTH = 4, 11, 16
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)

needs_views = pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no nnx.view")


def make(**fields):
    return attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0), **fields)


LAYERS = {
    "plain": {},
    "grouped, rotary, sink": dict(num_kv_heads=2, rotary=True, use_sink=True, value_dim=3, num_memory=2),
    "window": dict(sliding_window=3, score_mod=modifiers.ALiBi(modifiers.alibi_slopes(HEADS)), normalize_qk="rms"),
    "additive": dict(score="additive", logits_soft_cap=2.0),
}


@nnx.jit
def whole(layer, x):
    return layer(x, is_causal=True, decode=False)


@nnx.jit
def step(layer, x):
    return layer(x)


@pytest.mark.parametrize("name", LAYERS)
def test_any_split_is_the_whole_pass(name):
    fields = LAYERS[name]
    layer = make(decode=True, **fields)
    layer.init_cache(X.shape)
    kept, kv_heads = min(LENGTH, fields.get("sliding_window", LENGTH)), fields.get("num_kv_heads", HEADS)
    assert layer.cached_key.shape == (2, kept, kv_heads, WIDTH // HEADS)
    assert layer.cached_value.shape == (2, kept, kv_heads, fields.get("value_dim", WIDTH // HEADS))
    made = [step(layer, part) for part in np.split(X, [5, 6, 7], 1)]
    assert layer.cache_index[...] == LENGTH
    assert_close(np.concatenate(made, 1), np.asarray(whole(layer, X)), length=LENGTH)


def test_along_a_middle_axis():
    layer = make(attention_axes=1, rotary=True)
    x = np.stack([X, X[::-1], 2 * X], 2)
    layer.init_cache(x.shape)
    assert layer.cached_key.shape == (2, 3, LENGTH, HEADS, WIDTH // HEADS)
    made = [layer(part, decode=True) for part in np.split(x, [4], 1)]
    assert_close(np.concatenate(made, 1), np.asarray(whole(layer, x)), length=LENGTH)


def test_as_the_layer_of_flax_decodes():
    """The same seeds, one token at a time."""
    theirs = nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(0))
    ours = make(decode=True)
    for layer in (theirs, ours):
        layer.init_cache(X.shape)
    made, expected = ([step(layer, X[:, n : n + 1]) for n in range(4)] for layer in (ours, theirs))
    assert_close(made, expected, length=LENGTH)
    assert ours.cache_index[...] == theirs.cache_index[...] == 4
    for name in ("cached_key", "cached_value"):
        assert_close(getattr(ours, name)[...], getattr(theirs, name)[...], length=WIDTH)


def test_in_a_scan_over_donated_state():
    layer = make(decode=True, rotary=True)
    layer.init_cache(X.shape)
    graph, cache, rest = nnx.split(layer, nnx.Cache, ...)

    @functools.partial(jax.jit, donate_argnums=0)
    def generate(cache, rest, x):
        def one(cache, token):
            layer = nnx.merge(graph, cache, rest)
            output = layer(token[:, None])
            return nnx.state(layer, nnx.Cache), output[:, 0]

        return jax.lax.scan(one, cache, x.swapaxes(0, 1))

    cache, made = generate(cache, rest, X)
    assert_close(np.asarray(made).swapaxes(0, 1), np.asarray(whole(make(rotary=True), X)), length=LENGTH)
    assert nnx.to_pure_dict(cache)["cache_index"] == LENGTH


def test_a_ragged_cache():
    """Each sequence appends as many tokens as are real, and rotary positions are its own."""
    layer = make(decode=True, rotary=True)
    layer.init_cache(X.shape, ragged=True)
    poisoned = X.copy()
    poisoned[1, 3:] = np.nan
    first = layer(poisoned[:, :6], lengths=jnp.array([6, 3]), query_mask=np.arange(6) < np.array([[6], [3]]))
    then = layer(np.stack([X[0, 6:8], X[1, 3:5]]))
    assert layer.cache_index[...].tolist() == [8, 5]
    expected = np.asarray(whole(layer, X))
    assert_close([first[0], first[1, :3], then[0], then[1]],
                 [expected[0, :6], expected[1, :3], expected[0, 6:8], expected[1, 3:5]], length=LENGTH)  # fmt: skip


def test_a_mask_speaks_of_slots():
    """Left padding: the first tokens of a row are none, at every step."""
    real = jnp.arange(LENGTH)[None] >= jnp.array([[3], [0]])
    layer = make()
    layer.init_cache(X.shape, dtype=jnp.float32)
    call = functools.partial(layer, mask=masks.KeyPadding(real))
    made = [call(part, decode=True) for part in np.split(X, [6, 7], 1)]
    assert_close(np.concatenate(made, 1), np.asarray(call(X, is_causal=True)), length=LENGTH)


def test_dtypes_of_the_cache():
    for dtype, fields in ((jnp.bfloat16, dict(dtype=jnp.bfloat16)), (jnp.float32, {})):
        layer = make(decode=True, **fields)
        layer.init_cache(X.shape)
        assert layer.cached_key.dtype == dtype and step(layer, X[:, :2]).dtype == dtype
    layer.init_cache(X.shape, jnp.float16)
    assert step(layer, X[:, :2]).dtype == jnp.float32 and layer.cached_value.dtype == jnp.float16


# Views


@needs_views
def test_a_view_makes_its_cache_and_shares_the_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, dropout_rate=0.3, rngs=rngs)
            self.inner = attnlib.nnx.DotProductAttention(dropout_rate=0.3, rngs=rngs)

        def __call__(self, x):
            return self.attention(x)

    model = Model(nnx.Rngs(0))
    view = nnx.view(model, deterministic=True, decode=True, batch_size=2, max_length=LENGTH)
    assert view.attention.query.kernel is model.attention.query.kernel
    assert model.attention.cached_key is None and not model.attention.decode
    assert model.attention.deterministic is model.inner.deterministic is None
    assert view.inner.deterministic is view.attention.deterministic is True
    made = [step(view, part) for part in np.split(X, [5, 6], 1)]
    assert_close(np.concatenate(made, 1), np.asarray(whole(view.attention, X)), length=LENGTH)

    again = nnx.view(view, decode=True, batch_size=(2,), max_length=LENGTH)
    assert again.attention.cached_key is view.attention.cached_key
    assert nnx.view(view, decode=False).attention.decode is False
    assert nnx.view(view, deterministic=False).attention.decode is True  # as it was
    for wrong, text in (
        (dict(batch_size=3), r"shares a cache with the batch axes \(2,\)"),
        (dict(max_length=LENGTH + 1), "shares a cache of 11 tokens"),
    ):
        with pytest.raises(ValueError, match=text):
            nnx.view(view, decode=True, **wrong)
    with pytest.raises(ValueError, match="needs batch_size and max_length"):
        nnx.view(model, decode=True, batch_size=2)
    assert "batch_size" in nnx.view_info(model)


def test_a_view_in_a_middle_axis_and_with_a_window():
    """`set_view` is what `nnx.view` calls."""
    layer = make(attention_axes=1, sliding_window=4)
    layer.set_view(decode=True, batch_size=(2, 3), max_length=LENGTH, cache_dtype=jnp.bfloat16)
    assert layer.cached_key.shape == (2, 3, 4, HEADS, WIDTH // HEADS) and layer.cached_key.dtype == jnp.bfloat16
    layer.set_view(decode=True, max_length=20)  # the ring holds a window of any length
    with pytest.raises(ValueError, match="shares a cache of 4 tokens"):
        layer.set_view(decode=True, max_length=3)


def with_cache(**fields):
    layer = make(**fields)
    layer.init_cache(X.shape)
    return layer


WRONG = {
    "no cache": (lambda: make()(X, decode=True), ValueError, "call init_cache((batch, length, features)) first"),
    "a key": (lambda: with_cache()(X, X, decode=True), ValueError, "pass the query only"),
    "key_mask": (lambda: with_cache()(X, key_mask=X[..., 0] > 0, decode=True), ValueError, "takes no key_mask"),
    "positions": (
        lambda: with_cache()(X, query_positions=jnp.arange(LENGTH), decode=True), ValueError, "takes no positions"),
    "two axes": (lambda: make(attention_axes=(1, 2)).init_cache((2, 3, 4, WIDTH)), ValueError, "one attention axis"),
    "other batch": (lambda: with_cache()(X[:1], decode=True), ValueError, "to fit the cache"),
    "too many tokens": (
        lambda: with_cache()(np.concatenate([X, X], 1), decode=True), ValueError, "the capacity of the cache is 11"),
    "lengths, not ragged": (
        lambda: with_cache()(X, lengths=jnp.array([1, 2]), decode=True), ValueError, "ragged=True"),
    "features": (lambda: make().init_cache((2, LENGTH, 5)), ValueError, "in_features=16); got (2, 11, 5)"),
    "a length alone": (lambda: make().init_cache((WIDTH,)), ValueError, "input_shape must be (*batch, length"),
    "int8": (lambda: make().init_cache(X.shape, jnp.int8), TypeError, "attnlib.KVCache has int8"),
    "max_length": (lambda: make().set_view(decode=True, batch_size=2, max_length=0), ValueError, "max_length must be"),
    "decode": (lambda: make(decode=1), TypeError, "decode must be True or False"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_refused_with_the_remedy(name):
    assert_refused(WRONG[name])


def test_a_call_that_is_refused_leaves_the_cache_as_it_was():
    layer = with_cache(decode=True)
    step(layer, X[:, :4])
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Cache)))
    with pytest.raises(ValueError, match="capacity"):
        layer(X)
    assert_same(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Cache))), before)
