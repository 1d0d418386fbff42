"""Axis names given to initialisers: boxes, specifications, sharded application; and checkpoints of such parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import assert_close, assert_same
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnlib

pytestmark = pytest.mark.devices
X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
RNG = jax.random.key(0)
RULES = (("heads", "model"), ("features", None), ("batch", "data"))
WITH = {"partitioning": nn.with_partitioning, "logical": nn.with_logical_partitioning}


def initialisers(named):
    """Initialisers that name the axes of the parameters as they are stored."""
    normal = nn.initializers.normal(0.3)
    return dict(
        kernel_init=named(nn.initializers.lecun_normal(), ("features", "heads", None)),
        bias_init=named(normal, ("heads", None)),
        out_kernel_init=named(nn.initializers.lecun_normal(), ("heads", None, "features")),
        out_bias_init=named(normal, ("features",)),
    )


def multi_head(**fields):
    return lambda named: attnlib.MultiHeadAttention(
        num_heads=4, scale_init=named(nn.initializers.normal(), ("heads", None)), **initialisers(named), **fields
    )


LAYERS = {
    "multi-head": multi_head(),
    "grouped": multi_head(num_kv_heads=2),
    "additive": multi_head(score="additive"),
    "gate, several output axes": multi_head(use_gate=True, output_shape=(3, 2)),
    "AdditiveAttention": lambda named: attnlib.AdditiveAttention(
        scale_init=named(nn.initializers.normal(), ("features",))
    ),
}


def unnamed(init, names):
    return init


def boxes(tree):
    return jax.tree.leaves(tree, is_leaf=nn.meta.is_axis_metadata)


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto, AxisType.Auto))


def or_slow(chosen, rest):
    return [*chosen, *(pytest.param(*one, marks=pytest.mark.slow) for one in rest)]


@pytest.mark.parametrize(
    ("kind", "name"),
    or_slow(
        [("partitioning", "additive"), ("partitioning", "gate, several output axes"), ("logical", "grouped")],
        [("partitioning", name) for name in ("multi-head", "grouped", "AdditiveAttention")],
    ),
)
def test_boxed_parameters_are_the_bare_ones_with_names(kind, name):
    """Initialised, applied and differentiated, boxed or not, as the layer without names."""
    named, plain = LAYERS[name](WITH[kind]), LAYERS[name](unnamed)
    variables, expected = (jax.jit(layer.init)(RNG, X) for layer in (named, plain))
    assert all(isinstance(box, nn.Partitioned) for box in boxes(variables))
    assert_same(nn.meta.unbox(variables), expected)

    def results(layer):
        def loss(variables):
            output = layer.apply(variables, X)
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    boxed, slopes = results(named)(variables)
    assert_same((boxed, nn.meta.unbox(slopes)), results(plain)(expected))
    assert_same(*(jax.jit(layer.apply)(expected, X) for layer in (named, plain)))  # without boxes
    assert [box.names for box in boxes(slopes)] == [box.names for box in boxes(variables)]


@pytest.mark.parametrize("kind", WITH)
def test_partition_specs(kind):
    layer = LAYERS["additive"](WITH[kind])
    specs = nn.get_partition_spec(jax.eval_shape(layer.init, RNG, X))["params"]
    projection = {"kernel": P("features", "heads", None), "bias": P("heads", None)}
    assert specs == {
        "query": projection, "key": projection, "value": projection,
        "out": {"kernel": P("heads", None, "features"), "bias": P("features")},
        "score": {"scale": P("heads", None)},
    }  # fmt: skip
    assert nn.logical_to_mesh(specs, RULES)["out"]["kernel"] == P("model", None, None)


SHARDED = {
    "partitioning": lambda name: LAYERS[name](
        lambda init, names: nn.with_partitioning(init, tuple("model" if n == "heads" else None for n in names))
    ),
    "logical": lambda name: LAYERS[name](nn.with_logical_partitioning),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    or_slow([("partitioning", "gate, several output axes"), ("logical", "grouped")], [("partitioning", "additive")]),
)
def test_sharded_over_heads_and_batch(kind, name):
    """Initialised sharded under a mesh by the names, and applied: the numbers of one device, heads staying in place."""
    layer, plain = SHARDED[kind](name), LAYERS[name](unnamed)
    specs = nn.get_partition_spec(jax.eval_shape(layer.init, RNG, X))
    if kind == "logical":
        specs = nn.logical_to_mesh(specs, RULES)
    places = jax.tree.map(lambda spec: NamedSharding(mesh(), spec), specs)
    x = jax.device_put(X, NamedSharding(mesh(), P("data")))

    def run(layer):
        return lambda variables, x: jax.value_and_grad(
            lambda *operands: jnp.sum(jnp.sin(layer.apply(*operands))), argnums=(0, 1)
        )(variables, x)

    with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
        variables = jax.jit(layer.init, out_shardings=places)(RNG, x)
        compiled = jax.jit(run(layer)).lower(variables, x).compile()
        value, slopes = compiled(variables, x)
        unplaced = jax.jit(layer.init)(RNG, X)
    for params in (nn.meta.unbox(variables)["params"], nn.meta.unbox(slopes[0])["params"]):
        for projection, axis in (("query", 1), ("key", 1), ("value", 1), ("out", 0)):
            kernel = params[projection]["kernel"]
            assert {shard.data.shape[axis] for shard in kernel.addressable_shards} == {kernel.shape[axis] // 2}
    assert "all-reduce" in compiled.as_text()  # the sum over heads in the output projection
    assert "all-gather" not in compiled.as_text()
    assert "all-to-all" not in compiled.as_text()

    expected = jax.jit(plain.init)(RNG, X)
    bare_value, bare_slopes = jax.jit(run(plain))(expected, X)
    assert_same(nn.meta.unbox(unplaced), expected)
    assert_close(nn.meta.unbox(variables), expected)
    assert_close((value, nn.meta.unbox(slopes)), (bare_value, bare_slopes), length=64)


def test_a_scan_adds_the_name_of_its_axis():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + LAYERS["grouped"](nn.with_partitioning).copy(name="attention")(x), None

    stack = nn.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()  # fmt: skip
    variables = stack.init(RNG, X, None)
    specs = nn.get_partition_spec(variables)["params"]["attention"]
    assert specs["key"] == {"kernel": P("layers", "features", "heads", None), "bias": P("layers", "heads", None)}
    assert specs["out"] == {"kernel": P("layers", "heads", None, "features"), "bias": P("layers", "features")}
    assert_same(stack.apply(variables, X, None), stack.apply(nn.meta.unbox(variables), X, None))


def test_the_pure_layer_makes_the_same_boxes_and_wants_them_removed():
    params = attnlib.init_multi_head_attention(
        RNG, 12, num_heads=4, score="additive", scale_init=nn.with_partitioning(nn.initializers.ones, ("heads", None)),
        **initialisers(nn.with_partitioning),
    )  # fmt: skip
    specs = nn.get_partition_spec(params)
    layer = LAYERS["additive"](nn.with_partitioning)
    assert specs == nn.get_partition_spec(jax.eval_shape(layer.init, RNG, X))["params"]
    with pytest.raises(TypeError, match=r"Pass flax\.linen\.meta\.unbox\(params\)"):
        attnlib.multi_head_attention(params, X, score="additive")
    output = attnlib.multi_head_attention(nn.meta.unbox(params), X, score="additive")
    assert_same(layer.apply({"params": params}, X), output)


def test_initialisers_of_the_output_projection_default_to_the_others():
    ones, twos = nn.initializers.ones, nn.initializers.constant(2.0)
    params = attnlib.MultiHeadAttention(num_heads=2, kernel_init=ones, bias_init=twos).init(RNG, X)["params"]
    assert np.all(params["out"]["kernel"] == 1) and np.all(params["out"]["bias"] == 2)
    layer = attnlib.MultiHeadAttention(num_heads=2, out_kernel_init=twos, out_bias_init=ones, use_gate=True)
    params = layer.init(RNG, X)["params"]
    assert np.all(params["out"]["kernel"] == 2) and np.all(params["out"]["bias"] == 1)
    assert not any(np.any(params[name]["kernel"] == 2) for name in ("query", "key", "value", "gate"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(bias_init=("heads", None)), "a bias of shape (12,) names 1 axes at most; got ('heads', None)"),
        (dict(kernel_init=(None,) * 4), "a kernel of shape (12, 4, 3) names 3 axes at most; got (None, None, None, N"),
    ],
)
def test_names_for_more_axes_than_there_are_are_refused(fields, text):
    ones = nn.initializers.ones
    inits = {name: nn.with_partitioning(ones, names) for name, names in fields.items()}
    with pytest.raises(ValueError) as caught:
        attnlib.MultiHeadAttention(num_heads=4, **inits).init(RNG, X)
    assert text in str(caught.value)
    assert f"an initialiser of its own: out_{next(iter(fields))}" in str(caught.value)


# Checkpoints


@pytest.mark.parametrize("layout", ["bare", "boxed", "sharded"])
def test_checkpoints_give_the_parameters_back(layout, tmp_path):
    """Saved and restored with Orbax: the same bits, boxes, and places on devices."""
    layer = SHARDED["partitioning"]("additive") if layout != "bare" else LAYERS["additive"](unnamed)
    variables = layer.init(RNG, X)
    if layout == "sharded":
        specs = nn.get_partition_spec(variables)
        variables = jax.device_put(variables, jax.tree.map(lambda spec: NamedSharding(mesh(), spec), specs))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", jax.tree.map(ocp.utils.to_shape_dtype_struct, variables))
    assert_same(restored, variables)
    assert all(isinstance(box, nn.Partitioned) == (layout != "bare") for box in boxes(restored))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(variables), strict=True):
        assert got.sharding == want.sharding
    assert_same(layer.apply(restored, X), layer.apply(variables, X))
