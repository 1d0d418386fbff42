"""The blockwise implementation compiles for a TPU and a GPU, and stays linear in memory there, on a host with neither.

Compiled for a TPU v5e and an H100 by XLA's own compilers, which are not among attnlib's dependencies: these tests need

    pip install libtpu
    pip install --no-deps jax-cuda12-plugin==$JAXLIB jax-cuda12-pjrt==$JAXLIB

where $JAXLIB is the version of jaxlib. What is compiled is not run: neither numbers nor speed are tested.
"""

import importlib.metadata
import json
import pathlib
import subprocess
import sys

import pytest
from ahead_of_time import FEATURES, HEADS, LENGTH, SCORES

pytestmark = pytest.mark.measured
PROGRAM = pathlib.Path(__file__).parents[1] / "_support/ahead_of_time.py"
PROGRAMS = 9  # of each score, and the last is of the reference
COMPILERS = {"tpu": ["libtpu"], "h100": ["jax-cuda12-plugin", "jax-cuda12-pjrt"]}

TILE = 512  # the side that is chosen for these heads
SQUARE = HEADS * LENGTH**2
# Megabytes, where one array of all logits in float32 is 34. Measured: at most 8.7 and 18.9 for an H100, and for a TPU
# 0.3 and 0.6, which leave out what it keeps on the chip: there even the reference, with all logits, counts nothing.
LIMITS_MB = {"h100": {"forward": 11, "training": 22}, "tpu": {"forward": 1, "training": 2}}


def absent(platform):
    """Why nothing can be compiled for the platform here, or None."""
    jaxlib = importlib.metadata.version("jaxlib")
    for name in COMPILERS[platform]:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name}, which compiles for this platform, is not installed"
        if platform == "h100" and version != jaxlib:
            return f"{name} {version} does not fit jaxlib {jaxlib}"
    return None


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("platform", COMPILERS)
def test_compiles_without_squares(platform, score):
    """Forward and training, plain and causal, float32 and bfloat16, in one process, as each starts slowly."""
    if reason := absent(platform):
        pytest.skip(reason)
    command = [sys.executable, str(PROGRAM), platform, score]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *programs, reference = map(json.loads, done.stdout.splitlines())
    assert len(programs) == PROGRAMS - 1 and reference["implementation"] == "reference"
    assert reference["largest"] >= SQUARE, "the count does not see a square where there is one"
    for program in programs:
        assert program["temporaries"] <= LIMITS_MB[platform][program["derivative"]] * 1e6, program
        # The logits of one tile and no more: not of all pairs, and of no pair each feature.
        assert program["largest"] <= HEADS * TILE**2 < TILE**2 * FEATURES, program
        # One over the tiles, or two where some ask the mask, and none within a tile, forward and backward.
        assert program["loops"] <= (1 + program["causal"]) * (1 + (program["derivative"] == "training")), program
