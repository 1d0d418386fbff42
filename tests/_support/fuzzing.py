"""What the fuzz tests draw: calls that are right by construction, wrong values for any argument, masks.

Arrays are drawn as shapes and dtypes (`jax.ShapeDtypeStruct`), to be traced, or as NumPy arrays. What a mask says is
defined again in mask_catalogue.py, from docs/concepts and without attnlib.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import mask_catalogue
import numpy as np
import pytest
from conftest import x64
from hypothesis import strategies as st

FLOATS = ("float32", "float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz")
INTEGERS = ("int32", "int8", "int16", "uint8", "uint16", "uint32", "int64")
LENGTHS = (5, 1, 2, 3, 4, 7, 0)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What masks, biases and results are laid out by: batch axes, query heads, query axes, key axes."""

    batch: tuple[int, ...]
    heads: int
    query: tuple[int, ...]
    key: tuple[int, ...]

    @property
    def weights(self):
        return (*self.batch, self.heads, *self.query, *self.key)


def few_and_many(few, many):
    """A test takes so many examples, few by default, many among the slow tests."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def wide(arguments):
    """A context in which 64-bit arrays exist, if there are any: elsewhere JAX warns of a struct of them, since 0.12."""
    leaves = jax.tree.leaves(arguments)
    return x64(any(getattr(x, "dtype", None) in map(np.dtype, ("float64", "int64", "uint64")) for x in leaves))


# Arrays


@st.composite
def arrays(draw, shape, dtype):
    """An array to be traced, or one that is there; all numbers are drawn of a seed, the dtype of several."""
    dtype = dtype if isinstance(dtype, str) else draw(st.sampled_from(dtype))
    if draw(st.booleans()):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return numbers(draw(st.integers(0, 99)), shape, dtype)


def numbers(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    if dtype == np.bool_:
        return rng.random(shape) < 0.6
    if jnp.issubdtype(dtype, jnp.integer):
        return rng.integers(0 if jnp.issubdtype(dtype, jnp.unsignedinteger) else -1, 5, shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


@st.composite
def broadcasting(draw, whole):
    """A shape that broadcasts to a whole one of the same rank."""
    return tuple(draw(st.sampled_from((size, size, 1))) for size in whole)


@st.composite
def pairs(draw, sizes):
    """A shape by the rank rule of masks and biases: the weights' rank, or that of query and key axes at most."""
    spread = len(sizes.query) + len(sizes.key)
    rank = draw(st.sampled_from((len(sizes.weights), *range(spread + 1))))
    return draw(broadcasting(sizes.weights[len(sizes.weights) - rank :]))


# Masks


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Strategies for the arguments of a mask that fits some sizes; the rows of `mask_catalogue` are written with them.

    Attributes:
      sizes: what the mask has to fit.
      numbers: of which kinds whole numbers are: "static", a "scalar" array, an array of the "batch".
      concrete: whether arrays are there; else some are to be traced.
      far: up to which distance windows and offsets reach.
      longest: the length of the longest attention axis that there is.
    """

    sizes: Sizes
    numbers: tuple[str, ...] = ("static", "scalar", "batch")
    concrete: bool = False
    far: int = 6
    longest: int = max(LENGTHS)

    @property
    def axes(self):
        """How many attention axes."""
        return len(self.sizes.key)

    @property
    def integers(self):
        """Dtypes of whole numbers."""
        return ("int32", "uint8") if self.concrete else INTEGERS

    @property
    def reach(self):
        """None, or a distance to one side."""
        return st.none() | st.integers(0, self.far)

    @property
    def each(self):
        """A small positive number, for all axes or for each."""
        small = st.integers(1, 6)
        return small | st.tuples(*[small] * self.axes)

    def number(self, low, high):
        """A whole number, which may be one for each batch index."""

        def of_kind(kind):
            if kind == "static":
                return st.integers(low, high)
            shapes = st.just(()) if kind == "scalar" else broadcasting(self.sizes.batch)
            return shapes.flatmap(lambda shape: self.array(shape, self.integers))

        return st.sampled_from(self.numbers).flatmap(of_kind)

    def array(self, shape, dtype):
        drawn = arrays(shape, dtype)
        if not self.concrete:
            return drawn
        return st.builds(lambda seed, made: numbers(seed, shape, made.dtype), st.integers(0, 99), drawn)

    @property
    def of_heads(self):
        """Whole numbers, one for all heads or one for each, as an array."""
        return self.array((), self.integers) | self.array((self.sizes.heads,), self.integers)

    def of_queries(self, dtype):
        """An array `(*batch, *query axes)` or `(*query axes,)`."""
        return self._of_side(self.sizes.query, dtype)

    def of_keys(self, dtype):
        return self._of_side(self.sizes.key, dtype)

    def of_pairs(self, dtype):
        """An array of any shape that broadcasts to the weights."""
        return pairs(self.sizes).flatmap(lambda shape: self.array(shape, dtype))

    def table(self, size):
        """A bool table with one entry for each pair of blocks of so many positions."""
        shape = tuple(max(-(-math.prod(side) // size), 1) for side in (self.sizes.query, self.sizes.key))
        return st.integers(0, 99).map(lambda seed: numbers(seed, shape, "bool"))

    def _of_side(self, side, dtype):
        leads = st.just(()) | broadcasting(self.sizes.batch)
        return leads.flatmap(lambda lead: self.array((*lead, *side), dtype))


def masks_of(row, drawing):
    """Masks of one kind."""
    drawn = row.random(drawing)
    return (st.fixed_dictionaries(drawn) if isinstance(drawn, dict) else drawn).map(lambda given: row.kind(**given))


def leaf_masks(sizes, concrete):
    """Masks of any kind that fit; `concrete`: without arrays to be traced."""
    return st.one_of([masks_of(row, Drawing(sizes, concrete=concrete)) for row in mask_catalogue.ROWS])


@st.composite
def mask_trees(draw, sizes, concrete=False, depth=2):
    """Masks composed by `&`, `|` and `~`."""
    kind = draw(st.sampled_from(("leaf", "leaf", "and", "or", "not") if depth else ("leaf",)))
    if kind == "leaf":
        return draw(leaf_masks(sizes, concrete))
    left, right = (mask_trees(sizes, concrete, depth - 1) for _ in range(2))
    if kind == "not":
        return ~draw(left)
    return draw(left) & draw(right) if kind == "and" else draw(left) | draw(right)


def define(mask, sizes):
    """A mask as a bool array `(*batch, N, *query axes, *key axes)`, by its definition; None attends all pairs."""
    pairs = mask_catalogue.Pairs(sizes.query, sizes.key, sizes.batch, sizes.heads)
    attends = True if mask is None else mask_catalogue.attends(mask, pairs)
    return np.broadcast_to(attends, (*sizes.batch, sizes.heads, pairs.query.size, pairs.key.size)).reshape(
        sizes.weights
    )
