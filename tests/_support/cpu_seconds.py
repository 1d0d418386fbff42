"""A pytest plugin: the CPU time of each test, and which of them take too much of it."""

import os
from collections import defaultdict

import pytest
from processes import Process

LIMIT = 20  # a test that takes longer is marked slow, or cut


class CpuSeconds:
    """Times tests where they run, by CPU time, since others share the machine; adds up where they are reported."""

    def __init__(self, config):
        self.asked = config.getoption("--max-cpu")
        self.limit = LIMIT if self.asked is None else self.asked
        self.seconds = defaultdict(float)

    def pytest_runtest_logstart(self):
        self.before = now()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        # The tests in a process of their own are timed there.
        report.cpu_seconds = 0.0 if isinstance(item, Process) else now() - self.before
        self.before = now()
        return report

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += getattr(report, "cpu_seconds", 0.0)  # a worker that died says nothing

    def over(self):
        found = [(seconds, name) for name, seconds in self.seconds.items() if seconds > self.limit]
        return sorted(found, reverse=True)

    def pytest_sessionfinish(self, session):
        if self.asked is not None and self.over() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.over():
            terminalreporter.section(f"over {self.limit:g} CPU seconds")
            for seconds, name in self.over():
                terminalreporter.line(f"{seconds:6.1f} {name}")


def now():
    """CPU seconds of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])
