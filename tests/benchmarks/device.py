"""The numbers and the speed of attention on a GPU, in at most five minutes: python tests/benchmarks/device.py

Needs `pip install -e ".[demo]"` at the root of the repository, and JAX for the GPU: `pip install "jax[cuda13]"`. It
prints tables and writes device.json into `--out`. No row starts after `--seconds`; the rows left out are named.

First it checks outputs and gradients of each implementation on a table of calls. What they are compared with is the
reference in float32 and in "highest" precision. The difference is relative, in the Euclidean norm. Checks take at most
half of the time. The exit status is 1 if a check fails, if results differ where times are taken, or if attnlib raises
an error other than a lack of memory.

Then it times dot products against `jax.nn.dot_product_attention(implementation="cudnn")`, in float32, which cuDNN does
not take, against XLA's implementation; and additive attention against its definition in jax.numpy, as XLA compiles it.
Forward, and as a training step: the sum of squares of the output with its gradients. Times are of whole calls that wait
for the result, and so have some 0.1 ms of launches in them.

Memory is counted twice: of each program, the arguments, results and temporaries as the compiler counts them; and what
the device says was the most in use since the start of the process, right after the first run of the program. The
second never falls: it is a program's own only where it is above the one before.

Where there is no GPU it says so, and shows only that the script runs: small checks, and one tiny row of times.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable

import additive
import jax
import jax.numpy as jnp
import numpy as np
import peers
from dot import square
from report import Ratio, Report, milliseconds, parse, parser, table
from timing import KINDS, contest, jax_program, reason_of, relative_difference
from tqdm import tqdm

import attnlib
from attnlib import masks, scores
from attnlib._engine.dispatch import NAMES

STARTED = time.perf_counter()
ON_GPU = jax.default_backend() == "gpu"
SHARE_OF_CHECKS = 0.5
SMALL = not ON_GPU or "--quick" in sys.argv
CHECKED_LENGTH = 24 if SMALL else 512

# Checks


@dataclasses.dataclass(frozen=True)
class Check:
    """A call: its operands have CHECKED_LENGTH positions unless stated, 4 heads (key and value too) of 64 features."""

    name: str
    options: Callable[[int], dict] = lambda length: {}
    queries: Callable[[int], int] = lambda length: length
    kv_heads: int = 4
    features: int = 64
    arrays: dict = dataclasses.field(default_factory=dict)  # operands besides: {name: shape of a length}
    every_precision: bool = False  # in float32 also in the default precision, which is less on a GPU

    def operands(self):
        """Numbers of bfloat16, in float32: the same in either type."""
        length, heads = CHECKED_LENGTH, 4
        shapes = {
            "query": (2, self.queries(length), heads, self.features),
            "key": (2, length, self.kv_heads, self.features),
            "value": (2, length, self.kv_heads, self.features),
        } | {name: shape(length) for name, shape in self.arrays.items()}
        draw = np.random.default_rng(0).standard_normal
        return {name: draw(shape).astype(jnp.bfloat16).astype(np.float32) for name, shape in shapes.items()}

    def arguments(self, operands, **options):
        """Of `attention` and `explain`; the score is dot products, or additive with a scale among the operands."""
        others = dict(operands)
        score = scores.Additive(others.pop("scale")) if "scale" in others else scores.Dot()
        return dict(others, score=score, **self.options(CHECKED_LENGTH), **options)


def dropout(length):
    return dict(dropout_rate=0.3, dropout_rng=jax.random.key(2))


SCALE = {"scale": lambda length: (64,)}
CHECKS = [
    Check("dot", every_precision=True),
    Check("causal", lambda length: dict(is_causal=True)),
    Check("additive", arrays=SCALE, every_precision=True),
    Check("grouped heads, causal", lambda length: dict(is_causal=True), kv_heads=2),
    Check("window", lambda length: dict(mask=masks.SlidingWindow(length // 8, 0))),
    Check("lengths", lambda length: dict(mask=masks.Lengths(key=jnp.asarray([length, length // 2 - 3])))),
    Check("fewer queries, 128 features", queries=lambda length: length // 2, features=128),
    Check("one query", queries=lambda length: 1),
    Check("mask as an array", lambda length: dict(mask=jnp.eye(length, dtype=bool) | (jnp.arange(length) % 3 > 0))),
    Check("bias", arrays={"bias": lambda length: (1, 4, length, length)}),
    Check("soft cap", lambda length: dict(logits_soft_cap=2.0)),
    Check("dropout", dropout),
    Check("sink", arrays={"sink": lambda length: (4,)}),
    Check("additive, causal", lambda length: dict(is_causal=True), arrays=SCALE),
    Check("additive, dropout", dropout, arrays=SCALE),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """A type and a precision that a call is checked in; `tolerance` is the largest relative difference."""

    dtype: str
    precision: str | None
    tolerance: float

    def __str__(self):
        return self.dtype + (f", {self.precision}" if self.precision else "")


EXACT = Variant("float32", "highest", 2e-5)
DEFAULT_PRECISION = Variant(
    "float32", None, 5e-3 if ON_GPU else 2e-5
)  # on a GPU, products of numbers of 11 bits (TF32)
VARIANTS = EXACT, DEFAULT_PRECISION, Variant("bfloat16", None, 2e-2)


def checks(report, options):
    """The names of those that failed."""
    lines, failed, reasons, counts, expected = [], [], {}, dict.fromkeys(NAMES, 0), {}
    for check, variant in tqdm(checked(options.checks), desc="checks"):
        name = f"{check.name} ({variant})"
        if over(SHARE_OF_CHECKS * options.seconds):
            leave_out(report, f"check {name}")
            continue
        found = {implementation: compared(check, variant, implementation, expected) for implementation in NAMES}
        report.add("checks", dict(row=name, tolerance=variant.tolerance, results=found))
        lines.append([name, f"{variant.tolerance:g}", *(result["shown"] for result in found.values())])
        for implementation, result in found.items():
            counts[implementation] += result["passed"] is True
            if result["passed"] is False:
                failed.append(f"{name}, {implementation}: {result['reason'] or result['shown']}")
            elif result["reason"]:
                reasons.setdefault(f"{implementation}: {result['reason']}", []).append(name)
    print("\nchecks: the largest relative difference of outputs and gradients from the reference in float32, highest")
    print(table(["call", "tolerance", *NAMES], lines))
    for reason, names in reasons.items():
        print(f"refused by {reason}: " + ("all calls" if len(names) == len(lines) else "; ".join(names)))
    passed = sum(counts.values())
    detail = ", ".join(f"{implementation} {count}" for implementation, count in counts.items())
    print(f"checks passed: {passed} of {passed + len(failed)} ({detail})")
    report.put("checks passed", dict(passed=passed, failed=failed, **counts))
    return failed


def checked(names):
    """[(check, variant)]"""
    pairs = [(check, variant) for check in CHECKS if check.name in names for variant in VARIANTS]
    return [(check, variant) for check, variant in pairs if check.every_precision or variant != DEFAULT_PRECISION]


def compared(check, variant, implementation, expected):
    """Whether it passed (None: refused, or the expectation itself), what a table shows, and the reason.

    `expected` keeps the numbers that a check is compared with, {name of the check: numbers}.
    """
    if implementation == "reference" and variant == EXACT:
        return dict(passed=None, shown="=", reason=None, differences={})
    if implementation == "cudnn" and (reason := refusal(check, variant)):
        return dict(passed=None, shown="-", reason=reason, differences={})
    try:
        if check.name not in expected:
            expected[check.name] = numbers(check, EXACT, "reference")
        made = numbers(check, variant, implementation)
    except Exception as error:  # the others are still to be checked
        return dict(passed=False, shown="FAILED", reason=reason_of(error), differences={})
    differences = {name: relative_difference(x, made[name]) for name, x in expected[check.name].items()}
    worst = max(differences.values(), key=lambda x: float("inf") if np.isnan(x) else x)
    passed = worst <= variant.tolerance  # NaN is not
    shown = f"{worst:.1e}" if passed else f"FAILED {worst:.1e}"
    return dict(passed=passed, shown=shown, reason=None, differences=differences)


def cast(check, variant):
    """The operands of the variant; what is no query, key or value stays float32."""
    halved = ("query", "key", "value")
    return {name: x.astype(variant.dtype) if name in halved else x for name, x in check.operands().items()}


def refusal(check, variant):
    """The reason why cuDNN does not take the call, or None."""
    if not ON_GPU:
        return "there is no GPU"
    try:
        attnlib.explain(**check.arguments(cast(check, variant), precision=variant.precision, implementation="cudnn"))
    except ValueError as error:
        return next((line.strip() for line in str(error).splitlines() if "cudnn: " in line), str(error))
    return None


def numbers(check, variant, implementation):
    """{name: NumPy array} of the output and of the gradients, one for each operand."""
    operands = cast(check, variant)
    options = dict(precision=variant.precision, implementation=implementation)

    def attend(operands):
        return attnlib.attention(**check.arguments(operands, **options))

    @jax.jit
    def compute(operands):
        output, pullback = jax.vjp(attend, operands)
        cotangent = jnp.cos(jnp.arange(output.size, dtype="float32")).reshape(output.shape)
        return dict(output=output, **pullback(cotangent.astype("bfloat16").astype(output.dtype))[0])

    return {name: np.asarray(x, np.float32) for name, x in compute(operands).items()}


# Times

POSITIONS = 32768  # of all batch entries together
# Between two that round differently; a wrong mask or factor is ten times as much.
TOLERANCES = {"float32": 2e-2, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Row:
    work: str  # "dot", "causal" or "additive"
    length: int
    dtype: str
    kind: str

    @property
    def batch(self):
        return 1 if SMALL else max(1, POSITIONS // self.length)

    def __str__(self):
        return f"{self.work}, {self.batch} x {self.length}, {self.dtype}, {self.kind}"

    def contestants(self):
        """({name: function}, the operands, operations of a call or None)."""
        if self.work == "additive":  # one head
            arrays = [x.astype(self.dtype) for x in additive.operands(self.batch, self.length, 64)]
            return {"attnlib": additive.ours, "XLA": plain_additive}, arrays, None
        row = square(
            self.batch, self.length, features=128, dtype=self.dtype, mask="causal" if self.work == "causal" else None
        )
        arrays = row.operands()
        found = {"attnlib": peers.dot_attnlib(row)}
        if row.implementation(arrays) == "cudnn":  # our own beside it
            options = dict(is_causal=row.mask == "causal", implementation="blockwise")
            found["blockwise"] = functools.partial(attnlib.dot_product_attention, **options)
        found["cuDNN"] = peers.dot_jax_nn(row, "cudnn")
        if self.dtype == "float32":
            found["XLA"] = peers.dot_jax_nn(row, "xla")
        return found, arrays, row.flops(self.kind)


CONTESTANTS = "attnlib", "blockwise", "cuDNN", "XLA"
ROWS = [
    Row(work, length, dtype, kind)
    for length in (2048, 8192, 32768)
    for dtype in ("bfloat16", "float32")
    for work in ("dot", "additive", "causal")
    for kind in KINDS
]
TINY = Row("dot", 32, "float32", "training")


def plain_additive(query, key, value, scale):
    """The definition, with logits in float32 as ours; a sum, since a product of matrices would keep all the tanh."""
    query, key, scale = (x.astype("float32") for x in (query, key, scale))
    logits = jnp.sum(scale * jnp.tanh(query[:, :, None] + key[:, None]), -1)
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(logits, -1).astype(value.dtype), value)


def times(report, options):
    """The names of rows in which attnlib failed otherwise than by a lack of memory."""
    done, failed = [], []
    for row in tqdm([TINY] if SMALL else ROWS, desc="times"):
        if over(options.seconds):
            leave_out(report, f"times {row}")
            continue
        done.append(run_row(row, options))
        report.add("times", done[-1])
        tqdm.write(f"{row}: " + ", ".join(f"{name} {milliseconds(t)} ms" for name, t in done[-1]["times"].items()))
        for name, reason in done[-1]["refused"].items():
            tqdm.write(f"  {name}: {reason}")
            ours = name in ("attnlib", "blockwise", "all")
            if "differs" in reason or (ours and not reason.startswith("out of memory")):
                failed.append(f"{row}, {name}: {reason}")
    if done:
        print(
            "\nmilliseconds, fastest (median); ratios of the fastest, above 1x: attnlib is faster; TFLOP/s of attnlib"
        )
        print(table(["call", *CONTESTANTS, "over cuDNN", "over XLA", "TFLOP/s"], map(line_of, done)))
        print("\npeak memory in MB: as the compiler counts it / the most in use so far, as the device says")
        print(table(["call", *CONTESTANTS], map(memory_line_of, done)))
    return failed


def run_row(row, options):
    """The row as it goes into the report."""
    compiled, device, flops = {}, {}, None
    try:
        functions, arrays, flops = row.contestants()
        makers = {
            name: functools.partial(watched, name, KINDS[row.kind](function), arrays, compiled, device)
            for name, function in functions.items()
        }
        taken, refused = contest(makers, options.repeats, 4, TOLERANCES[row.dtype], ours_must_run=False)
    except Exception as error:  # no memory for operands, say; the next row may have it
        taken, refused = {}, {"all": reason_of(error)}
    peers_ran = [name for name in ("cuDNN", "XLA") if name in taken and "attnlib" in taken]
    return dict(
        row=str(row), times=taken, refused=refused,
        ratios={name: Ratio(name, taken[name].best / taken["attnlib"].best) for name in peers_ran},
        tflops=flops / taken["attnlib"].best / 1e12 if flops and "attnlib" in taken else None,
        compiled_peak_bytes=compiled, device_peak_bytes_so_far=device,
    )  # fmt: skip


def watched(name, function, arrays, compiled, device):
    """The program; notes its memory as soon as that is known, since it may not run."""
    program = jax_program(function, *arrays)
    compiled[name] = program.peak

    def read(result):
        statistics = jax.devices()[0].memory_stats() or {}  # a CPU has none
        device[name] = statistics.get("peak_bytes_in_use")
        return program.read(result)

    return dataclasses.replace(program, read=read)


def line_of(done):
    cells = [milliseconds(done["times"].get(name)) for name in CONTESTANTS]
    cells += [f"{done['ratios'][name].value:.2f}x" if name in done["ratios"] else "-" for name in ("cuDNN", "XLA")]
    return [done["row"], *cells, f"{done['tflops']:.3g}" if done["tflops"] else "-"]


def memory_line_of(done):
    def cell(name):
        both = [done[key].get(name) for key in ("compiled_peak_bytes", "device_peak_bytes_so_far")]
        return " / ".join("-" if x is None else f"{x / 1e6:.1f}" for x in both)

    return [done["row"], *map(cell, CONTESTANTS)]


# The time


def over(seconds):
    return time.perf_counter() - STARTED > seconds


def leave_out(report, name):
    report.add("left out", name)
    tqdm.write(f"left out, since the time is over: {name}")


def main():
    made = parser(__doc__, repeats=7, seconds=270, seconds_help="no new row of the whole program after these")
    names = [check.name for check in CHECKS]
    made.add_argument("--checks", nargs="*", choices=names, default=names, help="calls to check")
    options = parse(made)
    report = Report("device", options)
    if not ON_GPU:
        print(
            f"there is no GPU here ({jax.devices()[0].device_kind}): the checks are small, and the times mean nothing"
        )
    failed = checks(report, options) + times(report, options)
    left_out = report.data.get("left out", [])
    print(f"left out: {len(left_out)} rows" + "".join(f"\n  {name}" for name in left_out))
    print(f"took {time.perf_counter() - STARTED:.0f} seconds")
    sys.exit("\n".join(["failed:", *failed]) if failed else 0)


if __name__ == "__main__":
    main()
