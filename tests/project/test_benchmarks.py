"""The programs in tests/benchmarks run, notice what is wrong, and write down what they found."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import attnlib

pytest.importorskip("tqdm", reason="the benchmarks need tqdm of the extra attnlib[demo]")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def run(tmp_path):
    """Runs a program as a user does; gives what it printed and its JSON."""

    def run(name, *arguments, **environment):
        paths = os.pathsep.join([str(Path(attnlib.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, BENCHMARKS / f"{name}.py", *arguments, "--out", tmp_path / "results"],
            capture_output=True, text=True, timeout=600, check=False,
            env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((tmp_path / "results" / f"{name}.json").read_text())

    return run


@pytest.mark.parametrize(
    ("calls", "rows"),
    [(["dot"], 4), pytest.param([], 30, marks=pytest.mark.slow)],
    ids=["dot", "all"],
)
def test_first_calls(calls, rows, run, tmp_path):
    """Numbers of each step, of a compilation that nothing spares."""
    only = ["--only", *calls] if calls else ["--quick"]
    printed, data = run("compile", *only, "--repeats", "1", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    assert "measures first calls" in printed and "HLO instructions" in printed
    assert not list(tmp_path.glob("cache/*"))
    assert len(data["first calls"]) == rows
    for row in data["first calls"]:
        baseline = {"jax.nn", "jax.nn's dot"} & set(row["calls"])
        assert "attnlib" in row["calls"] and len(baseline) == 1
        for name, made in row["calls"].items():
            assert set(made) == {"trace", "lower", "compile", "instructions", "programs"}
            assert all(value > 0 for value in made.values()), (row["row"], name)
            assert f"{row['row']}: {name} " in printed
        assert row["ratios"]["attnlib"]["instructions"]["value"] > 0
        assert row["ratios"].keys() == row["calls"].keys() - baseline
        assert all(f"without {name}: {reason}" in printed for name, reason in row["refused"].items())


@pytest.mark.parametrize(
    "checks",
    [["dot", "grouped heads, causal", "additive"], pytest.param([], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_checks_of_a_device_without_one(checks, run):
    printed, data = run("device", *(["--checks", *checks] if checks else []))
    assert "there is no GPU here" in printed and "refused by cudnn: there is no GPU" in printed
    found = data["checks passed"]
    assert found["failed"] == [] and found["cudnn"] == 0
    # Each call in two variants, and two of them in the default precision too; one is what the others are compared with.
    calls = len({row["row"].partition(" (")[0] for row in data["checks"]})
    assert calls == (len(checks) or 15)
    assert (found["blockwise"], found["reference"]) == (2 * calls + 2, calls + 2)
    assert f"checks passed: {found['passed']} of {found['passed']}" in printed
    (row,) = data["times"]
    assert row["times"].keys() == {"attnlib", "XLA"} and row["refused"].keys() == {"cuDNN"}
    assert row["compiled_peak_bytes"]["attnlib"] > 3 * 32 * 8 * 128 * 4
    assert "left out: 0 rows" in printed and data["machine"]["date"] and data["machine"]["versions"]["jax"]


def test_training_steps_of_modules(run):
    """NNX and linen compute the same loss."""
    printed, data = run("modules", "--quick")
    assert "targets met" in printed
    assert all(row["times"].keys() == {"NNX", "linen"} and not row["refused"] for row in data["training"])


@pytest.mark.slow
def test_steps_of_caches(run):
    """Pages and truncated caches compute what a KVCache does."""
    printed, data = run("caches", "--quick")
    assert "time divided by that of a KVCache" in printed
    assert all(len(row["times"]) == 6 and not row["refused"] for row in data["caches"])


@pytest.fixture
def device(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("device")
    monkeypatch.setattr(module, "STARTED", time.perf_counter())
    monkeypatch.setattr(module, "ON_GPU", False)
    monkeypatch.setattr(module, "SMALL", True)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["device.py", "--out", str(tmp_path), *arguments])
        module.main()

    module.start = start
    return module


@pytest.mark.parametrize("wrong", [3e-5, np.nan])
def test_a_wrong_number_fails(wrong, device, monkeypatch, capsys):
    """In one variant, gradient and implementation; so does what raises."""

    def numbers(check, variant, implementation):
        if implementation == "blockwise" and variant.dtype == "bfloat16":
            raise ZeroDivisionError("as it happens")
        off = wrong if (implementation, variant) == ("blockwise", device.EXACT) else 1e-5
        return dict(output=np.ones(9), query=np.ones(9) * (1 if implementation == "reference" else 1 + off))

    monkeypatch.setattr(device, "numbers", numbers)
    monkeypatch.setattr(device, "times", lambda report, options: [])
    with pytest.raises(SystemExit) as stopped:
        device.start("--checks", "dot")
    assert stopped.value.code.splitlines() == [
        "failed:",
        f"dot (float32, highest), blockwise: FAILED {wrong:.1e}",
        "dot (bfloat16), blockwise: raises ZeroDivisionError: as it happens",
    ]
    assert "checks passed: 3 of 5" in capsys.readouterr().out


def test_a_lack_of_memory_is_reported_and_other_errors_fail(device, monkeypatch, capsys):
    """The other contestants and rows are timed."""

    def too_large(*operands):
        return jnp.zeros((2**50,), jnp.int8)

    def contestants(row):
        first = too_large if row.kind == "forward" else lambda *operands: 1 / 0
        return {"attnlib": first, "XLA": lambda x: x + 1}, [np.ones(3, np.float32)], None

    rows = [device.Row("dot", 32, "float32", kind) for kind in ("forward", "training")]
    monkeypatch.setattr(device, "SMALL", False)
    monkeypatch.setattr(device, "ROWS", rows)
    monkeypatch.setattr(device.Row, "contestants", contestants)
    with pytest.raises(SystemExit) as stopped:
        device.start("--checks", "--repeats", "1")
    (failure,) = stopped.value.code.splitlines()[1:]
    assert "training, attnlib: raises ZeroDivisionError" in failure
    done = json.loads(Path(sys.argv[2], "device.json").read_text())["times"]
    assert done[0]["refused"]["attnlib"].startswith("out of memory: RESOURCE_EXHAUSTED")
    assert [list(row["times"]) for row in done] == [["XLA"], ["XLA"]]


def test_rows_after_the_time_are_named(device, capsys):
    with pytest.raises(SystemExit) as stopped:
        device.start("--checks", "sink", "--seconds", "0")
    assert stopped.value.code == 0
    left_out = ["check sink (float32, highest)", "check sink (bfloat16)", f"times {device.TINY}"]
    assert "\n".join(["left out: 3 rows", *(f"  {name}" for name in left_out)]) in capsys.readouterr().out
