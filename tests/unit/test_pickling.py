"""What users hold can be pickled and copied: every kind of mask, score and modifier, layers, caches."""

import copy
import pickle

import jax
import jax.numpy as jnp
import mask_catalogue
import modifier_catalogue
import numpy as np
import pytest
import score_catalogue
from conftest import assert_same

import attnlib


def number(*shape):
    return np.full(shape, 0.5, np.float32)


SCORE_FITS, MODIFIER_FITS = score_catalogue.Fits(3, 4, 4), modifier_catalogue.Fits(3, (4,))
VALUES = {
    **{
        name: row.kind(**example)
        for row in mask_catalogue.ROWS for name, example in row.examples.items()
        if getattr(example.get("fn"), "__name__", "") != "<lambda>"  # which pickle does not take
    },
    "masks composed": attnlib.masks.Causal() & ~attnlib.masks.SlidingWindow(1, None),
    **{
        name: row(**form(number, SCORE_FITS))
        for row in score_catalogue.ROWS for name, form in row.forms.items()
    },
    **{row.name: row.kind(**row.arguments(number, MODIFIER_FITS)) for row in modifier_catalogue.ROWS},
    "a cache": attnlib.KVCache.create((2,), 4, 2, 3, ragged=True),
    "a cache in pages": attnlib.PagedKVCache.create(2, 4, 2, 3, num_pages=3, page_size=2),
}  # fmt: skip
LAYERS = [
    attnlib.AdditiveAttention(),
    attnlib.DotProductAttention(score_mode="concat", use_scale=True),
    attnlib.MultiHeadAttention(2, rotary=True, normalize_qk=True, use_sink=True, dtype=jnp.bfloat16),
    attnlib.MultiHeadAttention(2, score_mod=attnlib.RelativePositionBias(sizes=(3,))),
    attnlib.BucketedPositionBias(8),
]
both_ways = pytest.mark.parametrize(
    "duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"]
)


@both_ways
@pytest.mark.parametrize("name", VALUES)
def test_values(name, duplicate):
    """The same structure, which is the key of compiled programs, and the same arrays."""
    made = duplicate(VALUES[name])
    assert type(made) is type(VALUES[name])
    assert_same(*(jax.tree.map(np.asarray, x) for x in (made, VALUES[name])))


@both_ways
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers(layer, duplicate):
    assert duplicate(layer) == layer


def test_explanations():
    explanation = attnlib.explain(*[jax.ShapeDtypeStruct((1, 2, 1, 4), jnp.float32)] * 3)
    assert pickle.loads(pickle.dumps(explanation)) == explanation
