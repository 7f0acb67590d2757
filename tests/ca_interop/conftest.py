"""What the tests with real CA servers share, and the table of results printed at the end."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, for the sockets below it."""
    with tempfile.TemporaryDirectory(prefix="ca-") as directory:
        yield Path(directory)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run in one process what shares one server: the tests of a module with one event loop."""
    for each in items:
        if isinstance(each, pytest.Function) and "loop_of_the_module" in each.fixturenames:
            each.add_marker(pytest.mark.xdist_group(each.path.name))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each thing that a user of a CA relies on, in the order of the kinds."""
    terminalreporter.section("seen with real CA servers")
    for outcome, verdict in (("passed", "ok"), ("failed", "FAILED"), ("error", "FAILED")):
        for report in terminalreporter.getreports(outcome):
            file, _, test = report.nodeid.partition("::")
            kind = Path(file).stem.removeprefix("test_").replace("_", "-")
            words = test.removeprefix("test_").replace("_", " ")
            terminalreporter.write_line(f"{verdict:<7} {kind:<11} {words}")
            for _, noted in report.user_properties:
                terminalreporter.write_line(f"{noted}")
