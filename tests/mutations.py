"""Puts small faults into the library, one at a time, and says which test notices each.

    python tests/mutations.py [--only NAME ...] [--jobs N] [--full] [--json FILE]

The faults are listed in faults.py. Each goes into a temporary copy of the checkout, where the tests run that are
expected to notice it; with --full, the whole suite runs where these notice nothing. First the same tests run on a copy
without a fault, where they must pass. The exit status is 1 unless every fault is noticed.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "attnlib"
# What is said of a fault in place of a test: none failed, no test was chosen, or the library does not even import.
SURVIVED, NO_TEST, BROKEN = "SURVIVED", "NO TEST CHOSEN", "NO WORKING PROGRAM"
# What pytest returns: all passed, some failed, or no test was chosen.
PASSED, FAILED, NONE_CHOSEN = 0, 1, 5
# A fault may keep a program from ending; that counts as noticed.
SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a fault."""

    fault: str
    file: str
    killed_by: str  # the first test that failed, or SURVIVED, NO_TEST, BROKEN
    message: str  # the error of that test
    seconds: float

    @property
    def noticed(self) -> bool:
        return self.killed_by not in (SURVIVED, NO_TEST, BROKEN)


def main() -> int:
    options = _options()
    faults = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    places = {fault.name: place(fault) for fault in faults}
    _check_without_fault([test for fault in faults for test in fault.tests])
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda fault: _with_fault(fault, places[fault.name], fault.tests), faults))
    missed = [fault for fault, outcome in zip(faults, outcomes, strict=True) if outcome.killed_by == SURVIVED]
    if missed and options.full:
        _check_without_fault([])
        found = {fault.name: _with_fault(fault, places[fault.name], []) for fault in missed}
        outcomes = [found.get(outcome.fault, outcome) for outcome in outcomes]
    _report(outcomes)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(not all(outcome.noticed for outcome in outcomes))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="these faults; default: all")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many faults to try at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file too")
    parser.add_argument("--full", action="store_true", help="run the whole suite where the expected tests all pass")
    return parser.parse_args()


def place(fault: Fault) -> Path:
    """The file of the library that holds the text of the fault, relative to the root; it must be there exactly once."""
    counts = {path: path.read_text(encoding="utf-8").count(fault.old) for path in (ROOT / PACKAGE).rglob("*.py")}
    found = [path for path, count in counts.items() if count]
    if sum(counts.values()) != 1:
        where = ", ".join(f"{counts[path]} in {path.relative_to(ROOT)}" for path in found) or "nowhere"
        raise SystemExit(f"{fault.name}: this text must be in {PACKAGE} exactly once, and is {where}:\n{fault.old}")
    return found[0].relative_to(ROOT)


def _check_without_fault(tests: Sequence[str]) -> None:
    """Stops the program unless the tests pass on the library as it is."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = _copied(Path(folder))
        imported = _run([sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"], copy).stdout.strip()
        if not Path(imported).is_relative_to(copy):
            raise SystemExit(f"the tests must import the copy in {copy}, and import {imported}.")
        status, output = _pytest(copy, tests)
    if status != PASSED:
        raise SystemExit(f"without a fault the tests must pass; pytest returned {status}:\n{output}")
    print(f"without a fault: {output.splitlines()[-1]} ({time.monotonic() - start:.0f} s in all)", flush=True)


def _with_fault(fault: Fault, file: Path, tests: Sequence[str]) -> Outcome:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = _copied(Path(folder))
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            status, output = _pytest(copy, tests, "-x")
        except subprocess.TimeoutExpired:
            status, output = FAILED, f"FAILED the tests do not end within {SECONDS} s"
    killed_by, message = _first_failure(status, output)
    outcome = Outcome(fault.name, str(file), killed_by, message, round(time.monotonic() - start, 1))
    print(f"{outcome.fault}: {outcome.killed_by}", flush=True)
    return outcome


def _first_failure(status: int, output: str) -> tuple[str, str]:
    """(the test that failed first, its error); in place of a test what else there is to say."""
    if status in (PASSED, NONE_CHOSEN):
        return {PASSED: SURVIVED, NONE_CHOSEN: NO_TEST}[status], ""
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - (.*))?$", output, re.MULTILINE)
    if status != FAILED or failed is None:  # an import failed, and no test began
        return BROKEN, output
    return failed[1], failed[2] or ""


def _copied(folder: Path) -> Path:
    """A copy of the checkout as it is now, changes that are not committed included."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # a file may be deleted and still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder.resolve()


def _pytest(copy: Path, tests: Sequence[str], *options: str) -> tuple[int, str]:
    """(what pytest returns, its output) for tests as `Fault` writes them down; none: the whole suite."""
    parts = [test.partition(" ") for test in tests]
    files = list(dict.fromkeys(str(found) for file, _, _ in parts for found in copy.glob(f"tests/*/{file}")))
    chosen = list(dict.fromkeys(f"({file} and ({words}))" if words else file for file, _, words in parts))
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", *options]
    done = _run([*command, *files, *(["-k", " or ".join(chosen)] if chosen else [])], copy)
    return done.returncode, done.stdout + done.stderr


def _run(command: Sequence[str], copy: Path) -> subprocess.CompletedProcess:
    """Runs a command in the copy, whose package every Python started there imports."""
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "500"}
    return subprocess.run(
        command, cwd=copy, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )


def _report(outcomes: Sequence[Outcome]) -> None:
    width = max(len(outcome.fault) for outcome in outcomes)
    print(f"\n{'fault':{width}}  seconds  killed by")
    for outcome in outcomes:
        print(f"{outcome.fault:{width}}  {outcome.seconds:7.1f}  {outcome.killed_by}")
    print(f"{sum(outcome.noticed for outcome in outcomes)} of {len(outcomes)} faults are noticed")


if __name__ == "__main__":
    sys.exit(main())
