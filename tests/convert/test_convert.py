"""Parameters of Flax, Keras and Equinox: attnlib computes with them what their own layers do, and gives them back.

PyTorch and state dicts are in test_convert_torch.py.
"""

import inspect
import os
import re
import subprocess
import sys
import textwrap

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_same
from flax import nnx

import attnlib
from attnlib import convert

pytestmark = pytest.mark.usefixtures("allow_promotion_in_file")  # Keras promotes ranks

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(2, 7, 10)).astype(np.float32)
Z = np.random.default_rng(2).normal(size=(2, 7, 9)).astype(np.float32)


def drawn(tree, seed=3):
    """Random numbers for all parameters: biases and norms begin as zeros and ones, which would hide a mistake."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jax.device_put(0.5 * rng.normal(size=x.shape).astype(np.float32)), tree)


def assert_computes(params, expected, *inputs, **fields):
    """The function and the module with the fields read off the parameters, both."""
    assert_close(attnlib.multi_head_attention(params, *inputs, **fields), jnp.asarray(expected), length=12)
    layer = attnlib.MultiHeadAttention(**convert.module_fields(params), **fields)
    declared = jax.eval_shape(layer.init, jax.random.key(0), *inputs)["params"]
    assert jax.tree.map(jnp.shape, declared) == jax.tree.map(jnp.shape, params)


# Flax


def random_state(module):
    """The keys and counts of a module's random streams, as numbers."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.RngState))
    assert state
    return jax.tree.map(lambda x: jax.random.key_data(x) if x.dtype != jnp.uint32 else x, state)


LINEN = {
    "self": ((X,), {}),
    "cross, other features": ((X, Y), dict(qkv_features=15, out_features=4)),
    "value of its own": ((X, Y, Z), dict(use_bias=False)),
    "norms": ((X, Y), dict(normalize_qk=True)),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    inputs, fields = LINEN[name]
    theirs = nn.MultiHeadDotProductAttention(num_heads=3, **fields)
    variables = {"params": drawn(jax.eval_shape(theirs.init, jax.random.key(0), *inputs)["params"])}
    params = convert.from_flax(variables["params"])
    normalize = "layer" if "normalize_qk" in fields else False
    output, expected = jax.jit(
        lambda params, variables, *inputs: (
            attnlib.multi_head_attention(params, *inputs, normalize_qk=normalize),
            theirs.apply(variables, *inputs),
        )
    )(params, variables, *inputs)
    assert_close(output, expected, length=12)
    assert convert.module_fields(params).get("normalize_qk", False) == normalize
    assert_same(convert.to_flax(params), variables["params"])


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads", "grouped"])
@pytest.mark.parametrize("from_state", [False, True], ids=["module", "state"])
def test_nnx(kv_heads, from_state):
    fields = dict(in_features=12, qkv_features=8, in_kv_features=10, out_features=5, normalize_qk=kv_heads == 4)
    if kv_heads == 2:
        if "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention.__init__).parameters:
            pytest.skip("this Flax has no num_kv_heads")
        fields["num_kv_heads"] = 2

    def made(seed):
        return nnx.MultiHeadAttention(4, **fields, dropout_rate=0.1, decode=False, rngs=nnx.Rngs(seed))

    theirs, other = made(0), made(1)
    nnx.update(theirs, drawn(nnx.state(theirs, nnx.Param)))
    params = convert.from_flax(nnx.state(theirs) if from_state else theirs)
    options = {"normalize_qk": "layer"} if fields["normalize_qk"] else {}
    expected = theirs(X, Y, deterministic=True)
    assert_close(attnlib.multi_head_attention(params, X, Y, **options), expected, length=12)

    streams = random_state(other)
    if from_state:
        state = nnx.state(other)
        assert convert.to_flax(params, state) is state
        nnx.update(other, state)
    else:
        assert convert.to_flax(params, other) is other
    assert_same(other(X, Y, deterministic=True), expected)
    assert_same(random_state(other), streams)


def test_flax_traced_and_abstract():
    """Under `jit` and `grad` it is a relayout like any other, and shapes alone pass too."""
    theirs = nn.MultiHeadDotProductAttention(num_heads=3)
    variables = {"params": drawn(jax.eval_shape(theirs.init, jax.random.key(0), X)["params"])}

    def loss(params):
        return jnp.sum(jnp.sin(attnlib.multi_head_attention(convert.from_flax(params), X)))

    expected = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(theirs.apply({"params": params}, X)))))(
        variables["params"]
    )
    assert_close(jax.jit(jax.grad(loss))(variables["params"]), expected, length=24)
    abstract = jax.eval_shape(theirs.init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, convert.from_flax(abstract)) == jax.tree.map(jnp.shape, variables["params"])


