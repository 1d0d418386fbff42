"""Whole calls for the fuzz tests: right by construction, with what they must give; and nonsense."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import modifier_catalogue
import numpy as np
import option_catalogue
import score_catalogue
from fuzzing import FLOATS, INTEGERS, LENGTHS, Sizes, arrays, broadcasting, mask_trees, pairs
from hypothesis import strategies as st

from attnlib import masks, modifiers, scores
from attnlib._core.options import FIELDS
from attnlib._engine.dispatch import IMPLEMENTATIONS


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of `attnlib.attention`, and what they are laid out by."""

    arguments: dict[str, Any]
    sizes: Sizes

    def __repr__(self):
        return f"Call({self.arguments})"


@st.composite
def calls(draw, floats=FLOATS, lengths=LENGTHS):
    """A call that is right: every shape fits, and every option has a value that it may have."""
    leading = draw(st.sampled_from((2, 1, 2, 3, 4)))
    count = 1 if leading == 1 else draw(st.integers(1, min(leading, 3)))
    attended = draw(st.permutations(range(leading)))[:count]
    rank = leading + 2
    whole, asked = [0] * leading, [axis - rank if draw(st.booleans()) else axis for axis in attended]
    if draw(st.booleans()):
        attended = list(range(leading > 1, leading))
        asked = None
    elif len(attended) == 1 and draw(st.booleans()):
        asked = draw(st.sampled_from((int, np.int64)))(asked[0])
    else:
        asked = draw(st.sampled_from((tuple, list)))(asked)

    kv_heads, features, value_features = (draw(st.integers(low, 3)) for low in (1, 0, 0))
    heads = kv_heads * draw(st.integers(1, 3))
    score, key_features = draw(some_scores(heads, features, floats))
    shapes = {name: [0] * leading for name in ("query", "key", "value")}
    for axis in range(leading):
        if axis in attended:
            shapes["query"][axis] = draw(st.sampled_from(lengths))
            shapes["key"][axis] = shapes["value"][axis] = draw(st.sampled_from(lengths))
        else:
            whole[axis] = draw(st.sampled_from((2, 1, 3, *(size for size in lengths if size == 0))))
            for shape in shapes.values():
                shape[axis] = draw(st.sampled_from((whole[axis], whole[axis], 1)))
            sizes_here = {shape[axis] for shape in shapes.values()}
            whole[axis] = min(sizes_here) if 0 in sizes_here else max(sizes_here)
    sizes = Sizes(
        tuple(size for axis, size in enumerate(whole) if axis not in attended), heads,
        tuple(shapes["query"][axis] for axis in attended), tuple(shapes["key"][axis] for axis in attended),
    )  # fmt: skip
    tails = dict(query=(heads, features), key=(kv_heads, key_features), value=(kv_heads, value_features))
    operands = {name: draw(arrays((*shapes[name], *tail), floats)) for name, tail in tails.items()}
    return Call(dict(**operands, score=score, attention_axes=asked, **draw(options(sizes, floats))), sizes)


@st.composite
def some_scores(draw, heads, features, floats):
    """(a score, the features of keys that it takes)."""
    of = (*floats, "int32")  # numbers of a score may be integers
    number = st.sampled_from((2, 0.5, np.float32(0.5), np.float64(0.5)))
    row = draw(st.sampled_from(score_catalogue.ROWS))
    key_features = draw(st.integers(0, 3)) if row.other_features else features
    form = draw(st.sampled_from(list(row.forms.values())))

    def parameter(*shape):
        return draw(arrays(shape, of) if shape else number | arrays((), of))

    return row(**form(parameter, score_catalogue.Fits(heads, features, key_features))), key_features


@st.composite
def some_modifiers(draw, sizes, floats):
    """A modifier of any kind that fits, or a function."""
    one_axis = len(sizes.key) == 1
    row = draw(st.sampled_from([None, *(row for row in modifier_catalogue.ROWS if one_axis or not row.one_axis)]))
    if row is None:
        return moved
    fits = modifier_catalogue.Fits(sizes.heads, tuple(draw(st.integers(1, 3)) for _ in sizes.key))
    return row.kind(**row.arguments(lambda *shape: draw(arrays(shape, floats)), fits))


def moved(logit, batch, head, query, key):
    """A modifier that looks at all it is told: arrays of JAX, or in the definition numbers of Python."""
    places = jax.tree.leaves((batch, head, query, key))
    return logit * 0.5 + sum(place.astype(logit.dtype) if hasattr(place, "astype") else place for place in places)


