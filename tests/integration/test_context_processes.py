"""One sequence on the devices of two processes, and the memory of long sequences, each in processes of its own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import attnlib

SUPPORT = Path(__file__).parents[1] / "_support"
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "context.py"


def start(program, *arguments):
    paths = os.pathsep.join([str(Path(attnlib.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, program, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**environment, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def finish(*processes):
    """What the processes print; they have ended then, whatever happens."""
    try:
        return [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes():
    address = f"127.0.0.1:{free_port()}"
    processes = [start(SUPPORT / "two_processes.py", address, str(n)) for n in range(2)]
    for process, printed in zip(processes, finish(*processes), strict=True):
        assert process.returncode == 0 and "equal" in printed, printed
    host, _, port = address.rpartition(":")
    with socket.socket() as caller:
        assert caller.connect_ex((host, int(port))), "a process still listens"


def temporaries(devices, length, *, order="contiguous", exchange="ring"):
    """MiB of temporaries of a device, of causal attention forward and of its gradient, by compilation alone."""
    options = ["--devices", str(devices), "--length", str(length), "--orders", order, "--exchanges", exchange]
    process = start(BENCHMARK, *options, "--json")
    (printed,) = finish(process)
    assert process.returncode == 0, printed
    (row,) = json.loads(printed.splitlines()[-1])
    return row["temporaries"]["forward"] / 2**20, row["temporaries"]["gradient"] / 2**20


def test_memory_of_a_long_sequence():
    forward, gradient = temporaries(8, 65536)
    assert forward <= 110 and gradient <= 210, (forward, gradient)


@pytest.mark.slow
def test_twice_the_devices_need_half_the_memory():
    by_devices = {devices: temporaries(devices, 65536)[1] for devices in (2, 4, 8)}
    assert by_devices[4] <= 0.6 * by_devices[2] and by_devices[8] <= 0.6 * by_devices[4], by_devices


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_memory_of_a_quarter_of_a_million_positions(order):
    assert temporaries(8, 262144, order=order)[1] <= 700