def test_flax_boxes_are_refused():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
    variables = nn.MultiHeadDotProductAttention(num_heads=3, kernel_init=init).init(jax.random.key(0), X)
    with pytest.raises(TypeError, match="unbox"):
        convert.from_flax(variables["params"])
    convert.from_flax(nn.meta.unbox(variables["params"]))


# Keras

of_keras_itself = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def keras_layer(name, *shapes, **fields):
    """A built layer with random weights."""
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    layer = getattr(keras.layers, name)(**fields)
    layer.build(list(shapes)) if name in ("Attention", "AdditiveAttention") else layer.build(*shapes)
    rng = np.random.default_rng(3)
    layer.set_weights([0.5 * rng.normal(size=w.shape).astype("float32") for w in layer.weights])
    return layer


KERAS = {
    "MultiHeadAttention": ("MultiHeadAttention", (X, Y, Z), dict(num_heads=2, key_dim=3, value_dim=4)),
    "no bias": ("MultiHeadAttention", (X,), dict(num_heads=2, key_dim=3, use_bias=False)),
    "output shape": ("MultiHeadAttention", (X, Y), dict(num_heads=3, key_dim=4, output_shape=(2, 5))),
    "GroupQueryAttention": ("GroupQueryAttention", (X, Y), dict(head_dim=3, num_query_heads=4, num_key_value_heads=2)),
    "gate": ("MultiHeadAttention", (X, Y), dict(num_heads=2, key_dim=3, value_dim=4, use_gate=True)),
    "grouped gate": (
        "GroupQueryAttention", (X,), dict(head_dim=3, num_query_heads=4, num_key_value_heads=1, use_gate=True)
    ),
}  # fmt: skip


@of_keras_itself
@pytest.mark.parametrize("name", KERAS)
def test_keras_multi_head(name):
    kind, inputs, fields = KERAS[name]
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    if "use_gate" in fields and "use_gate" not in inspect.signature(keras.layers.MultiHeadAttention).parameters:
        pytest.skip("this Keras has no gates")
    query, key, value = (*inputs, *inputs[-1:] * (3 - len(inputs)))
    layer = keras_layer(kind, query.shape, value.shape, key.shape, **fields)
    params = convert.from_keras(layer)
    # The weights asked for: without them Keras has another path, which knows value_dim or output shapes less well.
    expected, _ = layer(query, value, key, return_attention_scores=True)
    assert_computes(params, expected, *inputs)

    assert_same(convert.to_keras(params), layer.get_weights())
    other = type(layer)(**fields)
    with pytest.raises(ValueError, match="no weights yet"):
        convert.to_keras(params, other)
    other.build(query.shape, value.shape, key.shape)
    assert_same(convert.to_keras(params, other), layer.get_weights())
    assert_same(other.get_weights(), layer.get_weights())


SINGLE = {
    "additive": ("AdditiveAttention", {}, attnlib.AdditiveAttention()),
    "additive, no scale": ("AdditiveAttention", {"use_scale": False}, attnlib.AdditiveAttention(use_scale=False)),
    "dot": ("Attention", {}, attnlib.DotProductAttention()),
    "dot, scale": ("Attention", {"use_scale": True}, attnlib.DotProductAttention(use_scale=True)),
    "concat": ("Attention", {"score_mode": "concat"}, attnlib.DotProductAttention(score_mode="concat")),
    "concat, scale": ("Attention", {"use_scale": True, "score_mode": "concat"},
                      attnlib.DotProductAttention(use_scale=True, score_mode="concat")),
}  # fmt: skip


