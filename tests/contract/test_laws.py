"""Laws: what attention must obey whatever computes it. Each holds on every implementation.

The only formula here is `softmax_average`, in NumPy float64; the laws compare attnlib with attnlib.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IN_ONE_TILE, IN_TURN, NAMES, SIDE_BY_SIDE, by_name, like, unsupported
from conftest import assert_close, assert_finite, assert_same, x64

import attnlib
from attnlib import masks, modifiers, scores

QUERY, KEY, VALUE = (2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 6)
WEIGHTS = (2, 4, 5, 7)


STATIC = {"attention_axes", "dropout_rate", "is_causal", "logits_soft_cap", "return_lse", "return_weights"}


@pytest.fixture(params=NAMES)
def attend(request):
    """`attention` on one implementation, in several blocks, with a Dot score unless another is given."""

    def call(query, key, value, *, score=None, **options):
        arguments = dict(query=query, key=key, value=value, score=score or scores.Dot(), **options)
        reason = unsupported(request.param, **arguments)
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
        static = tuple((name, value) for name, value in options.items() if name in STATIC)
        traced = {name: value for name, value in arguments.items() if name not in STATIC}
        return compiled(static, **by_name(request.param))(traced)

    return call


@functools.lru_cache
def compiled(static, **options):
    """`attention` of a dict of arrays, compiled quickly where it is not part of another program."""

    def function(traced):
        return attnlib.attention(**traced, **dict(static), **options)

    alone = jax.jit(function)
    return lambda traced: function(traced) if is_traced(traced) else alone(traced)


# Where the law is one of JAX's transformations, which test_derivatives.py compares to those of the reference.
on_the_reference = pytest.mark.parametrize(
    "attend", ["reference", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "reference")],
    indirect=True,
)  # fmt: skip


def slow(*parameters):
    return [pytest.param(parameter, marks=pytest.mark.slow) for parameter in parameters]


def is_traced(tree):
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def draw(keys, *shapes):
    return [keys.normal(*shape) for shape in shapes]


def softmax_average(query, key, value, mask=True, bias=0.0):
    """(output, weights) of query (..., T, D), key (..., S, D) and value (..., S, E), which must attend something."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = query @ np.swapaxes(key, -1, -2) / np.sqrt(query.shape[-1]) + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * mask
    weights /= weights.sum(-1, keepdims=True)
    return weights @ value, weights


# Axes


@pytest.mark.parametrize("axes", [(-3, 0), None, (0, 2, 1), *slow(0, 1, (2,), (0, 1), (-5, -3), (1, 2))], ids=str)
def test_folding_is_flattening(attend, axes, keys):
    """Attention over several axes is attention over their row-major product; causal by the flat position."""
    attended = {None: (1, 2)}.get(axes, axes if isinstance(axes, tuple) else (axes,))
    attended = [axis % 5 for axis in attended]
    batch = [axis for axis in range(3) if axis not in attended]
    lead, key_lead = [2, 3, 4], [2, 3, 4]
    for axis in attended:
        key_lead[axis] = {2: 3, 3: 2, 4: 5}[lead[axis]]
    query, key, value = draw(keys, (*lead, 2, 3), (*key_lead, 2, 3), (*key_lead, 2, 6))
    output, weights = attend(query, key, value, attention_axes=axes, is_causal=True, return_weights=True)

    def flat(array):
        array = np.transpose(array, (*batch, 3, *attended, 4))
        return array.reshape(*array.shape[: len(batch) + 1], -1, array.shape[-1])

    queries, keys_ = flat(query), flat(key)
    causal = np.arange(keys_.shape[-2]) <= np.arange(queries.shape[-2])[:, None]
    expected, expected_weights = softmax_average(queries, keys_, flat(value), causal)
    np.testing.assert_allclose(flat(output), expected, atol=5e-6)
    assert weights.shape == (
        *(lead[axis] for axis in batch), 2, *(lead[axis] for axis in attended), *(key_lead[axis] for axis in attended)
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(weights).reshape(expected_weights.shape), expected_weights, atol=5e-6)
    assert output.shape == (*lead, 2, 6)


def test_one_batch_entry_at_a_time(attend, keys):
    query, key, value = draw(keys, QUERY, KEY, VALUE)
    mask, (bias,) = keys.bools(*WEIGHTS), draw(keys, (2, 1, 5, 7))
    whole = attend(query, key, value, mask=mask, bias=bias, return_weights=True, return_lse=True)
    for i in range(2):
        one = slice(i, i + 1)
        single = attend(
            query[one], key[one], value[one], mask=mask[one], bias=bias[one], return_weights=True, return_lse=True
        )
        assert_close(single, jax.tree.map(lambda x, one=one: x[one], whole))


