"""Every option of the attention functions: calls with it, and values that it refuses.

A new option is a new row of ROWS. The tests of options, errors, cases and the fuzz tests read the rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import modifier_catalogue
import numpy as np
from attention_case import GROUPED, VALUES, WHOLE, Case
from refusals import Later, Wrong, wrong
from score_catalogue import distance

from attnlib import masks, modifiers, scores


@dataclasses.dataclass(frozen=True, eq=False)
class OptionRow:
    """What the tests know of an option, or of several that belong together.

    Attributes:
      names: of the options.
      cases: calls that run on every implementation that does not refuse the option.
      refused: wrong calls, for queries (2, 5, 4, 8) and keys (2, 7, 2, 8).
      same: pairs of options that give the same results.
      random: of the `fuzzing.Sizes`, a strategy for values that the fuzz tests pass, or None. Those of options that
        depend on each other are in fuzzing_calls.py.
    """

    names: tuple[str, ...]
    cases: Sequence[Case] = ()
    refused: Sequence[Wrong] = ()
    same: Sequence[tuple[dict[str, Any], dict[str, Any]]] = ()
    random: Callable[[Any], Any] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tilt:
    """A modifier with parameters, nonlinear in the logit, that depends on all it is told."""

    table: Any

    def __call__(self, logit, batch, head, query_position, key_position):
        moved = self.table[head] * (sum(flat(key_position)) - sum(flat(query_position))).astype(logit.dtype)
        return jnp.tanh(logit) + 0.3 * moved + 0.1 * sum(flat(batch), start=jnp.int32(0)).astype(logit.dtype)


def flat(index):
    return index if isinstance(index, tuple) else (index,)


ADDITIVE = dict(score=lambda draw: scores.Additive(draw(3, 4)))
CUSTOM = dict(score=lambda draw: scores.Custom(distance, jnp.asarray(0.3, draw.dtype)))
DROPOUT = dict(dropout_rate=0.4)
NAN = float("nan")


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


ROWS = [
    OptionRow(
        ("bias",),
        cases=[
            *(Case(f"bias {shape}", bias=shape) for shape in [(7,), (2, 1, 5, 1), WHOLE]),
            *(Case(f"bias {shape}", **VALUES, bias=shape) for shape in [(), (5, 1), (1, 3, 1, 1)]),
        ],
        refused=[
            wrong("bias of other shape", ValueError, "bias must broadcast", "(7, 5)", bias=zeros(7, 5)),
            wrong("bias of ints", TypeError, "bias must be a floating", "int32", bias=zeros(5, 7, dtype=np.int32)),
            wrong("bias a list", TypeError, "bias must be a floating-point array", "list", bias=[1.0]),
        ],
    ),
    OptionRow(
        ("logits_soft_cap",),
        cases=[
            Case("soft cap", bias=(5, 7), options=dict(logits_soft_cap=0.8), second_order=True),
            Case("soft cap, causal, additive", **ADDITIVE, **VALUES, options=dict(logits_soft_cap=2.0, is_causal=True)),
        ],
        refused=[
            *(wrong(f"soft cap {cap}", ValueError, "logits_soft_cap must be a number in [1e-30", str(cap),
                    logits_soft_cap=cap) for cap in (0.0, -1.0, NAN, float("inf"), 1e300, 1e-50)),
            wrong("soft cap a string", TypeError, "logits_soft_cap must be a number", logits_soft_cap="30"),
        ],
        same=[(dict(logits_soft_cap=0.8), dict(score_mod=modifiers.SoftCap(0.8)))],
    ),
    OptionRow(
        ("dropout_rate", "dropout_rng"),
        cases=[
            Case("dropout", **VALUES, options=DROPOUT),
            Case("dropout, grouped, causal", **GROUPED, options=dict(**DROPOUT, is_causal=True)),
            Case("dropout, additive, padded", **ADDITIVE, **VALUES, options=DROPOUT,
                 mask=lambda draw: masks.KeyPadding(draw.bools(2, 7))),
        ],
        refused=[
            *(wrong(f"rate {rate}", ValueError, "dropout_rate must be in [0, 1)", str(rate), dropout_rate=rate)
              for rate in (1.0, 1.5, -0.1, NAN, float("inf"))),
            wrong("rate a string", TypeError, "dropout_rate must be a number", "'0.1'", dropout_rate="0.1"),
            wrong("rate an array", TypeError, "dropout_rate must be a number", dropout_rate=np.array([0.1])),
            wrong("rate None", TypeError, "dropout_rate must be a number", "None", dropout_rate=None),
            wrong("rate True", TypeError, "dropout_rate must be a number", "True", dropout_rate=True),
            wrong("key of floats", TypeError, "dropout_rng must be one", "float32[2]",
                  dropout_rate=0.1, dropout_rng=zeros(2)),
            wrong("many keys", TypeError, "dropout_rng must be one JAX random key", "[2]",
                  dropout_rate=0.1, dropout_rng=Later(lambda: jax.random.split(jax.random.key(0)))),
            wrong("wrong key without rate", TypeError, "dropout_rng must be one JAX random key", dropout_rng="seed"),
        ],
    ),
    OptionRow(
        ("score_mod",),
        cases=[
            *(case for row in modifier_catalogue.ROWS for case in row.all_cases()),
            Case("score_mod, additive, dropout, soft cap", **ADDITIVE, score_mod=lambda draw: Tilt(draw(3)), sink=(3,),
                 mask=lambda draw: draw.bools(2, 1, 5, 7), options=dict(logits_soft_cap=0.9, **DROPOUT)),
            Case("score_mod, no batch", query=(5, 3, 4), key=(7, 3, 4), value=(7, 3, 6),
                 score_mod=lambda draw: Tilt(draw(3))),
            Case("score_mod, two batch axes", query=(3, 2, 2, 6), key=(5, 2, 2, 6), value=(5, 2, 2, 7),
                 **CUSTOM, **VALUES, score_mod=lambda draw: Tilt(draw(2)), options=dict(attention_axes=(0,))),
            Case("score_mod, two batch axes before", query=(2, 3, 4, 2, 6), key=(1, 3, 5, 2, 6), value=(2, 1, 5, 2, 7),
                 score_mod=lambda draw: Tilt(draw(2)), options=dict(attention_axes=-3)),
        ],
        refused=[
            wrong("score_mod not a function", TypeError, "score_mod must be a function", "modifiers.ALiBi",
                  score_mod=1.0),
        ],
    ),
    OptionRow(
        ("sink",),
        cases=[
            Case("sink", sink=(3,), second_order=True),
            Case("sink, rows of nothing", sink=(), mask=lambda draw: masks.Lengths(draw.integers(0, 6, 2), 5)),
            Case("sink, grouped, causal, dropout", **GROUPED, **VALUES, sink=(6,),
                 options=dict(is_causal=True, **DROPOUT)),
        ],
        refused=[
            wrong("sink of ints", TypeError, "sink must be a number", sink=zeros(4, dtype=np.int32)),
            *(wrong(f"sink {sink}", ValueError, "sink must be infinite or in [-1e30, 1e30]", str(sink), sink=sink)
              for sink in (NAN, 1e300)),
            wrong("sink True", TypeError, "sink must be a number", "bool", sink=True),
        ],
    ),
    OptionRow(
        ("normalize",),
        cases=[
            Case("unnormalized, grouped, causal, dropout", **GROUPED, bias=(1, 6, 5, 1),
                 options=dict(normalize=False, is_causal=True, **DROPOUT)),
            Case("unnormalized, rows of nothing", mask=lambda draw: masks.Lengths(draw.integers(0, 6, 2), 5),
                 options=dict(normalize=False)),
            Case("unnormalized, additive, modified", **ADDITIVE, **VALUES, score_mod=lambda draw: Tilt(draw(3)),
                 mask=lambda draw: draw.bools(2, 1, 5, 7), options=dict(normalize=False, logits_soft_cap=1.5)),
        ],
        refused=[
            wrong("normalize a string", TypeError, "normalize must be True or False", normalize="softmax"),
            wrong("normalize=False with a sink", ValueError, "a sink changes what weights are divided by", "sink=None",
                  normalize=False, sink=0.0),
        ],
    ),
    OptionRow(
        ("query_positions", "key_positions"),
        cases=[
            Case("positions", options=dict(is_causal=True),
                 positions=lambda draw: (draw.integers(-1, 9, 2, 5), draw.integers(-1, 9, 7))),
            Case("positions, modified", **GROUPED, mask=lambda draw: masks.SlidingWindow(3, 2),
                 score_mod=lambda draw: Tilt(draw(6)),
                 positions=lambda draw: (None, draw.integers(-2, 6, 2, 7))),
        ],
        refused=[
            wrong("positions of floats", TypeError, "query_positions must be an integer array or None", "float32[5]",
                  query_positions=zeros(5)),
            wrong("positions a list", TypeError, "key_positions must be an integer array or None", "list",
                  key_positions=[1, 2]),
            wrong("positions of other length", ValueError, "key_positions must have shape", "(2, 7)", "(5,)",
                  key_positions=zeros(5, dtype=np.int32)),
        ],
    ),
    OptionRow(
        ("mask",),
        refused=[
            wrong("mask of higher rank", ValueError, "mask must broadcast", mask=zeros(1, 2, 4, 5, 7, dtype=bool)),
            wrong("mask of other shape", ValueError, "mask must broadcast", "(5, 6)", "Use 1",
                  mask=zeros(5, 6, dtype=bool)),
            wrong("mask a list", TypeError, "mask must be a bool array or a Mask", "list", mask=[[True]]),
            wrong("mask True", TypeError, "mask must be a bool array or a Mask", "bool", mask=True),
            wrong("masks combined with and", TypeError, "no truth value", "`&`", mask=Later(
                  lambda: masks.Causal() and masks.SlidingWindow(1, 1))),
            wrong("an error inside a composition", ValueError, "KeyPadding mask",
                  mask=~masks.Causal() | masks.KeyPadding(zeros(3, dtype=bool))),
        ],
    ),
    OptionRow(
        ("is_causal",),
        refused=[
            wrong("is_causal a number", TypeError, "is_causal must be True or False", "1", is_causal=1),
        ],
    ),
    OptionRow(
        ("attention_axes",),
        refused=[
            wrong("axis names features", ValueError, "attention_axes", "got -1", attention_axes=(1, -1)),
            wrong("axis out of range", ValueError, "attention_axes", "got 4", attention_axes=(4,)),
            wrong("axis below range", ValueError, "attention_axes", "got -5", attention_axes=-5),
            wrong("no axes", ValueError, "at least one axis", "None", attention_axes=()),
            wrong("axis a float", TypeError, "attention_axes must be an int", "1.0", attention_axes=1.0),
            wrong("axes of floats", TypeError, "attention_axes must be an int", attention_axes=[1.0]),
            wrong("axis a string", TypeError, "attention_axes must be an int", "'1'", attention_axes="1"),
            wrong("axis a bool", TypeError, "attention_axes must be an int", "True", attention_axes=True),
            wrong("axes nested", TypeError, "attention_axes must be an int", attention_axes=[[1]]),
        ],
    ),
    OptionRow(
        ("return_weights",),
        refused=[
            wrong("return_weights None", TypeError, "return_weights must be True or False", return_weights=None),
        ],
    ),
    OptionRow(
        ("return_lse",),
        refused=[
            wrong("return_lse a string", TypeError, "return_lse must be True or False", return_lse="yes"),
        ],
    ),
    OptionRow(
        ("implementation",),
        refused=[
            wrong("implementation unknown among others", ValueError, "'flash' is unknown",
                  implementation=("reference", "flash")),
            wrong("implementation a number", TypeError, "implementation must be None", "3", implementation=3),
            wrong("implementation of none", TypeError, "implementation must be None", "()", implementation=()),
            wrong("implementation of numbers", TypeError, "implementation must be None",
                  implementation=("reference", 3)),
        ],
    ),
    OptionRow(
        ("block_sizes",),
        refused=[
            *(wrong(f"block_sizes {sizes}", error, "block_sizes must be (queries, keys)", repr(sizes),
                    block_sizes=sizes)
              for sizes, error in [(128, TypeError), ((128,), ValueError), ((0, 4), ValueError), ((4, -1), ValueError),
                    ((4, 4, 4), ValueError), ((4.0, 4), TypeError), ({4, 8}, TypeError)]),
            wrong("unsupported by name", ValueError, "no implementation can compute this", "reference: ",
                  "block_sizes=None", implementation="reference", block_sizes=(4, 4)),
        ],
    ),
    OptionRow(  # the calls that it runs are in context_cases.py
        ("context",),
        refused=[
            wrong("context a number", TypeError, "context must be the name of a mesh axis", "3", context=3),
            wrong("context of no mesh", ValueError, "context axis 'x' is unknown", "jax.set_mesh", context="x"),
        ],
    ),
    OptionRow(
        ("precision",),
        refused=[
            wrong("precision unknown", ValueError, "Precision", precision="fuzzy"),
        ],
    ),
]  # fmt: skip
