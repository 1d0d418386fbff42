"""Every wrong call a user can make is refused: type of the error, the argument's name, what came, and the remedy.

Those of options, masks, scores and modifiers are in the rows of their catalogues. The likeliest of all, and what users
of other libraries write, are in test_mistakes.py.
"""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import mask_catalogue
import modifier_catalogue
import numpy as np
import option_catalogue
import pytest
import score_catalogue
from refusals import Later, used_as, wrong

import attnlib
from attnlib import masks, modifiers, positions, scores

QUERY = jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.float32)  # B, T, N, D
KEY = jax.ShapeDtypeStruct((2, 7, 2, 8), jnp.float32)  # B, S, K, D


def zeros(*shape, dtype=jnp.float32):
    return np.zeros(shape, dtype)


SHAPES = [
    wrong("query of rank 2", ValueError, "query must have rank 3", "(4, 8)", "query[..., None, :]",
          query=zeros(4, 8), key=zeros(4, 8), value=zeros(4, 8)),
    wrong("key of other rank", ValueError, "same rank", "(7, 2, 8)", key=zeros(7, 2, 8)),
    wrong("value of other rank", ValueError, "same rank", "(7, 2, 8)", value=zeros(7, 2, 8)),
    wrong("features", ValueError, "equally many features", "8 and 6", "Bilinear", key=zeros(2, 7, 2, 6)),
    wrong("key and value lengths", ValueError, "key and value must have the same attention axes", "(2, 6, 2, 8)",
          value=zeros(2, 6, 2, 8)),
    wrong("key and value heads", ValueError, "equally many heads", "(2, 7, 4, 8)", value=zeros(2, 7, 4, 8)),
    wrong("more key heads", ValueError, "multiple of key heads", key=zeros(2, 7, 8, 8), value=zeros(2, 7, 8, 8)),
    wrong("no key heads", ValueError, "multiple of key heads", key=zeros(2, 7, 0, 8), value=zeros(2, 7, 0, 8)),
    wrong("batch sizes", ValueError, "batch axis 0 must be equal", "(3, 7, 2, 8)", "attention_axes",
          key=zeros(3, 7, 2, 8), value=zeros(3, 7, 2, 8)),
    wrong("batch axis of a longer key", ValueError, "batch axis 1", attention_axes=0),
]  # fmt: skip

TYPES = [
    wrong("query a list", TypeError, "query must be a floating-point array", "list", "jnp.asarray(query, jnp.float32)",
          query=[[1.0]]),
    wrong("key None", TypeError, "key must be a floating-point array", "NoneType", key=None),
    wrong("value a float", TypeError, "value must be a floating-point array", "got float", value=1.0),
    *(
        wrong(f"{name} {dtype}", TypeError, f"{name} must be a floating-point array", dtype, remedy,
              **{name: zeros(*shape, dtype=dtype)})
        for name, shape, dtype, remedy in [
            ("query", QUERY.shape, "int32", "query.astype(jnp.float32)"),
            ("key", KEY.shape, "complex64", "jnp.concatenate([key.real, key.imag], -1)"),
            ("value", KEY.shape, "bool", "value.astype(jnp.float32)"),
        ]
    ),
    wrong("score a name", TypeError, "score must be a Score", "'dot'", "scores.Dot()", score=Later(lambda: "dot")),
    wrong("score a function", TypeError, "score must be a Score", "Custom(fn", score=Later(lambda: lambda q, k: 0.0)),
]  # fmt: skip

TWO_AXES = dict(query=zeros(2, 5, 3, 4, 8), key=zeros(2, 7, 3, 4, 8), value=zeros(2, 7, 3, 4, 8))
OF_ONE_AXIS = [
    wrong("positions over two axes", ValueError, "query_positions and key_positions need one attention axis; got 2",
          query_positions=np.arange(15), **TWO_AXES),
    *(
        wrong(f"{name} over two axes", ValueError, f"{name} needs one attention axis; got 2", "modifiers.RelativeBias",
              score_mod=Later(make), **TWO_AXES)
        for name, make in (("ALiBi", lambda: modifiers.ALiBi(zeros(4))),
                           ("BucketedBias", lambda: modifiers.BucketedBias(zeros(8, 4))))
    ),
]  # fmt: skip