def test_one_head_at_a_time(attend, keys):
    """Query head n reads key head n // (N // K)."""
    query, key, value = draw(keys, QUERY, KEY, VALUE)
    whole = attend(query, key, value)
    for n in range(4):
        k = n // 2
        single = attend(query[:, :, n : n + 1], key[:, :, k : k + 1], value[:, :, k : k + 1])
        assert_close(single, whole[:, :, n : n + 1])


def test_repeating_grouped_heads_changes_nothing(attend, keys):
    query, key, value = draw(keys, QUERY, KEY, VALUE)
    repeated = attend(query, jnp.repeat(key, 2, 2), jnp.repeat(value, 2, 2))
    assert_close(attend(query, key, value), repeated)


def test_repeating_grouped_heads_changes_no_option_of_a_head(attend, keys):
    """A modifier is told the query head, and scales, masks, biases and sinks of query heads stay with them."""
    query, key, value = draw(keys, QUERY, KEY, VALUE)
    options = dict(mask=keys.bools(2, 4, 5, 7, rate=0.8), sink=keys.normal(4), score=scores.Dot(keys.normal(4)))
    options |= dict(bias=keys.normal(1, 4, 5, 7), score_mod=modifiers.ALiBi(keys.normal(4)), return_lse=True)
    grouped = attend(query, key, value, **options)
    assert_close(grouped, attend(query, jnp.repeat(key, 2, 2), jnp.repeat(value, 2, 2), **options))


# Keys are a set


def test_permuting_keys_changes_nothing(attend, keys):
    query, key, value = draw(keys, QUERY, KEY, VALUE)
    (bias,), mask = draw(keys, (1, 4, 5, 7)), keys.bools(2, 1, 5, 7)
    order = keys.permutation(7)

    @jax.jit
    def program(query, key, value, mask, bias):
        def loss(query, key, value, bias):
            output = attend(query, key, value, mask=mask, bias=bias)
            return jnp.sum(jnp.sin(output)), output

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(query, key, value, bias)

    (d_query, d_key, d_value, d_bias), output = program(query, key, value, mask, bias)
    made, output_permuted = program(query, key[:, order], value[:, order], mask[..., order], bias[..., order])
    assert_close(output_permuted, output)
    assert_close(made, (d_query, d_key[:, order], d_value[:, order], d_bias[..., order]), length=7)


@pytest.mark.parametrize("score", ["dot", *slow("additive")])
def test_splitting_keys_and_merging(attend, score, keys):
    """Values and gradients of attention over parts of the keys, merged, are those over all of them."""
    query, key, value, bias = draw(keys, QUERY, KEY, VALUE, (2, 4, 5, 7))
    scorer = {"dot": scores.Dot(), "additive": scores.Additive(*draw(keys, (3,)))}[score]
    real = keys.bools(2, 7).at[0, :3].set(False).at[1].set(False)
    cuts = [slice(0, 3), slice(3, 3), slice(3, 7)]

    def parts(query, key, value, bias):
        made = [
            attend(
                query, key[:, cut], value[:, cut], score=scorer, mask=masks.KeyPadding(real[:, cut]),
                bias=bias[..., cut], return_lse=True,
            )
            for cut in cuts
        ]  # fmt: skip
        return attnlib.merge_attention(*zip(*made, strict=True))

    def whole(query, key, value, bias):
        return attend(query, key, value, score=scorer, mask=masks.KeyPadding(real), bias=bias, return_lse=True)

    @jax.jit
    def program(arguments, cotangents):
        results = []
        for function in (parts, whole):
            made, pullback = jax.vjp(function, *arguments)
            results.append((made, pullback(cotangents)))
        return results

    cotangents = tuple(draw(keys, (2, 5, 4, 6), (2, 4, 5)))
    merged, direct = program((query, key, value, bias), cotangents)
    assert_close(merged, direct, length=7)
    assert np.isneginf(direct[0][1][1]).all()  # the second batch entry attends nothing
    assert_finite(merged[1])


def test_merging_is_associative_and_takes_stacks(keys):
    outputs, lses = draw(keys, (3, 2, 5, 4, 6), (3, 2, 4, 5))

    @jax.jit
    def program(outputs, lses):
        first = attnlib.merge_attention(outputs[:2], lses[:2])
        second = attnlib.merge_attention([first[0], outputs[2]], [first[1], lses[2]])
        return attnlib.merge_attention(outputs, lses), second, attnlib.merge_attention(outputs[:1], lses[:1])

    whole, second, alone = program(outputs, lses)
    assert_close(second, whole)
    assert_close(alone, (outputs[0], lses[0]))


