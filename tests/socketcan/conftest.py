"""Links for each test, and what the runs have shown, told at the end."""

import os
from collections.abc import Iterator

import pytest

from tests.socketcan.links import virtual_link

_findings = pytest.StashKey[list[str]]()


def pytest_runtest_setup() -> None:
    """Outside the rig there is no kernel to try, and nobody's network is touched."""
    if "SERVO_GATEWAY_TEST_CAN" not in os.environ:
        pytest.skip("needs a kernel with CAN, and links of its own: make socketcan")


@pytest.fixture
def channel() -> Iterator[str]:
    """A virtual CAN link of this test's own."""
    with virtual_link() as name:
        yield name


@pytest.fixture
def findings(pytestconfig: pytest.Config) -> list[str]:
    """Lines to tell at the end of the run."""
    return pytestconfig.stash.setdefault(_findings, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Tell what was found."""
    for line in config.stash.get(_findings, []):
        terminalreporter.write_line(line)
