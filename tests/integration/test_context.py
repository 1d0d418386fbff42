"""One sequence on several devices: the numbers of one device, for every score, mask, option and derivative."""

import context_cases
import covering
import jax
import pytest
from cases import context as dtype_of
from context_cases import BY_NAME, CASES, SETTINGS, Arranged, Setting
from conftest import assert_close

pytestmark = pytest.mark.devices


def configurations(every):
    pool = [(one.name, setting) for one in CASES for setting in SETTINGS]
    if every:
        return pool

    def groups(entry):
        name, setting = entry
        run = [("order", setting.order), ("exchange", setting.exchange), ("mode", setting.mode)]
        return {("case", name)} | covering.pairs(run)

    return covering.covering(pool, groups)


def check(name, setting):
    one = BY_NAME[name]
    with dtype_of(one):
        with jax.set_mesh(setting.mesh()):
            results, gradients, tangents = context_cases.host(context_cases.many_devices(one, setting))
        expected = context_cases.one_device(one)
        arranged = Arranged(one, setting)
        expected = [arranged.results(*expected[0]), expected[1], arranged.results(*expected[2])]
        made = [results, gradients, tangents]
        for got, want in zip(made, expected, strict=True):
            assert_close(jax.tree.leaves(got), jax.tree.leaves(context_cases.host(want)), length=16)


@pytest.mark.parametrize(("name", "setting"), configurations(every=False), ids=str)
def test_first_order(name, setting):
    check(name, setting)