@of_keras_itself
@pytest.mark.parametrize("name", SINGLE)
def test_keras_single_head(name):
    kind, fields, ours = SINGLE[name]
    layer = keras_layer(kind, X.shape, X.shape, dropout=0.1, **fields)
    params = convert.from_keras(layer)
    expected = jnp.asarray(layer([X, X[:, ::-1] * 2, X[:, ::-1]]))
    assert_close(ours.apply({"params": params}, X, X[:, ::-1], X[:, ::-1] * 2, deterministic=True), expected, length=12)
    assert_same(convert.to_keras(params), layer.get_weights())


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory):
    """(the layers by name, the two files) of a model with layers in layers, whose names repeat."""
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    pytest.importorskip("h5py", reason="h5py is not installed")

    class Block(keras.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.inner = keras.layers.MultiHeadAttention(2, 3, dropout=0.1, name="multi_head_attention")
            self._pair = [keras.layers.GroupQueryAttention(3, 4, 2) for _ in range(2)]

        def build(self, shape):
            self.inner.build(shape, shape)
            for layer in self._pair:
                layer.build(shape, shape)

        def call(self, x):
            return self._pair[1](self._pair[0](self.inner(x, x), x), x)

    x = query = keras.Input((5, 12))
    x = keras.layers.MultiHeadAttention(2, 3, value_dim=4, name="first")(x, x)
    x = keras.layers.AdditiveAttention(name="additive")([x, x])
    for name, fields in (("scaled", {"use_scale": True}), ("both", {"use_scale": True, "score_mode": "concat"})):
        x = keras.layers.Attention(**fields, name=name)([x, x])
    x = keras.layers.MultiHeadAttention(2, 3, dtype="bfloat16", name="half")(x, x)
    model = keras.Model(query, keras.layers.Dense(3, name="dense")(Block(name="block")(x)))
    rng = np.random.default_rng(3)
    model.set_weights([rng.normal(size=w.shape).astype("float32") for w in model.weights])
    folder = tmp_path_factory.mktemp("keras")
    files = [str(folder / "model.keras"), str(folder / "model.weights.h5")]
    model.save(files[0])
    model.save_weights(files[1])
    block = model.get_layer("block")
    layers = {name: model.get_layer(name) for name in ("first", "additive", "both", "half")}
    return layers | {"inner": block.inner, "layers/block/inner": block.inner, "block/inner": block.inner}, files


@of_keras_itself
@pytest.mark.parametrize("number", [0, 1], ids=["keras", "weights.h5"])
@pytest.mark.parametrize("name", ["first", "additive", "both", "half", "inner", "layers/block/inner", "block/inner"])
def test_keras_files(keras_files, name, number):
    layers, files = keras_files
    params = convert.from_keras(files[number], name)
    assert_same(params, convert.from_keras(layers[name]))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16" if name == "half" else "float32"}


@of_keras_itself
def test_keras_files_tell_what_they_hold(keras_files):
    layers, files = keras_files
    with pytest.raises(ValueError, match="score_mode"):
        convert.from_keras(files[1], "scaled")
    assert convert.from_keras(files[1], "scaled", score_mode="dot").keys() == {"scale"}
    assert convert.from_keras(files[1], "scaled", score_mode="concat").keys() == {"concat_score_weight"}
    with pytest.raises(ValueError, match=r"no layer 'second'; there are.* layers/multi_head_attention \(named first\)"):
        convert.from_keras(files[1], "second")
    with pytest.raises(ValueError, match=r"block in .* is no attention layer: it holds _pair, inner"):
        convert.from_keras(files[1], "block")
    with pytest.raises(ValueError, match=r"misshapen: scale, expected \(D,\), got \(12, 3\)\n  unexpected"):
        convert.from_keras(files[1], "dense")
    # The group of one layer is the name of another: neither is taken by chance.
    clash = layers["inner"].name
    with pytest.raises(ValueError, match=f"2 layers '{clash}'.*layers/block/inner .*layers/{clash} \\(named first"):
        convert.from_keras(files[1], clash)
    with pytest.raises(ValueError, match="path must name the layer"):
        convert.from_keras(files[1])
    with pytest.raises(ValueError, match="score_mode must be"):
        convert.from_keras(files[1], "scaled", score_mode="other")


def test_keras_layers_of_other_kinds():
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    with pytest.raises(TypeError, match="got Dense"):
        convert.from_keras(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="no weights yet"):
        convert.from_keras(keras.layers.MultiHeadAttention(2, 3))
    layer = keras_layer("MultiHeadAttention", X.shape, X.shape, num_heads=2, key_dim=3)
    with pytest.raises(ValueError, match="for a file"):
        convert.from_keras(layer, "first")
    params = attnlib.init_multi_head_attention(jax.random.key(0), 12, num_heads=3, use_bias=False, use_sink=True)
    with pytest.raises(ValueError) as raised:
        convert.to_keras(params, layer)
    assert {line.split(",")[0].strip() for line in str(raised.value).splitlines()[1:]} == {
        *(f"missing: {name}/bias" for name in ("query", "key", "value", "attention_output")),
        *(f"misshapen: {name}/kernel" for name in ("query", "key", "value", "attention_output")),
        "unexpected: sink/logit",
    }


# Equinox


@pytest.mark.parametrize("fields", [{}, dict(key_size=10, value_size=9, qk_size=3, vo_size=5, output_size=7,
    use_query_bias=True, use_output_bias=True)], ids=["plain", "sizes and some biases"])  # fmt: skip
def test_equinox(fields):
    equinox = pytest.importorskip("equinox", reason="Equinox is not installed")

    def made(seed):
        return equinox.nn.MultiheadAttention(3, 12, **fields, key=jax.random.key(seed))

    theirs, inputs = made(0), (X, Y, Z) if fields else (X, X, X)
    params = convert.from_equinox(theirs)
    expected = jax.vmap(theirs)(*inputs)
    assert_close(attnlib.multi_head_attention(params, *inputs), expected, length=12)
    assert_close(attnlib.multi_head_attention(params, *(x[0] for x in inputs)), expected[0], length=12)
    back = convert.to_equinox(params, made(1))
    assert_same(jax.tree.leaves(equinox.filter(back, equinox.is_array)),
                jax.tree.leaves(equinox.filter(theirs, equinox.is_array)))  # fmt: skip
    with pytest.raises(ValueError, match="unexpected: gate/kernel"):
        convert.to_equinox(params | {"gate": params["query"]}, made(1))
    with pytest.raises(TypeError, match="got Linear"):
        convert.from_equinox(theirs.query_proj)


# Errors, and what a tree tells


def test_one_error_lists_everything():
    params = attnlib.init_multi_head_attention(jax.random.key(0), 12, num_heads=4, num_kv_heads=2)
    params["gate"] = {"kernel": params["query"]["kernel"]}
    params["value"]["kernel"] = params["value"]["kernel"][..., :2]
    del params["out"]["bias"]
    with pytest.raises(ValueError) as raised:
        convert.to_flax(params)
    assert str(raised.value).splitlines() == [
        "the parameters do not fit a multi-head layer of Flax:",
        "  misshapen: value/kernel, expected (12, 2, 3), got (12, 2, 2)",
        "  missing: out/bias, expected (12,)",
        "  unexpected: gate/kernel, got (12, 4, 3)",
    ]


def test_errors_where_sizes_are_not_known():
    with pytest.raises(ValueError, match=re.escape("missing: query/kernel, expected (C, N, D)")):
        convert.from_flax({})
    with pytest.raises(TypeError, match="mapping"):
        convert.from_flax([X])
    params = attnlib.init_multi_head_attention(jax.random.key(0), 12, num_heads=3)
    with pytest.raises(TypeError, match="query/bias must hold floating-point numbers; got int32"):
        convert.from_flax(params | {"query": params["query"] | {"bias": jnp.ones((3, 4), jnp.int32)}})
    for name in ("key", "value"):
        params[name] = jax.tree.map(lambda x: x[..., :2, :], params[name])
    with pytest.raises(ValueError, match="3 query heads are not a multiple of the 2 heads"):
        convert.from_flax(params)


def test_module_fields():
    fields = dict(num_heads=4, num_kv_heads=2, key_dim=3, value_dim=5, output_shape=(2, 7), use_bias=False)
    for options in ({}, {"use_gate": True, "use_sink": True, "use_scale": True, "num_memory": 3}, {"score": "additive"},
                    {"normalize_qk": "layer"}):  # fmt: skip
        params = attnlib.init_multi_head_attention(jax.random.key(0), 12, **fields, **options)
        assert convert.module_fields(params) == fields | options
    params["query"]["bias"] = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="missing: key/bias"):
        convert.module_fields(params)


