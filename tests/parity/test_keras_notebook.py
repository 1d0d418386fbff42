"""`notebooks/from_keras.ipynb` leaves no argument of a Keras layer out, and names what exists in attnlib."""

import inspect
import json
import re
from pathlib import Path

import pytest
from keras_cases import keras

import attnlib

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "from_keras.ipynb"
MODULES = {
    "Attention": attnlib.DotProductAttention,
    "AdditiveAttention": attnlib.AdditiveAttention,
    "MultiHeadAttention": attnlib.MultiHeadAttention,
    "GroupQueryAttention": attnlib.MultiHeadAttention,
}
CALL_OF = {"AdditiveAttention": "Attention", "GroupQueryAttention": "MultiHeadAttention"}  # "those of ..., above"


def tables(layer):
    """(names in Keras' column, names in attnlib's) of each row: of the constructor, of the call."""
    cells = ("".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])
    (section,) = (text for text in cells if text.startswith(f"## {layer}\n"))
    found = {"constructor": [], "call": []}
    for line in section.splitlines():
        if heading := re.match(r"\| Keras' (\w+) ", line):
            rows = found[heading[1]]
        elif line.startswith("| "):
            rows.append([re.findall(r"`([\w.]+)[^`]*`", cell) for cell in line.split("|")[1:3]])
    return found


def arguments(function):
    return inspect.signature(function).parameters.keys() - {"self", "args", "kwargs"}


@pytest.mark.parametrize("layer", MODULES)
def test_tables_have_every_argument_of_the_layer(layer):
    theirs = getattr(keras.layers, layer)
    listed = {name for names, _ in tables(layer)["constructor"] for name in names}
    assert arguments(theirs.__init__) <= listed
    listed = {name for names, _ in tables(CALL_OF.get(layer, layer))["call"] for name in names}
    assert arguments(theirs.call) <= listed


@pytest.mark.parametrize("layer", MODULES)
def test_tables_name_what_exists_here(layer):
    module = MODULES[layer]
    known = {f"attnlib.{name}" for name in attnlib.__all__} | arguments(module) | arguments(module.__call__)
    for rows in tables(layer).values():
        for theirs, ours in rows:
            assert set(ours) <= known, theirs
