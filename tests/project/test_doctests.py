"""Every example in a docstring runs and prints what it says, and the public annotations hold while it does."""

import doctest
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from doctest_examples import MODULES, NEEDS

ROOT = Path(__file__).parents[2]
WITH_EXAMPLES = (
    "convert", "_api", "_attention_fn", "cache", "inspect", "layers", "linen", "masks", "modifiers", "nnx", "positions",
    "regularization",
    "scores",
)  # fmt: skip
PUBLIC = [f"attnlib.{name}" for name in WITH_EXAMPLES]


def test_public_functions_have_examples_that_are_found():
    """`test_examples_run_and_annotations_hold` would pass if doctest found nothing."""
    for name in (
        "_api",
        "layers._multi_head",
        "linen._multi_head",
        "nnx._multi_head",
        "scores._custom",
        "regularization",
    ):
        finder = doctest.DocTestFinder(exclude_empty=True)
        found = [test for test in finder.find(importlib.import_module(f"attnlib.{name}")) if test.examples]
        assert found, f"doctest finds no example in {name}"


def test_examples_run_and_annotations_hold():
    """In a process of their own, where jaxtyping and beartype, if it is there, check calls of the public modules."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("beartype"):
        command += [f"--jaxtyping-packages={','.join(PUBLIC)},beartype.beartype"]
    command += [str(ROOT / "tests/_support/doctest_examples.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    skipped = sum(importlib.util.find_spec(package) is None for package in NEEDS.values())
    assert f"{len(MODULES) - skipped} passed" in run.stdout
