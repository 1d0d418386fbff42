"""Every public kind of mask, score and modifier, and every option, has a row in a catalogue, which many tests read."""

import dataclasses
import inspect

import mask_catalogue
import modifier_catalogue
import option_catalogue
import pytest
import score_catalogue

from attnlib import masks, modifiers, scores
from attnlib._core.options import FIELDS

KINDS = {
    "mask": (masks, mask_catalogue.ABSTRACT, mask_catalogue.ROWS),
    "score": (scores, score_catalogue.ABSTRACT, score_catalogue.ROWS),
    "modifier": (modifiers, (), modifier_catalogue.ROWS),
}


@pytest.mark.parametrize("sort", KINDS)
def test_every_public_kind_has_a_row(sort):
    module, abstract, rows = KINDS[sort]
    public = [getattr(module, name) for name in module.__all__ if name not in abstract]
    kinds = [kind for kind in public if inspect.isclass(kind)]
    without = {kind.__name__ for kind in kinds} - {row.kind.__name__ for row in rows}
    assert not without, f"write a row for {without} in tests/_support/{sort}_catalogue.py"
    assert len(rows) == len(kinds), "a kind has two rows, or is not public"


@pytest.mark.parametrize("sort", KINDS)
def test_every_kind_is_tried(sort):
    """It has a call, examples and something that it refuses."""
    for row in KINDS[sort][2]:
        if sort == "mask":
            assert row.examples and row.all_cases(), row.kind
            assert row.refused_when_made or row.refused_in_calls or not dataclasses.fields(row.kind), row.kind
        else:
            assert row.refused, row.kind


def test_every_option_has_a_row():
    named = [name for row in option_catalogue.ROWS for name in row.names]
    assert sorted(named) == sorted(FIELDS), "write a row in tests/_support/option_catalogue.py"
