"""Every example in a docstring runs and prints what it says, and the public annotations hold while it does."""

import doctest
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnlib

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(attnlib.__path__, "attnlib.") if not info.name.endswith("__main__")
)
WITH_EXAMPLES = (
    "_convert", "attention", "attention_fn", "cache", "inspect", "layers", "linen", "masks", "modifiers", "positions",
    "regularization",
    "scores",
)  # fmt: skip
# Examples that only some users can run.
NEEDS = {"attnlib._convert.equinox": "equinox", "attnlib._convert.keras": "h5py"}
PUBLIC = [f"attnlib.{name}" for name in WITH_EXAMPLES]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def run_examples(name):
    """How many examples the module of this name has, and how many fail (doctest prints how)."""
    return doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: its examples cannot run")
    assert run_examples(name).failed == 0


def test_public_functions_have_examples_that_are_found():
    """`test_examples` would pass if doctest found nothing."""
    for name in ("attnlib.attention", "attnlib.layers", "attnlib.linen", "attnlib.scores", "attnlib.regularization"):
        finder = doctest.DocTestFinder(exclude_empty=True)
        found = [test for test in finder.find(importlib.import_module(name)) if test.examples]
        assert found, f"doctest finds no example in {name}"


def test_shape_annotations_hold_in_the_examples():
    """The examples again in a process where jaxtyping and beartype check the annotations of the public modules."""
    pytest.importorskip("beartype", reason="beartype is not installed: nothing checks annotations at run time")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"--jaxtyping-packages={','.join(PUBLIC)},beartype.beartype", f"{Path(__file__)}::test_examples"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    skipped = sum(importlib.util.find_spec(package) is None for package in NEEDS.values())
    assert f"{len(MODULES) - skipped} passed" in run.stdout
