"""attnlib against the NumPy oracle on random configurations: ranks, axes, heads, masks, biases, scores, causality.

Sizes differ on every axis and between query and key, so that a transposed or mis-folded axis cannot pass.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import COMPLETE
from conftest import assert_close, x64
from score_catalogue import BY_NAME, Fits

import attnlib

KINDS = (*BY_NAME, "dot")
SEEDS = range(18 * len(KINDS))
RANKS = (3, 4, 5, 6, 5, 4)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One random case: NumPy float64 operands, and the parameters and options that attnlib and the oracle share."""

    kind: str
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    parameters: dict
    options: dict

    @property
    def axes(self):
        """The attended axes, from 0."""
        rank, axes = self.query.ndim, self.options["attention_axes"]
        if axes is None:
            return (0,) if rank == 3 else tuple(range(1, rank - 2))
        return tuple(axis % rank for axis in axes)


@functools.lru_cache
def draw(seed):
    rng = np.random.default_rng([2026, seed])
    kind = KINDS[seed % len(KINDS)]
    rank = RANKS[(seed // len(KINDS)) % len(RANKS)]
    axes, attended = draw_axes(rng, rank)
    heads, kv_heads = [(1, 1), (2, 1), (2, 2), (4, 2), (3, 1), (6, 3)][rng.integers(6)]
    features, key_features, value_features = rng.permutation([2, 3, 4, 5])[:3]
    if not BY_NAME[kind].other_features:
        key_features = features

    # one attended axis: lengths up to 9; three: 2, 3 and 4 in different orders for query and key
    pool = rng.permutation([5, 7, 8, 9] if len(attended) == 1 else [2, 3, 4, 5][: max(3, len(attended))])
    query_shape, key_shape, value_shape = ([0] * rank for _ in range(3))
    for place, axis in enumerate(attended):
        query_shape[axis] = pool[place]
        key_shape[axis] = value_shape[axis] = pool[(place + 1) % len(pool)]
    batch_axes = [axis for axis in range(rank - 2) if axis not in attended]
    for axis, size in zip(batch_axes, rng.permutation([2, 3, 1]), strict=False):
        for shape in (query_shape, key_shape, value_shape):
            shape[axis] = 1 if rng.random() < 0.25 else size
    query_shape[-2:] = heads, features
    key_shape[-2:] = kv_heads, key_features
    value_shape[-2:] = kv_heads, value_features

    batch = tuple(max(s[axis] for s in (query_shape, key_shape, value_shape)) for axis in batch_axes)
    weights_shape = (*batch, heads, *(query_shape[a] for a in attended), *(key_shape[a] for a in attended))
    options = {"attention_axes": axes, "is_causal": bool(rng.random() < 0.4), "normalize": seed % 4 != 1}
    if rng.random() < 0.7:
        options["mask"] = rng.random(draw_shape(rng, weights_shape, len(attended))) < 0.7
    if rng.random() < 0.6:
        options["bias"] = rng.normal(size=draw_shape(rng, weights_shape, len(attended)))
    if rng.random() < 0.4:
        options["logits_soft_cap"] = float(rng.uniform(0.5, 4))
    return Configuration(
        kind,
        rng.normal(size=query_shape),
        rng.normal(size=key_shape),
        rng.normal(size=value_shape),
        draw_parameters(rng, kind, heads, features, key_features),
        options,
    )


def draw_axes(rng, rank):
    """``attention_axes`` as a user would pass it, and the same from 0."""
    if rng.random() < 0.2:
        return None, (0,) if rank == 3 else tuple(range(1, rank - 2))
    count = rng.integers(1, min(rank - 2, 3) + 1)
    attended = tuple(int(axis) for axis in rng.permutation(rank - 2)[:count])
    return tuple(axis - rank if rng.random() < 0.4 else axis for axis in attended), attended


def draw_shape(rng, weights_shape, attended):
    """A shape of any rank allowed that broadcasts to the weights."""
    rank = int(rng.choice([len(weights_shape), rng.integers(0, 2 * attended + 1)]))
    return tuple(1 if rng.random() < 0.3 else size for size in weights_shape[len(weights_shape) - rank :])


def draw_parameters(rng, kind, heads, features, key_features):
    forms = list(BY_NAME[kind].forms.values())
    draw = lambda *shape: np.asarray(rng.normal(size=shape))  # noqa: E731
    return forms[rng.integers(len(forms))](draw, Fits(int(heads), int(features), int(key_features)))


def run_attnlib(configuration, dtype, **static):
    """``(output, weights, lse)`` of attnlib, with every array in ``dtype``."""

    def cast(x):
        return x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x

    operands = configuration.query, configuration.key, configuration.value
    traced = {name: x for name, x in configuration.options.items() if isinstance(x, np.ndarray)}
    static |= {name: x for name, x in configuration.options.items() if name not in traced}

    arrays, others = split(configuration.parameters)

    @jax.jit
    def run(operands, arrays, traced):
        options = static | traced | {"return_weights": True, "return_lse": True}
        parameters = arrays | others
        if configuration.kind == "dot":
            return attnlib.dot_product_attention(*operands, **parameters, **options)
        if configuration.kind == "additive":
            return attnlib.additive_attention(*operands, **parameters, **options)
        return attnlib.attention(*operands, score=BY_NAME[configuration.kind](**parameters), **options)

    return run(*jax.tree.map(cast, (operands, arrays, traced)))


def split(parameters):
    """(those that are arrays, the functions and Python numbers)."""
    static = {name: x for name, x in parameters.items() if callable(x) or isinstance(x, float)}
    return {name: x for name, x in parameters.items() if name not in static}, static


def run_oracle(configuration, dtype):
    """The oracle in float64 on the operands that ``dtype`` can hold."""

    def rounded(x):
        return np.asarray(x, dtype).astype(np.float64) if isinstance(x, (np.ndarray, float)) else x

    row, parameters = BY_NAME[configuration.kind], jax.tree.map(rounded, configuration.parameters)
    options = {name: x if name == "mask" else rounded(x) for name, x in configuration.options.items()}
    return oracle.attention(
        *(rounded(x) for x in (configuration.query, configuration.key, configuration.value)),
        score=lambda q, k, head: row.logit(q, k, head, **parameters),
        **options,
    )


def assert_agree(got, expected):
    """Equal to rounding in attnlib's dtype; a logit and an output add up over features and keys."""
    _, weights, lse = expected
    assert_close(got, tuple(x.astype(got[0].dtype) for x in expected), length=weights.size // max(lse.size, 1) + 8)


def claims(seed):
    """What a configuration is an example of: single facts, and each two of what is combined freely."""
    c = draw(seed)
    axes, attended, rank = c.options["attention_axes"], c.axes, c.query.ndim
    batch_axes = [axis for axis in range(rank - 2) if axis not in attended]
    shapes = [x.shape for x in (c.query, c.key, c.value)]

    def form(name):
        if name not in c.options:
            return "none"
        return "full" if c.options[name].ndim == rank - 1 + len(attended) else f"rank {c.options[name].ndim}"

    facts = {
        "score": c.kind,
        "rank": rank,
        "attended": len(attended),
        "axes": "None" if axes is None else "negative" if min(axes) < 0 else "positive",
        "axes swapped": attended != tuple(sorted(attended)),
        "batch broadcasts": any(len({shape[axis] for shape in shapes}) > 1 for axis in batch_axes),
        "heads grouped": c.query.shape[-2] != c.key.shape[-2],
        "mask": form("mask").split()[0],
        "bias": form("bias").split()[0],
        "causal": c.options["is_causal"],
        "soft cap": "logits_soft_cap" in c.options,
    }
    single = {("mask is", form("mask")), ("bias is", form("bias"))}
    if any(b - a > 1 for a, b in itertools.pairwise(sorted(attended))):
        single.add("axes apart")
    if rank > 3 and 0 in attended:
        single.add("first axis attended")
    return single | set(itertools.combinations(facts.items(), 2))


def covering(seeds):
    """Seeds that claim, few as they are, what all do: each time the one that adds most."""
    left = {seed: claims(seed) for seed in seeds}
    missing, chosen = set().union(*left.values()), []
    while missing:
        best = max(left, key=lambda seed: len(left[seed] & missing))
        missing -= left.pop(best)
        chosen.append(best)
    return chosen


COVERING = covering(SEEDS)
SHORT = COVERING[:8]  # in float32, which a wrong axis does not care about


def seeds(some):
    return pytest.mark.parametrize(
        "seed", [*some, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS if seed not in some)]
    )


@seeds(SHORT)
def test_float32_agrees_with_the_oracle(seed):
    configuration = draw(seed)
    got = run_attnlib(configuration, np.float32)
    assert_agree(got, run_oracle(configuration, np.float32))


@seeds(COVERING)
def test_float64_agrees_with_the_oracle(seed):
    configuration = draw(seed)
    expected = run_oracle(configuration, np.float64)
    for implementation in COMPLETE:
        blocks = (1 + seed % 5, 1 + seed % 7) if implementation == "blockwise" else None  # so there are several tiles
        with x64():
            got = run_attnlib(configuration, np.float64, implementation=implementation, block_sizes=blocks)
            assert_agree(got, expected)


def test_the_configurations_cover_what_they_claim():
    """They reach every rank, order of axes, rank of mask and broadcast that this module is about, and each two."""
    claimed = set().union(*map(claims, COVERING))
    forms, either = ("none", "full", "rank"), (False, True)
    facts = {
        "score": set(KINDS), "rank": (3, 4, 5, 6), "attended": (1, 2, 3), "axes": ("None", "negative", "positive"),
        "axes swapped": either, "batch broadcasts": either, "heads grouped": either, "mask": forms, "bias": forms,
        "causal": either, "soft cap": either,
    }  # fmt: skip
    pairs = set()
    for (one, some), (other, more) in itertools.combinations(facts.items(), 2):
        pairs |= {((one, x), (other, y)) for x, y in itertools.product(some, more)}
    assert pairs - claimed == {  # what cannot be, for want of axes
        (("rank", 3), ("attended", 2)),
        (("rank", 3), ("attended", 3)),
        (("rank", 4), ("attended", 3)),
        (("rank", 3), ("axes swapped", True)),
        (("attended", 1), ("axes swapped", True)),
        (("axes", "None"), ("axes swapped", True)),  # which come in order
        (("rank", 3), ("batch broadcasts", True)),
    }
    ranks = ["full", *(f"rank {rank}" for rank in range(5))]
    assert claimed >= {(f"{name} is", rank) for name in ("mask", "bias") for rank in ranks}
    assert claimed >= {"axes apart", "first axis attended"}
    for c in map(draw, COVERING):
        assert c.value.shape[-1] != c.query.shape[-1]
        assert all(c.query.shape[axis] != c.key.shape[axis] for axis in c.axes)
    rows = (run_oracle(c, np.float64)[1].sum(tuple(range(-len(c.axes), 0))) for c in map(draw, COVERING))
    assert any((row == 0).any() for row in rows)  # a row that attends nothing


@pytest.mark.parametrize("implementation", COMPLETE)
@pytest.mark.parametrize("seed", [1, 4, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 3, 5))])
def test_no_keys_give_zeros(seed, implementation):
    """S = 0: nothing to attend."""
    query = jnp.ones((2, 3 + seed, 4, 5))
    key, value = jnp.ones((2, 0, 2, 5)), jnp.ones((2, 0, 2, 3))
    function = attnlib.additive_attention if seed % 2 else attnlib.dot_product_attention
    options = {"is_causal": seed > 3, "implementation": implementation}
    got = function(query, key, value, return_weights=True, return_lse=True, **options)
    assert_agree(got, oracle.attention(query, key, value))
    assert got[0].shape == (2, 3 + seed, 4, 3)


