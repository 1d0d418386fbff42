"""Programs with symbolic sizes: one exported program serves every batch size, length and number of heads."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from covering import covering
from jax import export
from symbolic_case import symbolic_arguments

import attnlib
from attnlib import inspect, masks, modifiers, positions, scores
from attnlib._core.options import Options
from attnlib._engine import call as _call
from attnlib._engine import dispatch as _dispatch


def struct(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


# Static tables, grids and arrays, and symbolic lengths do not fit.
REFUSED = {
    "block sparse": "BlockSparse blocks cover a number of positions",
    "registers before a grid": r"Registers with grid=\(2, 3\) need 7 queries",
    "registers before an array": "mask must broadcast",
}


def traced_configurations():
    """Some cases in which each feature is, and those that are refused; the others in the slow tests."""
    chosen = {
        None: {*covering(cases.CASES, cases.features), *(cases.BY_NAME[name] for name in REFUSED)},
        "blockwise": covering([case for case in cases.CASES if not case.values_only], cases.features),
    }
    for case in cases.CASES:
        for name, some in chosen.items():
            marks = [] if case in some else [pytest.mark.slow]
            yield pytest.param(case, name, name is None, id=f"{name or 'default'}-{case}", marks=marks)


@pytest.mark.parametrize(("case", "name", "lengths"), [*traced_configurations()])
def test_cases_trace_with_symbolic_sizes(case, name, lengths):
    """By default with symbolic batch and lengths, and blockwise with a symbolic batch; values and gradients."""

    def pulled_back(operands, traced):
        def results(operands):
            return cases.run(operands, traced, case.options, name)

        if case.values_only:
            return results(operands), None
        value, pullback = jax.vjp(results, operands)
        return value, pullback(value)[0]

    with cases.context(case), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        operands, traced, _ = cases.build(case)
        operands, traced = symbolic_arguments(case, operands, traced, lengths=lengths)
        if lengths and case.name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[case.name]):
                jax.eval_shape(pulled_back, operands, traced)
            return
        (output, *_), gradients = jax.eval_shape(pulled_back, operands, traced)
        query, value = operands["query"].shape, operands["value"].shape
        assert output.shape[-2:] == (query[-2], value[-1])
        assert gradients is None or gradients["query"].shape == query


# Exported programs that run


def plain(how, query, key):
    return attnlib.dot_product_attention(query, key, key, **how)


def attended(how, query, key, real, bias, data):
    """Grouped heads with every option, its results and a tangent."""

    def attend(query):
        return attnlib.dot_product_attention(
            query, key, key, mask=masks.KeyPadding(real) | masks.SlidingWindow(1, 2), bias=bias, is_causal=True,
            score_mod=lambda logit, batch, head, i, j: logit * data[0, head] + (batch + i - j).astype(logit.dtype),
            sink=data[1], logits_soft_cap=5.0, dropout_rate=0.2, dropout_rng=jax.random.key(1), return_weights=True,
            return_lse=True, **how,
        )  # fmt: skip

    return jax.jvp(attend, (query,), (jnp.sin(query),))


def of_images(how, query, mask):
    """Two attention axes, of which masks and modifiers see the coordinates."""
    mask = masks.Dense(mask) & masks.Neighborhood(3) | masks.Causal(axis=1) & masks.BlockLocal(2) & ~masks.Dilated(2)
    bias = modifiers.RelativeBias(jnp.sin(jnp.arange(18, dtype=jnp.float32)).reshape(3, 3, 2))
    output = attnlib.additive_attention(query, query, query, mask=mask, score_mod=bias, **how)
    sigmoid = dict(score_mod=modifiers.LogSigmoid(), normalize=False)  # whose bias is of the number of keys
    product = scores.Custom(lambda q, k: q @ k)
    return output, attnlib.attention(query, query, query, score=product, mask=mask, **sigmoid, **how)


def of_layers(how, x, real):
    made = [
        attnlib.MultiHeadAttention(
            4, num_kv_heads=2, rotary=True, normalize_qk="rms", use_gate=True, use_sink=True, sliding_window=3,
            num_memory=2,
            score_mod=attnlib.BucketedPositionBias(num_buckets=8, max_distance=6), **how,
        ),
        attnlib.AdditiveAttention(**how),
        attnlib.DotProductAttention(score_mode="concat", **how),
    ]  # fmt: skip
    results = [
        layer.init_with_output(jax.random.key(0), x, query_mask=real, key_mask=real, is_causal=True)[0]
        for layer in made
    ]
    turned = positions.rotary_embedding(x[:, :, None])
    parts = attnlib.dot_product_attention(turned, x[:, :, None], turned, return_lse=True, **how)
    return results, attnlib.merge_attention(*zip(parts, parts, strict=True))


def decoded(how, query, key, lengths):
    """A prompt and a token in a cache of each kind."""
    results = []
    for form in (dict(), dict(ragged=True), dict(window=3, ragged=True)):
        cache = attnlib.KVCache.create((query.shape[0],), 9, num_kv_heads=2, key_dim=8, **form)
        first, cache = cache.decode(query, key, key, lengths if "ragged" in form else None, **how)
        cache = cache.append(key[:, :1], key[:, :1])
        results += [first, cache.attend(query[:, :1], **how), cache.length.astype(jnp.float32)]
    return results


def in_pages(how, query, key, lengths):
    cache = attnlib.PagedKVCache.create(2, 12, num_kv_heads=2, key_dim=8, num_pages=7, page_size=4)
    first, cache = cache.fork(0, 1).decode(query, key, key, lengths, **how)
    return [first, cache.truncate(2).attend(query[:, :1], **how), cache.length.astype(jnp.float32)]


def looked_into(how, query, key):
    weights, keys = inspect.top_keys(query, key, k=1, **how)
    return [
        inspect.attention_rows(query, key, rows=[0, -1], **how), weights, keys.astype(jnp.float32),
        inspect.attention_received(query, key, mean=True, **how),
        inspect.attention_entropy(query, key, is_causal=True, **how),
    ]  # fmt: skip


# Of each program its arguments, as shapes of batch b, lengths t and s, and k key heads.
PROGRAMS = {
    "plain": (plain, "b,t,2*k,8 b,s,k,8"),
    "every option": (attended, "b,t,2*k,8 b,s,k,8 b,s:bool b,1,t,s 2,2*k"),
    "two axes": (of_images, "b,t,s,2,4 b,1,1,1,t,s:bool"),
    "layers": (of_layers, "b,t,8 b,t:bool"),
    "KVCache": (decoded, "b,t,4,8 b,t,2,8 b:int32"),
    "PagedKVCache": (in_pages, "2,t,4,8 2,t,2,8 2:int32"),
    "inspect": (looked_into, "b,t,4,8 b,s,2,8"),
}
SIZES = [dict(b=1, t=1, s=1, k=1), dict(b=2, t=5, s=7, k=2)]
MORE_SIZES = [*SIZES, dict(b=3, t=8, s=2, k=2)]


@pytest.mark.parametrize("sizes", [SIZES, pytest.param(MORE_SIZES, marks=pytest.mark.slow)], ids=["two", "three"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_exported_program_serves_all_sizes(name, sizes):
    check_exported(functools.partial(PROGRAMS[name][0], {}), PROGRAMS[name][1], "btsk", sizes)


# With lengths that are numbers: programs of tiles, also the one for few queries.
@pytest.mark.parametrize(
    ("name", "implementation", "symbols"),
    [
        ("plain", cases.SIDE_BY_SIDE, "b"),
        pytest.param("every option", "blockwise", "bk", marks=pytest.mark.slow),
        pytest.param("two axes", "blockwise", "b", marks=pytest.mark.slow),
        pytest.param("inspect", "blockwise", "b", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_one_exported_program_of_tiles_serves_all_batch_sizes(name, implementation, symbols):
    function, shapes = PROGRAMS[name]
    sizes = [dict(b=b, t=5, s=7, k=k) for b, k in ((1, 1), (3, 2))]
    if "k" not in symbols:
        sizes = [size | dict(k=2) for size in sizes]
    check_exported(functools.partial(function, cases.by_name(implementation)), shapes, symbols, sizes)


def check_exported(program, shapes, symbols, all_sizes):
    """Compares an exported program with the plain call, after serialization, forward and backward."""
    _, structs = arguments(shapes, all_sizes[0], symbols)
    exported = export.export(jax.jit(program))(*structs)
    pytest.importorskip("flatbuffers", reason="flatbuffers, with which JAX serializes programs, is not installed")
    exported = export.deserialize(exported.serialize(vjp_order=1))
    for sizes in all_sizes:
        args, _ = arguments(shapes, sizes, symbols)
        made, expected = derivatives(exported.call, args), derivatives(program, args)
        assert_close(made, expected, length=8, factor=64)


def arguments(shapes, sizes, symbols):
    """Arrays of these sizes, and their shapes with symbols in place of sizes."""
    draw, scope = np.random.default_rng(0), export.SymbolicScope()
    arrays, structs = [], []
    for entry in shapes.split():
        shape, _, dtype = entry.partition(":")
        shape = shape.split(",")
        numbers = [str(eval(size, dict(sizes))) for size in shape]
        names = [size if set(symbols) & set(size) else number for size, number in zip(shape, numbers, strict=True)]
        array = draw.normal(size=tuple(map(int, numbers)))
        arrays.append(jnp.asarray(array > -0.5 if dtype else array, dtype or "float32"))
        structs.append(jax.ShapeDtypeStruct(export.symbolic_shape(",".join(names), scope=scope), arrays[-1].dtype))
    return arrays, structs


def derivatives(function, args):
    """The results, and the gradients of a sum of them by the floating-point arguments."""
    at = [n for n, arg in enumerate(args) if jnp.issubdtype(arg.dtype, jnp.floating)]

    def loss(*chosen):
        filled = dict(zip(at, chosen, strict=True))
        results = function(*(filled.get(n, arg) for n, arg in enumerate(args)))
        return sum(jnp.sum(jnp.sin(jnp.where(jnp.isfinite(x), x, 0))) for x in jax.tree.leaves(results)), results

    return jax.jit(jax.value_and_grad(loss, tuple(range(len(at))), has_aux=True))(*(args[n] for n in at))


# Which implementation runs by default, and what is refused


def chosen(query, key, **options):
    """The implementation that runs by default."""
    arguments = _call.arguments(query, key, key, scores.Dot(), Options(**options))
    problem = jax.eval_shape(lambda arguments: _call.canonicalize(arguments)[0], arguments)
    return _dispatch.choose(problem, None).name


def test_default_choice():
    """A symbolic batch counts as one entry, unless constraints say more; symbolic lengths need the reference."""
    batch, length = export.symbolic_shape("b, t")
    (large,) = export.symbolic_shape("b", constraints=["b >= 4096"])

    def operands(batch, queries, keys):
        return struct(batch, queries, 8, 64), struct(batch, keys, 8, 64)

    assert chosen(*operands(batch, 64, 64)) == chosen(*operands(1, 64, 64)) == "blockwise"
    assert chosen(*operands(batch, 2048, 2048)) == chosen(*operands(1, 2048, 2048)) == "blockwise"
    assert chosen(*operands(large, 64, 64)) == chosen(*operands(4096, 64, 64)) == "blockwise"
    assert chosen(*operands(batch, 1, 1024)) == chosen(*operands(2, 1, 1024))
    assert chosen(*operands(2, length, 2048)) == chosen(*operands(batch, length, length)) == "reference"


def test_the_program_for_few_queries_exports():
    """Its layouts in memory are no part of an export, where JAX refuses them."""
    query, key = struct(2, 1, 8, 64), struct(2, 1024, 8, 64)
    assert chosen(query, key) == "blockwise"
    program = jax.jit(lambda query, key: attnlib.dot_product_attention(query, key, key))
    assert "LayoutConstraint" in program.lower(query, key).as_text()
    export.export(program, platforms=("cpu", "cuda", "tpu"))(query, key)


def refusals():
    b, t, s, n, d = export.symbolic_shape("b, t, s, n, d")

    def attend(*shapes, **options):
        return lambda: jax.eval_shape(
            lambda q, k: attnlib.dot_product_attention(q, k, k, **options), *(struct(*shape) for shape in shapes)
        )

    x = struct(b, t, 2, 8)
    yield (
        "lengths of tiles",
        attend((b, t, 2, 8), (b, 7, 2, 8), implementation="blockwise"),
        ValueError,
        ("blockwise: its tiles are a part of the program", "queries (t,) are symbolic; export numbers for them"),
    )
    yield (
        "block sizes",
        attend((b, t, 2, 8), (b, s, 2, 8), block_sizes=(4, 4)),
        ValueError,
        ("reference: it computes all pairs at once", "queries (t,) and keys (s,) are symbolic"),
    )
    yield "cudnn", attend((b, 8, 2, 8), (b, 8, 2, 8), implementation="cudnn"), ValueError, ("some are symbolic",)
    yield "batch", attend((b, t, 2, 8), (2, t, 2, 8)), ValueError, ("batch axis 0 must be equal",)
    yield "other batch", attend((b, t, 2, 8), (n, t, 2, 8)), ValueError, ("batch axis 0 must be equal",)
    yield "heads", attend((b, t, n, 8), (b, t, 2, 8)), ValueError, ("got n and 2", "'2*k' for query")
    yield "mask", attend((b, t, 2, 8), (b, t, 2, 8), mask=jnp.ones((5, 5), bool)), ValueError, ("(b, 2, t, t)",)
    yield "difference", attend((b, s * t - t, 2, 8), (b, s, 2, 8)), Exception, ("constraints=['n >= 2']",)
    yield (
        "top keys",
        lambda: jax.eval_shape(lambda x: inspect.top_keys(x, x, k=2), x),
        ValueError,
        ("constraints=['t >= 2']",),
    )
    yield (
        "rotary",
        lambda: jax.eval_shape(positions.rotary_embedding, struct(2, 5, 2, d)),
        TypeError,
        ("the number of features of x must be an int", "got the symbolic size d"),
    )
    layer = attnlib.MultiHeadAttention(2, key_dim=4)
    yield (
        "layer",
        lambda: jax.eval_shape(layer.init, jax.random.key(0), struct(2, 5, d)),
        TypeError,
        ("the number of features must be an int", "got the symbolic size (d,)"),
    )
    yield "capacity", lambda: attnlib.KVCache.create((b,), t, 2, 8), TypeError, ("capacity", "symbolic size t")
    yield "slopes", lambda: modifiers.alibi_slopes(n), TypeError, ("num_heads", "symbolic size n")
    yield "explain", lambda: attnlib.explain(x, x, x), ValueError, ("batch (b,)", "Pass operands of the sizes")


@pytest.mark.parametrize(("call", "error", "texts"), [pytest.param(*rest, id=name) for name, *rest in refusals()])
def test_refusals(call, error, texts):
    with pytest.raises(error) as caught:
        call()
    message = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    for text in texts:
        assert text in message


def test_broadcasting():
    """A batch axis of one broadcasts to a symbolic one, and a bool array of a mask may come from symbolic sizes."""
    b, t = export.symbolic_shape("b, t")

    def attend(query, key):
        mask = masks.Causal(1).as_array(query.shape[1], key.shape[1])
        return attnlib.dot_product_attention(query, key, key, mask=mask)

    assert jax.eval_shape(attend, struct(b, t, 2, 8), struct(1, t, 2, 8)).shape == (b, t, 2, 8)
