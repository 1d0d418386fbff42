"""What users of other attention libraries asked for: a test for each wish, named after it, on every implementation.

By default those run that say what no other test says. The others are slow, or run on the reference alone, with which
other tests compare every implementation.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COMPLETE
from conftest import assert_close, assert_finite, assert_same, assert_zero, x64

import attnlib
from attnlib import masks, scores

B, T, S, N, K, D, E = 2, 13, 11, 4, 2, 5, 3


@pytest.fixture(params=COMPLETE)
def attend(request):
    """dot_product_attention by one implementation, in small tiles where it has tiles, compiled."""

    def attend(query, key, value, **options):
        tiles = {"block_sizes": (4, 5)} if request.param == "blockwise" else {}
        options = {**tiles, "implementation": request.param, **options}
        return attnlib.dot_product_attention(query, key, value, **options)

    return attend


on_the_reference = pytest.mark.parametrize(
    "attend", ["reference", *(pytest.param(name, marks=pytest.mark.slow) for name in COMPLETE if name != "reference")],
    indirect=True,
)  # fmt: skip


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)
    shapes = (B, T, N, D), (B, S, K, D), (B, S, K, E)
    return tuple(jax.device_put(rng.normal(size=shape).astype(np.float32)) for shape in shapes)


def all_gradients(function):
    return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1, 2)))


@pytest.mark.slow
def test_fully_masked_row_gives_zero_everywhere(attend, operands):
    mask = masks.QueryPadding(jnp.arange(T) != 3) & masks.Causal()

    def run(*x):
        return attend(*x, mask=mask, return_weights=True)

    output, weights = run(*operands)
    assert_zero((output[:, 3], weights[:, :, 3]))
    gradients = all_gradients(lambda *x: run(*x)[0])(*operands)
    assert_finite(gradients)
    assert_zero(gradients[0][:, 3])


OPTIONS = {
    "is_causal": dict(is_causal=True),
    "window": dict(mask=masks.SlidingWindow(2, 1)),
    "packing": dict(mask=masks.Segments(jnp.arange(T) // 5, jnp.arange(S) // 5)),
    "mask": dict(mask=jnp.arange(S) != 4),
    "bias": dict(bias=jnp.linspace(-2.0, 2.0, S)),
    "dropout": dict(dropout_rate=0.4, dropout_rng=jax.random.key(0)),
    "scale": dict(scale=3.0),
    "logits_soft_cap": dict(logits_soft_cap=0.3),
}


def test_no_option_is_ignored_in_any_company(attend, operands):
    """Each option changes the result, alone and beside every other, whether or not weights are returned."""
    names = list(OPTIONS)
    pairs = [
        (first, second)
        for first, second in itertools.combinations(names, 2)
        if not OPTIONS[first].keys()
        & OPTIONS[second].keys()  # one argument cannot be given twice; masks compose with &
    ]
    neighbors = [pair for pair in pairs if names.index(pair[1]) - names.index(pair[0]) in (1, 7)]

    @jax.jit  # one program: each call for itself would be one
    def each(*operands):
        def weighted(**options):
            return attend(*operands, **options, return_weights=True)[0]

        return dict(
            none=attend(*operands),
            alone={name: attend(*operands, **OPTIONS[name]) for name in names},
            alone_weighted={name: weighted(**OPTIONS[name]) for name in names},
            both={pair: attend(*operands, **OPTIONS[pair[0]], **OPTIONS[pair[1]]) for pair in pairs},
            both_weighted={pair: weighted(**OPTIONS[pair[0]], **OPTIONS[pair[1]]) for pair in neighbors},
        )

    made = jax.tree.map(np.asarray, each(*operands))
    for name, output in made["alone"].items():
        assert np.max(np.abs(output - made["none"])) > 1e-3, name
    for pair, output in made["both"].items():
        for name in pair:
            assert np.max(np.abs(output - made["alone"][name])) > 1e-3, pair
    for kind in ("alone", "both"):
        for which, output in made[f"{kind}_weighted"].items():
            assert_close(output, made[kind][which], length=S)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(S,), (T, 1), (T, S), (1, 1, T, S), (B, 1, 1, S), (1, N, T, 1), (B, N, T, S)])
def test_any_broadcast_mask_is_accepted(attend, operands, shape):
    mask = jax.device_put(np.random.default_rng(1).random(shape) < 0.6)
    whole = jnp.broadcast_to(mask, (B, N, T, S))
    assert_close(attend(*operands, mask=mask), attend(*operands, mask=whole), length=S)
    assert_close(attend(*operands, mask=mask), attend(*operands, bias=jnp.where(whole, 0.0, -jnp.inf)), length=S)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(S,), (T, 1), (1, 1, T, S), (B, 1, 1, S), (1, N, 1, 1), (B, N, T, S)])
def test_bias_gradient_has_the_shape_of_the_bias(attend, operands, shape):
    bias = jax.device_put(np.random.default_rng(1).normal(size=shape).astype(np.float32))

    def loss(bias):
        return jnp.sum(jnp.sin(attend(*operands, bias=bias)))

    expected = jax.grad(lambda b: loss(jnp.broadcast_to(b, (B, N, T, S))))(bias)
    actual = jax.jit(jax.grad(loss))(bias)
    assert actual.shape == shape
    np.testing.assert_allclose(actual, expected, atol=2e-5)  # of sums of terms of size one; some cancel to zero


@on_the_reference
def test_forward_mode_works(attend, operands):
    tangents = tuple(map(jnp.cos, operands))
    _, moved = jax.jvp(attend, operands, tangents)
    step = 1e-2
    ahead, behind = (attend(*(x + s * t for x, t in zip(operands, tangents, strict=True))) for s in (step, -step))
    np.testing.assert_allclose(moved, (ahead - behind) / (2 * step), atol=2e-3)


@on_the_reference
def test_double_backward_works(attend, operands):
    """A gradient penalty has a gradient, and it is the right one."""

    def penalty(query):
        return jnp.sum(jax.grad(lambda q: jnp.sum(jnp.sin(attend(q, *operands[1:]))))(query) ** 2)

    direction = jnp.cos(operands[0])
    gradient = jnp.vdot(jax.grad(penalty)(operands[0]), direction)
    step = 1e-2
    difference = (penalty(operands[0] + step * direction) - penalty(operands[0] - step * direction)) / (2 * step)
    np.testing.assert_allclose(gradient, difference, rtol=2e-2)


@pytest.mark.slow
def test_weights_come_with_the_same_numbers(attend, operands):
    options = dict(is_causal=True, dropout_rate=0.3, dropout_rng=jax.random.key(1))
    output, weights = attend(*operands, **options, return_weights=True)
    assert_close(output, attend(*operands, **options), length=S)
    value = jnp.repeat(operands[2], N // K, axis=2)
    assert_close(jnp.einsum("bnts,bsne->btne", weights, value), output, length=S)


@pytest.mark.slow
def test_dropout_is_there_and_never_in_evaluation(attend, operands):
    dropped = attend(*operands, dropout_rate=0.5, dropout_rng=jax.random.key(0), return_weights=True)[1]
    assert 0.3 < float(jnp.mean(dropped == 0)) < 0.7
    with pytest.raises(ValueError, match="dropout_rng"):
        attend(*operands, dropout_rate=0.5)
    layer = attnlib.MultiHeadAttention(num_heads=2, dropout_rate=0.5)
    x = jnp.ones((1, 4, 8))
    params = layer.init(jax.random.key(0), x, deterministic=True)
    assert_same(layer.apply(params, x, deterministic=True), layer.apply(params, x, deterministic=True))


@pytest.mark.slow
def test_vmap_and_jacobian_work(attend, operands):
    query, key, value = operands
    pair = jnp.stack([value, -value])
    mapped = jax.vmap(attend, (None, None, 0))(query, key, pair)
    assert_close(mapped[1], attend(query, key, -value), length=S)
    jacobian = jax.jacrev(lambda q: attend(q, key, value)[0, 2, 1])(query)
    assert jacobian.shape == (E, *query.shape)
    others = jnp.arange(T) != 2
    assert_zero(jacobian[:, :, others])


def test_bias_and_mask_have_no_alignment_rules(attend):
    query, key, value = (jnp.ones((1, length, 3, 7)) for length in (5, 3, 3))
    assert attend(query, key, value, bias=jnp.ones((5, 3)), mask=jnp.ones((5, 3), bool)).shape == query.shape


@pytest.mark.slow
def test_negative_attention_axes_equal_flatten_then_attend(attend):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 3, 4, 5, 2, 6))
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, (2, 1, 3, 5, 3, 5)).at[..., 0, 0].set(True)[:, None]
    output = attend(query, key, value, attention_axes=(-5, -3), mask=mask)

    def flat(x):
        return jnp.moveaxis(x, 2, 1).reshape(8, 15, 2, 6)

    flat_mask = jnp.broadcast_to(mask, (2, 4, 1, 3, 5, 3, 5)).reshape(8, 1, 15, 15)
    expected = attend(flat(query), flat(key), flat(value), mask=flat_mask)
    assert_close(output, jnp.moveaxis(expected.reshape(2, 4, 3, 5, 2, 6), 1, 2), length=15)


def test_causal_is_aligned_at_the_first_positions_unless_told(attend, operands):
    weights = attend(*operands, is_causal=True, return_weights=True)[1]
    np.testing.assert_array_equal(weights[0, 0] > 0, np.arange(S) <= np.arange(T)[:, None])
    weights = attend(*operands, mask=masks.Causal(offset=S - T), return_weights=True)[1]
    np.testing.assert_array_equal(weights[0, 0] > 0, np.arange(S) <= np.arange(T)[:, None] + S - T)


@pytest.mark.slow
def test_causality_counts_absolute_positions_when_decoding(attend):
    """A prefill of several tokens, then some at a time, equals the full pass; the offset is traced."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 12, 2, 4))
    step = jax.jit(lambda q, offset: attend(q, key, value, mask=masks.Causal(offset)))
    parts = [step(query[:, a:b], jnp.int32(a)) for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))]
    assert_close(jnp.concatenate(parts, 1), attend(query, key, value, is_causal=True), length=12)


