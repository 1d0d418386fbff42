"""Dot-product attention against the other libraries: python tests/benchmarks/dot.py

Needs `pip install -e ".[demo]"` at the root of the repository; to compare with them also `pip install torch tokamax`.
A peer that is not installed, or that cannot do what a row asks, is left out with its reason. Takes about half an hour,
less with `--only` and the names of some groups; let nothing else run meanwhile. Prints tables and writes dot.json and
dot.png into `--out`.

Contestants: jax.nn, Flax linen, tokamax (its chunked XLA implementation, the one with linear memory on CPU), all under
`jax.jit`, and PyTorch's scaled_dot_product_attention, eager as its users run it and in its own layout. Each row is
timed forward and as a training step: the sum of squares of the output with its gradients by query, key and value.
"""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
from overhead import overhead
from peers import DOT
from report import COLORS, Ratio, Report, milliseconds, parse, parser, pyplot, table, verdict
from timing import KINDS, contest
from tqdm import tqdm

import attnlib
from attnlib import masks

JAX_PEERS = ("jax.nn", "Flax", "tokamax")
# The largest difference of an output or gradient from ours. Flax rounds after every step: in float16, where PyTorch's
# gradients are within 0.005 of ours, many of its small ones underflow and it differs by 0.015.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-2}
# Multiplications and additions a (head, query, key, feature): two products of matrices forward, seven in training.
FLOPS = {"forward": 4, "training": 14}


