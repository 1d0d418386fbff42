"""`jax.linear_transpose` in the value, in which attention is linear. With every case: tests/contract/test_modes.py."""

import jax
import jax.numpy as jnp
import pytest
from cases import COMPLETE
from conftest import assert_close

import attnlib
from attnlib import masks
from attnlib._autodiff.matmul import Form, pt_o_product, pv_product, qk_product

on_every_implementation = pytest.mark.parametrize("implementation", COMPLETE)


@on_every_implementation
def test_vmap_inside_and_outside(implementation, keys):
    """All results that depend on the value, and those that do not, whose transpose is 0."""
    query, key = keys.normal(3, 1, 4, 2, 4), keys.normal(1, 5, 2, 4)
    values = keys.normal(3, 1, 5, 2, 3)

    def attend(query, value):
        return attnlib.dot_product_attention(
            query, key, value, mask=masks.Lengths(key=jnp.array([3])), sink=jnp.zeros(2), dropout_rate=0.2,
            dropout_rng=jax.random.key(1), return_weights=True, return_lse=True, implementation=implementation,
        )  # fmt: skip

    def batched(values):
        return jax.vmap(attend)(query, values)

    def by_row(query, value, cotangent):
        return jax.linear_transpose(lambda value: attend(query, value), value)(cotangent)[0]

    cotangents = jax.tree.map(lambda x: keys.normal(*x.shape), jax.eval_shape(batched, values))
    (inside,) = jax.jit(jax.linear_transpose(batched, values))(cotangents)
    outside = jax.jit(jax.vmap(by_row))(query, values, cotangents)
    (expected,) = jax.jit(lambda values, cotangents: jax.vjp(batched, values)[1](cotangents))(values, cotangents)
    assert_close((inside, outside), (expected, expected), length=4)


@pytest.mark.parametrize("argument", ["query", "key"])
def test_other_arguments_are_refused(argument, keys):
    operands = dict(query=keys.normal(1, 4, 2, 4), key=keys.normal(1, 5, 2, 4), value=keys.normal(1, 5, 2, 3))

    def attend(x):
        return attnlib.dot_product_attention(**{**operands, argument: x}, implementation="blockwise")

    x = operands[argument]
    with pytest.raises(TypeError, match="linear in the value, and not in query, key, bias or parameters"):
        jax.linear_transpose(attend, x)(attend(x))


PRODUCTS = {
    qk_product: ((2, 3, 4), (2, 5, 4)), pv_product: ((2, 3, 5), (2, 5, 4)),
    pt_o_product: ((2, 3, 5), (2, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
@pytest.mark.parametrize("form", [Form(), Form("highest", by_keys=True)], ids=["by queries", "by keys"])
def test_products_are_linear_in_each_factor(product, form, keys):
    factors = [keys.normal(*shape) for shape in PRODUCTS[product]]
    result = product(form, *factors)
    assert_close(result, product(Form(), *factors), length=6)
    _, pullback = jax.vjp(lambda *factors: product(form, *factors), *factors)
    for n, expected in enumerate(pullback(result)):

        def in_one(x, n=n):
            return product(form, *factors[:n], x, *factors[n + 1 :])

        assert_close(jax.linear_transpose(in_one, factors[n])(result)[0], expected, length=6)
    with pytest.raises(TypeError, match=r"jax\.linear_transpose needs a linear function"):
        jax.linear_transpose(lambda *factors: product(form, *factors), *factors)(result)


def test_derivatives_compute_a_product_once(keys):
    """Where all arguments are known, the rule for unknown ones adds nothing."""
    query, key = keys.normal(1, 3, 4), keys.normal(1, 5, 4)
    program = jax.make_jaxpr(lambda query: jax.linearize(lambda x: qk_product(Form(), x, key), query)[0])(query)
    assert str(program).count("attnlib_ruled") == 1
