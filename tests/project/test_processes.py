"""The processes of tests are what their marks say, and what they ran is seen."""

import os

import jax
import processes
import pytest
from processes import EIGHT, QUICK, Process


def flags():
    return os.environ["XLA_FLAGS"].split()


def test_by_default_there_is_one_device_and_little_optimisation():
    assert jax.device_count() == 1
    assert QUICK[0] in flags()
    assert processes.OWN is None


@pytest.mark.devices
def test_eight_devices():
    assert jax.device_count() == 8
    assert QUICK[0] in flags()


@pytest.mark.measured
def test_programs_as_users_compile_them():
    assert jax.device_count() == 1
    assert not {*QUICK, *EIGHT} & set(flags())


def test_flags_that_xla_does_not_know_are_found_out():
    """It would end the process."""
    assert processes._known(QUICK[0])
    assert not processes._known("--xla_no_such_flag=1")


def test_a_process_that_runs_nothing_fails(request):
    file = request.node.getparent(pytest.File)
    process = Process.from_parent(file, name="nothing", kind="devices", ids=[f"{file.nodeid}::test_that_is_not_there"])
    with pytest.raises(pytest.fail.Exception, match=r"of kind 'devices'(.|\n)*not found"):
        process.runtest()
