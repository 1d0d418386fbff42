"""Every example in a docstring, module by module; test_doctests.py runs this where annotations are checked too."""

import doctest
import importlib
import pkgutil
import sys

import pytest

import attnlib

MODULES = sorted(
    info.name for info in pkgutil.walk_packages(attnlib.__path__, "attnlib.") if not info.name.endswith("__main__")
)
# Examples that only some users can run.
NEEDS = {"attnlib.convert._equinox": "equinox", "attnlib.convert._keras": "h5py"}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: its examples cannot run")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0
