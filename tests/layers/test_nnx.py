"""The NNX modules: programs and parameters of the linen modules, Flax's random numbers, and how they live in NNX."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import assert_close, assert_finite, assert_same
from flax import linen as nn
from flax import nnx, serialization
from jax.sharding import AxisType
from refusals import assert_refused

import attnlib
from attnlib import masks, modifiers, positions, scores

HEADS, LENGTH, WIDTH = 4, 5, 12
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
KEY = np.random.default_rng(1).normal(size=(2, 7, 8)).astype(np.float32)
REAL = np.random.default_rng(2).random((2, 7)) < 0.6
RNG = jax.random.key(0)


def pure(layer):
    """The parameters, as the nested dict that linen has."""
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def function_of_params(layer):
    """The call of a layer as a function of the tree of its parameters."""
    graph, state, rest = nnx.split(layer, nnx.Param, ...)

    def call(params, *args, **options):
        new = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(new, params)
        return nnx.merge(graph, new, rest)(*args, **options)

    return call


def multi_head(features=(WIDTH, WIDTH), **fields):
    """(the linen module, the NNX module) of the same fields."""
    bias = fields.pop("bias_module", None)
    linen_bias = dict(score_mod=getattr(attnlib, bias[0])(**bias[1])) if bias else {}
    nnx_bias = (
        dict(score_mod=getattr(attnlib.nnx, bias[0])(num_heads=HEADS, rngs=nnx.Rngs(1), **bias[1])) if bias else {}
    )
    return (
        attnlib.MultiHeadAttention(num_heads=HEADS, **fields, **linen_bias),
        attnlib.nnx.MultiHeadAttention(HEADS, features[0], key_features=features[1], rngs=nnx.Rngs(0), **fields,
                                       **nnx_bias),
    )  # fmt: skip


PLACES = jnp.array([3, 0, 7, 1, 9])
# name: (modules, arguments of the call, options of the call)
LAYERS = {
    "plain": (multi_head, (X,), {}),
    "sizes": (
        lambda: multi_head((WIDTH, 8), key_dim=5, value_dim=6, num_kv_heads=2, output_shape=(3, 2)), (X, KEY), {}
    ),
    "gate, no bias": (lambda: multi_head(use_gate=True, use_bias=False), (X,), dict(is_causal=True)),
    "window and masks": (
        lambda: multi_head((WIDTH, 8), sliding_window=2), (X, KEY),
        dict(query_mask=np.arange(10).reshape(2, 5) % 4 != 1, key_mask=REAL, mask=masks.Causal(1)),
    ),
    "additive": (
        lambda: multi_head(score="additive", use_sink=True, num_memory=2), (X,), dict(bias=np.ones((5, 1), np.float32))
    ),
    "scale, cap": (lambda: multi_head(use_scale=True, logits_soft_cap=1.0, normalize=False), (X,), {}),
    "cap of the call": (lambda: multi_head(logits_soft_cap=9.0), (X,), dict(logits_soft_cap=1.0)),
    "norms, rotary": (
        lambda: multi_head(key_dim=4, normalize_qk="rms", rotary=True), (X,), dict(query_positions=PLACES)
    ),
    "layer norms, rotary function": (
        lambda: multi_head(normalize_qk=True, rotary=functools.partial(positions.rotary_embedding, features=2)),
        (X,), {},
    ),
    "axes": (lambda: multi_head(attention_axes=[-3]), (X,), dict(return_weights=True)),
    "bfloat16": (lambda: multi_head(dtype=jnp.bfloat16), (X,), {}),
    "tiles": (lambda: multi_head(implementation=["blockwise"], block_sizes=[2, 3]), (X,), dict(is_causal=True)),
    "alibi": (lambda: multi_head(score_mod=modifiers.ALiBi(modifiers.alibi_slopes(HEADS))), (X,), {}),
    "a function of the call": (lambda: multi_head(score_mod=modifiers.SoftCap(2.0)), (X,),
                               dict(score_mod=lambda logit, *_: 2 * logit)),
    "bilinear": (lambda: multi_head(score=scores.Bilinear(jnp.eye(3) + 0.5)), (X,), dict(sink=0.5)),
    "relative bias": (lambda: multi_head(bias_module=("RelativePositionBias", dict(sizes=[4]))), (X,), {}),
    "buckets": (
        lambda: multi_head(bias_module=("BucketedPositionBias", dict(num_buckets=8, max_distance=7))), (X,), {}
    ),
    "AdditiveAttention": (
        lambda: (attnlib.AdditiveAttention(), attnlib.nnx.AdditiveAttention(8, rngs=nnx.Rngs(0))),
        (X[..., :8], KEY), dict(key_mask=REAL, return_weights=True),
    ),
    "AdditiveAttention without scale": (
        lambda: (attnlib.AdditiveAttention(use_scale=False, normalize=False),
                 attnlib.nnx.AdditiveAttention(WIDTH, use_scale=False, normalize=False)),
        (X,), {},
    ),
    "DotProductAttention": (
        lambda: (attnlib.DotProductAttention(), attnlib.nnx.DotProductAttention()), (X[..., :8], KEY), dict(sink=0.3)
    ),
    "concat": (
        lambda: (attnlib.DotProductAttention(use_scale=True, score_mode="concat"),
                 attnlib.nnx.DotProductAttention(use_scale=True, score_mode="concat", rngs=nnx.Rngs(0))),
        (X,), dict(is_causal=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_programs_and_parameters_are_those_of_linen(name):
    """Equal jaxprs of the same tree of parameters: values and derivatives of every order are equal."""
    make, args, options = LAYERS[name]
    linen, layer = make()
    params = jax.eval_shape(lambda: linen.init(RNG, *args, **options)).get("params", {})
    assert jax.tree.map(jnp.shape, pure(layer)) == jax.tree.map(jnp.shape, params)
    call = function_of_params(layer)
    programs = [
        jax.make_jaxpr(lambda p: call(p, *args, **options))(params),
        jax.make_jaxpr(lambda p: linen.apply({"params": p}, *args, **options))(params),
    ]
    assert str(programs[0]) == str(programs[1])
    assert [np.asarray(const).tobytes() for const in programs[0].consts] == [
        np.asarray(const).tobytes() for const in programs[1].consts
    ]


def test_gradients_of_a_whole_training_step_equal_those_of_linen():
    """Through nnx.jit and nnx.value_and_grad, on linen's parameters."""
    linen, layer = multi_head(num_kv_heads=2, use_gate=True, normalize_qk="rms", bias_init=nn.initializers.normal())
    params = jax.jit(lambda: linen.init(RNG, X)["params"])()
    state = nnx.state(layer, nnx.Param)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(layer, state)

    def loss(call):
        return jnp.sum(jnp.sin(call(X, is_causal=True)))

    ours = nnx.jit(lambda layer: nnx.value_and_grad(loss)(layer))
    theirs = jax.jit(jax.value_and_grad(lambda p: loss(functools.partial(linen.apply, {"params": p}))))
    value, gradients = ours(layer)
    assert_same((value, nnx.to_pure_dict(gradients)), theirs(params))