@pytest.mark.parametrize("shift", [-1024.0, 1024.0])
def test_merging_does_not_see_a_shift_of_all_lses(shift, keys):
    """However large or small they are, their differences alone count."""
    outputs, lses = keys.normal(3, 2, 5, 4, 6), jnp.round(64 * keys.normal(3, 2, 4, 5)) / 64  # exact after the shift
    output, lse = attnlib.merge_attention(outputs, lses)
    assert_close(attnlib.merge_attention(outputs, lses + shift), (output, lse + shift))


@pytest.mark.parametrize("axes", [None, (0, 1), -3, (1, 0)], ids=str)
def test_merging_over_any_axes(axes, keys):
    shape = (2, 3, 2, 4)
    attended = {None: (1,), -3: (1,)}.get(axes, axes)
    lse_shape = (*(shape[axis] for axis in range(2) if axis not in attended), 2, *(shape[axis] for axis in attended))
    outputs, lses = draw(keys, (2, *shape), (2, *lse_shape))
    output, lse = jax.jit(functools.partial(attnlib.merge_attention, attention_axes=axes))(outputs, lses)
    outputs, lses = np.asarray(outputs), np.asarray(lses)
    assert_close(lse, np.logaddexp(lses[0], lses[1]))
    shares = np.exp(lses - np.asarray(lse))
    to_user = {None: (0, 2, 1), -3: (0, 2, 1), (0, 1): (1, 2, 0), (1, 0): (2, 1, 0)}[axes]
    expected = sum(np.transpose(share, to_user)[..., None] * part for share, part in zip(shares, outputs, strict=True))
    np.testing.assert_allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (2, 0, 4, 6), (2, 5, 4, 0)])
def test_merging_nothing(shape):
    batch, queries, heads, _ = shape
    outputs, lses = np.ones((2, *shape), np.float32), np.full((2, batch, heads, queries), -np.inf, np.float32)
    output, lse = jax.jit(attnlib.merge_attention)(outputs, lses)
    assert_same(output, np.zeros(shape, np.float32))
    assert np.isneginf(lse).all()


# What may not be attended has no derivative


@pytest.mark.parametrize(
    "mask",
    [masks.Causal(2) & masks.SlidingWindow(1, None), masks.Neighborhood(3) | masks.Prefix(1), *slow(masks.Causal())],
    ids=["window", "neighborhood or prefix", "causal"],
)
def test_causality_is_read_off_the_gradient(attend, mask, keys):
    """d output[t] / d key[s] and d value[s] are zero exactly where t may not attend s, and nowhere else."""
    query, key, value = draw(keys, (1, 5, 1, 3), (1, 7, 1, 3), (1, 7, 1, 2))

    @jax.jit
    def jacobians(query, key, value):
        def outputs(key, value):
            return attend(query, key, value, mask=mask)[0, :, 0]

        return jax.jacrev(outputs, (0, 1))(key, value)

    allowed = np.asarray(mask.as_array(5, 7))
    alone = allowed.sum(-1, keepdims=True) == 1  # a weight of one does not depend on its key
    for jacobian, expected in zip(jacobians(query, key, value), (allowed & ~alone, allowed), strict=True):
        seen = np.any(np.asarray(jacobian) != 0, (1, 2, 4, 5))  # (T, S)
        assert np.array_equal(seen, expected)


# Identities


def test_weights_are_what_the_values_are_averaged_by(attend, keys):
    query, key, value = draw(keys, (2, 3, 2, 4, 3), (2, 2, 4, 2, 3), (2, 2, 4, 2, 6))
    output, weights, lse = attend(
        query, key, value, mask=masks.Causal(axis=0), return_weights=True, return_lse=True, logits_soft_cap=3.0
    )
    assert weights.shape == (2, 4, 3, 2, 2, 4)
    grouped = weights.reshape(2, 2, 2, 3, 2, 2, 4)
    expected = jnp.einsum("bkgtuxy,bxyke->btukge", grouped, value, precision="highest").reshape(2, 3, 2, 4, 6)
    assert_close(output, expected, length=8)
    np.testing.assert_allclose(weights.sum((-1, -2)), 1, atol=1e-6)
    assert lse.shape == (2, 4, 3, 2)
    alone = attend(query, key, value, mask=masks.Causal(axis=0), logits_soft_cap=3.0)
    assert_close(alone, output)  # asking for weights changes no number


