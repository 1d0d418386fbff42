"""The rules of docs/architecture.md that a program can check: which file may import which, and how large it may be."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import attnlib

PACKAGE = Path(attnlib.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a file may import files of the lines above its own, never of its own line or below.
ROOMS = [
    {"_words"},
    {"_types", "_values", "_tiles", "_panels", "_dropout", "_online_softmax", "_linear", "_loops", "_hoist", "_held"},
    {"_ruled"},
    {"_axes", "_positions", "_additive", "_product", "_cost"},
    {"_mask", "_modifier", "positions"},
    {"_sparse_masks"},
    {"masks", "scores", "modifiers"},
    {"_problem", "_dimensions"},
    {"_sink"},
    {"_convert._shapes", "_convert._arrays"},
    {"_convert._fields"},
    {"_convert.equinox", "_convert.flax", "_convert.keras", "_convert.torch"},
    {"_convert.state_dict"},
    {"convert"},
    {"_impl._sizes", "_impl._borrowed", "_impl._cudnn_kernel"},
    {"_impl._tile"},
    {"_impl._side_by_side"},
    {"_impl.blockwise", "_impl.reference", "_impl.cudnn"},
    {"_checks", "_choose"},
    {"_operands"},
    {"_call", "_merge"},
    {"attention"},
    {"layers", "attention_fn", "cache", "inspect"},
    {"_linen_base", "_linen_bias", "plot", "regularization"},
    {"_linen_single"},
    {"linen"},
    {"__init__"},
    {"demo._dates_data", "demo._training"},  # a user of the public names
    {"demo.dates", "demo.digits"},
    {"demo.__main__"},
]
# Imported inside a function, when it is called: optional, or upwards on purpose.
LATE = {("_mask", "plot")}
OPTIONAL = {"matplotlib", "PIL", "babel", "sklearn", "tqdm", "keras", "torch", "tokamax", "nbformat"}
OPTIONAL |= {"equinox", "h5py", "safetensors"}  # what files and modules of other libraries need
REQUIRED = {"jax", "flax", "numpy", "optax", "jaxtyping"}


def room_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts)


def level(room):
    return next((n for n, rooms in enumerate(ROOMS) if room in rooms), None)


def imports(path):
    """(dotted name, whether at the top level of the file) of everything a file imports."""
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_for_type_checkers(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
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


def rooms_imported(path):
    known = set().union(*ROOMS)
    for name, early in imports(path):
        if name.split(".")[0] != "attnlib":
            continue
        inside = name.removeprefix("attnlib").removeprefix(".")
        candidates = [inside, inside.rpartition(".")[0]]
        room = next((candidate for candidate in candidates if candidate in known), "__init__")
        yield room, early


@pytest.mark.parametrize("path", FILES, ids=room_of)
def test_imports_point_one_way(path):
    room = room_of(path)
    if path.name == "__init__.py" and room != "__init__":
        assert not list(rooms_imported(path))
        return
    assert level(room) is not None, f"{room} is new: give it a line in ROOMS, here, and in docs/architecture.md"
    for other, early in rooms_imported(path):
        if early:
            assert level(other) < level(room), f"{room} may not import {other}: imports point one way (ROOMS)"
        else:
            assert (room, other) in LATE, f"{room} imports {other} inside a function"


def test_the_order_names_files_that_exist():
    existing = {room_of(path) for path in FILES}
    assert set().union(*ROOMS) <= existing
    assert sum(map(len, ROOMS)) == len(set().union(*ROOMS))


def test_implementations_never_import_each_other():
    implementations = {room for rooms in ROOMS for room in rooms if room.startswith("_impl.") and "._" not in room}
    assert len(implementations) >= 2
    for room in implementations:
        path = PACKAGE.joinpath(*room.split(".")).with_suffix(".py")
        assert not implementations & {other for other, _ in rooms_imported(path)}


@pytest.mark.parametrize("path", FILES, ids=room_of)
def test_what_is_imported_from_outside(path):
    for name, early in imports(path):
        top = name.split(".")[0]
        assert not name.startswith("jax._src"), f"{path}: {name} is private to jax"
        if early and not room_of(path).startswith("demo"):
            assert top not in OPTIONAL, f"{path}: {top} is optional, and is imported where it is used"
        assert top in REQUIRED | OPTIONAL | {"attnlib"} | set(sys.stdlib_module_names), f"{path}: {top} is not declared"


@pytest.mark.parametrize("path", FILES, ids=room_of)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 400, "a file over 400 lines is asking to be two rooms"


def test_init_holds_public_names_and_nothing_else():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}
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
        loaded = [name for name in {sorted(OPTIONAL)} if name in sys.modules]
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
        public = ["attention", "cache", "inspect", "masks", "positions", "scores", "layers", "linen", "regularization"]
        with install_import_hook([f"attnlib.{name}" for name in public], "beartype.beartype"):
            import attnlib
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
        attnlib.AdditiveAttention().init_with_output(jax.random.key(0), query[:, :, 0], key[:, :, 0])

        try:
            attnlib.dot_product_attention(query, key, key[..., 0, :].astype(int))
        except Exception as error:
            assert "Type-check" in str(error), error
            print("refused")
        """)
    assert out.split() == ["refused"]
