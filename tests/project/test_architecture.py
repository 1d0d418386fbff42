"""The rules of docs/architecture.md that a program can check: who imports whom, and how large a file may be."""

import ast
import graphlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import attnlib
from attnlib._engine.dispatch import IMPLEMENTATIONS

PACKAGE = Path(attnlib.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a package may import those of the lines above its own, never of its own line or below.
LEVELS = [
    {"_core"},  # what everything speaks: axes, positions, problems, checks, errors
    {"_autodiff"},  # operations with derivative rules of their own
    {"masks", "scores", "modifiers", "positions"},  # what to compute
    {"_engine"},  # how to compute it
    {"_api", "implementations"},  # the public functions
    {"layers", "cache", "inspect", "_attention_fn", "plot", "regularization"},
    {"_modules"},  # the calls of the modules, without what stores parameters
    {"linen", "nnx", "convert"},
    {"__init__"},
    {"demo"},  # a user of the public names
]
# Imported inside a function, when it is called: optional, or upwards on purpose.
LATE = {("masks", "plot")}
OPTIONAL = {"matplotlib", "PIL", "babel", "sklearn", "tqdm", "keras", "torch", "tokamax", "nbformat"}
OPTIONAL |= {"equinox", "h5py", "safetensors"}  # what files and modules of other libraries need
REQUIRED = {"jax", "flax", "numpy", "optax", "jaxtyping"}


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def package_of(module):
    return module.split(".")[0]


def level(package):
    return next((n for n, packages in enumerate(LEVELS) if package in packages), None)


def imports(path):
    """(dotted name, whether at the top level of the file) of everything a file imports."""
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    types_only = {id(inner) for node in ast.walk(tree) if is_for_type_checkers(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from attnlib import masks` may name a file, or something in one
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in late


def is_for_type_checkers(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


MODULES = {module_of(path): path for path in FILES}


def own_imports(path):
    """(module of the package, whether at the top level of the file) of what a file imports from the package."""
    for name, early in imports(path):
        if name.split(".")[0] == "attnlib":
            inside = name.removeprefix("attnlib").removeprefix(".")
            candidates = inside, inside.rpartition(".")[0]
            yield next((module for module in candidates if module in MODULES), "__init__"), early


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path):
    package = package_of(module_of(path))
    assert level(package) is not None, f"{package} is new: give it a line in LEVELS, and in docs/architecture.md"
    for other, early in own_imports(path):
        other = package_of(other)
        if other == package or (not early and (package, other) in LATE):
            continue
        assert early, f"{package} imports {other} inside a function"
        assert level(other) < level(package), f"{package} may not import {other}: imports point one way (LEVELS)"


def test_no_circles():
    """Inside a package neither; a package's `__init__`, which names what is public of it, is for those outside."""
    graph = {}
    for module, path in MODULES.items():
        found = {other for other, early in own_imports(path) if early}
        graph[module] = found - {module}
        for other in found:
            inside = other == package_of(module) and other in MODULES and MODULES[other].name == "__init__.py"
            assert not inside or module == other, f"{module} imports from its own package's __init__"
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_levels_name_what_exists():
    assert set().union(*LEVELS) == {package_of(module) for module in MODULES}
    assert sum(map(len, LEVELS)) == len(set().union(*LEVELS))


def test_implementations_never_import_each_other():
    """Each is the module that makes it, or the package where this is called `implementation`."""
    estimates = [getattr(each.estimate, "func", each.estimate) for each in IMPLEMENTATIONS]
    modules = {estimate.__module__.removeprefix("attnlib.") for estimate in estimates}
    implementations = {module.removesuffix(".implementation") for module in modules}
    assert len(implementations) == len(IMPLEMENTATIONS)
    for one in implementations:
        paths = [path for module, path in MODULES.items() if module == one or module.startswith(f"{one}.")]
        assert paths
        for other, _ in (pair for path in paths for pair in own_imports(path)):
            assert not any(other.startswith(name) for name in implementations if name != one), f"{one} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_what_is_imported_from_outside(path):
    for name, early in imports(path):
        top = name.split(".")[0]
        assert not name.startswith("jax._src"), f"{path}: {name} is private to jax"
        if early and not module_of(path).startswith("demo"):
            assert top not in OPTIONAL, f"{path}: {top} is optional, and is imported where it is used"
        assert top in REQUIRED | OPTIONAL | {"attnlib"} | set(sys.stdlib_module_names), f"{path}: {top} is not declared"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 400, "a file over 400 lines is usually two subjects"


def test_init_holds_public_names_and_nothing_else():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    # The only code is the import of `attnlib.nnx`, which waits until it is used, and which type checkers see.
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == ["__getattr__"]
    (condition,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(condition) == "if typing.TYPE_CHECKING:\n    from attnlib import nnx"
    rest = {type(node) for node in tree.body if node not in functions and node is not condition}
    assert rest <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}
    assert all(not name.startswith("_") for name in attnlib.__all__)


def in_a_new_process(program):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_is_quiet_and_light():
    """No warning, no output, and none of the packages that only some users have."""
    out = in_a_new_process(f"""
        import sys
        import attnlib
        loaded = [name for name in {[*sorted(OPTIONAL), "flax.nnx"]} if name in sys.modules]
        assert not loaded, loaded
        """)
    assert out == ""


def test_annotations_hold_at_run_time():
    """jaxtyping and beartype agree that valid calls are valid and that another is not."""
    pytest.importorskip("beartype", reason="beartype is not installed: nothing checks annotations at run time")
    out = in_a_new_process("""
        import warnings
        warnings.simplefilter("ignore")  # beartype's, about annotations of others
        from jaxtyping import install_import_hook
        public = ["_api", "cache", "inspect", "masks", "positions", "scores", "regularization"]
        public += ["layers", "linen", "nnx"]
        with install_import_hook([f"attnlib.{name}" for name in public], "beartype.beartype"):
            import attnlib, attnlib.nnx
        import jax, jax.numpy as jnp, numpy as np
        from attnlib import masks, scores

        query, key = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8))
        one = jnp.ones((1, 7, 2, 8))
        for mask in (masks.Causal(), masks.KeyPadding(np.ones((2, 7), bool)), np.ones((5, 7), bool),
                     jnp.ones((2, 1, 5, 7), bool), masks.Lengths(key=np.array([3, 4])) & masks.SlidingWindow(1, None),
                     masks.Neighborhood(3), masks.Segments(jnp.zeros((2, 5), int), jnp.zeros((2, 7), int), 0)):
            attnlib.dot_product_attention(query, key, key, mask=mask, attention_axes=[1])
        attnlib.dot_product_attention(query, one, key)  # batch axes broadcast
        attnlib.dot_product_attention(query, key, one, bias=np.ones((), np.float32), scale=0.5)
        attnlib.dot_product_attention(query, key, key, dropout_rate=0.5, dropout_rng=jax.random.key(0))
        attnlib.dot_product_attention(query, key, key, implementation=("reference",), precision="highest")
        attnlib.additive_attention(query, key, key, scale=jnp.ones(8), logits_soft_cap=2.0, return_lse=True)
        attnlib.attention(query, key[..., :3], key, score=scores.Bilinear(jnp.ones((8, 3))))
        attnlib.explain(jax.ShapeDtypeStruct(query.shape, query.dtype), key, key)
        parts = attnlib.dot_product_attention(query, key, key, return_lse=True)
        attnlib.merge_attention(*zip(parts, parts))
        jax.jit(jax.vmap(jax.grad(lambda q: attnlib.dot_product_attention(q, key, key).sum())))(query[None])
        params = attnlib.init_multi_head_attention(jax.random.key(0), 8, num_heads=2)
        attnlib.multi_head_attention(params, query[:, :, 0], key_mask=np.ones((2, 5), bool))
        layer = attnlib.MultiHeadAttention(num_heads=2, output_shape=(2, 3))
        layer.init_with_output(jax.random.key(0), query[:, :, 0], sow_weights=True)
        rngs = attnlib.nnx._base.nnx.Rngs(0)
        table = attnlib.nnx.RelativePositionBias((4,), 2, rngs=rngs)
        layer = attnlib.nnx.MultiHeadAttention(2, 8, score_mod=table, dropout_rate=0.5, rngs=rngs)
        layer(query[:, :, 0], deterministic=False, rngs=rngs), layer.init_cache([2, 5, 8])
        attnlib.AdditiveAttention().init_with_output(jax.random.key(0), query[:, :, 0], key[:, :, 0])

        try:
            attnlib.dot_product_attention(query, key, key[..., 0, :].astype(int))
        except Exception as error:
            assert "Type-check" in str(error), error
            print("refused")
        """)
    assert out.split() == ["refused"]
