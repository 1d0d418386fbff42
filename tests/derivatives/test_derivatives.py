"""Every derivative and transformation of the tiled implementation, against the same of the reference, in float64.

Both are one compiled program: outside of one, JAX compiles one for each primitive and shape. A few run outside too. A
transformation gives all that it computes on the way, as a gradient beside its tangent; what gives no more than another
one does is slow.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import score_catalogue
from conftest import x64
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import attnlib
from attnlib import masks

IMPLEMENTATIONS = "blockwise", "reference"
BLOCKS = (5, 4)  # neither divides the lengths below


def score_of(name):
    """A score of a kind with all its parameters; of dot products, which all transformations run, without."""
    row = score_catalogue.BY_NAME[name]
    form = row.forms[name] if name == "dot" else row.last_form
    rng = np.random.default_rng(1)
    return row(**form(lambda *shape: rng.normal(size=shape), score_catalogue.Fits(4, 3, 3)))


def draw(score):
    """The arrays of a setting: arguments of its program, for XLA computes by itself what is constant, and slowly."""
    rng = np.random.default_rng(0)
    shapes = ((2, 12, 4, 3), (2, 11, 2, 3), (2, 11, 2, 5), (1, 4, 1, 11), (2, 12, 4, 5))
    query, key, value, bias, out_bar = (rng.normal(size=shape) for shape in shapes)
    made = dict(
        operands=(query, key, value),
        tangents=tuple(rng.normal(size=x.shape) for x in (query, key, value)),
        out_bar=out_bar,
        bias=bias,
        score=score_of(score),
        mask=masks.Causal(1) & masks.SlidingWindow(7, None) & masks.Segments(np.arange(12) // 9, np.arange(11) // 9),
        dropout_rng=jax.random.key(3),
    )
    return jax.tree.map(jnp.asarray, made)


class Setting:
    """Operands, tangents, and attention on one implementation: a causal window, a bias, dropout, grouped heads."""

    def __init__(self, implementation, drawn):
        self.operands, self.tangents, self.out_bar = drawn["operands"], drawn["tangents"], drawn["out_bar"]
        self.query, self.key, self.value = self.operands
        self.bias, self.score = drawn["bias"], drawn["score"]
        self.options = dict(
            mask=drawn["mask"], bias=self.bias, dropout_rate=0.2, dropout_rng=drawn["dropout_rng"],
            implementation=implementation, block_sizes=BLOCKS if implementation == "blockwise" else None,
        )  # fmt: skip

    def __call__(self, query, key, value):
        return attnlib.attention(query, key, value, score=self.score, **self.options)

    def loss(self, *operands):
        return jnp.sum(self(*operands) * self.out_bar)

    def gradient(self, *operands):
        return jax.grad(self.loss, (0, 1, 2))(*operands)

    def dot(self, left, right):
        return sum(jnp.sum(x * y) for x, y in zip(left, right, strict=True))

    def mesh(self, axis_type):
        return jax.make_mesh((1,), ("i",), axis_types=(axis_type,))

    def sharded(self, check_vma):
        mapped = jax.shard_map(
            self, mesh=self.mesh(AxisType.Auto), in_specs=P("i"), out_specs=P("i"), check_vma=check_vma
        )
        return lambda *operands: mapped(*operands)

    def scanned(self, query, key, value):
        def step(carry, _):
            return carry + self(carry, key, value)[..., :3], None

        return jnp.sum(lax.scan(step, query, None, length=3)[0] * self.out_bar[..., :3])

    def pairs(self):
        return tuple(jnp.stack([x, 2 * x]) for x in self.operands)


def _grads(function):
    return jax.grad(function, (0, 1, 2))


TRANSFORMATIONS = {
    "value": lambda f: f(*f.operands),
    "jvp": lambda f: jax.jvp(f, f.operands, f.tangents),
    "linearize": lambda f: jax.linearize(f, *f.operands)[1](*f.tangents),
    "grad": lambda f: f.gradient(*f.operands),
    "grad of grad": lambda f: _grads(lambda *x: f.dot(f.gradient(*x), f.tangents))(*f.operands),
    "forward over reverse": lambda f: jax.jvp(f.gradient, f.operands, f.tangents),
    "reverse over forward": lambda f: _grads(
        lambda *x: jnp.sum(jax.jvp(f, x, f.tangents)[1] * f.out_bar)
    )(*f.operands),
    "forward over forward": lambda f: jax.jvp(lambda *x: jax.jvp(f, x, f.tangents)[1], f.operands, f.tangents),
    "third order": lambda f: jax.value_and_grad(
        lambda *x: f.dot(jax.jvp(f.gradient, x, f.tangents)[1], f.tangents), (0, 1, 2)
    )(*f.operands),
    "jacfwd": lambda f: jax.jacfwd(lambda s: f(f.query * s, f.key, f.value))(1.3),
    "jacfwd of value": lambda f: jax.jacfwd(lambda v: f(f.query, f.key, f.value.at[0, 0, 0].set(v)))(f.value[0, 0, 0]),
    "jacrev": lambda f: jax.jacrev(lambda s: f(f.query * s, f.key, f.value)[0, :2, 0])(1.3),
    "hessian": lambda f: jax.hessian(lambda q: f.loss(f.query.at[0, 5, 1].set(q), f.key, f.value))(f.query[0, 5, 1]),
    "vmap": lambda f: jax.vmap(f)(*f.pairs()),
    "vmap of key alone": lambda f: jax.vmap(f, (None, 0, None))(f.query, f.pairs()[1], f.value),
    "vmap of grad": lambda f: jax.vmap(f.gradient)(*f.pairs()),
    "vmap of grad of query alone": lambda f: jax.vmap(f.gradient, (0, None, None))(f.pairs()[0], f.key, f.value),
    "vmap along another axis": lambda f: jax.vmap(f, (None, None, 1), 1)(
        f.query, f.key, jnp.stack([f.value, -f.value], 1)
    ),
    "grad of vmap": lambda f: _grads(lambda *x: jnp.sum(jax.vmap(f)(*x) * f.out_bar[None]))(*f.pairs()),
    "jvp of vmap": lambda f: jax.jvp(jax.vmap(f), f.pairs(), f.pairs()),
    "linearize of vmap": lambda f: jax.linearize(jax.vmap(f), *f.pairs())[1](*f.pairs()),
    "vmap of second order": lambda f: jax.vmap(
        lambda *x: jax.jvp(f.gradient, x, f.tangents), (0, None, 0)
    )(f.pairs()[0], f.key, f.pairs()[2]),
    "grad of checkpoint": lambda f: _grads(jax.checkpoint(f.loss))(*f.operands),
    "second order of checkpoint": lambda f: jax.jvp(_grads(jax.checkpoint(f.loss)), f.operands, f.tangents),
    "jvp of checkpoint": lambda f: jax.jvp(jax.checkpoint(f), f.operands, f.tangents)[1],
    "grad of scan": lambda f: _grads(f.scanned)(*f.operands),
    "jvp of scan": lambda f: jax.jvp(f.scanned, f.operands, f.tangents)[1],
    "second order of scan": lambda f: jax.jvp(_grads(f.scanned), f.operands, f.tangents),
    "while_loop": lambda f: lax.fori_loop(0, 3, lambda _, q: q + f(q, f.key, f.value)[..., :3], f.query),
    "grad of cond": lambda f: _grads(
        lambda *x: lax.cond(x[0][0, 0, 0, 0] > -9, f.loss, lambda *x: 0.0 * x[0].sum(), *x)
    )(*f.operands),
    "grad of bias": lambda f: jax.grad(
        lambda b: jnp.sum(attnlib.attention(*f.operands, score=f.score, **{**f.options, "bias": b}) * f.out_bar)
    )(f.bias),
    "grad of score": lambda f: jax.grad(
        lambda s: jnp.sum(attnlib.attention(*f.operands, score=s, **f.options) * f.out_bar), allow_int=True
    )(f.score),
    "second order of score and bias": lambda f: jax.jvp(
        jax.grad(
            lambda s, b: jnp.sum(attnlib.attention(*f.operands, score=s, **{**f.options, "bias": b}) * f.out_bar),
            (0, 1),
        ),
        (f.score, f.bias), (jax.tree.map(jnp.ones_like, f.score), jnp.cos(f.bias)),
    ),
    "grad of lse": lambda f: _grads(
        lambda *x: jnp.sum(jnp.sin(attnlib.attention(*x, score=f.score, return_lse=True, **f.options)[1]))
    )(*f.operands),
    "grad of weights": lambda f: jax.grad(
        lambda q, k: jnp.sum(
            jnp.sin(attnlib.attention(q, k, f.value, score=f.score, return_weights=True, **f.options)[1])
        ),
        (0, 1),
    )(f.query, f.key),
}  # fmt: skip


def _shard_map(derivative, check_vma):
    def run(f):
        mapped = f.sharded(check_vma)

        def loss(*x):
            return jnp.sum(mapped(*x) * f.out_bar)

        functions = {
            "value": lambda: mapped(*f.operands),
            "grad": lambda: _grads(loss)(*f.operands),
            "jvp": lambda: jax.jvp(mapped, f.operands, f.tangents),
            "second order": lambda: jax.jvp(_grads(loss), f.operands, f.tangents),
        }
        return functions[derivative]()

    return run


def _explicit(derivative):
    def run(f):
        with jax.set_mesh(f.mesh(AxisType.Explicit)):
            spread = lambda x: jax.device_put(x, P("i"))  # noqa: E731
            x, t = tuple(map(spread, f.operands)), tuple(map(spread, f.tangents))
            functions = {
                "value": lambda: jax.jit(f)(*x),
                "grad": lambda: jax.jit(f.gradient)(*x),
                "second order": lambda: jax.jit(lambda x, t: jax.jvp(f.gradient, x, t))(x, t),
            }
            return jax.tree.map(np.asarray, functions[derivative]())

    return run


for _derivative in ("value", "grad", "jvp", "second order"):
    for _check in (True, False):
        TRANSFORMATIONS[f"shard_map {_derivative}, check_vma={_check}"] = _shard_map(_derivative, _check)
# A mesh is set outside of a program.
EXPLICIT = {f"explicit mesh {derivative}": _explicit(derivative) for derivative in ("value", "grad", "second order")}


# The whole list for one score; for the others what goes through the score's own derivatives.
OF_SCORES = ("value", "jvp", "grad", "forward over reverse", "grad of grad", "vmap of grad of query alone",
             "grad of score", "second order of score and bias")  # fmt: skip
CASES = [("dot", name) for name in TRANSFORMATIONS if name != "grad of score"]
CASES += [(score, name) for score in ("additive", "custom") for name in OF_SCORES]
CASES += [(score, "second order of score and bias") for score in score_catalogue.BY_NAME
          if score not in ("dot", "additive", "custom")]  # fmt: skip

PARTS_OF_OTHERS = (
    "value", "grad", "vmap", "jacfwd", "vmap of grad", "linearize of vmap", "grad of checkpoint", "grad of scan",
    "grad of bias", "grad of score", "shard_map value, check_vma=True", "shard_map value, check_vma=False",
    "shard_map grad, check_vma=True", "explicit mesh value", "explicit mesh grad",
)  # fmt: skip
# With one setting of check_vma each; test_cases.py has second orders of dot products in reverse over reverse.
PAIRED = ("shard_map jvp, check_vma=True", "shard_map second order, check_vma=False", "grad of grad")
SLOW = [case for case in CASES if case[1] in PARTS_OF_OTHERS + PAIRED and case != ("additive", "grad of grad")]
# The transpose of a tangent is a gradient, and that of the first is in reverse over reverse.
SLOW += [("additive", "forward over reverse"), ("additive", "jvp"), ("custom", "jvp")]
SLOW += [("concat", "second order of score and bias")]  # the products of "additive", by one number more
OUTSIDE = [case for case in CASES if "shard_map" not in case[1]]  # which is for programs
SLOW_OUTSIDE = [case for case in OUTSIDE if case not in [("dot", "grad"), ("dot", "linearize")]]


def listed(cases, slow):
    made = [pytest.param(*case, id=": ".join(case), marks=[pytest.mark.slow] * (case in slow)) for case in cases]
    return pytest.mark.parametrize(("score", "name"), made)


@listed(CASES, SLOW)
def test_agrees_with_reference(score, name):
    with x64():
        check(*jax.jit(lambda drawn: [derived(name, which, drawn) for which in IMPLEMENTATIONS])(draw(score)))


@listed(OUTSIDE, SLOW_OUTSIDE)
def test_agrees_with_reference_outside_of_a_program(score, name):
    with x64():
        drawn = draw(score)
        check(derived(name, "blockwise", drawn), jax.jit(lambda drawn: derived(name, "reference", drawn))(drawn))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in PARTS_OF_OTHERS)) for name in EXPLICIT]
)
def test_agrees_with_reference_on_an_explicit_mesh(name):
    with x64():
        drawn = draw("dot")
        check(*(EXPLICIT[name](Setting(implementation, drawn)) for implementation in IMPLEMENTATIONS))


def derived(name, implementation, drawn):
    return TRANSFORMATIONS[name](Setting(implementation, drawn))


def check(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        scale = max(1e-3, float(np.max(np.abs(want), initial=0.0)))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * scale)
