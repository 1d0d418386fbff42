"""A name that goes warns where it is used, and works as long as it is there."""

import re
from pathlib import Path

import pytest

from attnlib._core.deprecation import deprecated


def test_a_call_warns_and_works():
    @deprecated("new(x)", removed_in="0.4")
    def old(x):
        """What it does."""
        return x + 1

    with pytest.warns(DeprecationWarning, match=re.escape("removed in 0.4. Write new(x).")) as found:
        assert old(1) == 2
    assert found[0].filename == __file__  # where the caller is, not the helper
    assert old.__doc__ == "What it does."


def test_the_policy_names_the_helper():
    assert "attnlib/_core/deprecation.py" in (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
