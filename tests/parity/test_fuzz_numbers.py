"""Random calls that are right, in numbers: each gives what the oracle gives, on every complete implementation.

Drawn as in test_fuzz.py; without dropout and explicit positions, of which the oracle knows nothing.
"""

import fuzzing_calls
import jax
import modifier_catalogue
import numpy as np
import oracle
import score_catalogue
from cases import BLOCK_SIZES, COMPLETE
from conftest import assert_close, fuzz
from fuzzing import define, few_and_many, numbers, wide
from hypothesis import given
from hypothesis import strategies as st

import attnlib

OPTIONS = ("score", "attention_axes", "mask", "bias", "is_causal", "logits_soft_cap", "score_mod", "sink", "normalize")


def concrete(tree, seed):
    """A tree with numbers in place of what was drawn to be traced."""
    return jax.tree.map(
        lambda x: numbers(seed, x.shape, x.dtype.name) if isinstance(x, jax.ShapeDtypeStruct) else x, tree
    )


def by_definition(query, key, value, *, sizes, mask=None, attention_axes=None, sink=None, **options):
    """(output, weights, lse) in float64."""
    options["score"] = score_catalogue.definition(options["score"])
    if options.get("score_mod") is not None:
        options["score_mod"] = modifier_catalogue.definition(options["score_mod"])
    if isinstance(mask, attnlib.masks.Mask):
        mask = define(mask, sizes)
    axes = None if attention_axes is None else [int(axis) for axis in np.atleast_1d(attention_axes)]
    output, weights, lse = oracle.attention(query, key, value, mask=mask, attention_axes=axes, **options)
    if sink is not None:  # one more key of that logit, whose value is 0
        sink = np.reshape(np.float64(sink), (-1, *[1] * len(sizes.query)))
        add_sink = np.logaddexp(lse, sink)
        kept = np.exp(lse - add_sink)
        weights = weights * kept.reshape(*kept.shape, *[1] * len(sizes.key))
        attended = (
            [axis % query.ndim for axis in axes] if axes else [0] if query.ndim == 3 else range(1, query.ndim - 2)
        )
        batch = len(sizes.batch)
        places = [axis for axis in range(query.ndim - 2) if axis not in attended]
        kept = np.moveaxis(kept, [*range(batch), batch, *range(batch + 1, kept.ndim)], [*places, -1, *attended])
        output, lse = output * kept[..., None], add_sink
    return output, weights, lse


@few_and_many(25, 100)
def test_right_calls_give_the_numbers_of_the_definition(examples):
    @fuzz(examples)
    @given(
        call=fuzzing_calls.calls(floats=("float32",), lengths=(3, 1, 2, 5, 0)),
        seed=st.integers(0, 99),
        blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    )
    def law(call, seed, blocks):
        check(call, seed, blocks)

    law()


def check(call, seed, blocks):
    """All implementations in one program."""
    arguments = concrete(call.arguments, seed)
    operands = [arguments[name] for name in ("query", "key", "value")]
    options = {name: arguments[name] for name in OPTIONS if name in arguments}

    @jax.jit
    def program(*operands):
        made = []
        for name in COMPLETE:
            how = dict(implementation=name, block_sizes=blocks if name in BLOCK_SIZES else None)
            made.append(attnlib.attention(*operands, **options, **how, return_weights=True, return_lse=True))
        return made

    with wide(arguments):
        every = program(*operands)
    expected = tuple(x.astype(np.float32) for x in by_definition(*operands, sizes=call.sizes, **options))
    for made in every:
        assert_close(made, expected, length=np.prod(call.sizes.key, dtype=int) + 8)
