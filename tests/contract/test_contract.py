"""The contract of docs/concepts/contract.md, line by line, on every implementation.

Lines 5 and 6 (dropout, transformations) are in test_dropout.py and test_laws.py, 8 in test_errors.py, and 9 in
test_recompilation.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BLOCK_SIZES, IN_ONE_TILE, NAMES, SIDE_BY_SIDE, by_name, like, run, unsupported
from conftest import assert_close, assert_finite, assert_same, assert_zero, x64

import attnlib
from attnlib import masks, scores

IMPLEMENTATIONS = [*NAMES, IN_ONE_TILE, SIDE_BY_SIDE]
on_every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SHAPES = dict(query=(2, 5, 4, 3), key=(2, 7, 2, 3), value=(2, 7, 2, 6))  # B, T or S, N or K, D or E
BATCH, HEADS, QUERIES, KEYS = 2, 4, 5, 7
SCORES = {
    "dot": lambda keys: scores.Dot(),
    "additive": lambda keys: scores.Additive(keys.normal(4, 3)),
    "custom": lambda keys: scores.Custom(lambda q, k, a: -a * jnp.sum((q - k) ** 2), jnp.float32(0.2)),
}


def draw_operands(keys, score="dot", **shapes):
    operands = {name: keys.normal(*shape) for name, shape in (SHAPES | shapes).items()}
    return {**operands, "score": SCORES[score](keys)}


def skip_unless_supported(implementation, operands, **options):
    reason = unsupported(implementation, **operands, **options)
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")


# 1. A query row that may attend nothing gives output 0, weights 0, lse -inf, and zero derivatives of every order


def empty_rows(kind):
    """(options, which (batch, query) attend nothing)."""
    some = np.zeros((BATCH, QUERIES), bool)
    some[0, 1] = some[1, 3] = some[1, 4] = True
    first_two = np.broadcast_to(np.arange(QUERIES) < 2, (BATCH, QUERIES))
    second_batch = np.broadcast_to(np.array([[False], [True]]), (BATCH, QUERIES))
    forbidding = jnp.where(jnp.asarray(some)[:, None, :, None], -jnp.inf, jnp.ones((BATCH, 1, QUERIES, KEYS)))
    no_key_has = jnp.where(jnp.asarray(some), 9, jnp.ones((BATCH, QUERIES), jnp.int32))
    half = jnp.broadcast_to(jnp.arange(KEYS) % 2 == 0, (QUERIES, KEYS))
    return {
        "key padding": (dict(mask=masks.KeyPadding(np.array([[True] * KEYS, [False] * KEYS]))), second_batch),
        "query padding": (dict(mask=masks.QueryPadding(jnp.asarray(~some))), some),
        "dense": (dict(mask=jnp.asarray(~some)[:, None, :, None]), some),
        "segments": (dict(mask=masks.Segments(no_key_has, jnp.ones((BATCH, KEYS), jnp.int32))), some),
        "causal": (dict(mask=masks.Causal(-2)), first_two),
        "lengths": (dict(mask=masks.Lengths(key=jnp.array([4, 0]))), second_batch),
        "bias": (dict(bias=forbidding), some),
        "bias and mask": (dict(bias=jnp.where(half, -jnp.inf, 1.0), mask=half), some | True),
    }[kind]


KINDS = ["key padding", "query padding", "dense", "segments", "causal", "lengths", "bias", "bias and mask"]


# The order of the derivatives. An implementation sees of a mask which pairs and tiles attend, so masks of pairs, of
# batch indices and of tiles stand for all; test_cases.py has values of every kind. The reference is so quick that it
# takes all. Heads side by side are for products; other scores run there as they do in tiles.
EMPTY_ROWS = {
    "reference": {kind: 2 if kind in ("dense", "bias", "bias and mask", "causal") else 1 for kind in KINDS},
    IN_ONE_TILE: {"dense": 2, "bias": 2},
    SIDE_BY_SIDE: {"dense": 2, "bias": 1},
}
IN_TILES = {"dense": 2, "bias": 2, "bias and mask": 1, "key padding": 1, "causal": 1}


def empty_row_cases():
    for implementation in IMPLEMENTATIONS:
        orders = EMPTY_ROWS.get(implementation, IN_TILES)
        for kind in KINDS:
            if kind in orders:
                yield implementation, kind, "dot", orders[kind]
            if orders.get(kind) != 2:
                yield slow(implementation, kind, "dot", 2)
        if implementation in NAMES:
            yield slow(implementation, "dense", "additive", 2)
            yield slow(implementation, "bias", "additive", 2)
    yield "reference", "dense", "additive", 1


@pytest.mark.parametrize(("implementation", "kind", "score", "order"), [*empty_row_cases()])
def test_1_rows_that_attend_nothing_are_zero(implementation, kind, score, order, keys):
    options, empty = empty_rows(kind)
    operands = draw_operands(keys, score)
    if "bias" in options:
        operands["bias"] = options.pop("bias")
    skip_unless_supported(implementation, operands, **options)

    @jax.jit
    def program(operands, options, rows):
        """Values, and derivatives of a loss of some rows (B, T)."""

        def loss(operands):
            output, weights, lse = run(operands, options, {}, implementation)
            lse = jnp.where(jnp.isfinite(lse), lse, 0)
            of_output = jnp.sin(output).sum((2, 3)) * rows
            return jnp.sum(of_output) + jnp.sum(rows[:, None] * ((weights**2).sum(-1) + jnp.sin(lse)))

        results, tangent = jax.jvp(lambda x: run(x, options, {}, implementation), (operands,), (tangents,))
        gradient = jax.grad(loss)
        if order == 1:
            return results, tangent, [gradient(operands)]
        return results, tangent, jax.jvp(gradient, (operands,), (tangents,))

    tangents = like(operands, 4)
    results, tangent, of_empty = program(operands, options, jax.device_put(empty.astype(np.float32)))
    *_, of_all = program(operands, options, jnp.ones(empty.shape, jnp.float32))
    empty = np.broadcast_to(empty[:, None], results[2].shape)  # (B, N, T)
    assert np.array_equal(np.isneginf(results[2]), empty)
    assert_zero((pick_rows(results, empty)[:2], pick_rows(tangent, empty), of_empty))
    assert_finite((results[:2], tangent, of_all))
    assert np.any(np.asarray(of_all[0]["value"]) != 0) or empty.all()


@pytest.mark.parametrize("implementation", [*NAMES, slow(SIDE_BY_SIDE)])
def test_1_third_derivatives_of_rows_that_attend_nothing(implementation, keys):
    options, empty = empty_rows("dense")
    operands = draw_operands(keys)
    skip_unless_supported(implementation, operands, **options)
    direction = like(operands, 5)

    @jax.jit
    def program(rows, operands, direction, step):
        def along(step):
            moved = jax.tree.map(lambda x, d: x + step * d, operands, direction)
            output, *_ = run(moved, options, {}, implementation)
            return jnp.sum(jnp.sin(jnp.where(rows[:, :, None, None], output, 0)))

        def forward(function):
            return lambda step: jax.jvp(function, (step,), (jnp.ones_like(step),))[1]

        return forward(jax.grad(forward(along)))(step)

    of_empty, of_all = (program(rows, operands, direction, 0.0) for rows in (empty, np.ones(empty.shape, bool)))
    assert of_empty == 0
    assert np.isfinite(of_all)
    assert of_all != 0


# 2. Content at masked positions cannot matter


def poisoned_mask(kind, keys):
    """(mask, bool (B, T) of poisoned queries, bool (B, S) of poisoned keys and values)."""
    queries, key_positions = np.zeros((BATCH, QUERIES), bool), np.zeros((BATCH, KEYS), bool)
    if kind == "key padding":
        key_positions[0, 4:] = key_positions[1, 0] = True
        return masks.KeyPadding(jnp.asarray(~key_positions)), queries, key_positions
    if kind == "query padding":
        queries[0, 3:] = queries[1, 1] = True
        return masks.QueryPadding(jnp.asarray(~queries)), queries, key_positions
    if kind == "causal":
        key_positions[:, 3] = True
        return masks.Causal(), queries, key_positions
    if kind == "segments":
        query_ids, key_ids = np.array([1, 1, 2, 2, 0]), np.array([1, 1, 1, 2, 2, 0, 0])
        queries[0], key_positions[0] = query_ids != 1, key_ids != 1
        return masks.Segments(query_ids, key_ids, padding_id=0), queries, key_positions
    if kind == "lengths and window":
        queries[:, 4:], key_positions[:, 5:] = True, True
        return masks.Lengths(jnp.array([4, 3]), jnp.array([5, 4])) & masks.SlidingWindow(2, 1), queries, key_positions
    assert kind == "dense"
    queries[0, 2], key_positions[0, 1] = True, True
    return masks.Dense(keys.bools(BATCH, HEADS, QUERIES, KEYS, rate=0.3)), queries, key_positions


# Likewise. What is masked is cleared before a score or its derivative sees it, so the second order needs one score.
POISONED_MASKS = "key padding", "query padding", "causal", "segments", "lengths and window", "dense"
POISONED = [*((kind, "dot") for kind in POISONED_MASKS), ("dense", "additive"), ("dense", "custom")]
ORDERS = {
    "reference": {poisoned: 2 if poisoned[0] == "dense" else 1 for poisoned in POISONED},
    IN_ONE_TILE: {("dense", "dot"): 2},
    SIDE_BY_SIDE: {("dense", "dot"): 2, ("key padding", "dot"): 1, ("causal", "dot"): 1},
}
ORDERS_IN_TILES = {("dense", "dot"): 2, ("lengths and window", "dot"): 2, ("query padding", "dot"): 1,
                   ("causal", "dot"): 1, ("dense", "additive"): 1, ("dense", "custom"): 1}  # fmt: skip


def poisoned_cases():
    for implementation in IMPLEMENTATIONS:
        orders = ORDERS.get(implementation, ORDERS_IN_TILES)
        for poisoned in POISONED:
            if poisoned in orders:
                yield implementation, *poisoned, orders[poisoned]
            if orders.get(poisoned) != 2 and (poisoned[1] == "dot" or implementation in NAMES):
                yield slow(implementation, *poisoned, 2)


@pytest.mark.parametrize(("implementation", "kind", "score", "order"), [*poisoned_cases()])
def test_2_masked_content_cannot_matter(implementation, kind, score, order, keys):
    """NaN, infinities and huge numbers, forward and backward, up to the second order, pair by pair.

    A row that attends poison is NaN, and so may be the derivative of what that row attends; all else is unchanged.
    """
    operands = draw_operands(keys, score)
    mask, bad_query, bad_key = poisoned_mask(kind, keys)
    skip_unless_supported(implementation, operands, mask=mask)
    tangents = like(operands, 6)

    @jax.jit
    def program(operands, mask):
        def function(operands):
            return run(operands, {"mask": mask}, {}, implementation)

        def loss(operands):
            return jnp.sum(function(operands)[0] ** 2)

        results, tangent = jax.jvp(function, (operands,), (tangents,))
        gradient = jax.grad(loss)
        if order == 1:
            return results, tangent, gradient(operands)
        return results, tangent, *jax.jvp(gradient, (operands,), (tangents,))

    attended = np.broadcast_to(mask.as_array(QUERIES, KEYS), (BATCH, HEADS, QUERIES, KEYS))
    bad_rows = (bad_query[:, None] & attended.any(-1)) | (attended & bad_key[:, None, None]).any(-1)  # (B, N, T)
    tainted = (attended & bad_rows[..., None]).any(-2)  # (B, N, S): keys that a poisoned row attends
    good = dict(
        query=~np.moveaxis(bad_rows, 1, 2),
        key=~np.moveaxis(tainted.reshape(BATCH, 2, HEADS // 2, KEYS).any(2), 1, 2),
    )
    good["value"] = good["key"]
    assert all(mask.any() for mask in good.values())

    clean = program(operands, mask)
    # What is not finite is computed again, by tiles: with heads side by side it is the same but for rounding.
    same = assert_close if implementation == SIDE_BY_SIDE else assert_same
    # A row that attends 1e30 overflows in its own ways, but what no row attends may be of any size.
    for poison in (np.nan, np.inf, -np.inf, *(() if bad_rows.any() else (1e30,))):
        poisoned = dict(operands)
        for name, bad in (("query", bad_query), ("key", bad_key), ("value", bad_key)):
            poisoned[name] = np.where(bad[..., None, None], np.float32(poison), np.asarray(operands[name]))
        made = program(poisoned, mask)
        for got, want in zip(made[:2], clean[:2], strict=True):
            same(pick_rows(got, ~bad_rows), pick_rows(want, ~bad_rows))
        for got, want in zip(made[2:], clean[2:], strict=True):
            for name, where in good.items():
                assert_finite(got[name][where])
                same(got[name][where], want[name][where])
            if not bad_rows.any():
                assert_same(got["score"], want["score"])


def pick_rows(results, rows):
    output, weights, lse = (np.asarray(x) for x in results)
    return np.moveaxis(output, 2, 1)[rows], weights[rows], lse[rows]


@pytest.mark.parametrize(
    ("implementation", "soft_cap", "order"),
    [*((name, None, 1) for name in NAMES), *((name, 2.0, 2) for name in NAMES), (SIDE_BY_SIDE, 2.0, 1),
     *(slow(name, cap, 2) for name in IMPLEMENTATIONS for cap in (None, 2.0) if (name in NAMES) <= (cap is None))],
)  # fmt: skip
def test_2_masked_bias_cannot_matter(implementation, soft_cap, order, keys):
    operands = draw_operands(keys)
    mask = keys.bools(BATCH, 1, QUERIES, KEYS)
    operands["bias"] = keys.normal(*mask.shape)
    options = dict(logits_soft_cap=soft_cap)
    skip_unless_supported(implementation, operands, mask=mask, **options)

    @jax.jit
    def program(operands):
        def loss(operands):
            return jnp.sum(run(operands, {"mask": mask}, options, implementation)[0] ** 2)

        gradient = jax.grad(loss)
        return gradient(operands) if order == 1 else jax.jvp(gradient, (operands,), (tangents,))

    tangents = like(operands, 7)
    clean = program(operands)
    for poison in (np.nan, np.inf, -np.inf, 1e30):
        made = program(operands | {"bias": jnp.where(mask, operands["bias"], poison)})
        assert_same(made, clean)


@on_every_implementation
def test_2_what_is_attended_does_matter(implementation, keys):
    """NaN that a row does attend reaches it, with a mask and without."""
    operands = draw_operands(keys)
    value = np.array(operands["value"])
    value[:, 1, 0] = np.nan
    operands["value"] = jax.device_put(value)
    every = (None, masks.Causal(), jnp.ones((1, 1), bool))
    for mask in every:
        skip_unless_supported(implementation, operands, mask=mask)

    @jax.jit
    def program(operands, every):
        return [attnlib.attention(**operands, mask=mask, **by_name(implementation)) for mask in every]

    for output in program(operands, every):
        poisoned = np.isnan(np.asarray(output)).any(-1)  # (B, T, N)
        assert poisoned[:, 1:, :2].all()  # heads 0 and 1 read key head 0
        assert not poisoned[:, :, 2:].any()


# 3. Softmax statistics are float32 at least, and float64 where an operand is; the output has the value's type


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("blockwise", "bfloat16"), ("reference", "float16"), (SIDE_BY_SIDE, "float16"), ("cudnn", "bfloat16"),
     slow("blockwise", "float16"), slow("reference", "bfloat16"), slow(SIDE_BY_SIDE, "bfloat16"),
     slow("cudnn", "float16")],
)  # fmt: skip
def test_3_statistics_are_float32(implementation, dtype, keys):
    """Only operands and output are rounded: the rest is as if they had been float32 all along."""
    shapes = dict(query=(2, 5, 4, 8), key=(2, 7, 2, 8), value=(2, 7, 2, 3))
    operands = {name: 8 * keys.normal(*shape, dtype=dtype) for name, shape in shapes.items()}
    operands["bias"] = keys.normal(5, 7, dtype=dtype)
    skip_unless_supported(implementation, operands, score=scores.Dot())

    @jax.jit
    def program(operands):
        def function(operands):
            return run({**operands, "score": scores.Dot()}, {}, {}, implementation)

        results, pullback = jax.vjp(function, operands)
        return results, pullback(jax.tree.map(jnp.ones_like, results))[0]

    (output, weights, lse), gradients = program(operands)
    exact, exact_gradients = program({name: x.astype(jnp.float32) for name, x in operands.items()})
    assert output.dtype == dtype
    assert jax.tree.map(lambda x: x.dtype, gradients) == jax.tree.map(lambda x: x.dtype, operands)
    assert_close((weights, lse), exact[1:], length=8)
    assert_close(output, exact[0].astype(dtype), factor=1)
    assert_close(gradients, jax.tree.map(lambda x: x.astype(dtype), exact_gradients), factor=2)


@on_every_implementation
def test_3_logits_beyond_float16(implementation, keys):
    query = jnp.full((1, 2, 1, 8), 200, jnp.float16)
    key = jnp.stack([query[:, 0], -query[:, 0]], 1)
    value = jnp.asarray([1, 2], jnp.float16).reshape(1, 2, 1, 1)
    skip_unless_supported(implementation, dict(query=query, key=key, value=value))
    output, lse = attnlib.dot_product_attention(query, key, value, return_lse=True, **by_name(implementation))
    assert_same(output, jnp.ones((1, 2, 1, 1), jnp.float16))
    np.testing.assert_allclose(lse, np.full((1, 1, 2), 8 * 200**2 / 8**0.5), rtol=1e-6)


@pytest.mark.parametrize("wide", ["query", "value"])
@on_every_implementation
def test_3_float64_is_honoured(implementation, wide, keys):
    with x64():
        draw = np.random.default_rng(3)
        query, key, value = (draw.normal(size=shape) for shape in SHAPES.values())
        operands = dict(query=query, key=key, value=value)
        operands = {name: jnp.asarray(x, jnp.float64 if name == wide else jnp.float32) for name, x in operands.items()}
        skip_unless_supported(implementation, operands, score=scores.Dot())
        program = jax.jit(lambda operands: run({**operands, "score": scores.Dot()}, {}, {}, implementation))
        output, weights, lse = program(operands)
        assert output.dtype == operands["value"].dtype
        assert weights.dtype == lse.dtype == jnp.float64

    query, key, value = (np.asarray(operands[name], np.float64) for name in SHAPES)
    logits = np.einsum("btnd,bsnd->bnts", query, np.repeat(key, 2, 2)) / 3**0.5
    expected = np.log(np.exp(logits).sum(-1))
    assert_close(lse, expected)
    expected = np.exp(logits - expected[..., None])
    assert_close(weights, expected)
    expected = np.einsum("bnts,bsne->btne", expected, np.repeat(value, 2, 2)).astype(output.dtype)
    assert_close(output, expected, factor=16 if wide == "value" else 1)


# 4. Any length; any broadcastable mask or bias, with its exact gradient at its own shape


@pytest.mark.parametrize("implementation", ["reference", *(slow(x) for x in IMPLEMENTATIONS if x != "reference")])
def test_4_every_broadcast_shape(implementation, keys):
    """Masks and biases of every shape do what their broadcast forms do, and the gradient is summed over broadcasts.

    The other implementations are compared with the reference at each of these shapes in test_cases.py.
    """
    operands = draw_operands(keys)
    whole = (BATCH, HEADS, QUERIES, KEYS)
    shapes = [(), (5, 1), (1, 4, 1, 7), (2, 1, 5, 1)]
    skip_unless_supported(implementation, operands, mask=jnp.ones(whole, bool), bias=jnp.ones(whole))
    direction = keys.normal(2, 5, 4, 6)

    @jax.jit
    def program(mask, bias):
        def loss(bias):
            return jnp.vdot(run({**operands, "bias": bias}, {"mask": mask}, {}, implementation)[0], direction)

        return jax.value_and_grad(loss)(bias)

    for shape in shapes:
        bias, mask = np.asarray(keys.normal(*shape)), np.asarray(keys.bools(*shape))
        expected, parts = program(np.broadcast_to(mask, whole), np.broadcast_to(bias, whole))
        axes = tuple(axis for axis in range(4) if ((1,) * (4 - len(shape)) + shape)[axis] == 1)
        loss, gradient = program(mask, bias)
        assert_close(loss, expected, length=QUERIES * KEYS)
        assert gradient.shape == shape
        parts = np.asarray(parts)
        error = np.abs(gradient - parts.sum(axes, keepdims=True).reshape(shape))
        assert np.all(error <= 16 * np.finfo(np.float32).eps * np.abs(parts).sum(axes).max())


# 7. Two runs on the same input are bitwise equal


@on_every_implementation
def test_7_two_runs_are_equal_bit_by_bit(implementation, keys):
    shapes = dict(query=(2, 67, 4, 16), key=(2, 131, 2, 16), value=(2, 131, 2, 16))
    operands = draw_operands(keys, **shapes)
    options = dict(dropout_rate=0.2, dropout_rng=next(keys), is_causal=True)
    skip_unless_supported(implementation, operands, **options)
    sizes = (32, 32) if BLOCK_SIZES.get(implementation) else None

    @jax.jit
    @jax.value_and_grad
    def program(operands):
        output = attnlib.attention(**operands, **options, **by_name(implementation) | dict(block_sizes=sizes))
        return jnp.sum(output**2)

    first = program(operands)
    for _ in range(3):
        assert_same(program(operands), first)


# 10. An implementation asked for by name runs or raises with its reasons; None chooses, and `explain` says what


def test_10_by_name_runs_or_raises():
    query = jnp.ones((2, 5, 1, 4))
    with pytest.raises(ValueError, match=r"no implementation can compute this .*\n  reference: .*block_sizes=None"):
        attnlib.dot_product_attention(query, query, query, implementation="reference", block_sizes=(2, 2))
    for name in NAMES:
        reason = unsupported(name, query, query, query)
        if reason is None:
            explanation = attnlib.explain(query, query, query, implementation=name)
            assert explanation.implementation == name
            assert name not in explanation.refusals
            assert attnlib.dot_product_attention(query, query, query, implementation=name).shape == query.shape


def test_10_several_are_tried_in_order():
    query = jnp.ones((2, 5, 1, 4))
    for names in (NAMES, NAMES[::-1], list(NAMES)):
        first = next(name for name in names if unsupported(name, query, query, query) is None)
        assert attnlib.explain(query, query, query, implementation=names).implementation == first


@pytest.mark.parametrize("length", [5, 64])
def test_10_none_chooses_and_explain_agrees(length):
    """The program compiled for None is the program of the implementation that explain names."""
    query = jax.ShapeDtypeStruct((2, length, 2, 4), jnp.float32)
    explanation = attnlib.explain(query, query, query, is_causal=True)
    assert explanation.implementation in NAMES
    assert set(explanation.refusals) == set(NAMES) - {explanation.implementation}
    assert f"implementation: {explanation.implementation}" in str(explanation)
    assert all(reason in str(explanation) for reason in explanation.refusals.values())
    assert explanation.memory > 0

    def program(implementation):
        def call(q, k, v):
            return attnlib.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

        return jax.jit(call).lower(query, query, query).as_text()

    assert program(None) == program(explanation.implementation)
