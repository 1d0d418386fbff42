"""Every public name of 0.1.0 is where it was, with the arguments that it had, in their order."""

import importlib
import importlib.util
import inspect
import operator
from pathlib import Path

import pytest

import attnlib

# name: its parameters, those that are given by name alone behind a star; longer lines go on further in.
TABLE = Path(__file__).with_name("public_names.txt").read_text().replace("\n    ", " ").splitlines()
NAMES = {name: parameters.split() for name, _, parameters in (line.partition(":") for line in TABLE)}


def found(name):
    for module in ("layers", "linen", "nnx", "cache", "plot", "regularization"):
        importlib.import_module(f"attnlib.{module}")
    return operator.attrgetter(name)(attnlib)


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_what_it_took(name):
    parameters = inspect.signature(found(name)).parameters.values()
    now = [("*" if p.kind is p.KEYWORD_ONLY else "") + p.name for p in parameters]
    old = NAMES[name]
    by_position = [parameter for parameter in old if not parameter.startswith("*")]
    assert now[: len(by_position)] == by_position
    assert {parameter.lstrip("*") for parameter in old} <= {parameter.lstrip("*") for parameter in now}
    new = [p for p in parameters if p.name not in {parameter.lstrip("*") for parameter in old}]
    assert all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in new)


def test_the_table_is_not_empty():
    assert len(NAMES) > 100


def test_no_module_hides_behind_a_function():
    """`import attnlib.attention` does not give a function: there is no such module."""
    for name in attnlib.__all__:
        if not inspect.ismodule(getattr(attnlib, name)):
            assert importlib.util.find_spec(f"attnlib.{name}") is None, name