@pytest.mark.parametrize(("length", "key_length"), [(1, 1), (1, 17), (17, 1), (19, 23), (8, 9)])
def test_any_length(attend, length, key_length):
    rng = np.random.default_rng(0)
    query, key, value = (jax.device_put(rng.normal(size=(1, n, 2, 4))) for n in (length, key_length, key_length))
    expected = attnlib.dot_product_attention(query, key, value, implementation="reference")
    assert_close(attend(query, key, value), expected, length=key_length)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "features", "value_features"), [(6, 3, 1, 17), (5, 1, 33, 2), (1, 1, 300, 1)]
)
def test_any_head_size_and_ratio(attend, heads, kv_heads, features, value_features):
    rng = np.random.default_rng(0)
    shapes = (1, 4, heads, features), (1, 6, kv_heads, features), (1, 6, kv_heads, value_features)
    query, key, value = (jax.device_put(rng.normal(size=shape)) for shape in shapes)
    repeated = (jnp.repeat(x, heads // kv_heads, 2) for x in (key, value))
    assert_close(attend(query, key, value), attend(query, *repeated), length=6 * features)


@on_the_reference
def test_an_attention_sink_and_its_gradient(attend, operands):
    """A learned sink is one more key of value zero, its logit a bias: exp(sink) joins each denominator."""
    query, key, value = operands

    def add_sink(sink):
        one_more = [jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1) for x in (key, value)]
        return attend(query, *one_more, bias=jnp.zeros((1, N, 1, S + 1)).at[0, :, 0, S].set(sink))

    def by_formula(sink):
        output, lse = attnlib.dot_product_attention(query, key, value, return_lse=True, implementation="reference")
        return output * jnp.swapaxes(jax.nn.sigmoid(lse - sink[None, :, None]), 1, 2)[..., None]

    sink = jnp.linspace(-1.0, 2.0, N)

    def named(sink):
        return attend(query, key, value, sink=sink)

    slopes = [jax.grad(lambda s, f=f: jnp.sum(jnp.sin(f(s))))(sink) for f in (add_sink, named, by_formula)]
    for actual, slope in zip((add_sink, named), slopes, strict=False):
        assert_close(actual(sink), by_formula(sink), length=S)
        assert_close(slope, slopes[-1], length=B * T)


def test_by_name_runs_or_raises_and_the_choice_can_be_asked_for(operands):
    for name in COMPLETE:
        assert attnlib.explain(*operands, implementation=name).implementation == name
    with pytest.raises(ValueError, match=r"reference: .*block_sizes=None"):
        attnlib.dot_product_attention(*operands, implementation="reference", block_sizes=(4, 4))
    assert attnlib.explain(*operands).implementation in COMPLETE


def test_true_means_attend_and_errors_name_axes(attend, operands):
    weights = attend(*operands, mask=jnp.arange(S) == 2, return_weights=True)[1]
    np.testing.assert_array_equal(weights[0, 0, 0], np.arange(S) == 2)
    with pytest.raises(ValueError, match=r"\(\*batch, heads, \*query axes, \*key axes\) = \(2, 4, 13, 11\)"):
        attend(*operands, mask=jnp.ones((B, T, S), bool))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_arguments_are_refused(attend, operands, rate):
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\)"):
        attend(*operands, dropout_rate=rate, dropout_rng=jax.random.key(0))
    with pytest.raises(ValueError, match="key and value must have the same attention axes"):
        attend(operands[0], operands[1], operands[2][:, :-1])


