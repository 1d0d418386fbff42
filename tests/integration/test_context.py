"""One sequence on several devices: the numbers of one device, for every score, mask, option and derivative."""

import context_cases
import jax
import numpy as np
import pytest
from cases import context as dtype_of
from context_cases import BY_NAME, CASES, SETTINGS, Arranged, Setting

pytestmark = pytest.mark.devices


EVERY = [(one.name, setting) for one in CASES for setting in SETTINGS]
# Left out by default, since other cases cut and send arrays of the same kinds. The slow tests run them.
LIKE_OTHERS = {
    "bilinear a head", "custom", "no mask", "far window", "traced lengths", "dense, rows of one", "not and or",
    "explicit keys", "bias a row", "alibi",
}  # fmt: skip
NAMES = [one.name for one in CASES if one.name not in LIKE_OTHERS]
# Each case in one setting, and each setting, with every pair of its parts, in one case at least.
CHOSEN = [(name, SETTINGS[7 * n % len(SETTINGS)]) for n, name in enumerate(NAMES)]
CHOSEN += [(name, Setting("zigzag", "heads", "manual")) for name in ("everything", "function")]
assert {setting for _, setting in CHOSEN} == set(SETTINGS)
assert {name for name, _ in CHOSEN} | LIKE_OTHERS == set(BY_NAME)
# Of second derivatives, which cost most to compile: the exchanges with a loop and without, and each order.
SECOND = [
    ("bias, soft cap, sink", Setting("zigzag", "ring", "manual")),
    ("dot, scale a head, causal", Setting("contiguous", "heads", "explicit")),
]


def name_of(value):
    return value if isinstance(value, str) else f"{value.order}-{value.exchange}-{value.mode}"


def assert_within(made, expected, tolerance):
    """Within the tolerance of the largest entry, or of 1."""
    for got, want in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        got, want = np.asarray(got), np.asarray(want)
        assert got.dtype == want.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


def check_first_order(name, setting):
    one = BY_NAME[name]
    with dtype_of(one):
        with jax.set_mesh(setting.mesh()):
            made = context_cases.host(context_cases.many_devices(one, setting))
        results, gradients, tangents = context_cases.one_device(one)
        arranged = Arranged(one, setting)
        assert_within(made, (arranged.results(*results), gradients, arranged.results(*tangents)), 1e-12)


def check_second_order(name, setting):
    one = BY_NAME[name]
    with dtype_of(one):
        with jax.set_mesh(setting.mesh()):
            made = context_cases.host(context_cases.second_derivatives(one, setting))
        assert_within(made, context_cases.second_derivatives(one, None), 1e-11)


@pytest.mark.parametrize(("name", "setting"), CHOSEN, ids=name_of)
def test_first_order(name, setting):
    check_first_order(name, setting)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting"), [one for one in EVERY if one not in CHOSEN], ids=name_of)
def test_first_order_of_all(name, setting):
    check_first_order(name, setting)


@pytest.mark.parametrize(("name", "setting"), SECOND, ids=name_of)
def test_second_order(name, setting):
    check_second_order(name, setting)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting"), [one for one in EVERY if one not in SECOND], ids=name_of)
def test_second_order_of_all(name, setting):
    check_second_order(name, setting)
