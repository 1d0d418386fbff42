"""Every notebook runs from top to bottom in a fresh kernel, and is committed as such a run left it."""

import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes; pictures in a repository are there for good

# These run by default, since each shows much that no other test runs: training, Keras' layers, a cache.
DEFAULT = {"quickstart.ipynb", "from_keras.ipynb", "decoding.ipynb"}

on_every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def test_there_are_notebooks():
    assert {path.name for path in NOTEBOOKS} > DEFAULT


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.name in DEFAULT else pytest.mark.slow) for path in NOTEBOOKS],
    ids=lambda path: path.name,
)
def test_runs_from_top_to_bottom(path, tmp_path):
    if path.name == "from_keras.ipynb":
        import keras_cases  # noqa: F401  it skips where Keras is missing or older than the one that both know
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    client.execute(env={**os.environ, "PYTHONPATH": search})  # raises at the first cell that does
    assert not written_to_stderr(notebook), "a reader would see warnings"


@on_every_notebook
def test_is_committed_as_a_run_left_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)
    assert not written_to_stderr(notebook)
    text = path.read_text(encoding="utf-8")
    assert len(text) <= LARGEST
    assert "Traceback" not in text
    assert not re.search(r"/(home|root|tmp|Users)/", text), f"{path.name} names a place on the machine that ran it"


def written_to_stderr(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