def test_the_flexible_path_trains_on_cpu(operands):
    distance = scores.Custom(lambda q, k, sharpness: -sharpness * jnp.sum((q - k) ** 2), jnp.float32(0.5))
    for name in COMPLETE:
        gradient = jax.grad(
            lambda score, q, name=name: jnp.sum(attnlib.attention(q, *operands[1:], score=score, implementation=name)),
            (0, 1),
        )(distance, operands[0])
        assert_finite(gradient)
        assert float(jnp.abs(gradient[0].params[0])) > 0


def test_masks_cost_no_recompilation_and_no_square(attend):
    traces = []

    @jax.jit
    def run(query, lengths, ids, offset):
        traces.append(None)
        return attend(query, query, query, mask=masks.Lengths(key=lengths) & masks.Segments(ids) & masks.Causal(offset))

    query = jnp.ones((2, 9, 1, 4))
    for n in range(3):
        run(query, jnp.array([n + 1, 9]), jnp.arange(9) // (n + 2), jnp.int32(n))
    assert len(traces) == 1


@pytest.mark.slow
def test_bfloat16_has_float32_statistics_and_float64_is_honoured(attend, operands):
    rounded = tuple(x.astype(jnp.bfloat16) for x in operands)
    output, lse = attend(*rounded, return_lse=True)
    assert output.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    exact = attend(*(x.astype(jnp.float32) for x in rounded))
    assert_close(output, exact.astype(jnp.bfloat16), factor=1)
    with x64():
        double = tuple(jnp.asarray(np.asarray(x), jnp.float64) for x in operands)
        expected = attnlib.dot_product_attention(*double, implementation="reference")
        assert_close(attend(*double), expected, length=S)


@pytest.mark.measured
def test_grouped_heads_do_not_repeat_keys(attend):
    """No array of the compiled program is as large as keys repeated for every query head."""
    query = jax.ShapeDtypeStruct((1, 8, 64, 16), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 2048, 1, 16), jnp.float32)
    compiled = jax.jit(lambda q, k, v: attend(q, k, v, block_sizes=None)).lower(query, key, key).compile()
    repeated, logits = 2048 * 64 * 16 * 4, 8 * 64 * 2048 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * logits + repeated / 4


