"""What layers add around attention: norms of query and key, rotary positions, learned scales, sinks and biases."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_same

import attnlib
from attnlib import masks, modifiers, positions, scores

HEADS, FEATURES, LENGTH = 4, 8, 11
WIDTH = 12


def layer_and_input(keys, *shape, **fields):
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, key_dim=FEATURES, **fields)
    x = keys.normal(*(shape or (2, LENGTH)), WIDTH)
    variables = jax.jit(lambda key: layer.init(key, x))(next(keys))
    moved = jax.tree.map(
        lambda p: jnp.asarray(p + 0.3 * np.asarray(keys.normal(*p.shape))), to_numpy(variables["params"])
    )
    return layer, moved, x


def to_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def projected(params, x):
    return [
        jnp.einsum("btc,cnd->btnd", x, params[n]["kernel"]) + params[n]["bias"][None, None]
        for n in ("query", "key", "value")
    ]


def finished(params, attended):
    return jnp.einsum("btnd,ndo->bto", attended, params["out"]["kernel"]) + params["out"]["bias"][None, None]


FIELDS = {
    "use_scale": dict(use_scale=True),
    "layer norms": dict(normalize_qk=True),
    "rms norms, rotary": dict(normalize_qk="rms", rotary=True),
    "sink": dict(use_sink=True),
    "alibi": dict(score_mod=modifiers.ALiBi(modifiers.alibi_slopes(HEADS))),
    "relative bias": dict(score_mod=attnlib.RelativePositionBias(sizes=4)),
    "buckets": dict(score_mod=attnlib.BucketedPositionBias(num_buckets=8, max_distance=7)),
    "all, additive": dict(
        score="additive", normalize_qk="rms", rotary=True, use_sink=True, num_kv_heads=2, num_memory=3
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_module_equals_pure_layer_bit_by_bit(name, keys):
    layer, params, x = layer_and_input(keys, **FIELDS[name])
    options = {field: value for field, value in FIELDS[name].items() if field in ("score", "normalize_qk", "rotary")}
    pure = dict(params)
    modifier = FIELDS[name].get("score_mod")
    if isinstance(modifier, nn.Module):
        modifier = modifier.bind({"params": pure.pop("score_mod")})(HEADS)

    # Two programs: XLA may fuse two copies of one computation in a program differently.
    made = jax.jit(lambda params: layer.apply({"params": params}, x, is_causal=True))(params)
    of_function = jax.jit(
        lambda pure, modifier: attnlib.multi_head_attention(pure, x, is_causal=True, score_mod=modifier, **options)
    )
    assert_same(made, of_function(pure, modifier))


@pytest.mark.parametrize("name", FIELDS)
def test_parameters_are_those_of_the_pure_layer(name, keys):
    fields = {field: value for field, value in FIELDS[name].items() if field not in ("score_mod", "rotary")}
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, key_dim=FEATURES, **FIELDS[name])
    params = jax.eval_shape(lambda: layer.init(next(keys), keys.normal(2, LENGTH, WIDTH)))["params"]
    made = jax.eval_shape(
        lambda: attnlib.init_multi_head_attention(next(keys), WIDTH, num_heads=HEADS, key_dim=FEATURES, **fields)
    )
    shapes = jax.tree.map(jnp.shape, {group: p for group, p in params.items() if group != "score_mod"})
    assert shapes == jax.tree.map(jnp.shape, made)


def test_what_options_begin_as(keys):
    """A layer with them computes at first what one without computes, sinks apart."""
    plain = attnlib.MultiHeadAttention(num_heads=HEADS, key_dim=FEATURES)
    x = keys.normal(2, LENGTH, WIDTH)
    params = plain.init(next(keys), x)["params"]
    scaled = plain.copy(use_scale=True, score_mod=attnlib.RelativePositionBias(3, nn.initializers.zeros))
    variables = scaled.init(next(keys), x)["params"]
    assert variables["score"]["scale"].shape == (HEADS,)
    assert_close(scaled.apply({"params": {**variables, **params}}, x), plain.apply({"params": params}, x))
    sunk = plain.copy(use_sink=True)
    made = sunk.apply({"params": {**params, "sink": {"logit": jnp.zeros(HEADS)}}}, x)
    assert_same(made, plain.apply({"params": params}, x, sink=jnp.zeros(HEADS)))
    assert_same(made, plain.apply({"params": params}, x, sink=0.0))


@pytest.mark.parametrize("kind", ["layer", "rms", True])
def test_norms_are_those_of_flax(kind, keys):
    layer, params, x = layer_and_input(keys, normalize_qk=kind)
    norm = nn.RMSNorm() if kind == "rms" else nn.LayerNorm(use_bias=False)

    @jax.jit
    def both(params):
        query, key, value = projected(params, x)
        query, key = (
            norm.apply({"params": params[f"{name}_norm"]}, array) for name, array in (("query", query), ("key", key))
        )
        expected = finished(params, attnlib.dot_product_attention(query, key, value))
        return layer.apply({"params": params}, x), expected

    assert_close(*both(params), length=LENGTH)


def test_norms_in_half_precision_are_computed_in_float32(keys):
    layer, params, x = layer_and_input(keys, normalize_qk="rms", dtype=jnp.float16)
    large = jax.tree.map(lambda p: p * 300, {name: params[name] for name in ("query", "key")})
    made = layer.apply({"params": {**params, **large}}, x)
    assert made.dtype == jnp.float16
    expected = layer.copy(dtype=jnp.float32).apply({"params": {**params, **large}}, x)
    assert_close(made.astype(jnp.float32), expected, eps=1e-3, length=LENGTH)


@pytest.mark.parametrize("rotary", [True, functools.partial(positions.rotary_embedding, base=100.0, features=4)])
def test_rotary_turns_query_and_key(rotary, keys):
    layer, params, x = layer_and_input(keys, rotary=rotary)
    turn = positions.rotary_embedding if rotary is True else rotary

    @jax.jit
    def both(params):
        query, key, value = projected(params, x)
        expected = finished(params, attnlib.dot_product_attention(turn(query), turn(key), value, is_causal=True))
        return layer.apply({"params": params}, x, is_causal=True), expected

    assert_close(*both(params), length=LENGTH)


def test_positions_of_packed_documents(keys):
    """Two documents in one row, positions starting anew, are the documents alone: rotary, ALiBi and windows."""
    layer, params, x = layer_and_input(
        keys, rotary=True, score_mod=modifiers.ALiBi(modifiers.alibi_slopes(HEADS)), sliding_window=3
    )
    ids = jnp.asarray([[0] * 6 + [1] * 5, [0] * 4 + [1] * 7])
    places = jnp.asarray([[*range(6), *range(5)], [*range(4), *range(7)]])

    @jax.jit
    def each(params, x):
        made = layer.apply({"params": params}, x, is_causal=True, mask=masks.Segments(ids), query_positions=places)
        parts = [(x[row, :first], x[row, first:]) for row, first in ((0, 6), (1, 4))]
        alone = [[layer.apply({"params": params}, part[None], is_causal=True)[0] for part in pair] for pair in parts]
        return made, jnp.stack([jnp.concatenate(pair) for pair in alone])

    assert_close(*each(params, x), length=LENGTH)


def test_positions_along_a_middle_axis(keys):
    """Attention along axis 1 of (batch, time, place, features), positions of each (batch, place)."""
    layer, params, x = layer_and_input(keys, 2, LENGTH, 3, rotary=True, attention_axes=1)
    places = keys.integers(0, 30, 2, 3, LENGTH)
    apply = jax.jit(lambda x, places: layer.apply({"params": params}, x, is_causal=True, query_positions=places))
    made = np.asarray(apply(x, places))
    # With one axis less, `attention_axes=1` is the same axis.
    x, places = np.asarray(x), np.asarray(places)
    for b, p in np.ndindex(2, 3):
        assert_close(made[b, :, p], np.asarray(apply(x[b : b + 1, :, p], places[b, p]))[0], length=LENGTH)


def test_gradients_reach_every_parameter(keys):
    layer, params, x = layer_and_input(
        keys, 2, 3, 4, use_sink=True, normalize_qk=True, use_scale=True, use_gate=True, rotary=True,
        score_mod=attnlib.RelativePositionBias(sizes=(3, 4)), num_memory=2,
    )  # fmt: skip
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(layer.apply({"params": p}, x)))))(params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(gradient)) and np.any(gradient != 0), jax.tree_util.keystr(path)


def test_a_table_is_shared_by_layers(keys):
    class Stack(nn.Module):
        def setup(self):
            bias = attnlib.BucketedPositionBias(num_buckets=8, max_distance=9)
            self.layers = [attnlib.MultiHeadAttention(num_heads=HEADS, score_mod=bias) for _ in range(2)]

        def __call__(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    variables = Stack().init(next(keys), keys.normal(2, LENGTH, WIDTH))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    assert sum("table" in path for path in paths) == 1


WRONG = [
    (dict(normalize_qk="batch"), {}, ValueError, 'normalize_qk must be False, True (as "layer"), "layer" or "rms"'),
    (dict(use_scale=True, score=scores.Dot()), {}, ValueError, 'use_scale is for score="dot"'),
    (dict(rotary="yes"), {}, TypeError, "rotary must be True, False or a function"),
    (dict(use_sink=True), dict(sink=0.0), ValueError, "Leave sink=None"),
    (dict(score_mod=attnlib.RelativePositionBias(sizes=0)), {}, ValueError, "sizes must be an int >= 1"),
    (dict(score_mod=attnlib.RelativePositionBias(sizes=(3, 3))), {}, ValueError, "each of 1 attention axes"),
    ({}, dict(query_positions=np.zeros((3, LENGTH), int)), ValueError, "query_positions must have shape"),
]


@pytest.mark.parametrize(("fields", "options", "error", "text"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_options_are_refused(fields, options, error, text, keys):
    layer = attnlib.MultiHeadAttention(num_heads=HEADS, key_dim=FEATURES, **fields)
    with pytest.raises(error) as caught:
        layer.init(next(keys), keys.normal(2, LENGTH, WIDTH), **options)
    assert text in str(caught.value)


def test_parameters_of_other_options_are_refused(keys):
    params = attnlib.init_multi_head_attention(next(keys), WIDTH, num_heads=HEADS, normalize_qk="rms")
    x = keys.normal(2, LENGTH, WIDTH)
    with pytest.raises(ValueError, match="params hold query_norm"):
        attnlib.multi_head_attention(params, x)
    del params["query_norm"], params["key_norm"]
    with pytest.raises(ValueError, match="params lack query_norm"):
        attnlib.multi_head_attention(params, x, normalize_qk=True)
