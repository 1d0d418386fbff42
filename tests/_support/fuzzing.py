"""What the fuzz tests draw: calls that are right by construction, wrong values for any argument, masks.

Arrays are drawn as shapes and dtypes (`jax.ShapeDtypeStruct`), to be traced, or as NumPy arrays. What a call must give,
and what a mask says, is defined here again, from docs/concepts and without attnlib.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

from attnlib import masks
from attnlib.masks import _base as _mask

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


@st.composite
def leaf_masks(draw, sizes, concrete):
    """A mask of any kind that fits; `concrete`: without arrays to be traced."""
    axes, batch = len(sizes.key), sizes.batch
    whole_numbers = ("int32", "uint8") if concrete else INTEGERS
    small, near = st.integers(1, 6), st.none() | st.integers(0, 6)
    each = small | st.tuples(*[small] * axes)

    def array(shape, dtype):
        made = draw(arrays(shape, dtype))
        return numbers(draw(st.integers(0, 99)), shape, made.dtype) if concrete else made

    def number(low, high):
        kind = draw(st.sampled_from(("static", "scalar", "batch")))
        if kind == "static":
            return draw(st.integers(low, high))
        return array(() if kind == "scalar" else draw(broadcasting(batch)), whole_numbers)

    def of_places(side, dtype):
        lead = draw(st.sampled_from(((), draw(broadcasting(batch)))))
        return array((*lead, *side), dtype)

    kinds = ["causal", "window", "local", "dilated", "prefix", "lengths", "keys", "queries", "segments", "dense"]
    kinds += ["predicate", "neighborhood", "sparse"]
    kind = draw(st.sampled_from(kinds))
    if kind == "causal":
        return masks.Causal(number(-4, 6), draw(st.none() | st.integers(-axes, axes - 1)))
    if kind == "window":
        return masks.SlidingWindow(draw(near), draw(near))
    if kind == "local":
        return masks.BlockLocal(draw(each), draw(near), draw(near))
    if kind == "dilated":
        return masks.Dilated(draw(each))
    if kind == "neighborhood":
        return masks.Neighborhood(draw(each), draw(each), draw(st.sampled_from(("shift", "clip"))))
    if kind == "prefix":
        return masks.Prefix(number(-1, 9))
    if kind == "lengths":
        return masks.Lengths(*(number(-1, 9) if draw(st.booleans()) else None for _ in range(2)))
    if kind == "keys":
        return masks.KeyPadding(of_places(sizes.key, "bool"))
    if kind == "queries":
        return masks.QueryPadding(of_places(sizes.query, "bool"))
    if kind == "segments":
        of_keys = None if sizes.query == sizes.key and draw(st.booleans()) else of_places(sizes.key, whole_numbers)
        padding = draw(st.sampled_from((None, 0, np.int64(2)))) if draw(st.booleans()) else array((), whole_numbers)
        return masks.Segments(of_places(sizes.query, whole_numbers), of_keys, padding)
    if kind == "dense":
        return masks.Dense(array(draw(pairs(sizes)), "bool"))
    if kind == "predicate":
        return masks.Predicate(draw(st.sampled_from((every_third, all_pairs))))
    size = draw(st.integers(1, 4))
    table = tuple(max(-(-math.prod(side) // size), 1) for side in (sizes.query, sizes.key))
    return masks.BlockSparse(numbers(draw(st.integers(0, 99)), table, "bool"), size)


def every_third(query, key):
    query, key = (sum(x) if isinstance(x, tuple) else x for x in (query, key))
    return (query + key) % 3 != 1


def all_pairs(query, key):
    return True


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
    """A mask as a bool array `(*batch, N, *query axes, *key axes)`, from its fields; None attends all pairs."""
    queries, keys = math.prod(sizes.query), math.prod(sizes.key)
    attends = True if mask is None else _attends(mask, sizes, np.arange(queries)[:, None], np.arange(keys)[None])
    return np.broadcast_to(attends, (*sizes.batch, sizes.heads, queries, keys)).reshape(sizes.weights)


def _attends(mask, sizes, t, s):
    def along(place, axes):
        return (place,) if len(axes) == 1 else np.unravel_index(place, axes)

    def whole(array, beside):  # one entry a place
        lead = array.shape[: array.ndim - axes]
        total = math.prod(array.shape[array.ndim - axes :])
        flat = np.expand_dims(np.asarray(array).reshape(*lead, total), beside)
        return flat[..., None, :, :] if lead else flat

    def each_batch(value):
        value = np.asarray(value).astype(np.int64)
        return value[..., None, None, None] if value.ndim else value

    axes = len(sizes.key)
    near = np.bool_(True)
    places = list(zip(along(t, sizes.query), along(s, sizes.key), strict=True)) if 0 not in sizes.weights else []
    match mask:
        case _mask.And():
            return _attends(mask.left, sizes, t, s) & _attends(mask.right, sizes, t, s)
        case _mask.Or():
            return _attends(mask.left, sizes, t, s) | _attends(mask.right, sizes, t, s)
        case _mask.Not():
            return ~_attends(mask.mask, sizes, t, s)
        case masks.Causal():
            t, s = (t, s) if mask.axis is None or not places else places[mask.axis]
            return s - t <= each_batch(mask.offset)
        case masks.SlidingWindow():
            left, right = (math.inf if side is None else side for side in (mask.left, mask.right))
            return (t - s <= left) & (s - t <= right)
        case masks.Prefix():
            return (s < each_batch(mask.length)) & (t == t)
        case masks.Lengths():
            ends = (math.inf if side is None else each_batch(side) for side in (mask.query, mask.key))
            return (t < next(ends)) & (s < next(ends))
        case masks.KeyPadding():
            return whole(mask.mask, -2)
        case masks.QueryPadding():
            return whole(mask.mask, -1)
        case masks.Segments():
            query = whole(mask.query_ids, -1).astype(np.int64)
            key = whole(mask.query_ids if mask.key_ids is None else mask.key_ids, -2).astype(np.int64)
            return (query == key) & (True if mask.padding_id is None else query != np.int64(mask.padding_id))
        case masks.Dense():
            return np.broadcast_to(mask.array, sizes.weights).reshape(
                *sizes.weights[: -2 * axes], math.prod(sizes.query), math.prod(sizes.key)
            )
        case masks.Predicate():
            return np.asarray(mask.fn(along(t, sizes.query), along(s, sizes.key)) if axes > 1 else mask.fn(t, s))
        case masks.BlockSparse():
            table = np.array([[entry == "1" for entry in row] for row in mask.blocks])
            row, column = t // mask.size, s // mask.size
            inside = (row < table.shape[0]) & (column < table.shape[1])
            return inside & table[np.minimum(row, table.shape[0] - 1), np.minimum(column, table.shape[1] - 1)]
        case masks.Neighborhood():
            near = oracle.neighborhood(sizes.query, sizes.key, mask.size, mask.dilation, mask.border == "clip")
            return near.reshape(math.prod(sizes.query), math.prod(sizes.key))
        case masks.BlockLocal():
            for (q, k), size in zip(places, _each(mask.size, axes), strict=False):
                distance = k // size - q // size
                near = near & (mask.before is None or distance >= -mask.before)
                near = near & (mask.after is None or distance <= mask.after)
            return near
        case masks.Dilated():
            for (q, k), step in zip(places, _each(mask.step, axes), strict=False):
                near = near & ((q - k) % step == 0)
            return near
    raise TypeError(f"no definition of {mask}")


def _each(value, axes):
    return value if isinstance(value, tuple) else (value,) * axes