@pytest.mark.devices
def test_partitions_without_collectives(attend):
    sharding = jax.NamedSharding(jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,)), jax.P("x"))
    query = jax.device_put(jnp.ones((2, 8, 2, 4)), sharding)
    compiled = jax.jit(attend).lower(query, query, query).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "collective-permute"))


def test_short_sequences_are_computed_at_once_and_long_ones_in_tiles():
    """The crossover is measured by tests/benchmarks/crossover.py."""

    def explained(batch, queries, keys=None, **options):
        query, key = (
            jax.ShapeDtypeStruct((batch, length, 8, 64), jnp.float32) for length in (queries, keys or queries)
        )
        return attnlib.explain(query, key, key, **options)

    assert explained(32, 16).implementation == "reference"
    assert explained(32, 16, is_causal=True).tiles == explained(32, 64).tiles == (1, 1)
    assert explained(1, 16, is_causal=True).implementation == "reference"
    assert explained(1, 4096).tiles[1] > 8
    assert explained(2, 1, 1024, block_sizes=(1, 1024)).tiles == (1, 1)
    nothing = explained(2, 0, 7, implementation="blockwise")
    assert nothing.flops == nothing.memory == 0
    other = scores.Custom(lambda query, key: -jnp.sum(jnp.abs(query - key)))
    assert explained(1, 16, score=other).implementation == "reference"
    assert explained(1, 4096, score=other).implementation == "blockwise"
    additive = scores.Additive(jnp.ones(64))
    for sizes, name in (((1, 16), "reference"), ((1, 64), "blockwise"), ((32, 1, 4096), "reference"),
                        ((32, 4096, 1), "reference"), ((32, 2, 4096), "blockwise")):  # fmt: skip
        assert explained(*sizes, score=additive).implementation == name, sizes


