"""What the tests with Istio's own programs share, and the table of results printed at the end."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.kubernetes import WEB_POD, ZTUNNEL, Kubernetes, kubernetes


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, for the sockets below it."""
    with tempfile.TemporaryDirectory(prefix="pa-") as directory:
        yield Path(directory)


@pytest.fixture
def cluster() -> Iterator[Kubernetes]:
    """What istiod takes for Kubernetes."""
    with kubernetes(WEB_POD, ZTUNNEL) as running:
        yield running


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each thing that a user of Istio relies on."""
    terminalreporter.section("seen with Istio's own programs")
    for outcome, verdict in (("passed", "ok"), ("failed", "FAILED"), ("error", "FAILED")):
        for report in terminalreporter.getreports(outcome):
            words = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            terminalreporter.write_line(f"{verdict:<7} {words}")
            for _, noted in report.user_properties:
                terminalreporter.write_line(f"{noted}")
