"""Every fault of tests/faults.py can be put into the library of today, and names tests that exist."""

import pytest
from documents import ROOT
from faults import FAULTS

TEXTS = [path.read_text(encoding="utf-8") for path in (ROOT / "attnlib").rglob("*.py")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_library(fault):
    assert sum(text.count(fault.old) for text in TEXTS) == 1, fault.old
    assert fault.new != fault.old
    for test in fault.tests:
        assert list(ROOT.glob(f"tests/*/{test.partition(' ')[0]}")), test


def test_names_of_faults_differ():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