@pytest.mark.slow
def test_backward_is_bitwise_repeatable(attend, operands):
    gradients = all_gradients(lambda *x: attend(*x, is_causal=True))
    assert_same(gradients(*operands), gradients(*operands))


@on_the_reference
def test_neighborhoods_compose_with_masks_and_bias(attend):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 5, 7, 2, 4))
    near = masks.Neighborhood((3, 5))
    real = jax.random.bernoulli(jax.random.key(1), 0.7, (5, 7))
    bias = jax.random.normal(jax.random.key(2), (1, 2, 5, 7, 5, 7))
    output = attend(query, key, value, mask=near & masks.KeyPadding(real), bias=bias)
    dense = near.as_array((5, 7), (5, 7)) & real[None, None]
    assert_close(output, attend(query, key, value, mask=dense, bias=bias), length=35)


def test_padding_of_packed_sequences_attends_nothing(attend):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 9, 2, 4))
    ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    weights = attend(query, key, value, mask=masks.Segments(ids, padding_id=0), return_weights=True)[1]
    np.testing.assert_array_equal(weights[0, 0] > 0, (ids == ids.T) & (ids != 0))


@pytest.mark.slow
def test_lse_has_a_gradient(attend, operands):
    def lse(query):
        return jnp.sum(attend(query, *operands[1:], return_lse=True)[1])

    key = jnp.repeat(operands[1], N // K, axis=2)
    expected = jax.grad(lambda q: jnp.sum(jax.nn.logsumexp(jnp.einsum("btnd,bsnd->bnts", q, key) * D**-0.5, axis=-1)))(
        operands[0]
    )
    assert_close(jax.grad(lse)(operands[0]), expected, length=S)


@pytest.mark.slow
def test_nan_in_padded_keys_does_not_leak(attend, operands):
    query, key, value = operands
    mask = masks.Lengths(key=jnp.array([7, 9]))
    real = (jnp.arange(S)[None] < jnp.array([[7], [9]]))[..., None, None]
    poisoned = jnp.where(real, key, jnp.nan), jnp.where(real, value, jnp.inf)
    assert_same(attend(query, *poisoned, mask=mask), attend(query, key, value, mask=mask))
    run = all_gradients(lambda *x: attend(*x, mask=mask))
    assert_close(run(query, *poisoned), run(query, jnp.where(real, key, 1), jnp.where(real, value, 1)), length=T)