FLAX = {
    "plain": {},
    "norms": dict(normalize_qk=True, bias_init=nnx.initializers.normal()),
    "grouped": dict(num_kv_heads=2, out_kernel_init=nnx.initializers.orthogonal(), use_bias=False),
}


@pytest.mark.parametrize("name", FLAX)
def test_equal_seeds_give_the_parameters_of_flax(name):
    fields = FLAX[name]
    if not fields.keys() <= inspect.signature(nnx.MultiHeadAttention.__init__).parameters.keys():
        pytest.skip("this Flax has no grouped heads")
    theirs = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(3), **fields)
    ours = attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(3), **fields)
    assert_same(pure(ours), attnlib.convert.from_flax(theirs))
    if name != "norms":  # from_flax takes a layer with the same paths
        assert_same(attnlib.convert.from_flax(ours), pure(ours))


def test_sizes_are_those_of_module_fields():
    """`convert.module_fields` gives the fields of an NNX module too; the features are those of the kernels."""
    params = attnlib.init_multi_head_attention(RNG, WIDTH, key_features=8, num_heads=4, num_kv_heads=2, use_gate=True)
    layer = attnlib.nnx.MultiHeadAttention(
        in_features=WIDTH, key_features=8, rngs=nnx.Rngs(0), **attnlib.convert.module_fields(params)
    )
    assert jax.tree.map(jnp.shape, pure(layer)) == jax.tree.map(jnp.shape, params)
    assert (layer.num_heads, layer.num_kv_heads, layer.in_features, layer.value_features) == (4, 2, WIDTH, 8)


