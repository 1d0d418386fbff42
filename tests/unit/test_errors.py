"""Every wrong call a user can make is refused: type of the error, the argument's name, what came, and the remedy.

The likeliest of them, and what users of other libraries write, are in test_mistakes.py.
"""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlib
from attnlib import masks, modifiers, scores

QUERY = jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.float32)  # B, T, N, D
KEY = jax.ShapeDtypeStruct((2, 7, 2, 8), jnp.float32)  # B, S, K, D
NAN = float("nan")


def zeros(*shape, dtype=jnp.float32):
    return np.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A call that must fail: what it changes, and texts that its message must have."""

    name: str
    error: type[Exception]
    texts: tuple[str, ...]
    change: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def wrong(name: str, error: type[Exception], *texts: str, **change: Any) -> Wrong:
    return Wrong(name, error, texts, change)


@dataclasses.dataclass(frozen=True)
class Later:
    """An argument that is made in the call, since making it may already raise."""

    make: Callable[[], Any]


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
        wrong(f"{name} {dtype}", TypeError, f"{name} must be a floating-point array", dtype, "astype",
              **{name: zeros(*shape, dtype=dtype)})
        for name, shape, dtype in [("query", QUERY.shape, "int32"), ("key", KEY.shape, "complex64"),
                                   ("value", KEY.shape, "bool")]
    ),
    wrong("score a name", TypeError, "score must be a Score", "'dot'", "scores.Dot()", score=Later(lambda: "dot")),
    wrong("score a function", TypeError, "score must be a Score", "Custom(fn", score=Later(lambda: lambda q, k: 0.0)),
]  # fmt: skip

AXES = [
    wrong("axis names features", ValueError, "attention_axes", "got -1", attention_axes=(1, -1)),
    wrong("axis out of range", ValueError, "attention_axes", "got 4", attention_axes=(4,)),
    wrong("axis below range", ValueError, "attention_axes", "got -5", attention_axes=-5),
    wrong("no axes", ValueError, "at least one axis", "None", attention_axes=()),
    wrong("axis a float", TypeError, "attention_axes must be an int", "1.0", attention_axes=1.0),
    wrong("axes of floats", TypeError, "attention_axes must be an int", attention_axes=[1.0]),
    wrong("axis a string", TypeError, "attention_axes must be an int", "'1'", attention_axes="1"),
    wrong("axis a bool", TypeError, "attention_axes must be an int", "True", attention_axes=True),
    wrong("axes nested", TypeError, "attention_axes must be an int", attention_axes=[[1]]),
]  # fmt: skip

MASKS = [
    wrong("mask of higher rank", ValueError, "mask must broadcast", mask=zeros(1, 2, 4, 5, 7, dtype=bool)),
    wrong("mask of other shape", ValueError, "mask must broadcast", "(5, 6)", "Use 1", mask=zeros(5, 6, dtype=bool)),
    wrong("mask a list", TypeError, "mask must be a bool array or a Mask", "list", mask=[[True]]),
    wrong("mask True", TypeError, "mask must be a bool array or a Mask", "bool", mask=True),
    wrong("masks combined with and", TypeError, "no truth value", "`&`", mask=Later(
        lambda: masks.Causal() and masks.SlidingWindow(1, 1))),
    wrong("key padding of query length", ValueError, "KeyPadding mask must have shape", "(2, 7) or (7,)", "(2, 5)",
          mask=masks.KeyPadding(zeros(2, 5, dtype=bool))),
    wrong("query padding of key length", ValueError, "QueryPadding mask", "(2, 5) or (5,)",
          mask=masks.QueryPadding(zeros(2, 7, dtype=bool))),
    wrong("lengths of other batch", ValueError, "Lengths key", "(2,)", "(3,)", mask=masks.Lengths(key=np.ones(3, int))),
    wrong("offset of other batch", ValueError, "Causal offset", "(3,)", mask=masks.Causal(np.ones(3, int))),
    wrong("prefix of other batch", ValueError, "Prefix length", "(3,)", mask=masks.Prefix(np.ones(3, int))),
    wrong("segments without key ids", ValueError, "Segments needs key_ids", mask=masks.Segments(np.ones((2, 5), int))),
    wrong("segments of other length", ValueError, "Segments key_ids", "(2, 6)",
          mask=masks.Segments(np.ones((2, 5), int), np.ones((2, 6), int))),
    wrong("causal axis", ValueError, "Causal axis", "1 attention axes", "got 1", mask=masks.Causal(axis=1)),
    wrong("neighborhood sizes", ValueError, "Neighborhood size", "1 attention axes", mask=masks.Neighborhood((3, 3))),
    wrong("dilations", ValueError, "Neighborhood dilation", mask=masks.Neighborhood(3, (1, 2))),
    wrong("block sizes of axes", ValueError, "BlockLocal size", "1 attention axes", mask=masks.BlockLocal((3, 3))),
    wrong("steps of axes", ValueError, "Dilated step", "1 attention axes", mask=masks.Dilated((1, 2))),
    wrong("table of other lengths", ValueError, "BlockSparse blocks", "(2, 3)", "got (1, 1)",
          mask=masks.BlockSparse(["1"], 3)),
    wrong("predicate of numbers", TypeError, "Predicate fn must return bool", mask=masks.Predicate(lambda q, k: q - k)),
    wrong("predicate of other shape", ValueError, "Predicate fn must return an array that broadcasts", "(3, 3)",
          mask=masks.Predicate(lambda q, k: jnp.ones((3, 3), bool))),
    wrong("an error inside a composition", ValueError, "KeyPadding mask",
          mask=~masks.Causal() | masks.KeyPadding(zeros(3, dtype=bool))),
]  # fmt: skip

OPTIONS = [
    wrong("bias of other shape", ValueError, "bias must broadcast", "(7, 5)", bias=zeros(7, 5)),
    wrong("bias of ints", TypeError, "bias must be a floating-point array", "int32", bias=zeros(5, 7, dtype=np.int32)),
    wrong("bias a list", TypeError, "bias must be a floating-point array or None", "list", bias=[1.0]),
    *(wrong(f"rate {rate}", ValueError, "dropout_rate must be in [0, 1)", str(rate), dropout_rate=rate)
      for rate in (1.0, 1.5, -0.1, NAN, float("inf"))),
    wrong("rate a string", TypeError, "dropout_rate must be a number", "'0.1'", dropout_rate="0.1"),
    wrong("rate an array", TypeError, "dropout_rate must be a number", dropout_rate=np.array([0.1])),
    wrong("rate None", TypeError, "dropout_rate must be a number", "None", dropout_rate=None),
    wrong("rate True", TypeError, "dropout_rate must be a number", "True", dropout_rate=True),
    wrong("key of floats", TypeError, "dropout_rng must be one", "float32[2]", dropout_rate=0.1, dropout_rng=zeros(2)),
    wrong("many keys", TypeError, "dropout_rng must be one JAX random key", "[2]",
          dropout_rate=0.1, dropout_rng=Later(lambda: jax.random.split(jax.random.key(0)))),
    wrong("wrong key without rate", TypeError, "dropout_rng must be one JAX random key", dropout_rng="seed"),
    *(wrong(f"soft cap {cap}", ValueError, "logits_soft_cap must be a number in [1e-30, 1e30] or None", str(cap),
            logits_soft_cap=cap) for cap in (0.0, -1.0, NAN, float("inf"), 1e300, 1e-50)),
    wrong("soft cap a string", TypeError, "logits_soft_cap must be a number", logits_soft_cap="30"),
    wrong("is_causal a number", TypeError, "is_causal must be True or False", "1", is_causal=1),
    wrong("return_weights None", TypeError, "return_weights must be True or False", return_weights=None),
    wrong("return_lse a string", TypeError, "return_lse must be True or False", return_lse="yes"),
    wrong("implementation unknown among others", ValueError, "'flash' is unknown",
          implementation=("reference", "flash")),
    wrong("implementation a number", TypeError, "implementation must be None", "3", implementation=3),
    wrong("implementation of none", TypeError, "implementation must be None", "()", implementation=()),
    wrong("implementation of numbers", TypeError, "implementation must be None", implementation=("reference", 3)),
    *(wrong(f"block_sizes {sizes}", error, "block_sizes must be (queries, keys)", repr(sizes), block_sizes=sizes)
      for sizes, error in [(128, TypeError), ((128,), ValueError), ((0, 4), ValueError), ((4, -1), ValueError),
                           ((4, 4, 4), ValueError), ((4.0, 4), TypeError), ({4, 8}, TypeError)]),
    wrong("unsupported by name", ValueError, "no implementation can compute this", "reference: ", "block_sizes=None",
          implementation="reference", block_sizes=(4, 4)),
    wrong("precision unknown", ValueError, "Precision", precision="fuzzy"),
]  # fmt: skip

MODIFIERS = [
    wrong("score_mod not a function", TypeError, "score_mod must be a function", "modifiers.ALiBi", score_mod=1.0),
    wrong("slopes of key heads", ValueError, "ALiBi slopes must be (4,)", "(2,)", "alibi_slopes(4)",
          score_mod=Later(lambda: modifiers.ALiBi(zeros(2)))),
    wrong("slopes a list", TypeError, "ALiBi slopes must be a floating-point array",
          score_mod=Later(lambda: modifiers.ALiBi([1.0]))),
    wrong("relative bias of other heads", ValueError, "RelativeBias table", "4 query heads", "(5, 2)",
          score_mod=Later(lambda: modifiers.RelativeBias(zeros(5, 2)))),
    wrong("relative bias of even size", ValueError, "RelativeBias table", "odd", "(6, 4)",
          score_mod=Later(lambda: modifiers.RelativeBias(zeros(6, 4)))),
    wrong("relative bias of other axes", ValueError, "each of 1 attention axes", "(5, 5, 4)",
          score_mod=Later(lambda: modifiers.RelativeBias(zeros(5, 5, 4)))),
    wrong("buckets of other heads", ValueError, "BucketedBias table must be (buckets, 4 query heads)", "(32, 8)",
          score_mod=Later(lambda: modifiers.BucketedBias(zeros(32, 8)))),
    wrong("an odd number of buckets", ValueError, "even", "(7, 4)",
          score_mod=Later(lambda: modifiers.BucketedBias(zeros(7, 4)))),
    wrong("a distance beyond 32 bits", ValueError, "BucketedBias max_distance must fit in 32 bits",
          score_mod=Later(lambda: modifiers.BucketedBias(zeros(32, 4), max_distance=10**30))),
    wrong("max_distance", ValueError, "max_distance must be above 8", "got 8",
          score_mod=Later(lambda: modifiers.BucketedBias(zeros(32, 4), max_distance=8))),
    wrong("sink of ints", TypeError, "sink must be a number, a floating-point array or None",
          sink=zeros(4, dtype=np.int32)),
    *(wrong(f"sink {sink}", ValueError, "sink must be infinite or in [-1e30, 1e30]", str(sink), sink=sink)
      for sink in (NAN, 1e300)),
    *(wrong(f"scale {scale}", ValueError, "score Dot must hold numbers in [-1e30, 1e30]", str(scale),
            score=scores.Dot(scale)) for scale in (NAN, float("inf"), 1e300)),
    wrong("sink True", TypeError, "sink must be a number", "bool", sink=True),
    wrong("positions of floats", TypeError, "query_positions must be an integer array or None", "float32[5]",
          query_positions=zeros(5)),
    wrong("positions a list", TypeError, "key_positions must be an integer array or None", "list",
          key_positions=[1, 2]),
    wrong("positions of other length", ValueError, "key_positions must have shape", "(2, 7)", "(5,)",
          key_positions=zeros(5, dtype=np.int32)),
]  # fmt: skip

SCORES = [
    wrong("dot scale of features", ValueError, "Dot scale", "() or (4,)", "(8,)",
          score=Later(lambda: scores.Dot(zeros(8)))),
    wrong("dot scale a list", TypeError, "Dot scale", "list", score=Later(lambda: scores.Dot([1.0]))),
    wrong("dot scale a bool", TypeError, "Dot scale", "bool", score=Later(lambda: scores.Dot(True))),
    wrong("dot scale complex", TypeError, "Dot scale", "complex", score=Later(lambda: scores.Dot(1j))),
    wrong("additive scale of heads", ValueError, "additive scale", "(), (8,) or (4, 8)", "(4,)",
          score=Later(lambda: scores.Additive(zeros(4)))),
    wrong("concat weight", ValueError, "Concat weight", "()", score=Later(lambda: scores.Concat(zeros(8)))),
    wrong("concat scale", ValueError, "Concat scale", "()", score=Later(lambda: scores.Concat(scale=zeros(8)))),
    wrong("bilinear kernel", ValueError, "Bilinear kernel", "(8, 8) or (4, 8, 8)", "(8, 7)",
          score=Later(lambda: scores.Bilinear(zeros(8, 7)))),
    wrong("custom not a function", TypeError, "Custom fn must be a function", score=Later(lambda: scores.Custom(1.0))),
    wrong("custom a tuple", ValueError, "Custom fn must return a scalar",
          score=Later(lambda: scores.Custom(lambda q, k: (q[0], k[0])))),
    wrong("custom complex", TypeError, "Custom fn must return a real number", "complex64",
          score=Later(lambda: scores.Custom(lambda q, k: 1j * q[0]))),
]  # fmt: skip

CALLS = [*SHAPES, *TYPES, *AXES, *MASKS, *OPTIONS, *MODIFIERS, *SCORES]


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
    ("causal offset a float", TypeError, "Causal offset must be an int or an integer", lambda: masks.Causal(1.5)),
    ("causal offset a bool", TypeError, "Causal offset must be an int or an integer", lambda: masks.Causal(True)),
    ("causal offset a string", TypeError, "Causal offset must be an int or an integer", lambda: masks.Causal("1")),
    ("causal axis a float", TypeError, "Causal axis must be an int or None", lambda: masks.Causal(axis=0.5)),
    ("window negative", ValueError, "SlidingWindow left must be an int >= 0", lambda: masks.SlidingWindow(-1, 0)),
    ("window a float", TypeError, "SlidingWindow right must be an int", lambda: masks.SlidingWindow(1, 1.5)),
    ("neighborhood 0", ValueError, "Neighborhood size must be an int >= 1 or a", lambda: masks.Neighborhood(0)),
    ("neighborhood None", TypeError, "Neighborhood size must be an int", lambda: masks.Neighborhood(None)),
    ("dilation 0", ValueError, "Neighborhood dilation must be an int >= 1", lambda: masks.Neighborhood(3, (1, 0))),
    ("border", ValueError, 'border must be "shift" or "clip"; got \'wrap\'', lambda: masks.Neighborhood(3, 1, "wrap")),
    ("block of nothing", ValueError, "BlockLocal size must be an int >= 1", lambda: masks.BlockLocal(0)),
    ("blocks before", ValueError, "BlockLocal before must be an int >= 0", lambda: masks.BlockLocal(2, -1)),
    ("blocks after", TypeError, "BlockLocal after must be an int >= 0 or None", lambda: masks.BlockLocal(2, after=1.5)),
    ("step 0", ValueError, "Dilated step must be an int >= 1", lambda: masks.Dilated(0)),
    ("table of ints", TypeError, "must be a bool array of rank 2", lambda: masks.BlockSparse(np.eye(2), 3)),
    ("table of one row", TypeError, "must be a bool array of rank 2", lambda: masks.BlockSparse([True], 3)),
    ("table of a text", TypeError, "must be a bool array of rank 2", lambda: masks.BlockSparse("101", 3)),
    ("table of nothing", ValueError, "at least one row", lambda: masks.BlockSparse([], 3)),
    ("table of ragged text", ValueError, "rows of equal length", lambda: masks.BlockSparse(["1", "10"], 3)),
    ("table of blocks of 0", ValueError, "BlockSparse size must be an int >= 1", lambda: masks.BlockSparse(["1"], 0)),
    ("table without size", TypeError, "BlockSparse size must be an int >= 1", lambda: masks.BlockSparse(["1"], None)),
    (
        "table traced",
        TypeError,
        "must be known when the program is compiled",
        lambda: jax.jit(lambda table: masks.BlockSparse(table, 2).as_array(2, 2))(np.ones((1, 1), bool)),
    ),
    ("padding of ints", TypeError, "KeyPadding mask must be a bool", lambda: masks.KeyPadding(np.ones((2, 7), int))),
    ("padding None", TypeError, "QueryPadding mask must be a bool array", lambda: masks.QueryPadding(None)),
    ("lengths of floats", TypeError, "Lengths key must be an int, an integer", lambda: masks.Lengths(key=np.ones(2))),
    ("a length of 41 bits", ValueError, "Lengths query must fit in 32 bits", lambda: masks.Lengths(query=2**40)),
    ("segments of floats", TypeError, "Segments query_ids must be an integer", lambda: masks.Segments(np.ones(5))),
    ("predicate", TypeError, "Predicate fn must be a function", lambda: masks.Predicate(True)),
    ("and with an array", TypeError, "masks.Dense(array)", lambda: masks.Causal() & jnp.ones((5, 7), bool)),
    ("or with None", TypeError, "`|` combines a Mask with another Mask; got NoneType", lambda: None | masks.Causal()),
    ("not", TypeError, "no truth value", lambda: not masks.Causal()),
    ("shape a float", TypeError, "query_shape must be an int", lambda: masks.Causal().as_array(2.0, 3)),
    ("shape negative", ValueError, "key_shape must be an int >= 0", lambda: masks.Causal().as_array(2, -3)),
]


@pytest.mark.parametrize(("error", "text", "make"), [case[1:] for case in MASK_MAKERS], ids=[c[0] for c in MASK_MAKERS])
def test_wrong_masks_are_refused_when_made(error, text, make):
    with pytest.raises(error, match=re.escape(text)):
        make()


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
        TypeError, match=r"Predicate must not capture traced arrays.*masks.Dense.*implementation='reference'"
    ):
        jax.jit(run, static_argnums=1)(2, "blockwise")
