"""What all tests share: their processes, random keys, dtype settings, and closeness to rounding."""

import gc
import os
import zlib

import cpu_seconds
import processes

os.environ.update(processes.environment())

import jax
import jax.numpy as jnp
import mlir_contexts
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# What JAX promotes silently, in the library or in a test, is an error. The environment does not say so: examples,
# notebooks and other programs that tests start would inherit it, and they promote as users do.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Thousands of tests raise errors, and JAX would cut each traceback, frame by frame.
jax.config.update("jax_traceback_filtering", "off")


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, metavar="N", help="draw N times as many examples in fuzz tests, anew")
    parser.addoption("--no-cache", action="store_true", help="compile anew what earlier runs compiled")
    parser.addoption("--max-cpu", type=float, metavar="S", help="fail if a test takes more than S seconds of CPU time")


def pytest_configure(config):
    gc.set_threshold(100_000)  # tracing makes many objects that live on: saves some percent of the time
    if processes.OWN != "measured":
        mlir_contexts.share()
    global _fuzz_times
    _fuzz_times = config.getoption("--fuzz")
    if config.getoption("--no-cache"):
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        jax.config.update("jax_enable_compilation_cache", False)
    config.pluginmanager.register(cpu_seconds.CpuSeconds(config))


@pytest.hookimpl(trylast=True)  # after -k, -m and --deselect
def pytest_collection_modifyitems(config, items):
    if processes.OWN is None and not config.getoption("--collect-only"):
        processes.gather(items)


def pytest_runtest_setup(item):
    if not isinstance(item, processes.Process) and processes.kind_of(item) != processes.OWN:
        pytest.fail(f"this process is of kind {processes.OWN}, the test needs {processes.kind_of(item)}", pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Says what was skipped in processes of their own, where pytest itself cannot see it."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "skipped inside" and report.when == "call":
                terminalreporter.line(f"SKIPPED inside {report.nodeid}: {text}")


_fuzz_times = None  # by default the same examples each time


def fuzz(examples):
    """Settings of a fuzz test; where it draws anew, a failure is printed with what reproduces it."""
    return settings(
        max_examples=examples * (_fuzz_times or 1),
        derandomize=_fuzz_times is None,
        database=None,
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def keys(request):
    """Random keys and numbers, the same ones each time a test runs, others for each test."""
    return Keys(zlib.crc32(request.node.nodeid.encode()))


# Resident bytes from which on a process forgets its programs: eight processes then fit into 16 GB. More does not pay: a
# second run of the suite took 324 s with about 2 GB, and 359 s with 4 GB.
MOST_MEMORY = 2e9


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees programs after a file of tests if the process is large: with those of all files it takes gigabytes.

    They are kept otherwise, since operations that tests share are programs too: each takes JAX some ms to make again.
    """
    yield
    if _is_large():
        jax.clear_caches()


def _is_large():
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY
    except OSError:  # not Linux
        return True


class Keys:
    """An endless supply of random keys, and of numbers.

    They are NumPy's, put on the device: JAX compiles a program for each shape that it draws, and for each one that
    `jnp.asarray` converts.
    """

    def __init__(self, seed):
        self._rng = np.random.default_rng(seed)

    def __iter__(self):
        return self

    def __next__(self):
        return jax.random.key(self._rng.integers(2**31))

    def normal(self, *shape, dtype="float32"):
        return jax.device_put(self._rng.normal(size=shape).astype(jnp.dtype(dtype)))

    def bools(self, *shape, rate=0.6):
        return jax.device_put(self._rng.random(shape) < rate)

    def integers(self, low, high, *shape):
        return jax.device_put(self._rng.integers(low, high, shape).astype(np.int32))

    def permutation(self, count):
        return self._rng.permutation(count)


def _allow_promotion():
    """Lets JAX promote ranks and dtypes, for code of other libraries that relies on it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


allow_promotion = pytest.fixture(_allow_promotion)  # in one test
allow_promotion_in_file = pytest.fixture(_allow_promotion, scope="module")


def x64(enabled=True):
    """A context in which float64 exists."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64

    return enable_x64(enabled)


def assert_close(actual, desired, *, length=1, eps=None, factor=16):
    """Asserts that two trees are equal but for rounding.

    The bound is `factor * eps * sqrt(length)` of the magnitude of the numbers that were added up, where `length` is
    how many were. That magnitude is the largest entry of the leaf, or a sixteenth of the largest of the tree, since a
    leaf may hold what is left when larger numbers cancel. `eps` is the leaf's, unless given. Infinities and NaN must
    be at the same places.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    pairs = list(zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True))
    whole = max((_largest(want) for _, want in pairs), default=0.0)
    for (path, got), want in pairs:
        name = jax.tree_util.keystr(path) or "array"
        assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
        assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
        unit = float(jnp.finfo(got.dtype).eps) if eps is None else eps
        bound = factor * unit * length**0.5 * max(_largest(want), whole / 16)
        got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=0, atol=bound + 1e-37, err_msg=name)


def _largest(array):
    array = np.abs(np.asarray(array).astype(np.float64))
    return float(np.max(array, initial=0.0, where=np.isfinite(array)))


def assert_finite(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.all(np.isfinite(np.asarray(leaf, np.float64))), f"{jax.tree_util.keystr(path)} is not finite: {leaf}"


def assert_zero(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.all(np.asarray(leaf) == 0), f"{jax.tree_util.keystr(path)} is not zero: {leaf}"


def assert_same(actual, desired):
    """Asserts that two trees are equal bit by bit (NaN being equal to NaN, and zero to minus zero)."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=jax.tree_util.keystr(path))
