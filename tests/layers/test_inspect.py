"""What `attnlib.inspect` says against the same read off the dense weights, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, COMPLETE, IN_TURN, build, by_name, context, like
from conftest import assert_close, assert_finite, assert_zero, x64

import attnlib
from attnlib import inspect, masks, modifiers, scores

# Each score, kind of broadcast, rows of nothing, and lengths that tiles do not divide. The functions see a mask through
# its tiles alone, so that a few kinds of masks are enough here; `test_cases` has them all.
TABLE = [
    "dot", "custom, unequal features", "grouped, mask and bias a head", "causal, offset a batch index", "lengths",
    "masks composed", "nothing attends", "score_mod, two batch axes before", "sink", "positions",
    "two axes, partly broadcast", "outer axes, reversed", "query of one broadcasts", "1 queries, 7 keys",
    "0 queries, 7 keys", "no keys, causal", "no batch entries", "bfloat16", "float64",
]  # fmt: skip
MORE = [
    "additive scale a head", "soft cap, causal, additive", "bilinear a head, unequal features", "multi-query",
    "block sparse", "query padding", "relative bias, two axes", "is_causal and a mask", "sliding window",
    "neighborhood, clipped and dilated", "segments", "predicate", "bucketed bias, causal, grouped",
    "sink, rows of nothing", "positions, modified", "two axes, neighborhood",
]  # fmt: skip
FUNCTIONS = ("rows", "received", "mean", "entropy", "top")
# The mean is what is received, divided: once for each kind of rows that attend nothing, and of axes.
WITH_MEAN = ("dot", "lengths", "nothing attends", "two axes, partly broadcast", "no keys, causal", "0 queries, 7 keys")
WITHOUT = ("value",)


def split(case):
    """(differentiable operands without the value, what is traced besides, static options)."""
    operands, traced, options = build(case)
    return {name: x for name, x in operands.items() if name not in WITHOUT}, traced, options


def chosen(case, rows=3):
    """Some query positions, with one of them twice, or none where there are none."""
    axes = attention_axes(case)
    total = int(np.prod([case.query[axis] for axis in axes]))
    return np.array([total - 1, 0, total // 2, 0][: rows + 1] if total else [], np.int32)


def attention_axes(case):
    rank = len(case.query)
    axes = case.options.get("attention_axes", tuple(range(1 if rank > 3 else 0, rank - 2)))
    return tuple(axis % rank for axis in (axes if isinstance(axes, tuple) else (axes,)))


def dense(operands, traced, options):
    """(weights `(*batch, N, *query axes, *key axes)`, lse) of all pairs at once."""
    query, key = operands["query"], operands["key"]
    value = jnp.ones((*key.shape[:-1], 1), query.dtype)
    options = {**options, "implementation": "reference"}
    return attnlib.attention(
        **operands, value=value, **traced, **options, return_weights=True, return_lse=True
    )[1:]  # fmt: skip


def flattened(weights, lse, sink, spread, xp):
    """(weights `(*batch, N, T, S)`, entropies `(*batch, N, T)`)."""
    lead = weights.shape[: weights.ndim - 2 * spread]
    queries, keys = weights.shape[len(lead) : len(lead) + spread], weights.shape[len(lead) + spread :]
    weights = weights.reshape(*lead, np.prod(queries, dtype=int), np.prod(keys, dtype=int))
    shares = weights
    if sink is not None:
        sink = xp.broadcast_to(xp.asarray(sink), lead[-1:]).reshape(*(1,) * (len(lead) - 1), -1, 1)
        rest = xp.where(xp.any(weights > 0, -1), xp.exp(sink - lse.reshape(weights.shape[:-1])), 1)
        shares = xp.concatenate([weights, rest[..., None]], -1)
    safe = xp.where(shares > 0, shares, 1)
    return weights, -xp.sum(xp.where(shares > 0, safe * xp.log(safe), 0), -1)


def everything(operands, traced, options, rows, k, functions=FUNCTIONS):
    call = {**operands, **traced, **options}
    every = dict(
        rows=lambda: inspect.attention_rows(**call, rows=rows),
        received=lambda: inspect.attention_received(**call),
        mean=lambda: inspect.attention_received(**call, mean=True),
        entropy=lambda: inspect.attention_entropy(**call),
        top=lambda: inspect.top_keys(**call, k=k) if k else None,
    )
    return {name: every[name]() for name in functions}


def expected(weights, lse, sink, rows, k, spread, xp=np):
    """The same of the dense weights; what is flat there keeps its flat axes. NumPy compiles nothing."""
    weights, entropy = flattened(weights, lse, sink, spread, xp)
    attending = xp.sum(xp.any(weights > 0, -1), -1)[..., None]
    received = xp.sum(weights, -2)
    return dict(
        rows=weights[..., rows, :], received=received,
        mean=received / xp.maximum(attending, 1).astype(weights.dtype), entropy=entropy,
        largest=xp.sort(weights, -1)[..., ::-1][..., :k], weights=weights,
    )  # fmt: skip


def check(case, implementation):
    """Every function of a case, on an implementation, against the dense weights."""
    with context(case):
        operands, traced, options = split(case)
        rows, spread = chosen(case), len(attention_axes(case))
        key_shape = tuple(case.key[axis] for axis in attention_axes(case))
        k = min(3, int(np.prod(key_shape)))
        functions = [name for name in FUNCTIONS if name != "mean" or case.name in WITH_MEAN]

        @jax.jit
        def both(operands, traced, rows):
            made = everything(operands, traced, {**options, **by_name(implementation)}, rows, k, functions)
            return made, dense(operands, traced, options)

        made, (weights, lse) = jax.tree.map(np.asarray, both(operands, traced, jax.device_put(np.asarray(rows))))
        want = expected(weights, lse, operands.get("sink"), rows, k, spread)
        lead = want["received"].shape[:-1]
        assert made["entropy"].shape == (*lead, *(case.query[axis] for axis in attention_axes(case)))
        assert made["rows"].shape == (*lead, len(rows), *key_shape)
        assert made["received"].shape == (*lead, *key_shape)
        for name in set(functions) - {"top"}:
            length = max(case.query[1], case.key[1])
            got = made[name].reshape(want[name].shape)
            if name == "entropy":  # rounded as the logits are
                np.testing.assert_allclose(got, want[name], atol=64 * float(jnp.finfo(got.dtype).eps))
            else:
                assert_close(got, want[name], length=max(length, 1), factor=32)
        if k:
            check_top(made["top"], want)


def check_top(top, want):
    """The largest weights, and keys that have them; -1 where they are nothing."""
    largest, keys = (x.reshape(want["largest"].shape) for x in top)
    assert_close(largest, want["largest"], factor=32)
    assert np.array_equal(keys == -1, largest == 0)
    found = np.take_along_axis(np.asarray(want["weights"]), np.maximum(keys, 0), -1)
    np.testing.assert_allclose(np.where(keys < 0, 0, found), largest, rtol=1e-5, atol=1e-6)
    assert all(len(set(row[row >= 0])) == sum(row >= 0) for row in np.asarray(keys).reshape(-1, keys.shape[-1]))


@pytest.fixture
def few_at_a_time(monkeypatch):
    """So that `top_keys` takes runs of two queries, the last beginning with one of the run before."""
    monkeypatch.setattr(inspect, "_NUMBERS", 1)
    monkeypatch.setattr(inspect, "_MIN_QUERIES", 2)


CHECKED = [(name, "blockwise") for name in TABLE]
CHECKED += [(name, "reference") for name in ("masks composed", "sink, rows of nothing", "two axes, row-major")]
CHECKED += [(name, IN_TURN) for name in ("masks composed", "sink, rows of nothing")]
REST = [(name, "blockwise") for name in MORE]
REST += [("custom", "reference"), ("alibi", "reference"), ("alibi", IN_TURN), ("two axes, row-major", IN_TURN)]


def or_slow(cases, rest):
    return [*cases, *(pytest.param(*each, marks=pytest.mark.slow) for each in rest)]


@pytest.mark.parametrize(("name", "implementation"), or_slow(CHECKED, REST))
def test_they_are_read_off_the_weights(name, implementation, few_at_a_time):
    check(BY_NAME[name], implementation)


# Each function with derivatives of each kind of operand, and all of them where rows attend nothing.
SMOOTH = [
    ("sink, rows of nothing", FUNCTIONS), ("custom", ("received", "top")),
    ("relative bias, two axes", ("rows", "entropy")),
]  # fmt: skip
ALL_SMOOTH = [("grouped", FUNCTIONS), ("soft cap, causal, additive", FUNCTIONS)]
ALL_SMOOTH += [(name, FUNCTIONS) for name, functions in SMOOTH if functions != FUNCTIONS]


@pytest.mark.parametrize(
    ("name", "functions"), or_slow(SMOOTH, ALL_SMOOTH), ids=lambda x: x if isinstance(x, str) else f"{len(x)}"
)
def test_gradients(name, functions, few_at_a_time):
    """Of all operands, biases, sinks and parameters of scores and modifiers."""
    case = BY_NAME[name]
    with context(case):
        operands, traced, options = split(case)
        rows, spread, k = chosen(case), len(attention_axes(case)), 2
        names = ["largest" if name == "top" else name for name in functions]

        def theirs(operands):
            made = expected(*dense(operands, traced, options), operands.get("sink"), rows, k, spread, jnp)
            return {n: made[n] for n in names}

        want = jax.eval_shape(theirs, operands)
        cotangents = {n: like(want[n], seed) for seed, n in enumerate(names)}

        def ours(operands):
            made = everything(operands, traced, {**options, **by_name("blockwise")}, rows, k, functions)
            if "top" in made:
                made["largest"] = made["top"][0]
            return {n: made[n].reshape(want[n].shape) for n in names}

        @jax.jit
        def pulled(operands, cotangents):
            return [jax.vjp(function, operands)[1](cotangents)[0] for function in (ours, theirs)]

        made, want = pulled(operands, cotangents)
        assert_finite(made)
        assert_close(made, want, length=8, factor=64)


def poisoned():
    """Operands of which nothing that the mask leaves out may matter, and that with zeros for the NaN in them."""
    draw = np.random.default_rng(0)
    query, key = (draw.normal(size=(2, length, 4, 6)).astype(np.float32) for length in (11, 13))
    mask = masks.Lengths(query=np.array([11, 5]), key=np.array([0, 9])) & masks.Causal(2)
    bad = [query.copy(), key.copy()]
    bad[0][1, 5:], bad[1][0], bad[1][1, 9:] = np.nan, np.inf, np.nan
    bias = np.zeros((2, 1, 1, 13), np.float32)
    bias[0], bias[1, ..., 9:] = np.nan, np.nan
    clean = [np.where(np.isfinite(x), x, 0) for x in (*bad, bias)]
    return [*bad, bias], clean, dict(mask=mask)


@pytest.mark.parametrize(
    ("score", "functions"),
    or_slow([(scores.Dot(), FUNCTIONS)], [(scores.Additive(), FUNCTIONS)]),
    ids=["dot", "additive"],
)
def test_what_is_masked_cannot_matter(score, functions, few_at_a_time):
    bad, clean, options = poisoned()

    def loss(arrays):
        operands = dict(zip(("query", "key", "bias"), arrays, strict=True), score=score)
        made = everything(operands, options, by_name("blockwise"), np.array([0, 7, 10]), 3, functions)
        keys = None
        if "top" in made:
            made["largest"], keys = made.pop("top")
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(made)), (made, keys)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, made), gradients = run(list(map(jnp.asarray, bad)))
    (_, want), want_gradients = run(list(map(jnp.asarray, clean)))
    assert_finite(made)
    assert_close(made[0], want[0])
    assert_close(gradients, want_gradients, factor=64)
    # The first of the batch has no keys, and the second no query from 5 on.
    assert_zero([made[0]["entropy"][0], made[0]["received"][0], made[0]["entropy"][1, :, 5:]])
    if functions == FUNCTIONS:
        assert_zero(made[0]["rows"][0])
        assert np.array_equal(made[1], want[1])
        assert np.all(np.asarray(made[1][0]) == -1)


def test_logits_of_minus_infinity_have_no_weight(keys):
    """As a bias or a modifier may have them instead of a mask."""
    query, key = keys.normal(2, 9, 3, 4), keys.normal(2, 9, 3, 4)
    keep = jnp.tril(jnp.ones((9, 9), bool), -1)  # the first row attends nothing
    bias = jnp.where(keep, 0.0, -jnp.inf)

    def modifier(logit, batch, head, i, j):
        return jnp.where(j < i, logit, -jnp.inf)

    def entropy(query, **options):
        return jnp.sum(jnp.sin(inspect.attention_entropy(query, key, **options)))

    @jax.jit
    def each(query):
        tiled = dict(implementation="blockwise")
        ways = [dict(mask=keep), dict(bias=bias, **tiled), dict(score_mod=modifier, **tiled)]
        return [jax.value_and_grad(lambda query, way=way: entropy(query, **way))(query) for way in ways]

    want, *others = each(query)
    for made in others:
        assert_close(made, want)


# What the rows are


def test_rows_by_place(keys):
    """Flat or along each axis, from the end, of any shape, traced or not."""
    query, key = keys.normal(2, 3, 5, 2, 4), keys.normal(2, 4, 3, 2, 4)
    value = jnp.ones((2, 4, 3, 2, 1))
    _, weights = attnlib.dot_product_attention(query, key, value, is_causal=True, return_weights=True)
    rows = functools.partial(inspect.attention_rows, query, key, is_causal=True)
    assert_close(rows(rows=7), weights[:, :, 1, 2])
    assert_close(rows(rows=(1, 2)), weights[:, :, 1, 2])
    assert_close(rows(rows=(-1, [0, 4])), weights[:, :, 2, jnp.array([0, 4])])
    assert_close(rows(rows=(jnp.arange(3)[:, None], jnp.arange(5))), weights)
    assert_close(
        jax.jit(lambda n: rows(rows=[[0, -1], [n, 14]]) if n is None else rows(rows=n))(jnp.int8(-8)),
        weights[:, :, 1, 2],
    )
    assert rows(rows=np.zeros((0, 2), int)).shape == (2, 2, 0, 2, 4, 3)


def test_rows_beyond_the_end(keys):
    query, key = keys.normal(1, 5, 1, 4), keys.normal(1, 7, 1, 4)
    made = jax.jit(lambda rows: inspect.attention_rows(query, key, rows=rows))(jnp.array([4, 5, -6, -5]))
    assert np.array_equal(np.isnan(made).all((0, 1, 3)), [False, True, True, False])
    assert np.array_equal(np.isnan(made).any((0, 1, 3)), [False, True, True, False])


def test_traced_rows_do_not_compile_again(keys):
    query, key = keys.normal(1, 6, 1, 4), keys.normal(1, 7, 1, 4)
    inspect.attention_rows(query, key, rows=jnp.array([0, 1]))
    count = inspect._attention_rows._cache_size()
    inspect.attention_rows(query, key, rows=[5, -1])
    assert inspect._attention_rows._cache_size() == count


def test_under_vmap(keys):
    """Over rows and operands, against one after another."""
    query, key = keys.normal(3, 6, 2, 4), keys.normal(3, 7, 2, 4)
    rows = jnp.array([[0, 5], [1, 1], [3, 2]])

    def one(query, key, rows):
        made = everything(dict(query=query, key=key), {}, dict(is_causal=True), rows, 2)
        return {**made, "top": made["top"][0]}, made["top"][1]

    made = jax.jit(jax.vmap(one))(query, key, rows)
    single = jax.jit(one)
    each = [single(*x) for x in zip(query, key, rows, strict=True)]
    assert_close(made[0], jax.tree.map(lambda *x: np.stack(x), *[x[0] for x in each]))
    assert np.array_equal(made[1], [x[1] for x in each])


# Closed forms


@pytest.mark.parametrize("implementation", COMPLETE)
def test_entropy_of_equal_weights(implementation):
    """log of how many; with a sink of the same logit, of one more."""
    query = jnp.zeros((1, 9, 2, 3))
    entropy = functools.partial(inspect.attention_entropy, query, query, is_causal=True, implementation=implementation)
    assert_close(entropy(), jnp.broadcast_to(jnp.log(jnp.arange(1.0, 10)), (1, 2, 9)))
    assert_close(entropy(sink=0.0), jnp.broadcast_to(jnp.log(jnp.arange(2.0, 11)), (1, 2, 9)))


def test_entropy_of_large_logits_is_rounded_as_they_are(keys):
    """To the logits' own rounding, and no worse."""
    query, key = 40 * keys.normal(1, 33, 2, 8), 40 * keys.normal(1, 65, 2, 8)
    with x64():
        wide = dict(query=np.asarray(query, float), key=np.asarray(key, float), score=scores.Dot())
        weights, lse = jax.jit(lambda wide: dense(wide, {}, {}))(wide)
        _, want = flattened(np.asarray(weights), np.asarray(lse), None, 1, np)
    largest = np.abs(np.einsum("btnd,bsnd->bnts", query, key)).max() / 8**0.5
    assert largest > 1000
    made = inspect.attention_entropy(query, key, implementation="blockwise")
    np.testing.assert_allclose(made, want, atol=8 * largest * float(jnp.finfo("float32").eps))


