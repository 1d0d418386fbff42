"""The processes that tests run in: JAX takes XLA's options, and how many devices there are, once, when it starts.

By default there is one CPU device, as there is for a user, and XLA optimises as little as it can, since nearly all of
a test's time goes into compiling. Tests that need another process say so with a mark, whose names are those of `KINDS`.
Pytest runs all tests of a kind in one process, since starting one takes seconds. The process is one item of the run.
"""

import importlib.metadata
import importlib.util
import mmap
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
# Measured on 9 tests: 58 CPU s as users compile, 35 with the first of these, 19 with the first two. With the third, the
# compilation of 6 gradients takes 1.9 CPU s instead of 2.6: XLA splits no program among compiler threads. Tests need no
# such threads, since they run in parallel.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
EIGHT = ("--xla_force_host_platform_device_count=8",)
KINDS = {"measured": (), "devices": (*QUICK, *EIGHT)}
OWN = os.environ.get("ATTNLIB_TEST_PROCESS")  # the kind of this process; None: the default


def environment():
    """What settles the kind of this process, and where compiled programs are kept, if set before JAX is imported.

    It is handed on: to workers, notebooks and programs that tests start.
    """
    flags = KINDS.get(OWN, QUICK)
    known = os.environ.get("ATTNLIB_KNOWN_FLAGS") or " ".join(filter(_known, (*QUICK, *EIGHT)))
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in (*QUICK, *EIGHT)]
    settings = dict(
        JAX_COMPILATION_CACHE_DIR=str(ROOT / ".cache/jax" / importlib.metadata.version("jaxlib")),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    return {
        **{name: os.environ.get(name, value) for name, value in settings.items()},
        "ATTNLIB_KNOWN_FLAGS": known,
        "XLA_FLAGS": " ".join([*others, *(flag for flag in flags if flag in known.split())]),
    }


def _known(flag):
    """Whether this XLA knows a flag; it ends the process where it does not, so its library is searched for the name."""
    name = flag.lstrip("-").partition("=")[0].encode() + b"\0"
    package = Path(importlib.util.find_spec("jaxlib").origin).parent
    for path in sorted(package.glob("*.so"), key=lambda path: -path.stat().st_size):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
            if library.find(name) >= 0:
                return True
    return False


def kind_of(item):
    return next((kind for kind in KINDS if item.get_closest_marker(kind)), None)


def gather(items):
    """Puts those that need another process into one item for each kind, and these first, since they take longest."""
    apart = defaultdict(list)
    for item in items:
        if kind_of(item):
            apart[kind_of(item)].append(item)
    starts = [
        Process.from_parent(
            those[0].getparent(pytest.File),
            name=f"{kind} ({len(those)} tests)",
            kind=kind,
            ids=[item.nodeid for item in those],
        )
        for kind, those in apart.items()
    ]
    items[:] = [*starts, *(item for item in items if not kind_of(item))]


class Process(pytest.Item):
    """Tests in a process of their own."""

    def __init__(self, *, kind, ids, **kwargs):
        super().__init__(**kwargs)
        self.kind, self.ids = kind, ids

    def runtest(self):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            options = ["-q", "-m", "", "-p", "no:cacheprovider", f"--junitxml={report}"]
            for name in ("--fuzz", "--max-cpu"):
                if value := self.config.getoption(name):
                    options.append(f"{name}={value}")
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *self.ids],
                cwd=self.config.rootpath,
                env={**os.environ, "ATTNLIB_TEST_PROCESS": self.kind},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                pytest.fail(f"in a process of kind {self.kind!r}:\n{done.stdout}", pytrace=False)
            cases = list(ElementTree.parse(report).iter("testcase"))
        assert len(cases) == len(self.ids), f"{len(cases)} of {len(self.ids)} tests ran:\n{done.stdout}"
        skips = [skip for case in cases for skip in case.iter("skipped")]
        skipped = [skip.get("message") for skip in skips if "xfail" not in skip.get("type")]
        if skipped:
            reasons = "; ".join(sorted(set(skipped)))
            self.user_properties.append(("skipped inside", f"{len(skipped)} of {len(cases)}: {reasons}"))
        if len(skipped) == len(cases):
            pytest.skip(reasons)

    def reportinfo(self):
        return self.path, None, self.name