# Dropout

DROPOUT = {
    "multi-head": lambda **fields: attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, **fields),
    "additive": lambda **fields: attnlib.nnx.AdditiveAttention(WIDTH, **fields),
    "dot": attnlib.nnx.DotProductAttention,
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout(kind):
    """A key for each call from the module's stream; the call decides, then the attribute."""
    make = DROPOUT[kind]
    layer, plain = make(dropout_rate=0.5, rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(0))
    call = nnx.jit(lambda layer, x: layer(x))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        layer(X)
    layer.train()
    first, second = call(layer, X), call(layer, X)
    assert not np.array_equal(first, second)
    expected = np.asarray(call(plain, X))
    layer.eval()
    assert_same(call(layer, X), expected)
    assert not np.array_equal(layer(X, deterministic=False), expected)
    assert_same(make(dropout_rate=0.5, deterministic=True, rngs=nnx.Rngs(0))(X), plain(X))

    again = make(dropout_rate=0.5, deterministic=False, rngs=nnx.Rngs(0))
    assert_same((call(again, X), call(again, X)), (first, second))
    own = functools.partial(again, X, deterministic=False)
    key = nnx.Rngs(dropout=7).dropout()
    assert_same(own(rngs=nnx.Rngs(dropout=7)), own(rngs=key))
    assert_same(own(rngs=nnx.Rngs(7).dropout), own(rngs=nnx.Rngs(7)))
    assert_same(again(X, deterministic=False, rngs=key), make(dropout_rate=0.5, keep_rngs=False, rngs=nnx.Rngs(0))(
        X, deterministic=False, rngs=key))  # fmt: skip


def test_a_layer_without_dropout_has_no_stream():
    """A stream is part of a checkpoint."""
    for kind, make in DROPOUT.items():
        assert not nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(0)), nnx.RngState)), kind
        assert not nnx.to_pure_dict(nnx.state(make(dropout_rate=0.5, keep_rngs=False, rngs=nnx.Rngs(0)), nnx.RngState))
        stream = nnx.to_pure_dict(nnx.state(make(dropout_rate=0.5, rngs=nnx.Rngs(0)), nnx.RngState))
        assert stream["rngs"].keys() == {"key", "count"}


# In NNX


class Block(nnx.Module):
    """A residual block, as users write them."""

    def __init__(self, rngs):
        self.attention = attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, dropout_rate=0.2, deterministic=False, rngs=rngs)

    def __call__(self, x):
        return x + self.attention(x, is_causal=True)