class Tensor:
    """As much of a tensor of PyTorch as is read: one with gradients, on an accelerator, may not become an array."""

    def __init__(self, array, where=("graph", "device")):
        self.array, self.where = array, where
        self.dtype = f"torch.{array.dtype}"

    def detach(self):
        return Tensor(self.array, [x for x in self.where if x != "graph"])

    def cpu(self):
        return Tensor(self.array, [x for x in self.where if x != "device"])

    def contiguous(self):
        return self.array

    def numpy(self):
        assert not self.where and self.dtype != "torch.bfloat16"
        return np.asarray(self.array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_with_gradients_on_accelerators(dtype):
    params = attnlib.init_multi_head_attention(jax.random.key(0), 12, num_heads=3, param_dtype=dtype)
    assert_same(convert.from_flax(jax.tree.map(Tensor, params)), params)


def test_no_other_library_is_needed():
    """NumPy's arrays by PyTorch's names convert where neither PyTorch nor Keras can be imported."""
    program = """
        import sys
        blocked = ("torch", "keras", "h5py", "safetensors", "equinox")
        sys.modules.update(dict.fromkeys(blocked))  # an import of None fails
        import jax, attnlib
        from attnlib import convert
        params = attnlib.init_multi_head_attention(jax.random.key(0), 12, num_heads=3)
        convert.from_torch(convert.to_torch(params), 3)
        convert.from_flax(convert.to_flax(params))
        convert.to_keras(params)
        """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
