"""The documentation is true: its Python runs, its links lead somewhere, its tables name what exists, and it builds."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec

import documents
import jax
import pytest
from documents import PAGES, ROOT, anchors, blocks, fences, links, names_in, read, rows

import attnlib
from attnlib import implementations, plot

DOCUMENTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
PROGRAMS = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
NEEDS = {"migration/keras.md": "keras"}  # what the program of a page needs that not every user has
MODULES = (
    attnlib.AdditiveAttention, attnlib.DotProductAttention, attnlib.MultiHeadAttention, attnlib.nnx.MultiHeadAttention
)  # fmt: skip


def name_of(path):
    return str(path.relative_to(ROOT)).removeprefix("docs/")


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


# Programs


@each(PROGRAMS)
@pytest.mark.usefixtures("allow_promotion")  # as for those who read it
def test_the_python_of_a_page_runs(path):
    """In order, as one program; warnings are errors."""
    package = NEEDS.get(name_of(path))
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    documents.run_python(path.read_text(encoding="utf-8"), name_of(path))


def test_there_are_programs():
    """Every page that shows how to use attnlib has one."""
    for folder in ("concepts", "extending", "guides", "migration"):
        for page in (ROOT / "docs" / folder).glob("*.md"):
            assert page in PROGRAMS, name_of(page)


@pytest.mark.devices
@pytest.mark.parametrize("page", ["guides/sharding.md", "guides/context-parallelism.md"])
def test_the_pages_of_sharding_run_on_eight_devices(page):
    assert jax.device_count() == 8
    documents.run_python(read(f"docs/{page}"), page)


@each(DOCUMENTS)
def test_fences_are_of_a_known_kind(path):
    assert {language for language, _ in fences(path.read_text(encoding="utf-8"))} <= {"python", "bash", "text"}


# Links and names


@each(DOCUMENTS)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in links(text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), target
        if not anchor:
            continue
        if anchor.startswith("attnlib."):  # what mkdocstrings makes
            assert anchor in described(other.read_text(encoding="utf-8")), target
        else:
            assert anchor in anchors(other.read_text(encoding="utf-8")), target


def described(page):
    """The public names that a page of the reference describes."""
    names = set(re.findall(r"^::: ([\w.]+)$|^\[\]\(\)\{#([\w.]+)\}$", page, flags=re.MULTILINE))
    return {name for pair in names for name in pair if name}


@each(PAGES)
def test_code_in_the_text_names_what_exists(path):
    text = documents.without_fences(path.read_text(encoding="utf-8"))
    for name in re.findall(r"`(attnlib(?:\.\w+)+)", text):
        thing = attnlib
        for part in name.split(".")[1:]:
            assert hasattr(thing, part) or find_spec(f"{thing.__name__}.{part}"), name
            thing = getattr(thing, part, None) or __import__(f"{thing.__name__}.{part}", fromlist=["*"])


@each([path for path in DOCUMENTS if path.name != "CHANGELOG.md"])  # which tells of files that may be gone
def test_files_in_the_text_exist(path):
    for name in re.findall(r"(?<![\w/.])(?:tests|docs|notebooks)/[\w./-]*\w", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml", "pyproject.toml", ".ci/run",
             ".pre-commit-config.yaml", ".github/workflows/ci.yml", *(f"docs/{name_of(page)}" for page in PAGES)]
)  # fmt: skip
def test_no_place_on_a_machine_is_named(name):
    assert not re.search(r"(?<![\w.])/(home|root|tmp|opt|work|Users)/", read(name))


def test_the_citation_is_of_the_last_release():
    (version,) = re.findall(r"^version: (.+)$", read("CITATION.cff"), flags=re.MULTILINE)
    (date,) = re.findall(r"^date-released: (.+)$", read("CITATION.cff"), flags=re.MULTILINE)
    releases = re.findall(r"^## \[(\d[^\]]*)\] - (.+)$", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert releases[0] == (version, date)


def test_the_workflow_runs_all_that_has_to_pass():
    assert re.search(r"run: \.ci/run$", read(".github/workflows/ci.yml"), flags=re.MULTILINE)
    assert "mkdocs build --strict" in read(".ci/run") and "--quiet" not in re.search(r".*mkdocs.*", read(".ci/run"))[0]


def test_the_contract_has_ten_lines():
    lines = re.findall(r"^(\d+)\. \*\*(.+?)\.\*\*", read("docs/concepts/contract.md"), flags=re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(1, 11))


def test_files_that_the_documents_name_exist():
    for path in DOCUMENTS:
        for name in re.findall(r"`((?:tests|attnlib|docs|notebooks)/[\w/.-]*\w)`", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), (path, name)


def test_the_trees_of_the_architecture_name_what_exists():
    trees = blocks(read("docs/architecture.md"), "text")
    assert [tree.splitlines()[0] for tree in trees] == ["attnlib/", "tests/"]
    for tree in trees:
        root, *lines = tree.splitlines()
        outer = root
        found = set()
        for line in lines:
            entry = re.match(r"(│   )?[├└]── (\S+)", line)
            if entry is None:
                continue
            inside, name = entry.groups()
            outer = outer if inside else name
            path = f"{root}{outer}{name if inside else ''}"
            assert (ROOT / path).exists(), path
            found.add(path)
        for path in (ROOT / root).iterdir():
            if not path.name.startswith("__") or path.name == "__init__.py":
                assert f"{root}{path.name}{'/' * path.is_dir()}" in found | {f"{root}py.typed"}, path


def test_commands_name_extras_that_exist():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for path in DOCUMENTS:
        for block in blocks(path.read_text(encoding="utf-8"), "bash"):
            assert set(re.findall(r'-e "\.\[(\w+)\]"', block)) <= extras.keys(), path


# The tables of migration


def arguments_of(*functions):
    """Every argument of some functions of another library."""
    found = {name for function in functions for name in inspect.signature(function).parameters}
    return found - {"self", "args", "kwargs", "parent", "name"}


def keras_arguments():
    """Every constructor and call argument of the four Keras layers, and the layers themselves."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="Keras is not installed: no arguments to look for")
    layers = ("AdditiveAttention", "Attention", "MultiHeadAttention", "GroupQueryAttention")
    kinds = [getattr(keras.layers, name) for name in layers]
    return {*layers, *arguments_of(*(function for kind in kinds for function in (kind.__init__, kind.call)))}