# Memory

LENGTH, HEADS, FEATURES = 16384, 2, 64
ROWS = 4
SQUARE_MB = HEADS * LENGTH**2 * 4 / 1e6
PROGRAMS = {
    "rows": lambda *x, **o: inspect.attention_rows(*x, rows=jnp.arange(ROWS) * 1000, **o),
    "received": inspect.attention_received,
    "entropy": inspect.attention_entropy,
    "top": lambda *x, **o: inspect.top_keys(*x, k=4, **o)[0],
}
OPTIONS = {
    "causal": dict(is_causal=True),
    "modified, with a sink": dict(score_mod=modifiers.ALiBi(modifiers.alibi_slopes(HEADS)), sink=0.5),
    "additive": dict(score=scores.Additive(), is_causal=True),
}


@functools.cache
def temporaries(name, option, length, gradient):
    """Megabytes of temporaries that the compiled program needs."""

    def program(query, key):
        return PROGRAMS[name](query, key, **OPTIONS[option])

    def loss(*operands):
        return jnp.sum(jnp.sin(program(*operands)))

    operand = jax.ShapeDtypeStruct((1, length, HEADS, FEATURES), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1)) if gradient else program).lower(operand, operand).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


# A gradient's program holds the forward one; each function, option and kind of pass is here once, the rest is slow.
COUNTED = [("rows", "causal", True), ("top", "causal", True), ("received", "modified, with a sink", True)]
COUNTED += [("entropy", "additive", False)]
ALSO_COUNTED = [(name, "causal", gradient) for name in PROGRAMS for gradient in (False, True)]
ALSO_COUNTED += [
    ("entropy", "modified, with a sink", True),
    ("received", "additive", False),
    ("top", "additive", False),
]
ALL_COUNTED = list(dict.fromkeys([*COUNTED, *ALSO_COUNTED]))


