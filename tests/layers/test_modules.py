"""The linen modules: equal to the pure layers bit by bit, their parameter trees, and how they live in Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_finite, assert_same
from flax import linen as nn

import attnlib
from attnlib import masks, modifiers, scores

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
KEY = np.random.default_rng(1).normal(size=(2, 7, 8)).astype(np.float32)
REAL = np.random.default_rng(2).random((2, 7)) < 0.6
RNG = jax.random.key(0)


def shapes(tree):
    return jax.tree.map(lambda x: x.shape, tree)


# MultiHeadAttention equals the pure layer

# name: (fields of the module, options of the call to both, options that the pure layer takes instead of fields)
EQUAL = {
    "plain": ({}, {}, {}),
    "sizes": (dict(key_dim=5, value_dim=6, num_kv_heads=2, output_shape=(3, 2)), {}, {}),
    "gate, no bias": (dict(use_gate=True, use_bias=False), dict(is_causal=True), {}),
    "window and masks": (
        dict(sliding_window=2),
        dict(query_mask=np.arange(10).reshape(2, 5) % 4 != 1, key_mask=np.arange(10).reshape(2, 5) % 3 != 1,
             mask=masks.Causal(1)),
        dict(sliding_window=2),
    ),
    "additive": (dict(score="additive"), dict(bias=np.ones((5, 1), np.float32)), dict(score="additive")),
    "soft cap": (dict(logits_soft_cap=1.0, precision="highest"), {}, dict(logits_soft_cap=1.0, precision="highest")),
    "soft cap of the call": (dict(logits_soft_cap=9.0), dict(logits_soft_cap=1.0), {}),
    "axes": (dict(attention_axes=-3), {}, dict(attention_axes=0)),
    "bfloat16": (dict(dtype=jnp.bfloat16), {}, dict(dtype=jnp.bfloat16)),
    "blockwise": (dict(implementation="blockwise", block_sizes=(2, 3)), {},
                  dict(implementation="blockwise", block_sizes=(2, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_module_equals_pure_layer_bit_by_bit(name):
    fields, call, pure = EQUAL[name]
    layer = attnlib.MultiHeadAttention(num_heads=4, bias_init=nn.initializers.normal(), **fields)

    @jax.jit
    def both(x):
        params = layer.init(RNG, x)["params"]
        made = layer.apply({"params": params}, x, return_weights=True, **call)
        return made, attnlib.multi_head_attention(params, x, return_weights=True, **call, **pure)

    assert_same(*both(X))


def test_gradients_and_dropout_equal_those_of_the_pure_layer():
    layer = attnlib.MultiHeadAttention(num_heads=4, dropout_rate=0.3, use_gate=True)
    params = jax.jit(lambda: layer.init(RNG, X, deterministic=True)["params"])()
    key = jax.random.key(7)

    def module(params):
        return jnp.sum(layer.apply({"params": params}, X, deterministic=False, dropout_rng=key) ** 2)

    def pure(params):
        return jnp.sum(attnlib.multi_head_attention(params, X, dropout_rate=0.3, dropout_rng=key) ** 2)

    assert_same(*(jax.jit(jax.value_and_grad(function))(params) for function in (module, pure)))


def test_parameters_are_laid_out_as_the_pure_layer_makes_them():
    fields = dict(num_heads=4, num_kv_heads=2, value_dim=6, output_shape=(3, 2), use_gate=True, score="additive")
    variables = jax.eval_shape(attnlib.MultiHeadAttention(**fields).init, RNG, X, KEY)
    assert set(variables) == {"params"}
    expected = jax.eval_shape(lambda: attnlib.init_multi_head_attention(RNG, 12, key_features=8, **fields))
    assert shapes(variables["params"]) == shapes(expected)
    assert shapes(variables["params"]) == dict(
        query=dict(kernel=(12, 4, 3), bias=(4, 3)), key=dict(kernel=(8, 2, 3), bias=(2, 3)),
        value=dict(kernel=(8, 2, 6), bias=(2, 6)), out=dict(kernel=(4, 6, 3, 2), bias=(3, 2)),
        gate=dict(kernel=(12, 4, 6), bias=(4, 6)), score=dict(scale=(4, 3)),
    )  # fmt: skip


def test_fields_can_be_read_off_a_built_layer():
    layer = attnlib.MultiHeadAttention(num_heads=4, num_kv_heads=2, key_dim=3, attention_axes=(1,), dropout_rate=0.1)
    assert (layer.num_heads, layer.num_kv_heads, layer.key_dim, layer.attention_axes) == (4, 2, 3, (1,))
    assert (layer.value_dim, layer.dropout_rate, layer.use_bias, layer.score) == (None, 0.1, True, "dot")


def test_initialisers_and_param_dtype():
    """Each kernel draws for itself; custom initialisers and dtypes reach every parameter."""
    layer = attnlib.MultiHeadAttention(num_heads=4, param_dtype=jnp.bfloat16, score="additive", use_gate=True,
                                       bias_init=nn.initializers.constant(0.5))  # fmt: skip
    params = layer.init(RNG, X.astype(jnp.bfloat16))["params"]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    assert all(np.all(p["bias"] == 0.5) for name, p in params.items() if name != "score")
    kernels = [np.asarray(p["kernel"], np.float32).ravel() for name, p in params.items() if name in ("key", "value")]
    assert not np.array_equal(*kernels)
    assert layer.apply({"params": params}, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


# The two layers without heads


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (attnlib.AdditiveAttention(), dict(scale=(8,))),
        (attnlib.AdditiveAttention(use_scale=False), {}),
        (attnlib.DotProductAttention(), {}),
        (attnlib.DotProductAttention(use_scale=True), dict(scale=())),
        (attnlib.DotProductAttention(score_mode="concat"), dict(concat_score_weight=())),
        (attnlib.DotProductAttention(use_scale=True, score_mode="concat"), dict(scale=(), concat_score_weight=())),
    ],
    ids=["additive", "additive, no scale", "dot", "dot, scale", "concat", "concat, scale"],
)
def test_parameters_of_layers_without_heads(layer, expected):
    variables = layer.init(RNG, KEY)
    assert shapes(variables.get("params", {})) == expected
    assert set(variables) <= {"params"}
    if isinstance(layer, attnlib.DotProductAttention):
        assert all(leaf == 1 for leaf in jax.tree.leaves(variables))


def test_additive_scale_is_glorot_uniform():
    """As Keras draws a vector of D: uniform between -sqrt(3 / D) and sqrt(3 / D)."""
    x = jnp.ones((1, 2, 3000))
    scale = attnlib.AdditiveAttention().init(RNG, x)["params"]["scale"]
    limit = (3 / 3000) ** 0.5
    assert np.max(np.abs(scale)) <= limit
    assert abs(float(jnp.std(scale)) - limit / 3**0.5) < 0.02 * limit
    assert abs(float(jnp.mean(scale))) < 0.05 * limit


# The score knows nothing of axes: each kind of layer has two of the four by default.
AXES = {"additive": (None, (-3, -2)), "dot": (-2, (1,)), "concat": ((-3, -2), None)}


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        pytest.param(kind, axes, marks=() if axes in AXES[kind] else pytest.mark.slow)
        for kind in AXES
        for axes in (None, -2, (-3, -2), (1,))
    ],
    ids=str,
)
def test_layers_without_heads_are_attention_of_one_head(kind, axes, keys):
    query, key, value = (keys.normal(2, *n, d) for n, d in [((3, 5), 8), ((3, 5), 8), ((3, 5), 6)])
    weight, scale = jnp.float32(0.7), jnp.float32(1.3)
    layer, params, score = {
        "additive": (attnlib.AdditiveAttention, dict(scale=jnp.arange(8.0)), scores.Additive(jnp.arange(8.0))),
        "dot": (attnlib.DotProductAttention, {}, scores.Dot(1.0)),
        "concat": (attnlib.DotProductAttention, dict(scale=scale, concat_score_weight=weight),
                   scores.Concat(weight, scale)),
    }[kind]  # fmt: skip
    fields = dict(use_scale=True, score_mode="concat") if kind == "concat" else {}
    with_heads = {None: None, -2: -3, (-3, -2): (-4, -3), (1,): (1,)}[axes]

    @jax.jit
    def both(*operands):
        options = dict(is_causal=True, return_weights=True)
        made = layer(attention_axes=axes, **fields).apply({"params": params}, *operands, **options)
        one_head = (x[..., None, :] for x in operands)
        return made, attnlib.attention(*one_head, score=score, attention_axes=with_heads, **options)

    made, (output, weights) = jax.tree.map(np.asarray, both(query, key, value))
    batch_axes = 1 if axes in (None, (-3, -2)) else 2
    assert_close(made, (output[..., 0, :], np.squeeze(weights, batch_axes)), length=15)


def test_options_of_layers_without_heads():
    """The call takes what changes logits and positions; without a key, its positions are the query's."""
    places = jnp.array([3, 0, 7, 1, 9])
    options = dict(logits_soft_cap=2.0, sink=0.3, score_mod=modifiers.ALiBi(jnp.ones(1)), is_causal=True)
    made = attnlib.DotProductAttention().apply({}, X, query_positions=places, **options)
    one_head = [X[..., None, :]] * 3
    expected = attnlib.dot_product_attention(
        *one_head, scale=1.0, query_positions=places, key_positions=places, **options
    )
    assert_close(made, expected[..., 0, :], length=12)