@pytest.mark.parametrize("implementation", COMPLETE)
@pytest.mark.parametrize("batch, queries, keys", [(2, 0, 3), (0, 2, 3), (2, 0, 0)])
def test_no_queries_or_no_batch_give_empty(batch, queries, keys, implementation):
    query, key, value = (jnp.ones(s) for s in ((batch, queries, 4, 5), (batch, keys, 2, 5), (batch, keys, 2, 3)))
    for function in (attnlib.dot_product_attention, attnlib.additive_attention):
        got = function(query, key, value, implementation=implementation, return_weights=True, return_lse=True)
        assert [x.shape for x in got] == [(batch, queries, 4, 3), (batch, 4, queries, keys), (batch, 4, queries)]


@pytest.mark.parametrize("implementation", COMPLETE)
def test_masked_content_is_never_read(implementation):
    """Keys and values that no row may attend are NaN, on both sides."""
    rng = np.random.default_rng(7)
    query, key, value = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 6)))
    mask = rng.random((7,)) < 0.6
    key[:, ~mask] = np.nan
    value[:, ~mask] = np.nan
    expected = oracle.attention(query, key, value, mask=mask)
    assert all(np.isfinite(x).all() for x in expected)
    options = {"mask": mask, "implementation": implementation, "return_weights": True, "return_lse": True}
    assert_agree(attnlib.dot_product_attention(query, key, value, **options), expected)


@pytest.mark.parametrize("implementation", COMPLETE)
def test_logits_of_minus_infinity_attend_nothing(implementation):
    """A bias of -inf is a mask; a row of nothing else is an empty row."""
    rng = np.random.default_rng(8)
    query, key, value = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 2, 3), (2, 7, 1, 3), (2, 7, 1, 6)))
    bias = rng.normal(size=(5, 7)).astype(np.float32)
    bias[rng.random((5, 7)) < 0.4] = -np.inf
    bias[2] = -np.inf
    expected = oracle.attention(query, key, value, bias=bias)
    assert (expected[0][:, 2] == 0).all() and (expected[2][:, :, 2] == -math.inf).all()
    options = {"bias": bias, "implementation": implementation, "return_weights": True, "return_lse": True}
    assert_agree(attnlib.dot_product_attention(query, key, value, **options), expected)
