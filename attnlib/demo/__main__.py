"""The command line of the demo: ``python -m attnlib.demo [dates|digits] [--steps N] [--seed S] [--out DIR]``."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

# Modules and their names on PyPI.
PICTURE_AND_PROGRESS = {"matplotlib": "matplotlib", "tqdm": "tqdm"}
# For each task: a description, the default number of training steps, and the modules that only this task imports.
TASKS = {
    "dates": ("dates in many languages to ISO 8601, with additive attention", 800, {"babel": "Babel"}),
    "digits": ("handwritten digits, with attention along columns, rows and both", 1500, {"sklearn": "scikit-learn"}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo with command-line arguments (default: those of the process) and returns the exit status."""
    options = parse(arguments)
    _, default_steps, packages = TASKS[options.task]
    missing = missing_packages({**packages, **PICTURE_AND_PROGRESS})
    if missing:
        print(f'attnlib.demo needs {" and ".join(missing)}: pip install "attnlib[demo]"', file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # some terminals cannot print Greek letters
    options.out.mkdir(parents=True, exist_ok=True)
    task = importlib.import_module(f"attnlib.demo.{options.task}")
    task.run(steps=options.steps or default_steps, seed=options.seed, out=options.out)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options. A wrong option ends the process with argparse's message and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m attnlib.demo",
        description="Train a small model with attnlib on a real task and save a picture of its attention weights.",
        epilog="  ".join(f"{name}: {about} ({steps} steps)." for name, (about, steps, _) in TASKS.items()),
    )
    parser.add_argument("task", nargs="?", choices=tuple(TASKS), default="dates", help="default: %(default)s")
    parser.add_argument("--steps", type=_positive, metavar="N", help="training steps; default: depends on the task")
    seed = "random seed, which determines the result on one machine; default: 0"
    parser.add_argument("--seed", type=_not_negative, default=0, metavar="S", help=seed)
    parser.add_argument("--out", type=_folder, default=Path(), metavar="DIR", help="folder of the picture; default: .")
    return parser.parse_args(arguments)


def missing_packages(packages: dict[str, str]) -> list[str]:
    """Returns the PyPI names of the packages (module to PyPI name) that cannot be imported."""
    missing = []
    for module, name in packages.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(name)
    return missing


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def _folder(text: str) -> Path:
    folder = Path(text)
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, expected a folder")
    return folder


if __name__ == "__main__":
    sys.exit(main())