@st.composite
def options(draw, sizes, floats):
    one_axis = len(sizes.key) == 1
    made = {}

    def maybe(name, *strategies):
        if draw(st.integers(0, 2)) == 0:
            made[name] = draw(st.one_of(*strategies))

    maybe("mask", mask_trees(sizes), pairs(sizes).flatmap(lambda shape: arrays(shape, "bool")))
    maybe("bias", pairs(sizes).flatmap(lambda shape: arrays(shape, floats)))
    maybe("is_causal", st.sampled_from((True, False, np.bool_(True))))
    maybe("logits_soft_cap", st.sampled_from((None, 2, 1.5, np.float32(3), np.int64(2), 1e-30, 1e30)))
    maybe("sink", st.sampled_from((None, 0, -1.5, np.float32(0.5))), arrays((sizes.heads,), floats), arrays((), floats))
    if made.get("sink") is None:
        maybe("normalize", st.booleans())
    maybe("return_weights", st.booleans())
    maybe("return_lse", st.booleans())
    maybe("precision", st.sampled_from((None, "highest", "default", jax.lax.Precision.HIGH, ("high", "highest"))))
    if one_axis:
        for name, side in (("query_positions", sizes.query), ("key_positions", sizes.key)):
            lead = draw(st.sampled_from(((), draw(broadcasting(sizes.batch)))))
            maybe(name, st.none(), arrays((*lead, *side), INTEGERS))
    maybe("score_mod", st.none(), some_modifiers(sizes, floats))
    if draw(st.integers(0, 3)) == 0:
        made["dropout_rate"] = draw(st.sampled_from((0.3, 0, np.float32(0.5), 1 - 1e-12, 1e-12)))
        made["dropout_rng"] = draw(st.sampled_from((jax.random.key(1), jax.random.PRNGKey(1))))
    block_sizes = st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)) | st.just([np.int64(2), 10**6])
    which = draw(st.sampled_from((None, "reference", "blockwise", ("cudnn", "blockwise"), ["reference", "blockwise"])))
    maybe("implementation", st.just(which))
    maybe("block_sizes", block_sizes)
    for row in option_catalogue.ROWS:
        if row.random is not None:
            maybe(row.names[0], row.random(sizes))
    asked = made.get("implementation")
    asked = (asked,) if isinstance(asked, str) else asked
    for name in [*made][::-1]:  # the last ones are left out, until one of those asked for supports all
        supports = [each.supports for each in IMPLEMENTATIONS if asked is None or each.name in asked]
        if not any(supported >= made.keys() - RESOLVED for supported in supports):
            del made[name]
    return made


RESOLVED = {name for name, field in FIELDS.items() if field.metadata["resolved"]}  # no implementation has to


def expected(arguments):
    """Shapes and dtypes of output, weights and lse, as far as asked for, that a call gives by docs/concepts."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    rank, asked = query.ndim, arguments.get("attention_axes")
    if asked is None:
        attended = [0] if rank == 3 else list(range(1, rank - 2))
    else:
        attended = [int(axis) % rank for axis in ([asked] if np.ndim(asked) == 0 else asked)]
    lead = list(query.shape[:-2])
    batch = [axis for axis in range(rank - 2) if axis not in attended]
    for axis in batch:
        found = {x.shape[axis] for x in (query, key, value)}
        lead[axis] = 0 if 0 in found else max(found)
    statistics = "float64" if "float64" in [x.dtype.name for x in (query, key, value)] else "float32"
    rows = *(lead[axis] for axis in batch), query.shape[-2], *(lead[axis] for axis in attended)
    results = [((*lead, query.shape[-2], value.shape[-1]), value.dtype.name)]
    if arguments.get("return_weights"):
        results.append(((*rows, *(key.shape[axis] for axis in attended)), statistics))
    if arguments.get("return_lse"):
        results.append((rows, statistics))
    return results


# What may be wrong

NAN = float("nan")
PLAIN = (
    None, True, False, 0, 1, -1, 2, 3, 10**30, 2**31, -(2**63), 0.5, 0.0, -0.5, NAN, math.inf, -math.inf, 1e300, 1j,
    "dot", "", "reference", "highest", b"x", (), [], (1,), [1, 2], (0, 1), (2, 2), (True, 2), ("a", "b"), ((1,), 2),
    (NAN, 1), (None, 3), {}, {"a": 1}, set(), range(2), Ellipsis, slice(2), object, object(), lambda *args: 0.0,
    np.float32(0.5), np.float32(NAN), np.int64(1), np.int8(-1), np.bool_(True), np.str_("reference"), np.float64(1),
    np.complex64(1), np.datetime64("2026-01-01"), masks.Causal, scores.Dot, jnp.float32, jnp.dtype("float32"),
)  # fmt: skip
VALUES = (
    masks.Causal(), ~masks.Lengths(key=3), masks.Neighborhood((2, 3, 2, 2, 2)), masks.Causal(axis=7), scores.Dot(),
    masks.BlockSparse(["1"], 1), scores.Additive(np.ones(9)), modifiers.SoftCap(2.0), modifiers.ALiBi(np.ones(9)),
    modifiers.RelativeBias(np.ones((4, 9))), modifiers.BucketedBias(np.ones((3, 1))), scores.Dot("x"),
    scores.Custom(lambda q, k: q), scores.Bilinear(None), np.array("x"), np.array([None]), np.array(["a", "b"]),
    masks.Dense(np.ones((9, 9), bool)), masks.Segments(np.ones((1, 9), int)), jax.random.split(jax.random.key(0), 3),
)  # fmt: skip


@st.composite
def nonsense(draw):
    """A value of any kind, and whether it is traced."""
    kind = draw(st.sampled_from(("plain", "plain", "value", "array", "array")))
    if kind != "array":
        return draw(st.sampled_from(PLAIN if kind == "plain" else VALUES))
    shape = tuple(draw(st.lists(st.sampled_from((1, 2, 0, 3, 5)), max_size=5)))
    dtype = draw(st.sampled_from((*FLOATS, *INTEGERS, "bool", "complex64", "int4", "float4_e2m1fn", "uint64")))
    return draw(arrays(shape, dtype))