@pytest.mark.parametrize("layer", [attnlib.AdditiveAttention(), attnlib.DotProductAttention()],
                         ids=["additive", "dot"])  # fmt: skip
def test_masks_of_layers_without_heads(layer):
    """Masks and biases have no head axis: (B, T, S) is of the weights' rank here."""
    query, variables = X[..., :8], layer.init(RNG, KEY)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.5
    _, weights = layer.apply(variables, query, KEY, mask=mask, return_weights=True)
    assert weights.shape == (2, 5, 7)
    assert np.array_equal(weights != 0, mask)
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    _, same = layer.apply(variables, query, KEY, bias=bias, return_weights=True)
    assert_close(same, weights)
    _, pair = layer.apply(variables, query, KEY, mask=mask[0], return_weights=True)
    assert np.array_equal(pair != 0, np.broadcast_to(mask[0], (2, 5, 7)))
    _, padded = layer.apply(variables, query, KEY, key_mask=REAL, mask=masks.Causal(2), return_weights=True)
    assert np.array_equal(padded != 0, REAL[:, None] & np.tri(5, 7, 2, dtype=bool))
    with pytest.raises(ValueError, match="mask must broadcast"):
        layer.apply(variables, query, KEY, mask=mask[:, :4])


@pytest.mark.parametrize(
    "layer",
    [attnlib.AdditiveAttention(), attnlib.DotProductAttention(use_scale=True), attnlib.MultiHeadAttention(2)],
    ids=["additive", "dot", "multi-head"],
)
def test_padding_may_hold_anything(layer):
    """Masked query rows give zero output (before the output projection); NaN in padding leaves gradients finite."""
    query_mask, key_mask = np.arange(10).reshape(2, 5) % 3 != 1, REAL
    params = layer.init(RNG, X[..., :8], KEY)["params"]

    @jax.jit
    def program(query, key):
        def loss(params):
            output = layer.apply({"params": params}, query, key, query_mask=query_mask, key_mask=key_mask)
            return jnp.sum(output**2), output

        return jax.grad(loss, has_aux=True)(params)

    clean = program(X[..., :8], KEY)
    dirty = program(
        np.where(query_mask[..., None], X[..., :8], np.nan).astype(np.float32),
        np.where(key_mask[..., None], KEY, np.inf).astype(np.float32),
    )
    assert_finite(clean)
    assert_same(dirty, clean)
    assert not np.any(clean[1][~query_mask])