def test_a_stack_in_vmap_scan_and_remat():
    """Layers made by nnx.vmap, scanned with nnx.remat: the values and gradients of the layers one by one."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Block(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def apply(block, x):
        return nnx.remat(Block.__call__)(block, x)

    @nnx.jit
    def scanned(stack):
        return nnx.value_and_grad(lambda stack: jnp.sum(apply(stack, X) ** 2))(stack)

    @nnx.jit
    def one_by_one(stack):
        def loss(params):
            graph, _, rest = nnx.split(stack, nnx.Param, ...)
            x = X
            for n in range(3):
                x = nnx.merge(graph, *jax.tree.map(lambda leaf, n=n: leaf[n], (params, rest)))(x)
            return jnp.sum(x**2)

        return jax.value_and_grad(loss)(nnx.state(stack, nnx.Param))

    made, expected = scanned(make(nnx.Rngs(0))), one_by_one(make(nnx.Rngs(0)))
    assert_close(
        *(jax.tree.map(np.asarray, nnx.to_pure_dict(gradients)) for _, gradients in (made, expected)), length=60
    )
    assert_close(made[0], expected[0], length=60)


@pytest.mark.usefixtures("allow_promotion")  # optax's Adam takes a power of its count of steps
def test_a_training_step_with_penalty_and_constraint():
    def l2(kernel):
        return jnp.sum(kernel**2)

    model = attnlib.nnx.MultiHeadAttention(2, WIDTH, output_shape=1, dropout_rate=0.1, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    expected = sum(np.sum(np.square(getattr(model, name).kernel[...])) for name in ("query", "key", "value", "out"))
    np.testing.assert_allclose(attnlib.parameter_penalty(state, kernel_regularizer=l2), expected, rtol=1e-5)
    positive = attnlib.constrain(kernel_constraint=optax.projections.projection_non_negative)
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-2), positive), wrt=nnx.Param)
    model.train()

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            penalty = attnlib.parameter_penalty(nnx.state(model, nnx.Param), kernel_regularizer=l2)
            return jnp.mean((model(X)[..., 0] - jnp.mean(X, (1, 2))[:, None]) ** 2) + 1e-4 * penalty

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert float(jnp.min(model.query.kernel[...])) >= 0
    assert float(jnp.min(model.out.bias[...])) != 0


@pytest.mark.parametrize("kind", DROPOUT)
def test_weights_are_returned_or_sown(kind):
    layer = DROPOUT[kind](rngs=nnx.Rngs(0))
    output, weights = layer(X, return_weights=True)
    assert weights.shape == ((2, HEADS, LENGTH, LENGTH) if kind == "multi-head" else (2, LENGTH, LENGTH))
    if not hasattr(nnx, "capture"):  # older Flax sows into the module
        assert_same(layer(X, sow_weights=True), output)
        sown = nnx.pop(layer, nnx.Intermediate)
    else:
        made, sown = nnx.capture(layer, nnx.Intermediate)(X, sow_weights=True)
        assert_same(made, output)
    (captured,) = nnx.to_pure_dict(sown)["attention_weights"]
    assert_same(captured, weights)


def test_a_table_is_shared_by_layers():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            bias = attnlib.nnx.BucketedPositionBias(HEADS, num_buckets=8, max_distance=9, rngs=rngs)
            self.first, self.second = (
                attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, score_mod=bias, rngs=rngs) for _ in range(2)
            )

        def __call__(self, x):
            return self.second(self.first(x))

    stack = Stack(nnx.Rngs(0))
    assert sum("table" in path for path, _ in nnx.to_flat_state(nnx.state(stack, nnx.Param))) == 1
    gradients = nnx.jit(nnx.grad(lambda stack: jnp.sum(stack(X) ** 2)))(stack)
    assert np.any(np.asarray(gradients["first"]["score_mod"]["table"].get_value()))


def test_arrays_of_scores_and_modifiers_are_constants():
    """They are leaves of the state, not parameters, and a new value needs no new program."""
    slopes = modifiers.alibi_slopes(HEADS)
    layers = [attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, score=scores.Bilinear(jnp.eye(3)), rngs=nnx.Rngs(0),
                                             score_mod=modifiers.ALiBi(slopes * n)) for n in (1, 2)]  # fmt: skip
    assert pure(layers[0]).keys() == {"query", "key", "value", "out"}
    count = 0

    @nnx.jit
    def call(layer):
        nonlocal count
        count += 1
        return layer(X)

    assert not np.array_equal(*map(call, layers))
    assert count == 1


def test_as_a_pytree_and_shapes_alone():
    layer = attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, attention_axes=[1], rngs=nnx.Rngs(0))
    assert_same(jax.jit(lambda layer, x: layer(x))(layer, X), nnx.jit(lambda layer, x: layer(x))(layer, X))
    shapes = nnx.eval_shape(lambda: attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, dropout_rate=0.5, rngs=nnx.Rngs(0)))
    assert shapes.query.kernel.get_value().shape == (WIDTH, HEADS, 3)


def test_checkpoints():
    """Parameters, caches and streams through bytes, and whole layers through pickle."""
    layer = attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, dropout_rate=0.5, deterministic=False, rngs=nnx.Rngs(0))
    layer.init_cache(X.shape)
    layer(X[:, :3], decode=True)
    graph, keys, rest = nnx.split(layer, nnx.RngKey, ...)
    saved = serialization.to_bytes(nnx.to_pure_dict(rest))
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(rest)), saved)
    nnx.replace_by_pure_dict(rest, jax.tree.map(jnp.asarray, restored))
    copies = [nnx.merge(graph, keys, rest), pickle.loads(pickle.dumps(layer))]
    expected = layer(X[:, 3:], decode=True)
    for copy in copies:
        assert_same(copy(X[:, 3:], decode=True), expected)


@pytest.mark.devices
@pytest.mark.parametrize("how", ["names of initialisers", "metadata"])
def test_named_axes_are_sharded_under_a_mesh(how):
    """Parameters are made in shards, and keep their names."""
    heads = {"kernel": (None, "heads", None), "out": ("heads", None, None)}
    if how == "metadata":
        name = "out_sharding" if "out_sharding" in inspect.getsource(nnx.with_partitioning) else "sharding_names"
        fields = dict(kernel_metadata={name: heads["kernel"]}, out_kernel_metadata={name: heads["out"]})
    else:
        init = functools.partial(nnx.with_partitioning, nnx.initializers.lecun_normal())
        fields = dict(kernel_init=init(heads["kernel"]), out_kernel_init=init(heads["out"]))
    with jax.set_mesh(jax.make_mesh((4,), ("heads",), (AxisType.Auto,))):
        layer = attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0), **fields)
        outputs = np.asarray(nnx.jit(lambda layer, x: layer(x))(layer, X))
    for name, shape in {"query": (WIDTH, 1, 3), "out": (1, 3, WIDTH)}.items():
        kernel = getattr(layer, name).kernel[...]
        assert {shard.data.shape for shard in kernel.addressable_shards} == {shape}
    plain = attnlib.nnx.MultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0))
    assert_close(outputs, np.asarray(plain(X)), length=WIDTH)


# Mistakes


def make(*args, **fields):
    return attnlib.nnx.MultiHeadAttention(*args, **{"rngs": nnx.Rngs(0), **fields})


boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "heads", None))
long = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None, None, "heads"))
WRONG = {
    "qkv_features": (lambda: make(4, 12, qkv_features=16), TypeError, "write key_dim=qkv_features // num_heads."),
    "in_kv_features": (lambda: make(4, 12, in_kv_features=8), TypeError, "write key_features=in_kv_features."),
    "out_features": (lambda: make(4, 12, out_features=8), TypeError, "write output_shape=out_features."),
    "embed_dim": (lambda: make(4, embed_dim=8), TypeError, "write in_features=embed_dim."),
    "query_features": (lambda: make(4, query_features=8), TypeError, "write in_features=query_features."),
    "attention_fn": (lambda: make(4, 12, attention_fn=None), TypeError, "leave it out"),
    "regularizer": (lambda: make(4, 12, kernel_regularizer=None), TypeError, "attnlib.parameter_penalty(params"),
    "activity": (lambda: make(4, 12, activity_regularizer=None), TypeError, "penalty of the layer's output"),
    "too many by position": (lambda: make(4, 12, 3, 3), TypeError, "num_heads, in_features, key_dim by position"),
    "an option of the call": (lambda: make(4, 12, is_causal=True), TypeError, "is_causal in the call"),
    "rngs a key": (lambda: make(4, 12, rngs=RNG), TypeError, "rngs must be nnx.Rngs, such as nnx.Rngs(0)"),
    "rngs missing": (lambda: attnlib.nnx.AdditiveAttention(8), TypeError, "rngs must be nnx.Rngs"),
    "rngs missing, dropout": (
        lambda: attnlib.nnx.DotProductAttention(dropout_rate=0.5), TypeError, "rngs must be nnx.Rngs"),
    "heads": (lambda: make(4, 13), ValueError, "which must be an int; got 13 / 4. Pass key_dim."),
    "kv heads": (lambda: make(4, 12, num_kv_heads=3), ValueError, "num_kv_heads may be 1, 2, 4"),
    "features": (lambda: make(4, "12"), TypeError, "in_features must be an int"),
    "score": (lambda: make(4, 12, score="cosine"), ValueError, 'score must be "dot", "additive" or'),
    "rate": (lambda: make(4, 12, dropout_rate=1.5), ValueError, "dropout_rate must be in [0, 1)"),
    "a box of linen": (lambda: make(4, 12, kernel_init=boxed), TypeError, "Write nnx.with_partitioning(init, names)"),
    "names": (lambda: make(4, 12, kernel_init=long), ValueError, "names 3 axes at most"),
    "other features": (lambda: make(4, 12)(X[..., :8]), ValueError, "must have (12,) features"),
    "a call without key": (lambda: make(4, 12, dropout_rate=0.1, keep_rngs=False)(X, deterministic=False), ValueError,
                           "made with keep_rngs=False. Pass rngs=nnx.Rngs"),
    "rngs of the call": (lambda: make(4, 12, dropout_rate=0.1)(X, deterministic=False, rngs=0), TypeError,
                         "rngs must be one JAX random key"),
    "dropout_rng": (lambda: make(4, 12)(X, dropout_rng=RNG), TypeError, "write rngs=dropout_rng."),
    "inputs_kv": (lambda: make(4, 12)(X, inputs_kv=X), TypeError, "write key=inputs_kv."),
    "a field in the call": (lambda: make(4, 12)(X, sliding_window=3), TypeError, "in the constructor, nnx.Multi"),
    "lengths": (lambda: make(4, 12)(X, lengths=jnp.ones(2, int)), ValueError, "lengths counts the tokens"),
    "heads of a table": (
        lambda: make(4, 12, score_mod=attnlib.nnx.RelativePositionBias(3, 2, rngs=nnx.Rngs(0)))(X), ValueError, "4"),
    "size of a table": (
        lambda: attnlib.nnx.RelativePositionBias(0, 2, rngs=nnx.Rngs(0)), ValueError, "sizes must be an int >= 1"),
    "score_mode": (lambda: attnlib.nnx.DotProductAttention(score_mode="general"), ValueError, "score_mode must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_refused_with_the_remedy(name):
    assert_refused(WRONG[name])


def test_padding_may_hold_anything():
    """NaN in padding changes neither values nor gradients."""
    layer = make(HEADS, WIDTH, key_features=8)

    @nnx.jit
    def program(layer, key):
        return nnx.value_and_grad(lambda layer: jnp.sum(layer(X, key, key_mask=REAL) ** 2))(layer)

    clean = program(layer, KEY)
    dirty = program(layer, np.where(REAL[..., None], KEY, np.nan).astype(np.float32))
    clean, dirty = ((value, nnx.to_pure_dict(gradients)) for value, gradients in (clean, dirty))
    assert_finite(clean)
    assert_same(dirty, clean)
