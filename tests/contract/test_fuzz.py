"""Random calls of the public functions, by tracing alone: each gives what the contract says, or is refused.

Their numbers are in test_fuzz_numbers.py. The slow tests draw more examples; `--fuzz N` N times as many, and anew.
"""

import inspect as signatures
import pathlib
import re
import traceback

import fuzzing_calls
import jax
import mask_catalogue
import modifier_catalogue
import numpy as np
import pytest
import score_catalogue
from cases import kinds_of_tiles
from conftest import fuzz
from fuzzing import Sizes, define, few_and_many, mask_trees, wide
from hypothesis import given
from hypothesis import strategies as st

import attnlib
from attnlib._core.tile_kinds import EMPTY, FULL

PACKAGE = str(pathlib.Path(attnlib.__file__).parent)
NAMES = tuple(signatures.signature(attnlib.attention).parameters)
# What a refusal may name beside the arguments of the function itself.
ROWS = [*mask_catalogue.ROWS, *score_catalogue.ROWS, *modifier_catalogue.ROWS]
PARTS = {"Segments", *(name for row in ROWS for name in signatures.signature(row.kind).parameters)}


@pytest.fixture(autouse=True, scope="module")
def whole_tracebacks():
    """With the frames of JAX, where an error that is not ours comes from."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def outcome(function, arguments, names=NAMES):
    """The shapes and dtypes that a call gives, or its refusal; an error that is no refusal is raised."""
    leaves, tree = jax.tree.flatten(arguments)
    traced = [leaf for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)]

    def call(*traced):
        left = iter(traced)
        made = [next(left) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves]
        return function(**jax.tree.unflatten(tree, made))

    try:
        results = jax.eval_shape(call, *traced)
    except (TypeError, ValueError, NotImplementedError) as error:
        assert_refusal(error, names)
        return error
    return [(x.shape, x.dtype.name) for x in jax.tree.leaves(results)]


def assert_refusal(error, names):
    """It is raised by attnlib, of a type that says what is wrong, in words that name an argument."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    named = re.search(rf"\b({'|'.join([*names, *PARTS])})\b", str(error))
    of_jax = "recision" in str(error)  # JAX' own words name it
    if not of_jax and not (last.filename.startswith(PACKAGE) and named and len(str(error)) > 20):
        raise AssertionError(f"no refusal of ours: {type(error).__name__}: {error}") from error


@few_and_many(60, 250)
def test_right_calls_give_what_the_contract_says(examples):
    @fuzz(examples)
    @given(call=fuzzing_calls.calls(), promotion=st.sampled_from(("standard", "strict")), explained=st.integers(0, 3))
    def law(call, promotion, explained):
        with wide(call.arguments), jax.numpy_dtype_promotion(promotion):
            got = outcome(attnlib.attention, call.arguments)
            if isinstance(got, Exception):
                raise got
            assert got == fuzzing_calls.expected(call.arguments)
            if explained == 0:
                assert not isinstance(outcome(explain, call.arguments), Exception)

    law()


def explain(query, key, value, *, score, **options):
    """`attnlib.explain`, which gives no arrays."""
    print_of = str(attnlib.explain(query, key, value, score=score, **options))
    assert print_of.startswith("implementation: ")
    return ()


@st.composite
def spoilt(draw):
    """A right call of which one or two arguments are anything."""
    call = draw(fuzzing_calls.calls())
    arguments = dict(call.arguments)
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True)):
        arguments[name] = draw(fuzzing_calls.nonsense())
    if isinstance(arguments.get("score_mod"), type):
        arguments["score_mod"] = None  # it can be called, and raises its own errors
    return arguments


def words(error):
    return re.sub("0x[0-9a-f]+", "0x", str(error))  # an object's address, which is another one each time


@few_and_many(200, 700)
def test_wrong_calls_are_refused_at_the_border(examples):
    @fuzz(examples)
    @given(arguments=spoilt(), promotion=st.sampled_from(("standard", "strict")))
    def law(arguments, promotion):
        with wide(arguments), jax.numpy_dtype_promotion(promotion):
            got = outcome(attnlib.attention, arguments)
            if isinstance(got, Exception) and arguments["score"] is not None:  # for which explain has a default
                said = outcome(explain, arguments)
                assert (type(said), words(said)) == (type(got), words(got)), (said, got)
            elif not isinstance(got, Exception):
                want = fuzzing_calls.expected(arguments)
                assert got == want, (got, want)

    law()


# Masks, by what they say and by tile


SIZES = [Sizes((2,), 3, (4,), (6,)), Sizes((3,), 1, (3, 3), (3, 3))]  # few, as what is not traced is compiled


@st.composite
def placed_masks(draw):
    """A mask without traced arrays, its sizes, and tile sizes."""
    sizes = draw(st.sampled_from(SIZES))
    return draw(mask_trees(sizes, concrete=True)), sizes, (draw(st.integers(1, 5)), draw(st.integers(1, 5)))


@few_and_many(60, 500)
def test_masks_say_what_their_definition_says(examples):
    @fuzz(examples)
    @given(drawn=placed_masks())
    def law(drawn):
        mask, sizes, tile = drawn
        with wide(mask):
            dense = define(mask, sizes)
            got = np.asarray(jax.jit(lambda: mask.as_array(sizes.query, sizes.key))())
            assert np.array_equal(np.broadcast_to(got, dense.shape), dense)
            queries, keys = np.prod(sizes.query), np.prod(sizes.key)
            for place, kind in np.ndenumerate(kinds_of_tiles(mask, sizes.query, sizes.key, tile)):
                (row, column), pairs = place, dense.reshape(-1, queries, keys)
                part = pairs[:, row * tile[0] : (row + 1) * tile[0], column * tile[1] : (column + 1) * tile[1]]
                assert not part.any() if kind == EMPTY else part.all() or kind != FULL

    law()