def test_scale_bias_and_mask_identities(attend, keys):
    query, key, value = draw(keys, QUERY, KEY, VALUE)
    by_head, shift = draw(keys, (4,), (2, 4, 5, 1))
    mask = keys.bools(5, 7).at[:, 0].set(True)

    # Few programs: arguments of one shape are one, whatever they say.
    plain, lse = attend(query, key, value, return_lse=True)
    heads_first = [np.moveaxis(np.asarray(x, np.float64), 2, 1) for x in (query, key, value)]
    by_definition = [heads_first[0], *(np.repeat(x, 2, 1) for x in heads_first[1:])]

    def expected(query, key, value, **options):
        return np.moveaxis(softmax_average(query, key, value, **options)[0], 1, 2).astype(np.float32)

    assert_close(plain, expected(*by_definition))
    scaled = by_definition[0] * np.asarray(by_head)[:, None, None] * 3**0.5
    assert_close(attend(query, key, value, score=scores.Dot(by_head)), expected(scaled, *by_definition[1:]))
    shift, forbidden = (np.broadcast_to(x, (2, 4, 5, 7)) for x in (shift, np.where(mask, np.float32(0), -np.inf)))
    shifted, shifted_lse = attend(query, key, value, bias=shift, return_lse=True)
    assert_close((shifted, shifted_lse), (plain, lse + shift[..., 0]))
    masked = expected(*by_definition, mask=np.asarray(mask))
    assert_close(attend(query, key, value, mask=mask), masked)
    assert_close(attend(query, key, value, bias=forbidden, return_lse=True)[0], masked)
    assert_close(attend(query, key, value, mask=jnp.ones((5, 7), bool)), plain)
    assert_close(attend(query, key, value, logits_soft_cap=1e4), plain)
    assert_close(attend(query, key, 3 * value + 1, return_lse=True)[0], 3 * plain + 1)
    assert_close(attend(query, key + 1, value, return_lse=True)[0], plain, factor=64)  # alike for all keys of a query
    assert_close(attend(query, key, value, score=scores.Bilinear(jnp.eye(3) / 3**0.5)), plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["reference", "blockwise", *slow(IN_TURN, IN_ONE_TILE, SIDE_BY_SIDE)])
def test_logits_of_any_size(name, dtype):
    """From 1e-3, where all keys weigh alike, to 1e4, where one has all weight: values and gradients."""
    with x64(dtype == "float64"):
        draw = np.random.default_rng(3)
        query, key, value, cotangent = (
            jax.device_put(draw.normal(size=(2, length, 2, 4)).astype(dtype)) for length in (5, 7, 7, 5)
        )

        @jax.jit
        def both(query, key, value):
            made, pull = jax.vjp(lambda *x: attnlib.dot_product_attention(*x, **by_name(name)), query, key, value)
            return made, pull(cotangent)[2]

        unit = float(jnp.finfo("float64" if dtype == "float64" else "float32").eps)
        for size in (1e-3, 1, 60, 1e4):
            scaled = jnp.asarray(query * (2 * size), dtype)  # 2 = sqrt(features)
            made, value_ct = both(scaled, key, value)
            of_heads = [np.moveaxis(np.asarray(x).astype(np.float64), 2, 1) for x in (scaled, key, value, cotangent)]
            expected, weights = softmax_average(*of_heads[:3])
            largest = np.abs(np.einsum("bntd,bnsd->bnts", *of_heads[:2])).max() / 2
            # A logit is wrong by some units of the largest, and a weight by as much of itself.
            bound = 4 * unit * max(largest, 1) + 2 * float(jnp.finfo(dtype).eps)
            for got, want in ((made, expected), (value_ct, np.swapaxes(weights, -1, -2) @ of_heads[3])):
                np.testing.assert_allclose(
                    np.moveaxis(np.asarray(got).astype(np.float64), 2, 1), want, rtol=0, atol=bound * np.abs(want).max()
                )


# Transformations


# Any two operands are batched both, each alone, or (a call that is not batched) neither.
MAPPED = [
    ("query", "key", "scale", "dropout_rng"),
    ("query", "value", "mask", "dropout_rng"),
    ("query", "bias", "mask", "scale"),
    ("key", "value", "bias", "mask", "dropout_rng"),
    ("key", "value", "bias", "scale"),
]
ONE_MAPPED = [("query",), ("key",), ("value",), ("bias",), ("mask",), ("scale",)]