def flax_arguments():
    from flax import linen as nn
    from flax import nnx

    layers = (nn.MultiHeadDotProductAttention, nnx.MultiHeadAttention)
    return arguments_of(*(function for layer in layers for function in (layer.__init__, layer.__call__)))


def jax_arguments():
    return arguments_of(jax.nn.dot_product_attention)


def torch_arguments():
    """Those of PyTorch 2.13, read off its documentation: it need not be installed."""
    function = "query key value attn_mask dropout_p is_causal scale enable_gqa"
    layer = "embed_dim num_heads dropout bias add_bias_kv add_zero_attn kdim vdim batch_first device dtype"
    call = "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal"
    flex = "query key value block_mask scale enable_gqa return_lse kernel_options return_aux"
    return {*function.split(), *layer.split(), *call.split(), *flex.split()}


@pytest.mark.parametrize(
    ("page", "arguments"),
    [("keras", keras_arguments), ("flax", flax_arguments), ("jax-nn", jax_arguments), ("pytorch", torch_arguments)],
)
def test_tables_have_every_argument_of_the_other_library(page, arguments):
    listed = {name for theirs, *_ in rows(read(f"docs/migration/{page}.md")) for name in names_in(theirs)}
    assert arguments() <= listed


@pytest.mark.parametrize("page", ["keras", "flax", "jax-nn", "pytorch"])
def test_tables_name_what_exists_here(page):
    known = {f"attnlib.{name}" for name in attnlib.__all__} | set(attnlib.__all__)
    for function in (*MODULES, *(module.__call__ for module in MODULES), attnlib.dot_product_attention):
        known |= inspect.signature(function).parameters.keys()
    text = read(f"docs/migration/{page}.md").split("\n## FlexAttention")[0]
    assert rows(text)
    for theirs, ours, *note in rows(text):
        assert names_in(ours) or (page != "keras" and any(note)), f"{theirs}: neither a name nor a remark"
        assert set(names_in(ours)) <= known, theirs


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip('mkdocs is not installed: pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds(site):
    for page in PAGES:
        name = name_of(page).removesuffix(".md")
        assert (site / ("index.html" if name == "index" else f"{name}/index.html")).exists(), name


def test_the_reference_describes_every_public_name(site):
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").rglob("index.html"))
    modules = {name: getattr(attnlib, name) for name in attnlib.__all__ if inspect.ismodule(getattr(attnlib, name))}
    for name in set(attnlib.__all__) - modules.keys():
        assert f'id="attnlib.{name}"' in pages, name
    modules["implementations"] = implementations
    for module, names in {**{name: module.__all__ for name, module in modules.items()}, "plot": pictures()}.items():
        for name in names:
            assert f'id="attnlib.{module}.{name}"' in pages, f"{module}.{name}"


def pictures():
    functions = inspect.getmembers(plot, inspect.isfunction)
    return [name for name, thing in functions if thing.__module__ == plot.__name__ and not name.startswith("_")]


def test_the_reference_reads_docstrings(site):
    """Several arguments of one entry, an example as code, and stars of a shape as stars."""
    page = (site / "api" / "functions" / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "<code>mask</code>, <code>bias</code>, <code>is_causal</code>" in page  # the options are written in
    assert "{options}" not in page and "{names}" not in page
    assert "<code>query_positions</code>: ints <code>(*batch, length)</code>" in page
    assert "&gt;&gt;&gt; attnlib.dot_product_attention(query, key, value, is_causal=True).shape" in text
    assert "Args:" not in text
    assert "logits_soft_cap: float | None = None" in text and "Unpack" not in text  # signatures show options
    causal = re.sub(r"<[^>]+>", "", (site / "api" / "masks" / "index.html").read_text(encoding="utf-8"))
    assert "Key position &lt;= query position + offset" in causal


def test_nothing_is_fetched_from_elsewhere(site):
    """Pages work without a network."""
    loaded = re.compile(r'<(?:script|img)[^>]* src="([^"]+)"|<link[^>]* rel="stylesheet"[^>]* href="([^"]+)"')
    for page in site.rglob("*.html"):
        sources = ["".join(found) for found in loaded.findall(page.read_text(encoding="utf-8"))]
        sources += re.findall(r'<link[^>]* href="([^"]+)"[^>]* rel="stylesheet"', page.read_text(encoding="utf-8"))
        assert sources, page
        for source in sources:
            assert not source.startswith(("http:", "https:", "//")), (page, source)
