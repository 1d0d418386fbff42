"""Additive attention, its speed, its memory, and how both grow: python tests/benchmarks/additive.py

Needs `pip install -e ".[demo]"` at the root of the repository; to compare with Keras and PyTorch also
`pip install keras torch`. A peer that is not installed is left out. Takes some minutes and, for the peers, 8 GB of
memory; let nothing else run meanwhile. Prints tables and writes additive.json and additive.png into `--out`.

Float32, one head. Forward, and a training step: the sum of squares of the output with its gradients by query, key,
value and scale. Contestants: Keras' AdditiveAttention layer under `jax.jit`, and the formula in PyTorch, eager. The
floor is the time of one bare fused pass over all query x key x feature numbers, `sum(1 / (1 + u * w))`: the least that
a forward pass must do; a training step needs the same numbers about four times (for the output and three gradients).
"""

import itertools
import math
import sys

import jax
import jax.numpy as jnp
from peers import load, torch_program
from report import COLORS, Ratio, Report, milliseconds, parse, parser, pyplot, table, verdict
from timing import KINDS, contest, jax_program, measure
from tqdm import tqdm

import attnlib

# (batch, length, features): the targets of the speedup over Keras, forward and training.
ROWS = {(4, 256, 128): (6.5, 5), (1, 1024, 128): (10, 14), (1, 2048, 64): (9, 15)}
PASSES = {"forward": 1, "training": 4}
FLOOR_TARGETS = {"forward": 1.3, "training": 1.6}
TOLERANCE = 1e-3  # float32, after sums over thousands of numbers in different orders

LENGTHS = (512, 1024, 2048, 4096, 8192)
FEATURES = 64
KERAS_LONGEST, KERAS_MOST_BYTES = 2048, 6e9
MOST_MB_AT_LONGEST = 100
# From each length to its double: time grows fourfold with queries x keys, memory twofold with queries + keys.
MOST_TIME_GROWTH, MOST_MEMORY_GROWTH = 4.8, 2.4


def ours(query, key, value, scale):
    return attnlib.additive_attention(query[:, :, None], key[:, :, None], value[:, :, None], scale=scale)[:, :, 0]


def chosen(arrays):
    """What attnlib chooses: all pairs at once where they are few, else tiles."""
    query, key, value, scale = arrays
    score = attnlib.scores.Additive(scale)
    return attnlib.explain(query[:, :, None], key[:, :, None], value[:, :, None], score=score).implementation


def keras_layer(shape):
    layer = load("keras").layers.AdditiveAttention()
    layer.build([shape, shape])

    def attend(query, key, value, scale):
        return layer.stateless_call([scale], layer.non_trainable_variables, [query, value, key])[0]

    return attend


def in_torch(query, key, value, scale):
    scores = load("torch").tanh(query[:, :, None] + key[:, None]) @ scale
    return scores.softmax(-1) @ value


def bare_pass(u, w):
    return jnp.sum(1 / (1 + u[:, :, None, :] * w[:, None]), -1)


def operands(batch, length, features):
    query, key, value = jax.random.normal(jax.random.key(0), (3, batch, length, features))
    return query, key, value, 0.3 * jax.random.normal(jax.random.key(1), (features,))


def contestants(arrays, kind):
    def in_jax(function, *arrays):
        return lambda: jax_program(function, *arrays)

    makers = {
        "attnlib": in_jax(KINDS[kind](ours), *arrays),
        "one pass": in_jax(bare_pass, *map(jnp.exp, arrays[:2])),
    }
    if load("keras"):
        makers["Keras"] = in_jax(KINDS[kind](keras_layer(arrays[0].shape)), *arrays)
    if load("torch"):
        makers["PyTorch"] = lambda: torch_program(in_torch, arrays, kind)
    return makers


