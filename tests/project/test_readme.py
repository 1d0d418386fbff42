"""README is true: its two commands have the promised form, its Python runs, its tables name what exists."""

import contextlib
import io
import re
import tomllib

import documents
import pytest
from documents import ROOT, blocks, names_in, read, rows, section

from attnlib._engine import dispatch as _choose

README = read("README.md")


@pytest.fixture(scope="module")
def program():
    """(the names of README's program, what it prints)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = documents.run_python(README, "README")
    return names, printed.getvalue()


def test_python_blocks_run_in_order(program):
    assert "implementation:" in program[1]  # of `explain`, and warnings are errors


def test_it_is_short():
    assert len(README.splitlines()) <= 200


def test_every_fence_is_python_or_bash():
    assert {name for name, _ in documents.fences(README)} == {"python", "bash"}


@pytest.mark.parametrize("row", rows(section(README, "Features")), ids=lambda row: row[0])
def test_the_example_of_each_feature_runs(row, program):
    feature, example, more = row
    (code,) = names_in(example)
    assert eval(code.replace("\\|", "|"), program[0]) is not None, feature
    assert documents.links(more), "a feature leads to a page"


def test_the_sections_have_their_order():
    titles = re.findall(r"^## (.*)$", README, flags=re.MULTILINE)
    assert titles == ["Install", "Quick start", "Features", "Performance", "Limits", "Where to go on"]
    assert "`pip install attnlib`" in section(README, "Install")


@pytest.mark.parametrize(
    ("number", "extra", "job"), [(0, "demo", "-m attnlib.demo"), (1, "test", "-m pytest")], ids=["demo", "tests"]
)
def test_the_two_commands(number, extra, job):
    """Each of the first two bash blocks is one complete command: environment, installation, job."""
    (line,) = blocks(README, "bash")[number].splitlines()
    environment, installation, run = line.split(" && ")
    assert environment == "python3 -m venv .venv"
    assert installation == f'.venv/bin/pip install -e ".[{extra}]"'
    assert run.startswith(f".venv/bin/python {job}")
    assert extra in tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]


def test_continuous_integration_runs_the_second_command():
    assert 'fences("bash")[1]' in read(".ci/run")


def test_pictures_are_small_and_described():
    """A repository keeps every version of them for good."""
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert pictures
    for words, path in pictures:
        assert len(words) > 20 and (ROOT / path).stat().st_size < 100_000, path


def test_every_implementation_is_described():
    for name in _choose.NAMES:
        assert f"`{name}`" in section(README, "Limits"), name


@pytest.mark.parametrize("page", ["additive", "dot", "decode"])
def test_figures_are_those_of_the_performance_pages(page):
    """README repeats figures of the tables, and says where, when and how they were measured."""
    table = read(f"docs/performance/{page}.md")
    (entry,) = [entry for entry in section(README, "Performance").split("\n- ") if f"performance/{page}.md" in entry]
    numbers = re.findall(r"([\d.]+) (?:ms|MB|GB)\b", entry)
    assert len(numbers) >= 2
    for number in numbers:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", table), number
    assert f"`python tests/benchmarks/{page}.py`" in entry
    assert re.search(rf"\| command \| `python tests/benchmarks/{page}\.py[^`]*` \|", table)
    (date,) = re.findall(r"\| date \| (\d{4}-\d\d-\d\d) \|", table)
    assert date in section(README, "Performance")