@pytest.mark.parametrize(
    ("name", "option", "gradient"), or_slow(COUNTED, [one for one in ALL_COUNTED if one not in COUNTED])
)
@pytest.mark.measured
def test_no_square_of_weights(name, option, gradient):
    assert temporaries(name, option, LENGTH, gradient) <= SQUARE_MB / 8


@pytest.mark.parametrize(("name", "option", "gradient"), or_slow(COUNTED[:1], ALL_COUNTED[1:]))
@pytest.mark.measured
def test_memory_is_linear(name, option, gradient):
    long, half = (temporaries(name, option, length, gradient) for length in (LENGTH, LENGTH // 2))
    assert long <= 2.4 * half


# Errors


def draw(*shape):
    return np.ones(shape, np.float32)


QUERY, KEY = draw(1, 5, 2, 4), draw(1, 7, 2, 4)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: inspect.attention_rows(QUERY, KEY, rows=[0, 5]), ValueError, "rows must be in -5..4, of 5 queries"),
        (lambda: inspect.attention_rows(QUERY, KEY, rows=-6), ValueError, "rows must be in -5..4"),
        (lambda: inspect.attention_rows(QUERY, KEY, rows=1.0), TypeError, r"rows must hold integers; got float64\[\]"),
        (lambda: inspect.attention_rows(QUERY, KEY, rows=(0, 1)), ValueError,
         "rows as a tuple must have one entry for each of the 1 attention axes; got 2. .* a list"),
        (lambda: inspect.attention_rows(draw(1, 0, 2, 4), KEY, rows=0), ValueError, "rows must be .* of 0 queries"),
        (lambda: inspect.top_keys(QUERY, KEY, k=8), ValueError, "k must be at most the number of keys, 7; got 8"),
        (lambda: inspect.top_keys(QUERY, KEY, k=0), ValueError, "k must be an int >= 1; got 0"),
        (lambda: jax.jit(lambda k: inspect.top_keys(QUERY, KEY, k=k))(2), TypeError, "k must be an int >= 1, known"),
        (lambda: inspect.attention_received(QUERY, KEY, mean=1), TypeError, "mean must be"),
        (lambda: inspect.attention_entropy(QUERY, KEY, dropout_rate=0.1), TypeError,
         "attention_entropy takes no 'dropout_rate': known are attention_axes, bias, "),
        (lambda: inspect.top_keys(QUERY, KEY, k=1, return_weights=True), TypeError,
         "top_keys takes no 'return_weights'"),
        (lambda: inspect.attention_entropy(QUERY, KEY, scale=2.0), TypeError,
         r"write score=attnlib.scores.Dot\(scale\)"),
        (lambda: inspect.attention_entropy(QUERY, KEY, score_mod=3), TypeError, "score_mod must be a function"),
        (lambda: inspect.attention_received(QUERY, KEY[0]), ValueError, "must have the same rank"),
        (lambda: inspect.attention_received(QUERY[0, 0], KEY), ValueError, "query must have rank 3 or more"),
        (lambda: inspect.attention_rows(QUERY, draw(1, 7, 3, 4), rows=0), ValueError, "query heads must be a multiple"),
        (lambda: inspect.attention_rows(QUERY, KEY.astype(int), rows=0), TypeError, "key must be a floating-point"),
        (lambda: inspect.top_keys(QUERY, KEY, k=1, implementation="cudnn"), ValueError, "no implementation can"),
    ],
)  # fmt: skip
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