@dataclasses.dataclass(frozen=True)
class Row:
    batch: int
    queries: int
    keys: int
    heads: int = 8
    kv_heads: int = 8
    features: int = 64
    dtype: str = "float32"
    mask: str | None = None

    def __str__(self):
        length = f"{self.queries}" if self.queries == self.keys else f"({self.queries}, {self.keys})"
        unusual = [self.dtype] * (self.dtype != "float32") + [self.mask] * (self.mask is not None)
        unusual += [f"{self.heads}/{self.kv_heads} heads"] * (self.heads != self.kv_heads)
        unusual += [f"{self.features} features"] * (self.features != 64)
        return ", ".join([f"{self.batch} x {length}", *unusual])

    def smaller(self):
        """For --quick. With one key, gradients are zeros, of which no relative difference can be taken."""
        return dataclasses.replace(self, queries=-(-self.queries // 16), keys=max(2, self.keys // 16))

    def operands(self):
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads)]
        arrays = [
            jax.random.normal(key, (self.batch, *shape, self.features), self.dtype)
            for key, shape in zip(keys, shapes, strict=False)
        ]
        if self.mask == "lengths":
            arrays.append(self.keys - 1 - jnp.arange(self.batch) * (self.keys // 3))
        if self.mask == "dense":  # every tile is partial, and no row empty: of those, peers make different things
            kept = jax.random.bernoulli(keys[3], 0.8, (self.queries, self.keys))
            arrays.append(kept | jnp.eye(self.queries, self.keys, dtype=bool))
        return arrays

    def flops(self, kind):
        pairs = self.batch * self.heads * self.queries * self.keys / (2 if self.mask == "causal" else 1)
        return FLOPS[kind] * pairs * self.features

    def implementation(self, arrays):
        """What attnlib chooses."""
        extra = {"lengths": lambda: masks.Lengths(key=arrays[3]), "dense": lambda: arrays[3]}.get(self.mask)
        options = dict(mask=extra() if extra else None, is_causal=self.mask == "causal")
        return attnlib.explain(*arrays[:3], **options).implementation


def square(batch, length, **others):
    return Row(batch, length, length, **others)


GROUPS = {
    "full": [square(1, 2048), square(1, 4096)],
    "causal": [square(1, 2048, mask="causal"), square(1, 4096, mask="causal")],
    "batch": [square(4, 512)],
    "short": [square(32, 16), square(32, 64), square(8, 128), square(8, 256)],
    "half": [square(1, 2048, dtype="bfloat16"), square(1, 2048, dtype="float16")],
    "grouped": [square(1, 2048, kv_heads=2)],
    "features": [square(1, 1024, features=features) for features in (32, 128, 256)],
    "cross": [Row(1, 512, 4096), Row(1, 4096, 512)],
    "masks": [square(2, 2048, mask="lengths"), square(1, 2048, mask="dense")],
    "decode": [
        *[Row(1, 1, 4096), Row(8, 1, 4096), Row(1, 1, 32768)],
        *[Row(1, 1, 4096, kv_heads=2), Row(1, 1, 4096, mask="lengths"), Row(2, 1, 4096, mask="lengths")],
    ],
}
# What each group is to reach, forward and training, over PyTorch and over the fastest JAX peer; None: no target.
TORCH_TARGETS = {"full": (0.85, 0.85), "causal": (0.75, 0.7)}
JAX_TARGETS = {"full": (2.8, 2.8), "causal": (None, None), "batch": (2, 1.8), "short": (0.95, 0.95)}
OTHER_JAX_TARGETS = (0.9, 0.9)
# Short inputs are where the plain dense ones are at home: the target there is set against these two.
SHORT_PEERS = ("jax.nn", "Flax")


def ratios(group, kind, times):
    """The ratios of a row, {"PyTorch": Ratio, "JAX": Ratio}, as far as those ran."""
    ours, at, found = times["attnlib"].best, list(KINDS).index(kind), {}
    if "PyTorch" in times:
        target = TORCH_TARGETS.get(group, (None, None))[at]
        found["PyTorch"] = Ratio("PyTorch", times["PyTorch"].best / ours, target)
    peers = [name for name in (SHORT_PEERS if group == "short" else JAX_PEERS) if name in times]
    if peers:
        best = min(peers, key=lambda name: times[name].best)
        target = JAX_TARGETS.get(group, OTHER_JAX_TARGETS)[at]
        found["JAX"] = Ratio(best, times[best].best / ours, target)
    return found


def run_row(group, row, kind, options):
    """The row as it goes into the report."""
    arrays = row.operands()
    makers, refused = {}, {}
    for name, contestant in DOT.items():
        if not contestant.installed():
            continue
        if reason := contestant.unsupported(row):
            refused[name] = reason
        else:
            makers[name] = lambda contestant=contestant: contestant.program(row, arrays, kind)
    times, failed = contest(makers, options.repeats, options.seconds, TOLERANCES[row.dtype])
    gflops = {name: row.flops(kind) / t.best / 1e9 for name, t in times.items()}
    return dict(
        group=group, row=str(row), kind=kind, implementation=row.implementation(arrays), times=times, gflops=gflops,
        ratios=ratios(group, kind, times), refused=refused | failed,
    )  # fmt: skip


def line_of(done):
    cells = [f"{done['group']}: {done['row']}", done["kind"], done["implementation"]]
    cells += [milliseconds(done["times"].get(name)) for name in DOT]
    cells.append(f"{done['gflops']['attnlib']:.1f}")
    for name in ("PyTorch", "JAX"):
        ratio = done["ratios"].get(name)
        cells += ratio.cells() if ratio else ["-", "", ""]
    return [*cells, done["ratios"]["JAX"].against if "JAX" in done["ratios"] else "-"]


def speed(report, options):
    rows = [(group, row) for group in GROUPS if group in options.only for row in GROUPS[group]]
    done = []
    for (group, row), kind in tqdm(list(itertools.product(rows, KINDS)), desc="rows"):
        done.append(run_row(group, row.smaller() if options.quick else row, kind, options))
        report.add("speed", done[-1])
        found = ", ".join(map(str, done[-1]["ratios"].values()))
        tqdm.write(f"{group}, {done[-1]['row']}, {kind}: {milliseconds(done[-1]['times']['attnlib'])} ms; {found}")
        if kind == "forward" or any("differs" in reason for reason in done[-1]["refused"].values()):
            for name, reason in done[-1]["refused"].items():
                tqdm.write(f"  without {name}: {reason}")
    if not done:
        return []
    header = ["batch x length", "kind", "chosen", *DOT, "GFLOP/s", "over PyTorch", "target", "met"]
    print(
        "\nmilliseconds, fastest (median); GFLOP/s of attnlib; ratios of the fastest runs, above 1: attnlib is faster"
    )
    print(table([*header, "over JAX peers", "target", "met", "best of them"], map(line_of, done)))
    return done


def picture(report, done):
    plt = pyplot()
    if plt is None:
        return
    names = list(dict.fromkeys((row["group"], row["row"]) for row in done))
    borders = [y - 0.5 for y in range(1, len(names)) if names[y][0] != names[y - 1][0]]
    figure, axes = plt.subplots(
        1, 2, figsize=(9.5, 1.5 + 0.3 * len(names)), sharey=True, sharex=True, layout="constrained"
    )
    styles = {"JAX": ("blue", "o", "fastest other JAX library"), "PyTorch": ("vermillion", "s", "PyTorch")}
    for ax, kind in zip(axes, KINDS, strict=True):
        ax.axvline(1, color=COLORS["grey"], linewidth=1)
        for against, (color, marker, label) in styles.items():
            found = [(row, row["ratios"][against]) for row in done if row["kind"] == kind and against in row["ratios"]]
            at = [names.index((row["group"], row["row"])) for row, _ in found]
            ax.plot([ratio.value for _, ratio in found], at, marker, color=COLORS[color], label=label, markersize=6)
            wanted = [(ratio.target, y) for (_, ratio), y in zip(found, at, strict=True) if ratio.target]
            if wanted:
                ax.plot(*zip(*wanted, strict=True), "|", color=COLORS[color], markersize=11, label=f"target: {label}")
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(plt.FixedLocator([0.25, 0.5, 1, 2, 4, 8, 16]))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        ax.minorticks_off()
        ax.grid(axis="x", color="#e0e0e0", linewidth=0.6)
        ax.hlines(borders, 0, 1, transform=ax.get_yaxis_transform(), color="#c0c0c0", linewidth=0.6)
        ax.tick_params(axis="y", length=0)
        ax.set(title={"forward": "forward", "training": "training step"}[kind], xlabel="attnlib is faster by")
    axes[0].set_yticks(range(len(names)), [row for _, row in names])
    axes[0].set_ylabel("batch x length, or batch x (queries, keys)")
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    facts = report.data["machine"]
    figure.suptitle(f"Speed of dot-product attention over others, {facts['cores']} CPU cores", fontsize=11)
    report.picture(figure, "dot.png")


def main():
    made = parser(__doc__, repeats=9, seconds=20)
    choices = (*GROUPS, "overhead")
    made.add_argument("--only", nargs="+", choices=choices, default=choices, help="groups of rows, or the overhead")
    options = parse(made)
    report = Report("dot", options)
    done = speed(report, options)
    found = [(f"{row['row']} {row['kind']}", ratio) for row in done for ratio in row["ratios"].values()]
    if "overhead" in options.only:
        found += overhead(report, options)
    print(verdict(found))
    if done:
        picture(report, done)
    differs = [f"{row['row']} {row['kind']}" for row in done if "differs" in str(row["refused"])]
    sys.exit("\n".join(["failed:", *differs]) if differs else 0)


if __name__ == "__main__":
    main()
