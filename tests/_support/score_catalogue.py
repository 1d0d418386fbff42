"""Every kind of score: its definition in NumPy, forms of its parameters, and parameters that it refuses.

A new kind is a new row of ROWS. The tests of scores, derivatives, errors, cases, exports, the agreement with the oracle
and the fuzz tests read the rows.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attention_case import Case
from refusals import Wrong, wrong

from attnlib import scores

ABSTRACT = ("Score",)  # what those use who write a score


class Fits(NamedTuple):
    """What the parameters of a score are laid out by."""

    heads: int
    features: int
    key_features: int


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreKind:
    """What the tests know of a kind of score.

    Attributes:
      kind: the class.
      logit: the definition: of a query vector, a key vector, the number of the query head, and the arguments.
      forms: by name, functions of (draw, fits) that give arguments: `draw(*shape)` makes numbers. The first is the
        plainest form; the last has all parameters, and the tests that take one form alone take this.
      cases: calls that all implementations run; by default the last form.
      other_features: whether query and key may have different features.
      refused: wrong arguments, for queries (2, 5, 4, 8) and keys (2, 7, 2, 8).
      make: what makes the score of arguments that are given by name.
    """

    kind: type[scores.Score]
    logit: Callable[..., float]
    forms: dict[str, Callable[[Callable[..., Any], Fits], dict[str, Any]]]
    cases: Sequence[Case] | None = None
    other_features: bool = False
    refused: Sequence[Wrong] = ()
    make: Callable[..., scores.Score] | None = None

    @property
    def name(self) -> str:
        return next(iter(self.forms))

    @property
    def last_form(self) -> Callable[[Callable[..., Any], Fits], dict[str, Any]]:
        return list(self.forms.values())[-1]

    def __call__(self, **arguments: Any) -> scores.Score:
        return (self.make or self.kind)(**arguments)

    def all_cases(self) -> Sequence[Case]:
        if self.cases is not None:
            return self.cases
        return [Case(self.name, score=lambda draw: self(**self.last_form(draw, Fits(3, 4, 4))))]


# Definitions


def of_head(parameter, head, rank):
    """A parameter for one head; `rank` is its rank without a head axis."""
    parameter = np.asarray(parameter, np.float64)
    return parameter[head] if parameter.ndim == rank + 1 else parameter


def dot(q, k, head, scale=None):
    scale = max(len(q), 1) ** -0.5 if scale is None else of_head(scale, head, rank=0)
    return float(scale) * sum(float(a) * float(b) for a, b in zip(q, k, strict=True))


def additive(q, k, head, scale=None):
    scale = np.broadcast_to(of_head(1.0 if scale is None else scale, head, rank=1), (len(q),))
    return sum(float(c) * math.tanh(a + b) for a, b, c in zip(q, k, scale, strict=True))


def concat(q, k, head, weight=None, scale=None):
    weight, scale = (1.0 if number is None else float(number) for number in (weight, scale))
    return weight * sum(math.tanh(scale * (a + b)) for a, b in zip(q, k, strict=True))


def bilinear(q, k, head, kernel):
    matrix = of_head(kernel, head, rank=2)
    return sum(float(q[i] * matrix[i, j] * k[j]) for i in range(len(q)) for j in range(len(k)))


def custom(q, k, head, fn, params=()):
    return float(fn(q, k, *(np.asarray(number, np.float64) for number in params)))


# Functions of one query and one key, for NumPy and for JAX.


def squared_sum(query, key):
    """Features of different sizes will do, and no named score can express it."""
    return (query**2).sum() - key.sum() * query[:1].sum()


def squared_sum_of(query, key, number):
    return squared_sum(query, key) * number.astype(query.dtype)


def distance(query, key, sharpness):
    return -sharpness * jnp.sum((query - key) ** 2)


def unequal(query, key, matrix):
    return jnp.tanh(query @ matrix @ key)


NAN = float("nan")


def zeros(*shape):
    return np.zeros(shape, np.float32)


ROWS = [
    ScoreKind(
        scores.Dot, dot,
        forms={
            "dot": lambda draw, fits: {},
            "dot, number": lambda draw, fits: dict(scale=0.7),
            "dot, scalar": lambda draw, fits: dict(scale=draw()),
            "dot, heads": lambda draw, fits: dict(scale=draw(fits.heads)),
        },
        cases=[
            Case("dot", second_order=True),
            Case("dot scale a head", score=lambda draw: scores.Dot(draw(3))),
        ],
        refused=[
            wrong("dot scale of features", ValueError, "Dot scale", "() or (4,)", "(8,)", scale=zeros(8)),
            wrong("dot scale a list", TypeError, "Dot scale", "list", scale=[1.0]),
            wrong("dot scale a bool", TypeError, "Dot scale", "bool", scale=True),
            wrong("dot scale complex", TypeError, "Dot scale", "complex", scale=1j),
            *(wrong(f"scale {scale}", ValueError, "score Dot must hold numbers in [-1e30", str(scale), scale=scale)
              for scale in (NAN, float("inf"), 1e300)),
        ],
    ),
    ScoreKind(
        scores.Additive, additive,
        forms={
            "additive": lambda draw, fits: {},
            "additive, number": lambda draw, fits: dict(scale=0.5),
            "additive, scalar": lambda draw, fits: dict(scale=draw()),
            "additive, features": lambda draw, fits: dict(scale=draw(fits.features)),
            "additive, heads": lambda draw, fits: dict(scale=draw(fits.heads, fits.features)),
        },
        cases=[
            Case("additive scale a feature", score=lambda draw: scores.Additive(draw(4))),
            Case("additive scale a head", score=lambda draw: scores.Additive(draw(3, 4))),
        ],
        refused=[
            wrong("additive scale of heads", ValueError, "additive scale", "(), (8,) or (4, 8)", "(4,)",
                  scale=zeros(4)),
        ],
    ),
    ScoreKind(
        scores.Concat, concat,
        forms={
            "concat": lambda draw, fits: {},
            "concat, weight": lambda draw, fits: dict(weight=draw()),
            "concat, numbers": lambda draw, fits: dict(weight=0.6, scale=1.7),
            "concat, both": lambda draw, fits: dict(weight=draw(), scale=draw()),
        },
        cases=[Case("concat", score=lambda draw: scores.Concat(draw(), draw()))],
        refused=[
            wrong("concat weight", ValueError, "Concat weight", "()", weight=zeros(8)),
            wrong("concat scale", ValueError, "Concat scale", "()", scale=zeros(8)),
        ],
    ),
    ScoreKind(
        scores.Bilinear, bilinear,
        forms={
            "bilinear": lambda draw, fits: dict(kernel=draw(fits.features, fits.key_features)),
            "bilinear, heads": lambda draw, fits: dict(kernel=draw(*fits)),
        },
        cases=[
            Case("bilinear", score=lambda draw: scores.Bilinear(draw(4, 4))),
            Case("bilinear a head, unequal features", key=(2, 7, 3, 8),
                 score=lambda draw: scores.Bilinear(draw(3, 4, 8))),
        ],
        other_features=True,
        refused=[
            wrong("bilinear kernel", ValueError, "Bilinear kernel", "(8, 8) or (4, 8, 8)", "(8, 7)",
                  kernel=zeros(8, 7)),
        ],
    ),
    ScoreKind(
        scores.Custom, custom,
        forms={
            "custom": lambda draw, fits: dict(fn=squared_sum),
            "custom, a parameter": lambda draw, fits: dict(fn=squared_sum_of, params=(draw(),)),
        },
        cases=[
            Case("custom", score=lambda draw: scores.Custom(distance, jnp.asarray(0.3, draw.dtype))),
            Case("custom, unequal features", key=(2, 7, 3, 8), score=lambda draw: scores.Custom(unequal, draw(4, 8))),
        ],
        other_features=True,
        refused=[
            wrong("custom not a function", TypeError, "Custom fn must be a function", fn=1.0),
            wrong("custom a tuple", ValueError, "Custom fn must return a scalar", fn=lambda q, k: (q[0], k[0])),
            wrong("custom complex", TypeError, "Custom fn must return a real number", "complex64",
                  fn=lambda q, k: jax.lax.complex(q[0], k[0])),
        ],
        make=lambda fn, params=(): scores.Custom(fn, *params),
    ),
]  # fmt: skip
BY_KIND = {row.kind: row for row in ROWS}
BY_NAME = {row.name: row for row in ROWS}


def definition(score: scores.Score) -> Callable[[np.ndarray, np.ndarray, int], float]:
    """The logit of a query vector, a key vector and the number of the query head, by the definition of the kind."""
    return lambda q, k, head: BY_KIND[type(score)].logit(q, k, head, **vars(score))
