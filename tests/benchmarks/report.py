"""What a benchmark shares besides timing: options, facts of the machine, tables, targets, JSON, style of pictures."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import jax

# Above this load when a benchmark starts, something else runs. PyTorch's threads, which wait for each other, then take
# up to 20 times as long, the others up to twice.
IDLE_LOAD = 0.5
# Okabe and Ito's colours, which every kind of colour vision tells apart; the shapes say it once more.
COLORS = {"blue": "#0072B2", "vermillion": "#D55E00", "green": "#009E73", "grey": "#555555"}


def parser(description, *, seconds_help="no new round of a row after these", **defaults):
    """The options that all have; `defaults` of repeats and seconds."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("benchmark-results"), help="folder of the JSON and the pictures")
    made.add_argument("--repeats", type=int, default=defaults["repeats"], help="rounds over all contestants of a row")
    made.add_argument("--seconds", type=float, default=defaults["seconds"], help=seconds_help)
    made.add_argument("--quick", action="store_true", help="tiny sizes, one round: sees that it runs, measures nothing")
    return made


def parse(made):
    options = made.parse_args()
    if options.quick:
        options.repeats = 1
        print("--quick: the sizes are tiny and the times mean nothing")
    return options


def machine():
    """What a reader has to know about where the numbers come from."""
    packages = ["jax", "jaxlib", "flax", "keras", "tokamax", "torch", "numpy"]
    packages += [name for cuda in (12, 13) for name in (f"jax-cuda{cuda}-plugin", f"nvidia-cudnn-cu{cuda}")]
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
        "attnlib": _commit(),
    }
    if hasattr(os, "getloadavg"):
        facts["load at start"] = round(os.getloadavg()[0], 2)
    return facts


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "of an unknown commit"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio and what the project wants of it: at least `target`, or at most where `at_most`."""

    against: str
    value: float
    target: float | None = None
    at_most: bool = False

    @property
    def met(self):
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def cells(self):
        """The ratio, the target, whether met."""
        if self.target is None:
            return [f"{self.value:.2f}x", "", ""]
        return [f"{self.value:.2f}x", f"{'<=' if self.at_most else '>='} {self.target:g}x", "yes" if self.met else "NO"]

    def __str__(self):
        value, target, met = self.cells()
        return f"{self.against} {value}" + (f" ({target}: {met})" if target else "")


class Report:
    """Collects what is measured and writes it down after every row: an interrupted run keeps what it has."""

    def __init__(self, name, options):
        self.path = options.out / f"{name}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        facts = machine()
        for key, value in facts.items():
            text = ", ".join(map(" ".join, value.items())) if isinstance(value, dict) else value
            print(f"{key:14s} {text}")
        if facts.get("load at start", 0) > IDLE_LOAD:
            print("WARNING: something else is running on this machine; the ratios below mean little")
        shown = {name: value for name, value in vars(options).items() if name != "out"}
        self.data = {"program": name, "machine": facts, "options": shown}

    def add(self, section, row):
        """One more row of a section."""
        self.put(section, [*self.data.get(section, []), row])

    def put(self, section, value):
        self.data[section] = value
        self.path.write_text(json.dumps(self.data, indent=1, default=_plain) + "\n")

    def picture(self, figure, name):
        path = self.path.parent / name
        figure.savefig(path, dpi=150)
        print(f"picture: {path}")


def _plain(value):
    """Dataclasses as JSON; a ratio says whether it is met."""
    return dataclasses.asdict(value) | ({"met": value.met} if isinstance(value, Ratio) else {})


def milliseconds(times):
    """'fastest (median)', or a dash for a contestant that did not run."""
    if times is None:
        return "-"
    digits = 3 if times.best < 1e-3 else 2 if times.best < 1e-2 else 1 if times.best < 1 else 0
    return f"{times.best * 1e3:.{digits}f} ({times.median * 1e3:.{digits}f})"


def table(header, rows):
    """Lines of text: the first column to the left, the others to the right."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def verdict(ratios):
    """How many of the targets are met, and which are not; `ratios` are (row, Ratio)."""
    wanted = [(row, ratio) for row, ratio in ratios if ratio.target is not None]
    missed = [f"  missed: {row}: {ratio}" for row, ratio in wanted if not ratio.met]
    return "\n".join([f"targets met: {len(wanted) - len(missed)} of {len(wanted)}", *missed])


def pyplot():
    """matplotlib, drawing to files, in this project's style; None, said aloud, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
    return plt
