"""The public surface: names exist and are documented, parameter by parameter, and the package is what it says."""

import dataclasses
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import attnlib
from attnlib import convert, masks, modifiers, plot, positions, scores

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SPACES = attnlib, convert, attnlib.inspect, masks, modifiers, positions, scores
NAMESPACES = {module.__name__.removeprefix("attnlib."): module for module in SPACES}
PUBLIC = {f"{space}.{name}": getattr(module, name) for space, module in NAMESPACES.items() for name in module.__all__}
FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
PICTURES = "attention_map", "attention_over_frames", "attention_over_image", "costs", "mask"
FUNCTIONS |= {f"plot.{name}": getattr(plot, name) for name in PICTURES}
CLASSES = {name: thing for name, thing in PUBLIC.items() if inspect.isclass(thing)}
MODULES = {name: thing for name, thing in CLASSES.items() if hasattr(thing, "apply")}
OPTIONAL = ("babel", "beartype", "equinox", "h5py", "keras", "matplotlib", "pytest", "safetensors", "sklearn", "tqdm")


def of_each(table):
    return pytest.mark.parametrize("name", sorted(table))


@pytest.mark.parametrize("space", sorted(NAMESPACES))
def test_public_names_are_sorted_and_unique(space):
    names = NAMESPACES[space].__all__
    assert list(names) == sorted(set(names))


def test_the_kinds_of_public_things_are_all_found():
    layers = {f"attnlib.{name}Attention" for name in ("Additive", "DotProduct", "MultiHead")}
    assert MODULES.keys() == layers | {f"attnlib.{name}PositionBias" for name in ("Bucketed", "Relative")}
    assert {"attnlib.attention", "attnlib.explain", "attnlib.multi_head_attention"} <= FUNCTIONS.keys()


@of_each(PUBLIC)
def test_everything_public_is_documented(name):
    own = vars(PUBLIC[name]).get("__doc__") if inspect.isclass(PUBLIC[name]) else PUBLIC[name].__doc__
    assert own
    assert not own.startswith(f"{PUBLIC[name].__name__.split('.')[-1]}("), "a dataclass's own docstring says nothing"


@of_each(FUNCTIONS | MODULES)
def test_functions_and_modules_have_an_example(name):
    doc = inspect.getdoc((FUNCTIONS | MODULES)[name])
    assert ">>> " in doc.split("Example:")[1]


@of_each(FUNCTIONS)
def test_every_parameter_of_a_function_is_documented(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    expected = {stars.get(parameter.kind, "") + parameter.name for parameter in parameters}
    assert documented(FUNCTIONS[name], "Args") == expected


@of_each(MODULES)
def test_every_field_of_a_module_is_documented(name):
    fields = {field.name for field in dataclasses.fields(MODULES[name])}
    assert documented(MODULES[name], "Attributes") == fields - {"parent", "name"}


@of_each(MODULES)
def test_every_argument_of_a_module_call_is_documented(name):
    call = MODULES[name].__call__
    expected = set(inspect.signature(call).parameters) - {"self"}
    reference = re.search(r"arguments and results as in `(\w+)`", call.__doc__)
    if reference:
        other = MODULES[f"attnlib.{reference[1]}"].__call__
        assert set(inspect.signature(other).parameters) - {"self"} == expected
    else:
        assert documented(call, "Args") == expected


@of_each({name: kind for name, kind in CLASSES.items() if dataclasses.is_dataclass(kind) and name not in MODULES})
def test_every_field_of_a_value_is_documented(name):
    doc = inspect.getdoc(CLASSES[name])
    fields = [field.name for field in dataclasses.fields(CLASSES[name])]
    if len(fields) == 1 and "Args:" not in doc:
        return  # one field, which the sentence is about
    assert documented(CLASSES[name], "Attributes" if "Attributes:" in doc else "Args") == set(fields)


def documented(thing, section):
    """The names that a section of a docstring describes: `a, b: what they are`, one entry an indented line."""
    doc = inspect.getdoc(thing)
    if f"{section}:\n" not in doc:
        return set()
    body = doc.split(f"{section}:\n")[1].split("\n\n")[0]
    indent = re.match(r" +", body)[0]
    entries = re.split(rf"\n(?={indent}\S)", body)
    return {name for entry in entries for name in re.split(r",\s+", re.split(r":\s", entry)[0].strip())}


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", attnlib.__version__)
    assert PROJECT["dynamic"] == ["version"], "the version is in attnlib/__init__.py alone"
    try:
        installed = importlib.metadata.version("attnlib")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("attnlib is imported from a folder, not installed")
    assert attnlib.__version__ == installed


def test_changelog_has_the_version_being_written():
    """Changes since the last release are under Unreleased, at the top."""
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    releases = [heading for heading in headings if heading != "Unreleased"]
    assert headings in (releases, ["Unreleased", *releases])
    assert (headings if "dev" in attnlib.__version__ else releases)[0] in ("Unreleased", attnlib.__version__)


def test_floors_can_be_pinned():
    """.ci/run turns each dependency into its oldest version by writing == for >=."""
    for dependency in PROJECT["dependencies"]:
        assert re.fullmatch(r"[a-z]+>=[\d.]+", dependency)


def test_annotations_reach_users():
    assert (Path(attnlib.__file__).parent / "py.typed").exists()


def test_importing_attnlib_imports_no_optional_package():
    code = f"import sys, attnlib; print([name for name in {OPTIONAL!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