CALLS = [
    *SHAPES,
    *TYPES,
    *OF_ONE_AXIS,
    *(refused for row in option_catalogue.ROWS for refused in row.refused),
    *(
        used_as(name, make, refused)
        for name, rows in {
            "mask": [(row.kind, row.refused_in_calls) for row in mask_catalogue.ROWS],
            "score": [(row, row.refused) for row in score_catalogue.ROWS],
            "score_mod": [(row.kind, row.refused) for row in modifier_catalogue.ROWS],
        }.items()
        for make, wrongs in rows
        for refused in wrongs
    ),
]


@pytest.mark.parametrize("through", [attnlib.attention, attnlib.explain], ids=["attention", "explain"])
@pytest.mark.parametrize("case", CALLS, ids=str)
def test_wrong_calls_are_refused(case, through):
    """By the call, here under jit, where arrays have no values, and in the same words by `explain`."""

    def call(operands):
        arguments = dict(score=scores.Dot()) | case.change | operands
        made = {name: value.make() if isinstance(value, Later) else value for name, value in arguments.items()}
        return through(**made)

    operands = dict(query=QUERY, key=KEY, value=KEY) | case.change
    traced = {
        name: value
        for name, value in operands.items()
        if name in ("query", "key", "value", "mask", "bias") and isinstance(value, (jax.ShapeDtypeStruct, np.ndarray))
    }
    with pytest.raises(case.error) as caught:
        jax.eval_shape(call, traced)
    assert type(caught.value) is case.error
    for text in case.texts:
        assert text in str(caught.value), f"{text!r} is not in: {caught.value}"


MASK_MAKERS = [
    *(
        (refused, functools.partial(row.kind, **refused.change))
        for row in mask_catalogue.ROWS
        for refused in row.refused_when_made
    ),
    (wrong("table traced", TypeError, "must be known when the program is compiled"),
     lambda: jax.jit(lambda table: masks.BlockSparse(table, 2).as_array(2, 2))(np.ones((1, 1), bool))),
    (wrong("and with an array", TypeError, "masks.Dense(array)"), lambda: masks.Causal() & jnp.ones((5, 7), bool)),
    (wrong("None and a mask", TypeError, "`&` combines a Mask"), lambda: None & masks.Causal()),
    (wrong("or with None", TypeError, "`|` combines a Mask with another Mask; got NoneType"),
     lambda: None | masks.Causal()),
    (wrong("not", TypeError, "no truth value"), lambda: not masks.Causal()),
    (wrong("shape a float", TypeError, "query_shape must be an int >= 0"), lambda: masks.Causal().as_array(2.0, 3)),
    (wrong("shape negative", ValueError, "key_shape must be an int >= 0"), lambda: masks.Causal().as_array(2, -3)),
]  # fmt: skip


@pytest.mark.parametrize(("refused", "make"), MASK_MAKERS, ids=[str(refused) for refused, _ in MASK_MAKERS])
def test_wrong_masks_are_refused_when_made(refused, make):
    with pytest.raises(refused.error) as caught:
        make()
    for text in refused.texts:
        assert text in str(caught.value), f"{text!r} is not in: {caught.value}"


