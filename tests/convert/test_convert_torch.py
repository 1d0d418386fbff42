"""Parameters of PyTorch's module, and of state dicts with names and layouts of the caller's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, assert_same

import attnlib
from attnlib import convert

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(2, 7, 10)).astype(np.float32)
Z = np.random.default_rng(2).normal(size=(2, 7, 9)).astype(np.float32)


def drawn(query_features=12, **fields):
    """Random parameters, biases too."""
    params = jax.eval_shape(lambda: attnlib.init_multi_head_attention(jax.random.key(0), query_features, **fields))
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32)), params)


MODULES = {
    "self": ((X, X, X), {}),
    "batch first, memory": ((X, X, X), dict(batch_first=True, add_bias_kv=True)),
    "cross": ((X, X[:, :3], X[:, :3]), dict(bias=False)),
    "other features": ((X, Y, Z), dict(kdim=10, vdim=9)),
    "other features, no bias": ((X, X, Z[:, :5]), dict(vdim=9, bias=False)),
}


@pytest.mark.parametrize("name", MODULES)
def test_torch_module(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    inputs, fields = MODULES[name]

    def made(seed):
        torch.manual_seed(seed)
        module = torch.nn.MultiheadAttention(12, 3, **fields)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        return module

    theirs, other = made(0), made(1)
    params = convert.from_torch(theirs.state_dict(), 3)
    tensors = [torch.from_numpy(x if fields.get("batch_first") else x.swapaxes(0, 1)) for x in inputs]
    with torch.no_grad():
        expected = theirs(*tensors)[0].numpy()
    expected = jnp.asarray(expected if fields.get("batch_first") else expected.swapaxes(0, 1))
    assert_close(attnlib.multi_head_attention(params, *inputs), expected, length=12)
    layer = attnlib.MultiHeadAttention(**convert.module_fields(params))
    assert_same(layer.apply({"params": params}, *inputs), attnlib.multi_head_attention(params, *inputs))

    other.load_state_dict({name: torch.from_numpy(x) for name, x in convert.to_torch(params).items()})
    assert_same([x.numpy() for x in other.state_dict().values()], [x.numpy() for x in theirs.state_dict().values()])


def test_torch_model():
    """A layer of a model by its prefix, from parameters that want gradients; the copy outlives a training step."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = torch.nn.TransformerEncoderLayer(12, 3, dtype=torch.float32)
    before = {name: x.detach().numpy().copy() for name, x in model.self_attn.named_parameters()}
    params = convert.from_torch(dict(model.named_parameters()), 3, prefix="self_attn")
    assert_same(params, convert.from_torch(model.state_dict(), 3, prefix="self_attn."))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_same(convert.to_torch(params), before)
    assert convert.to_torch(params, "self_attn").keys() == {f"self_attn.{name}" for name in before}


def test_torch_bfloat16():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    theirs = torch.nn.MultiheadAttention(12, 3, dtype=torch.bfloat16)
    params = convert.from_torch(theirs.state_dict(), 3)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    for name, array in convert.to_torch(params).items():
        assert torch.equal(torch.from_dlpack(jnp.asarray(array)), theirs.state_dict()[name])


@pytest.mark.parametrize("fields", [{}, {"key_features": 10}, {"use_bias": False}, {"num_memory": 1}], ids=str)
def test_there_and_back(fields):
    params = drawn(num_heads=3, **fields)
    state = convert.to_torch(params, "a")
    assert ("a.in_proj_weight" in state) == ("key_features" not in fields)
    assert all(array.flags.writeable and array.flags.c_contiguous for array in state.values())
    assert_same(convert.from_torch(state | {"b.other": np.ones(3)}, 3, "a"), params)


def test_torch_layout():
    """Row n D + d of a weight makes feature d of head n; columns of the output's weight read them."""
    rows = X[0, :3].repeat(12, 0) + np.arange(36, dtype=np.float32)[:, None]
    state = {"in_proj_weight": rows, "out_proj.weight": rows[:12]}
    params = convert.from_torch(state, 3)
    for part, name in enumerate(("query", "key", "value")):
        for head in range(3):
            for feature in range(4):
                row = rows[part * 12 + head * 4 + feature]
                np.testing.assert_array_equal(params[name]["kernel"][:, head, feature], row)
    np.testing.assert_array_equal(params["out"]["kernel"].reshape(12, 12), rows[:12].T)


