"""attnlib has a word, or an answer, for every argument of its peers; and what answers keeps the signatures.

What is answered, word by word, is in test_mistakes.py.
"""

import inspect
import re

import jax
import pytest
from documents import names_in, read, rows
from flax import linen as nn
from flax import nnx

import attnlib
from attnlib._core.suggestions import OMIT, SUGGESTIONS, suggests_arguments

dot, MHA = attnlib.dot_product_attention, attnlib.MultiHeadAttention


def own_words():
    """Every argument of a public function, field or call."""
    functions = [dot, attnlib.additive_attention, attnlib.attention, attnlib.init_multi_head_attention]
    functions += [attnlib.multi_head_attention]
    functions += [f for layer in (MHA, attnlib.AdditiveAttention, attnlib.DotProductAttention)
                  for f in (layer, layer.__call__)]  # fmt: skip
    functions += [attnlib.nnx.MultiHeadAttention, attnlib.nnx.MultiHeadAttention.__call__]
    return {name for function in functions for name in inspect.signature(function).parameters}


def test_what_is_to_be_written_exists():
    assert {ours for meant in SUGGESTIONS.values() for ours in meant} - {OMIT} <= own_words()


@pytest.mark.parametrize(
    "theirs",
    [jax.nn.dot_product_attention, nn.MultiHeadDotProductAttention, nn.MultiHeadDotProductAttention.__call__,
     nnx.MultiHeadAttention.__init__, nnx.MultiHeadAttention.__call__, nn.dot_product_attention],
    ids=lambda function: f"{function.__module__}.{function.__qualname__}",
)  # fmt: skip
def test_every_argument_of_jax_and_flax_is_known_or_answered(theirs):
    own = own_words() | {"module", "parent", "name", "self"}
    assert set(inspect.signature(theirs).parameters) - own <= set(SUGGESTIONS)


def test_every_argument_of_keras_is_known_or_answered():
    table = rows(read("docs/migration/keras.md"))
    theirs = {name for theirs, *_ in table for name in names_in(theirs) if re.fullmatch("[a-z_]+", name)}
    assert len(theirs) > 30
    assert theirs - own_words() <= set(SUGGESTIONS)


def test_signatures_stay_and_call_what_they_did():
    assert list(inspect.signature(dot).parameters)[:5] == ["query", "key", "value", "scale", "mask"]
    assert inspect.signature(dot).parameters["is_causal"].default is False
    assert list(inspect.signature(MHA).parameters)[:2] == ["num_heads", "key_dim"]
    assert "query_mask" in inspect.signature(MHA.__call__).parameters

    def takes_all(*args, **options):
        return args, options

    assert suggests_arguments(takes_all) is takes_all