def test_any_two_operands_are_batched_in_every_way():
    operands = sorted({operand for mapped in MAPPED for operand in mapped})
    assert len(operands) == 7
    for one, other in itertools.combinations(operands, 2):
        ways = {(one in mapped, other in mapped) for mapped in [*MAPPED, ()]}
        assert len(ways) == 4, (one, other)


@pytest.mark.parametrize("mapped", [*MAPPED, *slow(*ONE_MAPPED)], ids=" ".join)
def test_vmap_over_any_operands_is_a_loop(attend, mapped, keys):
    count = 3
    arguments = dict(zip(("query", "key", "value", "bias"), draw(keys, QUERY, KEY, VALUE, (2, 1, 5, 7)), strict=True))
    arguments["mask"] = masks.KeyPadding(keys.bools(2, 7)) & masks.Causal(jnp.int32(2))
    arguments["scale"] = jnp.float32(0.4)
    arguments["dropout_rng"] = next(keys)
    stacked = dict(arguments)
    for name in mapped:
        if name == "mask":
            real = keys.bools(count, 2, 7)
            stacked["mask"] = masks.KeyPadding(real) & masks.Causal(jnp.arange(count, dtype=jnp.int32))
        elif name == "dropout_rng":
            stacked[name] = jax.random.split(next(keys), count)
        else:
            factors = jnp.arange(1, count + 1, dtype=jnp.float32).reshape(-1, *[1] * arguments[name].ndim)
            stacked[name] = arguments[name][None] * factors
    axes = {name: 0 if name in mapped else None for name in arguments}

    def call(arguments):
        options = dict(arguments)
        score = scores.Dot(options.pop("scale"))
        return attend(**options, score=score, dropout_rate=0.3)

    batched = jax.jit(jax.vmap(call, in_axes=(axes,)))(stacked)
    for i in range(count):
        one = {name: jax.tree.map(lambda x, i=i: x[i], stacked[name]) if name in mapped else stacked[name]
               for name in stacked}  # fmt: skip
        assert_close(call(one), batched[i])


@on_the_reference
def test_transformations_agree(attend, keys):
    """jit, remat, linearize, scan, cond and while_loop give the numbers of the plain call and its gradient."""
    query, key, value = draw(keys, (2, 5, 2, 3), (2, 7, 1, 3), (2, 7, 1, 3))
    tangent = like(query, 8)

    def step(x):
        return attend(x, key, value, mask=masks.Causal(1))

    def loss(x, step=step):
        return jnp.sum(jnp.sin(step(step(x))))

    def scanned(x):
        return jnp.sum(jnp.sin(jax.lax.scan(lambda x, _: (step(x), None), x, None, length=2)[0]))

    def looped(x):
        return jnp.sum(jnp.sin(jax.lax.fori_loop(0, 2, lambda _, x: step(x), x)))

    def branched(x):
        return jnp.sum(jnp.sin(jax.lax.cond(x[0, 0, 0, 0] < 1e9, lambda x: step(step(x)), jnp.zeros_like, x)))

    @jax.jit
    def program(query):
        value, gradient = jax.value_and_grad(loss)(query)
        others = [scanned, branched, lambda x: loss(x, jax.checkpoint(step))]
        _, linear = jax.linearize(loss, query)
        forward = (jax.jvp(loss, (query,), (tangent,))[1], linear(tangent), jnp.vdot(gradient, tangent))
        return value, gradient, [jax.value_and_grad(other)(query) for other in others], looped(query), forward

    value_of, gradient, others, looped_value, forward = program(query)
    assert_close(value_of, loss(query), length=60)
    for other in others:
        assert_close(other, (value_of, gradient), length=60)
    assert_close(looped_value, value_of, length=60)
    assert_close(forward, (forward[0],) * 3, length=60)


@on_the_reference
def test_jacobians_and_hessian_agree(attend, keys):
    query, key, value = draw(keys, (1, 2, 1, 2), (1, 3, 1, 2), (1, 3, 1, 1))

    def loss(query):
        return jnp.sum(jnp.sin(attend(query, key, value, score=scores.Additive())))

    @jax.jit
    def program(query):
        gradient = jax.grad(loss)
        return jax.jacfwd(loss)(query), gradient(query), jax.hessian(loss)(query), jax.jacrev(gradient)(query)

    forward, reverse, hessian, double_reverse = program(query)
    assert_close(forward, reverse, length=6)
    assert_close(hessian, double_reverse, length=6)
    flat = hessian.reshape(4, 4)
    assert_close(flat, flat.T, length=6)
