"""A pytest plugin: the CPU time of each test, and which of them take too much of it."""

import os
from collections import defaultdict

import pytest
from processes import Process

LONG = 20  # a test that takes longer is named: it is to be marked slow, or cut


class CpuSeconds:
    """Times tests where they run, by CPU time, since others share the machine; adds up where they are reported."""

    def __init__(self, config):
        self.limit = config.getoption("--max-cpu")
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

    def over(self, limit):
        return sorted(((seconds, name) for name, seconds in self.seconds.items() if seconds > limit), reverse=True)

    def pytest_sessionfinish(self, session):
        too_long = self.limit is not None and self.over(self.limit)
        if too_long and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for limit, says in ((LONG, "takes long"), (self.limit, "fails this run, by --max-cpu")):
            if limit is not None and (over := self.over(limit)):
                terminalreporter.section(f"over {limit:g} CPU seconds, which {says}")
                for seconds, name in over:
                    terminalreporter.line(f"{seconds:6.1f} {name}")


def now():
    """CPU seconds of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])