def test_torch_errors():
    state = {"a.in_proj_weight": np.ones((35, 12)), "a.in_proj_bias": np.ones(36), "a.bias_k": np.ones((1, 12))}
    with pytest.raises(ValueError) as raised:
        convert.from_torch(state | {"a.out_proj.weight": np.ones((12, 12))}, 3, "a")
    assert str(raised.value).splitlines() == [
        "the entries do not fit a torch.nn.MultiheadAttention of 3 heads:",
        "  misshapen: a.bias_k, expected (1, 1, 12), got (1, 12)",
        "  misshapen: a.in_proj_weight, expected (36, 12), got (35, 12)",
        "  missing: a.bias_v, expected (1, 1, 12)",
        "  missing: a.out_proj.bias, expected (12,)",
    ]
    with pytest.raises(ValueError, match=re.escape("missing: in_proj_weight, expected (9*D, 3*D)")):
        convert.from_torch({}, 3)
    with pytest.raises(ValueError, match=re.escape("misshapen: in_proj_weight, expected (15*D, 5*D), got (36, 12)")):
        convert.from_torch({"in_proj_weight": np.ones((36, 12)), "out_proj.weight": np.ones((12, 12))}, 5)
    with pytest.raises(ValueError, match="num_heads must be an int >= 1"):
        convert.from_torch({}, 0)
    with pytest.raises(TypeError, match="got list"):
        convert.from_torch([1], 3)
    with pytest.raises(ValueError, match=re.escape("misshapen: key/kernel, expected (12, 4, 3), got (12, 2, 3)")):
        convert.to_torch(drawn(num_heads=4, num_kv_heads=2))
    with pytest.raises(ValueError, match=re.escape("misshapen: memory/key, expected (1, 3, 4), got (2, 3, 4)")):
        convert.to_torch(drawn(num_heads=3, num_memory=2))
    with pytest.raises(ValueError, match=re.escape("misshapen: out/kernel, expected (3, 4, 12), got (3, 4, 7)")):
        convert.to_torch(drawn(num_heads=3, output_shape=7))


# State dicts with other names


SEPARATE = dict(qkv=("q_proj", "k_proj", "v_proj"), out="o_proj")
LAYOUTS = {
    "fused": {},
    "Conv1D": dict(qkv="c_attn", out="c_proj", inputs_first=True),
    "interleaved": dict(interleaved=True),
    "interleaved, inputs first": dict(interleaved=True, inputs_first=True, kernel="/w", bias="/b"),
    "separate": SEPARATE,
}


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dict_there_and_back(name, kv_heads, use_bias):
    params = drawn(num_heads=4, num_kv_heads=kv_heads, use_bias=use_bias, output_shape=7)
    state = convert.to_state_dict(params, **LAYOUTS[name], prefix="a.b")
    assert len(state) == (4 if name == "separate" else 2) * (2 if use_bias else 1)
    others = {"a.bc": np.ones(2), "c": np.ones(3)}
    assert_same(convert.from_state_dict(state | others, 4, kv_heads, **LAYOUTS[name], prefix="a.b"), params)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_layout_by_its_definition(kv_heads, interleaved):
    """The rows of a fused kernel, one by one."""
    rng, dim, group = np.random.default_rng(0), 3, 4 // kv_heads
    heads = {("query", n): rng.normal(size=(dim, 12)) for n in range(4)}
    heads |= {(part, n): rng.normal(size=(dim, 12)) for part in ("key", "value") for n in range(kv_heads)}
    if interleaved:
        order = []
        for k in range(kv_heads):
            order += [("query", k * group + i) for i in range(group)] + [("key", k), ("value", k)]
    else:
        order = [("query", n) for n in range(4)] + [(part, n) for part in ("key", "value") for n in range(kv_heads)]
    fused = np.concatenate([heads[head] for head in order]).astype(np.float32)
    state = {"qkv.weight": fused, "proj.weight": np.ones((5, 12), np.float32)}
    state["qkv.bias"] = fused[:, 0]
    params = convert.from_state_dict(state, 4, kv_heads, interleaved=interleaved)
    for (part, n), rows in heads.items():
        np.testing.assert_array_equal(params[part]["kernel"][:, n], rows.T.astype(np.float32))
        np.testing.assert_array_equal(params[part]["bias"][n], rows[:, 0].astype(np.float32))
    assert "bias" not in params["out"]


