"""Every kind of modifier: its definition in NumPy, its parameters, and parameters that it refuses.

A new kind is a new row of ROWS. The tests of modifiers, errors, cases, exports and the fuzz tests read the rows.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from attention_case import GRID, GROUPED, VALUES, Case, of_length
from refusals import Wrong, wrong

from attnlib import modifiers


class Fits(NamedTuple):
    """What the parameters of a modifier are laid out by: query heads, and a distance along each attention axis."""

    heads: int
    reach: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ModifierKind:
    """What the tests know of a kind of modifier.

    Attributes:
      name: what it is called in names of tests.
      kind: the class.
      modified: the definition: the new logit, of a logit, the query head, a query and a key position (tuples where
        there are several attention axes), and the arguments.
      arguments: of (draw, fits), all arguments; `draw(*shape)` makes numbers.
      one_axis: whether it is for one attention axis.
      is_bias: whether it adds to the logit what is linear in its arrays.
      cases: calls that all implementations run; by default one with these arguments.
      refused: wrong arguments, for queries (2, 5, 4, 8) and keys (2, 7, 2, 8).
    """

    name: str
    kind: type
    modified: Callable[..., float]
    arguments: Callable[[Callable[..., Any], Fits], dict[str, Any]]
    one_axis: bool = False
    is_bias: bool = False
    cases: Sequence[Case] | None = None
    refused: Sequence[Wrong] = ()

    def all_cases(self) -> Sequence[Case]:
        if self.cases is not None:
            return self.cases
        return [Case(self.name, score_mod=lambda draw: self.kind(**self.arguments(draw, Fits(3, (4,)))))]


# Definitions, from the papers


def alibi(logit, head, query, key, slopes):
    return logit - float(slopes[head]) * abs(query - key)


def bucket(distance, buckets, bidirectional, max_distance):
    """Raffel et al., for one distance, key minus query."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    steps = (buckets - exact) * math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(exact + math.floor(steps + 1e-9), buckets - 1)


def bucketed(logit, head, query, key, table, bidirectional=True, max_distance=128):
    return logit + float(table[bucket(key - query, len(table), bidirectional, max_distance), head])


def relative(logit, head, query, key, table):
    query, key = (place if isinstance(place, tuple) else (place,) for place in (query, key))
    entry = table
    for i, j in zip(query, key, strict=True):
        reach = len(entry) // 2
        entry = entry[min(max(i - j, -reach), reach) + reach]
    return logit + float(entry[head])


def soft_cap(logit, head, query, key, cap):
    return float(cap) * math.tanh(logit / float(cap))


def log_sigmoid(logit, head, query, key, bias):
    shifted = logit + float(bias[head] if np.ndim(bias) else bias)
    return min(shifted, 0.0) - math.log1p(math.exp(-abs(shifted)))


def log_relu(logit, head, query, key, power=2.0):
    return power * math.log(logit) if logit > 0 else -math.inf


def zeros(*shape):
    return np.zeros(shape, np.float32)


UNNORMALIZED = dict(normalize=False)