# Dropout in modules

LAYERS = {
    "multi-head": lambda **fields: attnlib.MultiHeadAttention(num_heads=2, **fields),
    "additive": attnlib.AdditiveAttention,
    "dot": attnlib.DotProductAttention,
}


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout(kind):
    make = LAYERS[kind]
    layer = make(dropout_rate=0.5)
    variables = layer.init({"params": RNG, "dropout": RNG}, X, deterministic=False)
    plain = make().apply(variables, X)

    def dropped(key, **options):
        return layer.apply(variables, X, deterministic=False, rngs={"dropout": jax.random.key(key)}, **options)

    assert_same(layer.apply(variables, X, deterministic=True), plain)
    assert_same(make(dropout_rate=0.5, deterministic=True).apply(variables, X), plain)
    assert_same(dropped(1), dropped(1))
    assert not np.array_equal(dropped(1), dropped(2))
    assert not np.array_equal(dropped(1), plain)
    assert_same(  # the call's key, where there is one
        layer.apply(variables, X, deterministic=False, dropout_rng=jax.random.key(5)),
        dropped(1, dropout_rng=jax.random.key(5)),
    )
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, X)
    with pytest.raises(ValueError, match="deterministic"):
        make(dropout_rate=0.5, deterministic=True).apply(variables, X, deterministic=True)
    with pytest.raises(Exception, match='PRNG for "dropout"'):
        layer.apply(variables, X, deterministic=False)
    for rate in (1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\)"):
            make(dropout_rate=rate).apply(variables, X, deterministic=True)


