"""README is true: its two commands have the promised form, its Python runs, its tables name what exists."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import attnlib
from attnlib._engine import dispatch as _choose

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
KERAS_LAYERS = ("AdditiveAttention", "Attention", "MultiHeadAttention", "GroupQueryAttention")
MODULES = (attnlib.AdditiveAttention, attnlib.DotProductAttention, attnlib.MultiHeadAttention)


def blocks(language):
    return [text for name, text in FENCES if name == language]


def section(title):
    """The text below a heading of the second level."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_python_blocks_run_in_order(capsys):
    namespace = {}
    for number, text in enumerate(blocks("python")):
        exec(compile(text, f"README python block {number}", "exec"), namespace)
    assert "implementation:" in capsys.readouterr().out  # of `explain`, and warnings are errors


def test_every_fence_is_python_or_bash():
    assert {name for name, _ in FENCES} == {"python", "bash"}


@pytest.mark.parametrize(
    ("number", "extra", "job"), [(0, "demo", "-m attnlib.demo"), (1, "test", "-m pytest")], ids=["demo", "tests"]
)
def test_the_two_commands(number, extra, job):
    """Each of the first two bash blocks is one complete command: environment, installation, job."""
    (line,) = blocks("bash")[number].splitlines()
    environment, installation, run = line.split(" && ")
    assert environment == "python3 -m venv .venv"
    assert installation == f'.venv/bin/pip install -e ".[{extra}]"'
    assert run.startswith(f".venv/bin/python {job}")
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_continuous_integration_runs_the_second_command():
    assert 'fences("bash")[1]' in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_pictures_are_small_and_described():
    """A repository keeps every version of them for good."""
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert pictures
    for words, path in pictures:
        assert len(words) > 20 and (ROOT / path).stat().st_size < 100_000, path


def test_every_implementation_is_described():
    for name in _choose.NAMES:
        assert f"`{name}`" in section("Limits"), name


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "pyproject.toml", ".ci/run"])
def test_no_place_on_a_machine_is_named(name):
    assert not re.search(r"(?<![\w.])/(home|root|tmp|opt|work|Users)/", (ROOT / name).read_text(encoding="utf-8"))


# The tables for Keras users


def rows():
    """(names in the Keras column, names in attnlib's column) of each row of the tables."""
    lines = [line for line in section("Coming from Keras").splitlines() if line.startswith("| `")]
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:3]] for line in lines]
    return [(theirs, ours) for theirs, ours in cells]


def keras_arguments():
    """Every constructor and call argument of the four Keras layers, and the layers themselves."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="Keras is not installed: no arguments to look for")
    arguments = set(KERAS_LAYERS)
    for name in KERAS_LAYERS:
        layer = getattr(keras.layers, name)
        for function in (layer.__init__, layer.call):
            arguments |= inspect.signature(function).parameters.keys()
    return arguments - {"self", "args", "kwargs"}


def test_tables_have_every_keras_argument():
    listed = {name for theirs, _ in rows() for name in theirs}
    assert keras_arguments() <= listed


def test_tables_name_what_exists_here():
    known = {f"attnlib.{name}" for name in attnlib.__all__} | set(attnlib.__all__)
    for module in MODULES:
        known |= inspect.signature(module).parameters.keys() | inspect.signature(module.__call__).parameters.keys()
    for theirs, ours in rows():
        assert ours, theirs
        assert set(ours) <= known, theirs


def test_the_reference_renders(tmp_path):
    """README's command, with -o in place of a browser: a section for every public name."""
    (line,) = [line for text in blocks("bash") for line in text.splitlines() if "pdoc" in line]
    _, arguments = line.split(" && .venv/bin/pdoc ")
    command = [sys.executable, "-m", "pdoc", *arguments.split(), "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    page = (tmp_path / "attnlib.html").read_text(encoding="utf-8")
    modules = [name for name in attnlib.__all__ if inspect.ismodule(getattr(attnlib, name))]
    for name in [*modules, "plot"]:
        assert (tmp_path / "attnlib" / f"{name}.html").exists(), name
    for name in set(attnlib.__all__) - set(modules):
        assert f'<section id="{name}">' in page, name
