"""Functions as masks: where they are taken, what they capture, which tiles they empty, as arrays and pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import unsupported
from conftest import assert_close, assert_same
from flax import nnx

import attnlib
from attnlib import inspect, layers, masks
from attnlib._core.axes import AttentionShape
from attnlib._engine.blockwise.implementation import blockwise
from attnlib._engine.call import attend
from attnlib.masks import _function

B, T, S, N = 2, 5, 7, 4
X = jnp.ones((1, 12, 2, 4))
TABLE = np.arange(256)


def near(batch, head, query, key):
    """The windows of the heads and of the batch entries differ."""
    return (key <= query + batch) & (query - key <= head)


def defined(queries=T, keys=S, heads=N, batch=B):
    """`near` by loops: `(*batch, N, T, S)`."""
    each = np.ndindex(batch, heads, queries, keys)
    return np.array([near(*where) for where in each]).reshape(batch, heads, queries, keys)


def normal(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


# Where a function is taken

Q, K = normal(B, T, N, 4), normal(B, S, 2, 4, seed=1)
FEATURES = normal(B, T, 8)
PARAMS = layers.init_multi_head_attention(jax.random.key(0), 8, num_heads=N, key_dim=2)
FLAT = attnlib.DotProductAttention()
CACHE = attnlib.KVCache.create((B,), 8, 2, 4)
MODULE = attnlib.nnx.MultiHeadAttention(N, in_features=8, rngs=nnx.Rngs(0))

# name: a call with a mask; the numbers of queries, keys and heads
TAKEN = {
    "dot": (lambda mask: attnlib.dot_product_attention(Q, K, K, mask=mask), T, S, N),
    "additive": (lambda mask: attnlib.additive_attention(Q, K, K, mask=mask), T, S, N),
    "layer": (lambda mask: layers.multi_head_attention(PARAMS, FEATURES, mask=mask), T, T, N),
    "linen": (
        lambda mask: attnlib.MultiHeadAttention(num_heads=N).init_with_output(
            jax.random.key(1), FEATURES, mask=mask, key_mask=jnp.arange(T)[None] < jnp.array([[5], [3]])
        )[0],
        T, T, N,
    ),
    "nnx": (lambda mask: MODULE(FEATURES, mask=mask), T, T, N),
    "no heads": (lambda mask: FLAT.apply({}, FEATURES, mask=mask), T, T, 1),
    "cache": (lambda mask: CACHE.decode(Q, K[:, :T], K[:, :T], is_causal=True, mask=mask)[0], T, 8, N),
    "inspect": (lambda mask: inspect.attention_received(Q, K, mask=mask), T, S, N),
    "rows": (lambda mask: inspect.attention_rows(Q, K, rows=jnp.array([3, 1]), mask=mask), T, S, N),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_a_function_is_taken_where_a_mask_is(name):
    """It gives what the array of its definition gives, bare and as `Function`."""
    call, *sizes = TAKEN[name]
    array = jnp.asarray(defined(*sizes))
    expected = call(array[:, 0] if name == "no heads" else array)
    np.testing.assert_allclose(call(near), expected, rtol=0, atol=2e-6)
    if name == "dot":
        assert_same(call(masks.Function(near)), call(near))
        assert not np.allclose(call(None), expected)


def test_explain_takes_a_function():
    shape = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)
    assert attnlib.explain(shape, shape, shape, mask=near).implementation == "blockwise"
    assert "mask" in unsupported("cudnn", *[jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)] * 3, mask=near)


def test_functions_compose():
    function = masks.Function(near)
    made = (~function & masks.Causal()) | (function & masks.Registers(1, lambda batch, head, query, key: key > query))
    every, array = np.tri(T, S, dtype=bool), defined()
    later = np.pad(np.triu(np.ones((T - 1, S - 1), bool), 1), ((1, 0), (1, 0)), constant_values=True)
    np.testing.assert_array_equal(made.as_array(T, S, heads=N, batch=B), (~array & every) | (array & later))


# What a function captures


@pytest.mark.parametrize("array", [jnp.array, np.array])
def test_captured_values_never_recompile(array):
    """Other values, and another function object of the same program, find the program, and have their effect."""

    def count(reach):
        mask = masks.Function(lambda batch, head, query, key: query - key <= jnp.asarray(reach)[head]) & masks.Causal()
        _, weights = attnlib.dot_product_attention(X, X, X, mask=mask, return_weights=True)
        return np.count_nonzero(np.asarray(weights)[0], -1).max(-1).tolist()

    assert count(array([0, 2])) == [1, 3]
    programs = attend._cache_size()
    assert count(array([4, 1])) == [5, 2]
    assert attend._cache_size() == programs


def test_captured_values_may_be_traced_and_have_no_gradient():
    def loss(x, height):
        mask = masks.Function(lambda batch, head, query, key: height[head] * query > key)
        return jnp.sum(attnlib.dot_product_attention(x, x, x, mask=mask, block_sizes=(4, 4)) ** 2)

    with jax.numpy_dtype_promotion("standard"):
        height = jnp.array([0.6, 1.2])
        x = normal(*X.shape)
        by_x, by_height = jax.jit(jax.grad(loss, (0, 1)))(x, height)
        assert_same(by_height, jnp.zeros(2))
        assert np.any(np.asarray(by_x))
        mapped = jax.vmap(loss, (None, 0))(x, jnp.stack([height, height / 2]))
        np.testing.assert_allclose(mapped, [loss(x, height), loss(x, height / 2)], rtol=1e-5)


# Tiles


def tiles(mask, length=256, heads=2, size=32, **options):
    shape = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
    return attnlib.explain(shape, shape, shape, mask=mask, block_sizes=(size, size), **options).tiles


def test_a_static_function_skips_tiles():
    """As many as the mask of the same pairs; of several heads, those that none attends."""
    assert tiles(lambda b, h, q, k: (q - k <= 40) & (k <= q)) == tiles(masks.SlidingWindow(40, 0)) != tiles(None)
    assert tiles(lambda b, h, q, k: (q - k <= 20 * (h + 1)) & (k <= q)) == tiles(masks.SlidingWindow(40, 0))
    assert tiles(lambda b, h, q, k: q - k <= 40, is_causal=True) == tiles(masks.SlidingWindow(40, 0))
    # Many pairs are known by cells of 8 x 8, and where tiles begin within a cell, nothing wrong is said of them.
    window = masks.SlidingWindow(40, 40)
    assert tiles(lambda b, h, q, k: abs(q - k) <= 40, 999) == tiles(window, 999)
    assert tiles(window, 999, size=33)[0] <= tiles(lambda b, h, q, k: abs(q - k) <= 40, 999, size=33)[0] < 31**2


@pytest.mark.parametrize("cell", [1, 8])
def test_tables_of_pairs(cell, monkeypatch):
    """In several chunks, the last one shorter: whether some pair of a cell attends, and whether all do, of any head."""
    monkeypatch.setattr(_function, "_CHUNK", 2000)
    mask = masks.Function(near).closure_converted(AttentionShape((B,), N, (51,), (45,), (1, 1), jnp.float32))
    some, every = _function._table(mask.function.program, mask.sizes, mask.reads, (51,), (45,), cell)
    dense = defined(51, 45)
    size = tuple(-(-length // cell) for length in (51, 45))
    assert some.shape == every.shape == size
    for row, column in np.ndindex(*size):
        block = dense[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        assert (some[row, column], every[row, column]) == (block.any(), block.all())


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: jnp.asarray(TABLE)[k] <= q,
        lambda b, h, q, k: jax.lax.fori_loop(0, q, lambda n, x: x + 1, 0) >= k,
        lambda b, h, q, k: jax.lax.cond(h > 0, lambda: k <= q, lambda: k < q),
        lambda b, h, q, k: jax.pure_callback(np.less, jax.ShapeDtypeStruct((), bool), k, q, vmap_method="expand_dims"),
        lambda b, h, q, k: jax.lax.scan(lambda x, _: (x + 1, None), k, None, length=10**6)[0] <= q,
    ],
    ids=["captures", "loop", "branch", "callback", "many operations"],
)
def test_other_functions_are_not_computed_beforehand(function):
    assert tiles(function) == tiles(masks.Dense(jnp.ones((256, 256), bool)))


def test_a_function_is_computed_once_a_program():
    """However often tiles are classified, and by whichever sizes."""
    _function._table.cache_clear()
    q = jnp.ones((1, 96, 2, 4))
    program = jax.jit(jax.grad(lambda q: attnlib.dot_product_attention(
        q, q, q, mask=lambda b, h, i, j: abs(i - j) < 9, block_sizes=(16, 16)).sum()))  # fmt: skip
    program.lower(q)
    assert _function._table.cache_info().misses == 1


# Arrays and pictures


def test_an_array_has_heads_and_batch_where_the_function_does():
    array = masks.Function(near).as_array(T, S, heads=N, batch=B)
    np.testing.assert_array_equal(array, defined())
    by_head = masks.Function(lambda batch, head, query, key: query - key == head)
    assert by_head.as_array(T, S, heads=3).shape == (1, 3, T, S)
    assert by_head.as_array(T, S, heads=3, batch=(2, 3)).shape == (1, 1, 3, T, S)
    assert masks.Function(lambda batch, head, query, key: batch[1] < key).as_array(T, S, batch=(2, 3)).shape == (
        1, 3, 1, T, S,
    )  # fmt: skip
    assert masks.Function(lambda batch, head, query, key: query > key).as_array(T, S, heads=3).shape == (T, S)
    for mask, given, text in (
        (by_head, {}, "depends on the head, so its array does too: pass heads"),
        (masks.Causal() & by_head, dict(batch=2), "pass heads, the number of query heads"),
        (masks.Function(near), dict(heads=2), "pass batch, the number of batch entries, mask.as_array(T, S, batch="),
    ):
        with pytest.raises(ValueError) as caught:
            mask.as_array(T, S, **given)
        assert text in str(caught.value)
    with pytest.raises(ValueError, match="heads must be an int >= 1 or None"):
        by_head.as_array(T, S, heads=0)


def test_a_picture_has_a_panel_for_each_head():
    import matplotlib

    matplotlib.use("agg")
    axes = masks.Function(lambda batch, head, query, key: query - key == 9 * head).plot(16, 16, heads=2)
    assert [ax.get_title() for ax in axes] == ["head 0", "head 1"]
    (axes,) = np.ravel(attnlib.plot.mask(lambda batch, head, query, key: key <= query, 16, 16, block_sizes=(8, 8)))
    assert len(axes.images) == 2  # the pairs, and the tile that is skipped


def test_a_tile_of_some_heads_joins_functions_and_arrays():
    """One head after another, or several: the function is evaluated for them alone, lengths are cut from all."""
    q, k = normal(12, 256, 4, 4), normal(12, 256, 4, 4, seed=1)
    reach = np.random.default_rng(2).integers(0, 99, (12, 4))
    function = masks.Function(lambda batch, head, query, key: query - key <= jnp.asarray(reach)[batch, head])
    mask = (~function | masks.Lengths(key=20 * jnp.arange(12))) & masks.Causal()
    made, expected = (
        attnlib.dot_product_attention(q, k, k, mask=mask, implementation=one)
        for one in (blockwise("loop_over_heads", "blockwise, loop_over_heads"), "reference")
    )
    assert_close(made, expected, length=256)