def test_separate_layers_of_any_sizes():
    """Keys and values of other features, values of other features of a head, a bias here and none there."""
    params = drawn(num_heads=4, num_kv_heads=2, key_features=10, value_features=9, key_dim=3, value_dim=5)
    del params["key"]["bias"], params["out"]["bias"]
    state = convert.to_state_dict(params, **SEPARATE)
    assert state["v_proj.weight"].shape == (10, 9)
    made = convert.from_state_dict(state, 4, 2, **SEPARATE)
    assert_same(made, params)
    assert attnlib.multi_head_attention(made, X, Y, Z).shape == X.shape


def test_state_dict_of_linear_layers():
    """Attention written with PyTorch's linear layers, one fused, gives what attnlib gives."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    qkv, proj = torch.nn.Linear(12, (4 + 2 * 2) * 3), torch.nn.Linear(12, 7)
    query, key, value = qkv(torch.from_numpy(X)).split([12, 6, 6], -1)
    heads = [x.unflatten(-1, (-1, 3)).transpose(1, 2) for x in (query, key, value)]
    attended = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    expected = proj(attended.transpose(1, 2).flatten(2)).detach().numpy()
    state = torch.nn.ModuleDict({"qkv": qkv, "proj": proj}).state_dict()
    params = convert.from_state_dict(state, 4, 2)
    assert_close(attnlib.multi_head_attention(params, X, is_causal=True), jnp.asarray(expected), length=12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors(tmp_path, dtype):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    params = jax.tree.map(lambda x: x.astype(dtype), drawn(num_heads=3))
    path = tmp_path / "model.safetensors"
    safetensors.save_file(convert.to_torch(params, "a") | convert.to_state_dict(params, prefix="b"), str(path))
    assert_same(convert.from_torch(path, 3, "a"), params)
    assert_same(convert.from_state_dict(str(path), 3, prefix="b."), params)
    with pytest.raises(ValueError, match=r"missing: c\.in_proj_weight"):
        convert.from_torch(path, 3, "c")


def test_state_dict_errors():
    params = drawn(num_heads=4, num_kv_heads=2)
    state = convert.to_state_dict(params)
    with pytest.raises(ValueError) as raised:
        convert.from_state_dict(state | {"q_norm.weight": np.ones(3)}, 4, 1, out="out", bias=".b")
    assert str(raised.value).splitlines() == [
        "the entries do not fit attention with 4 query heads and 1 key/value heads:",
        "  missing: out.weight, expected (O, 16)",
        "  unexpected: proj.bias, got (12,)",
        "  unexpected: proj.weight, got (12, 12)",
        "  unexpected: q_norm.weight, got (3,)",
        "  unexpected: qkv.bias, got (24,)",
    ]
    with pytest.raises(ValueError, match="4 query heads are not a multiple of the 3 heads"):
        convert.from_state_dict({"qkv.weight": np.ones((20, 6)), "proj.weight": np.ones((6, 8))}, 4, 3)
    with pytest.raises(ValueError, match="misshapen: value/kernel"):
        convert.to_state_dict(drawn(num_heads=4, value_dim=5))
    with pytest.raises(ValueError, match="unexpected: gate/bias"):
        convert.to_state_dict(drawn(num_heads=4, use_gate=True))
    with pytest.raises(ValueError, match="one fused layer or the names of three"):
        convert.from_state_dict(state, 4, qkv=("a", "b"))
    with pytest.raises(ValueError, match="interleaved is a layout of one fused layer"):
        convert.to_state_dict(params, **SEPARATE, interleaved=True)