# Weights


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_are_returned_or_sown(kind):
    layer = LAYERS[kind]()
    variables = layer.init(RNG, X)
    output, weights = layer.apply(variables, X, return_weights=True)
    assert weights.shape == ((2, 2, 5, 5) if kind == "multi-head" else (2, 5, 5))
    made, updated = layer.apply(variables, X, sow_weights=True, mutable=["intermediates"])
    assert_same(made, output)
    assert_same(updated["intermediates"]["attention_weights"], (weights,))
    (both, again), _ = layer.apply(variables, X, sow_weights=True, return_weights=True, mutable=["intermediates"])
    assert_same((both, again), (output, weights))
    assert_same(layer.apply(variables, X, sow_weights=True), output)  # silent where nothing collects


@pytest.mark.parametrize("kind", LAYERS)
def test_key_and_value_default(kind):
    layer = LAYERS[kind]()
    variables = layer.init(RNG, X)
    assert_same(layer.apply(variables, X), layer.apply(variables, X, X, X))
    assert_same(layer.apply(variables, X, X[:, ::-1]), layer.apply(variables, X, X[:, ::-1], X[:, ::-1]))


# In Flax


class Block(nn.Module):
    """A residual block, as users write them."""

    rate: float = 0.2

    @nn.compact
    def __call__(self, x, _=None):
        layer = attnlib.MultiHeadAttention(num_heads=2, dropout_rate=self.rate, name="attention")
        attended = layer(x, deterministic=False)
        return x + attended, None


def test_lifted_transformations():
    """nn.remat, nn.jit, nn.vmap and nn.scan over the modules: parameters, dropout streams, gradients."""
    rngs = {"params": RNG, "dropout": jax.random.key(1)}
    block = Block()
    params = jax.jit(block.init)(rngs, X)["params"]

    def loss(module):
        def function(params):
            output, _ = module.apply({"params": params}, X, rngs={"dropout": jax.random.key(2)})
            return jnp.sum(output**2)

        return jax.jit(jax.value_and_grad(function))(params)

    assert_close(loss(nn.remat(Block)()), loss(block), length=12)
    assert_close(loss(nn.jit(Block)(rate=0.0)), loss(Block(rate=0.0)), length=12)  # Flax's jit gives other streams

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3)()
    variables = jax.jit(lambda: stack.init(rngs, X, None))()
    assert variables["params"]["attention"]["query"]["kernel"].shape == (3, 12, 2, 6)
    output, _ = jax.jit(lambda v: stack.apply(v, X, None, rngs={"dropout": jax.random.key(2)}))(variables)
    assert_finite(output)

    many = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, in_axes=0)()
    xs = np.stack([X, X, X])
    variables = jax.jit(lambda: many.init(rngs, xs))()
    outputs, _ = jax.jit(lambda v: many.apply(v, xs, rngs={"dropout": jax.random.key(2)}))(variables)
    assert not np.array_equal(outputs[0], outputs[1])  # parameters and dropout of their own


def test_a_module_in_setup_and_called_twice():
    class Model(nn.Module):
        def setup(self):
            self.attention = attnlib.MultiHeadAttention(num_heads=2)

        def __call__(self, x):
            return self.attention(self.attention(x))

    variables = Model().init(RNG, X)
    assert set(variables["params"]) == {"attention"}
    params = variables["params"]["attention"]
    twice = jax.jit(lambda x: attnlib.multi_head_attention(params, attnlib.multi_head_attention(params, x)))
    assert_same(jax.jit(lambda x: Model().apply(variables, x))(X), twice(X))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (attnlib.DotProductAttention(score_mode="general"), 'score_mode must be "dot" or "concat"; got \'general\''),
        (attnlib.AdditiveAttention(attention_axes=3), "attention_axes must name axes among the first 2"),
        (attnlib.AdditiveAttention(implementation="flash"), "implementation 'flash' is unknown"),
        (attnlib.MultiHeadAttention(num_heads=4, sliding_window=0), "sliding_window must be an int >= 1; got 0"),
        (attnlib.MultiHeadAttention(num_heads=4, logits_soft_cap=-1.0), "logits_soft_cap must be a number in"),
    ],
)
def test_wrong_fields_are_refused(layer, text):
    with pytest.raises(ValueError) as caught:
        layer.init(RNG, X)
    assert text in str(caught.value)