ROWS = [
    ModifierKind(
        "alibi", modifiers.ALiBi, alibi, lambda draw, fits: dict(slopes=draw(fits.heads)),
        one_axis=True, is_bias=True,
        cases=[Case("alibi", score_mod=lambda draw: modifiers.ALiBi(draw(3)), bias=(5, 1), second_order=True)],
        refused=[
            wrong("slopes of key heads", ValueError, "ALiBi slopes must be (4,)", "(2,)", "alibi_slopes(4)",
                  slopes=zeros(2)),
            wrong("slopes a list", TypeError, "ALiBi slopes must be a floating-point array", slopes=[1.0]),
        ],
    ),
    ModifierKind(
        "bucketed", modifiers.BucketedBias, bucketed,
        lambda draw, fits: dict(table=draw(8, fits.heads), bidirectional=True, max_distance=9),
        one_axis=True, is_bias=True,
        cases=[
            Case("bucketed bias", query=(2, 11, 3, 4), **of_length(13),
                 score_mod=lambda draw: modifiers.BucketedBias(draw(6, 3), max_distance=7)),
            Case("bucketed bias, causal, grouped", **GROUPED, options=dict(is_causal=True),
                 score_mod=lambda draw: modifiers.BucketedBias(draw(5, 6), bidirectional=False, max_distance=4)),
        ],
        refused=[
            wrong("buckets of other heads", ValueError, "BucketedBias table must be (buckets, 4 query heads)", 
                  "(32, 8)", table=zeros(32, 8)),
            wrong("an odd number of buckets", ValueError, "even", "(7, 4)", table=zeros(7, 4)),
            wrong("a distance beyond 32 bits", ValueError, "BucketedBias max_distance must fit in 32 bits",
                  table=zeros(32, 4), max_distance=10**30),
            wrong("max_distance", ValueError, "max_distance must be above 8", "got 8",
                  table=zeros(32, 4), max_distance=8),
        ],
    ),
    ModifierKind(
        "relative", modifiers.RelativeBias, relative,
        lambda draw, fits: dict(table=draw(*(2 * reach - 1 for reach in fits.reach), fits.heads)), is_bias=True,
        cases=[
            Case("relative bias, two axes", **GRID, score_mod=lambda draw: modifiers.RelativeBias(draw(3, 9, 2))),
        ],
        refused=[
            wrong("relative bias of other heads", ValueError, "RelativeBias table", "4 query heads", "(5, 2)",
                  table=zeros(5, 2)),
            wrong("relative bias of even size", ValueError, "RelativeBias table", "odd", "(6, 4)", table=zeros(6, 4)),
            wrong("relative bias of other axes", ValueError, "each of 1 attention axes", "(5, 5, 4)",
                  table=zeros(5, 5, 4)),
        ],
    ),
    ModifierKind(
        "soft cap", modifiers.SoftCap, soft_cap, lambda draw, fits: dict(cap=2.0), cases=[],
        refused=[
            *(wrong(f"a cap of {cap}", ValueError, "SoftCap cap must be a number in [1e-30, 1e30]", cap=cap)
              for cap in (0, -1.0, 1e300)),  # float32 has no 1e300: it would be infinite, and infinity times 0 is NaN
        ],
    ),
    ModifierKind(
        "log sigmoid", modifiers.LogSigmoid, log_sigmoid, lambda draw, fits: dict(bias=draw(fits.heads)),
        cases=[
            Case("sigmoid", score_mod=lambda draw: modifiers.LogSigmoid(draw(3)), options=UNNORMALIZED),
            Case("sigmoid, default bias, two axes", **GRID, **VALUES, score_mod=lambda draw: modifiers.LogSigmoid(),
                 bias=(4, 5, 1), options=dict(is_causal=True, **UNNORMALIZED)),
        ],
        refused=[
            wrong("sigmoid bias of key heads", ValueError, "LogSigmoid bias must be a number or have shape () or (4,)",
                  "(2,)", bias=zeros(2)),
            wrong("sigmoid bias of ints", TypeError, "LogSigmoid bias must be a floating", bias=np.zeros(4, np.int32)),
            wrong("sigmoid bias infinite", ValueError, "LogSigmoid bias must be in [-1e30, 1e30]", bias=-math.inf),
            wrong("sigmoid bias a string", TypeError, "LogSigmoid bias must be a number", bias="log"),
        ],
    ),
    ModifierKind(
        "log relu", modifiers.LogRelu, log_relu, lambda draw, fits: dict(power=2.0),
        cases=[
            Case("squared relu", score_mod=lambda draw: modifiers.LogRelu(), mask=lambda draw: draw.bools(2, 1, 5, 7),
                 options=UNNORMALIZED, second_order=True),
            Case("relu, divided by the sum", **VALUES, score_mod=lambda draw: modifiers.LogRelu(1), bias=(1, 3, 1, 7)),
        ],
        refused=[
            wrong("a power below 1", ValueError, "LogRelu power must be at least 1", "got 0.5", power=0.5),
            wrong("a power of 0", ValueError, "LogRelu power must be a number in [1e-30, 1e30]", power=0),
            wrong("a power of many", TypeError, "LogRelu power must be a number", power=zeros(2)),
        ],
    ),
]  # fmt: skip
BY_KIND = {row.kind: row for row in ROWS}


def definition(modifier: Any) -> Callable[..., float]:
    """The new logit of (logit, batch, head, query position, key position), by the definition of the kind."""
    if type(modifier) not in BY_KIND:
        return modifier  # a function itself
    row, arguments = BY_KIND[type(modifier)], vars(modifier)
    return lambda logit, batch, head, query, key: row.modified(logit, head, query, key, **arguments)