def speed(report, options):
    lines, ratios = [], []
    for shape, kind in tqdm(list(itertools.product(ROWS, KINDS)), desc="speed"):
        batch, length, features = (shape[0], shape[1] // 16, shape[2]) if options.quick else shape
        makers = contestants(operands(batch, length, features), kind)
        times, refused = contest(makers, options.repeats, options.seconds, TOLERANCE, uncompared=["one pass"])

        best = {name: t.best for name, t in times.items()}
        floor = PASSES[kind] * best["one pass"]
        found = {"floor": Ratio("floor", best["attnlib"] / floor, FLOOR_TARGETS[kind], at_most=True)}
        for peer, target in (("Keras", dict(zip(KINDS, ROWS[shape], strict=True))[kind]), ("PyTorch", None)):
            if peer in best:
                found[peer] = Ratio(peer, best[peer] / best["attnlib"], target)
        name = f"{(batch, length, features)} {kind}"
        rate = batch * length**2 * features / best["one pass"] / 1e9
        report.add("speed", dict(row=name, times=times, ratios=found, pass_rate_g_per_s=rate, refused=refused))
        tqdm.write(f"{name}: {milliseconds(times['attnlib'])} ms; " + ", ".join(map(str, found.values())))
        for peer, reason in refused.items():
            tqdm.write(f"  {peer} {reason}")
        ratios += [(name, ratio) for ratio in found.values()]
        cells = {
            peer: found[peer].cells() if peer in found else ["-", "", ""] for peer in ("Keras", "floor", "PyTorch")
        }
        shown = [milliseconds(times.get(peer)) for peer in ("attnlib", "Keras", "PyTorch")]
        floor_cells = [f"{floor * 1e3:.1f}", f"{rate:.2f}", *cells["floor"]]
        lines.append([name, *shown, *cells["Keras"], cells["PyTorch"][0], *floor_cells])
    header = "(batch, length, features)|attnlib|Keras|PyTorch|over Keras|target|met|over PyTorch"
    header += "|floor|pass G/s|to floor|target|met"
    print("\nmilliseconds, fastest (median); 'pass G/s': numbers a second, in billions, of the bare pass")
    print(table(header.split("|"), lines))
    print(verdict(ratios))


def scaling(report, options):
    """Time and temporary memory of a training step against the length; whether they grow as they should."""
    rows = []
    for length in tqdm([n // 16 for n in LENGTHS] if options.quick else LENGTHS, desc="scaling"):
        arrays = operands(1, length, FEATURES)
        programs = {"attnlib": jax_program(KINDS["training"](ours), *arrays)}
        if load("keras"):
            programs["Keras"] = jax_program(KINDS["training"](keras_layer(arrays[0].shape)), *arrays)
        memory = {name: program.temporaries / 1e6 for name, program in programs.items()}
        if length > KERAS_LONGEST or memory.get("Keras", 0) * 1e6 > KERAS_MOST_BYTES:
            programs.pop("Keras", None)  # compiled, so that its memory is known, but not run
        for program in programs.values():
            program.run()
        times = measure(programs, options.repeats, options.seconds)
        rows.append(dict(length=length, implementation=chosen(arrays), times=times, temporary_mb=memory))
        report.add("scaling", rows[-1])
        tqdm.write(f"length {length}: {milliseconds(times['attnlib'])} ms, {memory['attnlib']:.1f} MB")

    print(f"\na training step, batch 1, {FEATURES} features: ms, fastest (median), and MB of temporaries")
    print(
        table(
            "length|attnlib ms|Keras ms|faster|attnlib MB|Keras MB|leaner".split("|"),
            [_scaling_cells(row["length"], row["times"], row["temporary_mb"]) for row in rows],
        )
    )
    for check in growth_checks(rows) if not options.quick else ():  # tiny inputs are computed all at once
        print(f"{'yes' if check['holds'] else 'NO '}  {check['text']}")
        report.add("checks", check)
    picture(report, rows)


def growth_checks(rows):
    """Of the two longest; memory is the compiler's count, the same on every run, so that missing it is a failure."""
    before, last = rows[-2:]
    time = last["times"]["attnlib"].best / before["times"]["attnlib"].best
    megabytes = last["temporary_mb"]["attnlib"]
    memory = megabytes / before["temporary_mb"]["attnlib"]
    step = f"{before['length']} to {last['length']}"
    for text, measured, most, must in (
        (f"time grows as queries x keys: {step} costs {time:.2f}x", time, MOST_TIME_GROWTH, False),
        (f"memory grows as queries + keys: {step} needs {memory:.2f}x", memory, MOST_MEMORY_GROWTH, True),
        (f"{last['length']} trains in {megabytes:.1f} MB of temporaries", megabytes, MOST_MB_AT_LONGEST, True),
    ):
        yield dict(text=f"{text}, at most {most}", holds=measured <= most, must=must)


def _scaling_cells(length, times, memory):
    cells = [length, milliseconds(times["attnlib"]), milliseconds(times.get("Keras"))]
    cells.append(f"{times['Keras'].best / times['attnlib'].best:.1f}x" if "Keras" in times else "-")
    cells.append(f"{memory['attnlib']:.1f}")
    if "Keras" not in memory:
        return [*cells, "-", "-"]
    return [*cells, f"{memory['Keras']:.0f}", f"{memory['Keras'] / memory['attnlib']:.0f}x"]


def picture(report, rows):
    plt = pyplot()
    if plt is None:
        return
    figure, (time_ax, memory_ax) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    styles = {"attnlib": (COLORS["blue"], "o"), "Keras": (COLORS["vermillion"], "s")}
    lengths = [row["length"] for row in rows]
    for name, (color, marker) in styles.items():
        timed = [(row["length"], row["times"][name].best) for row in rows if name in row["times"]]
        counted = [(row["length"], row["temporary_mb"][name] * 1e6) for row in rows if name in row["temporary_mb"]]
        for ax, points in ((time_ax, timed), (memory_ax, counted)):
            if points:
                ax.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
        if missing := counted[len(timed) :]:  # compiled only: hollow
            memory_ax.plot(*zip(*missing, strict=True), marker, color=color, markerfacecolor="white")
            memory_ax.annotate(
                "counted,\nnot run", missing[0], (6, -4), textcoords="offset points", va="top", fontsize=8, color=color
            )
    for row in rows:
        if row["implementation"] == "reference":
            at = (row["length"], row["temporary_mb"]["attnlib"] * 1e6)
            note = dict(textcoords="offset points", va="center", fontsize=8, color=COLORS["blue"])
            memory_ax.annotate("small: all\npairs at once", at, (24, -4), **note)
            break  # the others say the same
    both = [row for row in rows if "Keras" in row["times"]]
    if both:
        points = {name: both[-1]["times"][name].best for name in styles}
        _gap(time_ax, both[-1]["length"], *points.values(), "{:.0f}x faster")
        _gap(memory_ax, both[-1]["length"], *(both[-1]["temporary_mb"][n] * 1e6 for n in styles), "{:.0f}x less")
    time_ax.set(title="time", ylabel="one training step")
    memory_ax.set(title="temporary memory", ylabel="of the compiled step")
    for ax, units in ((time_ax, {"µs": 1e-6, "ms": 1e-3, "s": 1}), (memory_ax, {"kB": 1e3, "MB": 1e6, "GB": 1e9})):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda y, _, units=units: _with_unit(y, units))
        ax.grid(color="#e0e0e0", linewidth=0.6)
        ax.set_xlabel("length (queries = keys)")
        ax.legend(frameon=False, loc="upper left")
    facts = report.data["machine"]
    figure.suptitle(f"Training additive attention, {FEATURES} features, {facts['cores']} CPU cores", fontsize=11)
    report.picture(figure, "additive.png")


def _gap(ax, x, low, high, text):
    """An arrow between the two curves that says how far they are apart."""
    ax.annotate("", (x, low), (x, high), arrowprops=dict(arrowstyle="->", color=COLORS["grey"], shrinkA=6, shrinkB=6))
    # Nearer the upper end: from the lower one, our curve rises through the middle.
    at = (x, math.exp(0.3 * math.log(low) + 0.7 * math.log(high)))
    ax.annotate(text.format(high / low), at, (5, 0), textcoords="offset points", va="center", fontsize=9)


def _with_unit(value, units):
    name, size = [(name, size) for name, size in units.items() if value >= size * 0.999][-1:][0] or ("", 1)
    return f"{value / size:g} {name}"


def main():
    made = parser(__doc__, repeats=7, seconds=60)
    made.add_argument("--only", nargs="*", choices=("speed", "scaling"), default=("speed", "scaling"))
    options = parse(made)
    report = Report("additive", options)
    if "speed" in options.only:
        speed(report, options)
    if "scaling" in options.only:
        scaling(report, options)
    differs = [row["row"] for row in report.data.get("speed", ()) if "differs" in str(row["refused"])]
    broken = [check["text"] for check in report.data.get("checks", ()) if check["must"] and not check["holds"]]
    sys.exit("\n".join(["failed:", *differs, *broken]) if differs or broken else 0)


if __name__ == "__main__":
    main()