@pytest.mark.parametrize(
    ("error", "text", "outputs", "lses"),
    [
        (ValueError, "at least one output and as many lses; got 0 and 0", [], []),
        (ValueError, "as many lses; got 2 and 1", [zeros(2, 5, 4, 8)] * 2, [zeros(2, 4, 5)]),
        (ValueError, "here (2, 4, 5); got outputs[0] (2, 5, 4, 8) and lses[0] (2, 5, 4)",
         [zeros(2, 5, 4, 8)], [zeros(2, 5, 4)]),
        (ValueError, "got outputs[1] (2, 6, 4, 8)", [zeros(2, 5, 4, 8), zeros(2, 6, 4, 8)], [zeros(2, 4, 5)] * 2),
        (ValueError, "outputs[0] must have rank 3", [zeros(4, 8)], [zeros(4)]),
        (TypeError, "outputs[0] must be a floating-point array", [zeros(2, 5, 4, 8, dtype=np.int32)], [zeros(2, 4, 5)]),
        (TypeError, "lses[0] must be a floating-point array", [zeros(2, 5, 4, 8)], ["lse"]),
    ],
)  # fmt: skip
def test_merge_attention_refuses(error, text, outputs, lses):
    with pytest.raises(error, match=re.escape(text)):
        attnlib.merge_attention(outputs, lses)


def test_what_a_subclass_leaves_out_is_refused():
    """A mask, a score or a scaling of a user is not taken for one that allows, adds or changes nothing."""
    x = zeros(2, 5, 4, 8)
    for method, call in {
        "evaluate": lambda: attnlib.dot_product_attention(x, x, x, mask=type("Mine", (masks.Mask,), {})()),
        "block": lambda: attnlib.attention(x, x, x, score=type("Mine", (scores.Score,), {})()),
        "frequencies": lambda: positions.rotary_embedding(x, scaling=type("Mine", (positions.RotaryScaling,), {})(2)),
    }.items():
        with pytest.raises(NotImplementedError, match=rf"Mine needs the method {method}\("):
            call()


def test_errors_do_not_vanish_under_python_o():
    """No check is an assert: what is refused is refused when Python drops those."""
    program = """
import jax, numpy as np, attnlib
from attnlib import masks
ones = lambda *shape: np.ones(shape, np.float32)
x = ones(2, 5, 4, 8)
calls = {
    "multiple of key heads": lambda: attnlib.dot_product_attention(x, ones(2, 7, 3, 8), ones(2, 7, 3, 8)),
    "same attention axes": lambda: attnlib.dot_product_attention(x, ones(2, 7, 4, 8), ones(2, 6, 4, 8)),
    "needs dropout_rng": lambda: attnlib.dot_product_attention(x, x, x, dropout_rate=0.5),
    "must be in [0, 1)": lambda: attnlib.dot_product_attention(x, x, x, dropout_rate=-1),
    "is ambiguous": lambda: attnlib.dot_product_attention(x, x, x, mask=np.ones((2, 5, 5), bool)),
    "must name axes": lambda: attnlib.dot_product_attention(x, x, x, attention_axes=3),
    "additive scale": lambda: attnlib.additive_attention(x, x, x, scale=ones(5)),
    "num_heads must be": lambda: attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=0),
    "int >= 0": lambda: masks.SlidingWindow(-1, 1),
}
assert False, "asserts are off"
refused = 0
for text, call in calls.items():
    try:
        call()
    except (ValueError, TypeError) as error:
        refused += text in str(error)
print(refused, "of", len(calls))
"""
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "9 of 9", done.stdout + done.stderr


def test_predicates_that_capture_traced_arrays():
    """Tiles refuse them with the remedy; the reference takes them."""
    x = jnp.ones((1, 6, 2, 4))

    def run(b, implementation):
        mask = attnlib.masks.Predicate(lambda q, k: q <= k + b)
        return attnlib.dot_product_attention(x, x, x, mask=mask, implementation=implementation)

    assert jax.jit(run, static_argnums=1)(2, "reference").shape == x.shape
    with pytest.raises(
        TypeError,
        match=r"Predicate must not capture traced arrays.*masks.Function may.*masks.Dense.*implementation='reference'",
    ):
        jax.jit(run, static_argnums=1)(2, "blockwise")
