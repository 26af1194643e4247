"""The demonstration, as a newcomer sees it: on a terminal, in a home directory that has never seen the gateway."""

import os
import re
from pathlib import Path

from hil.arm import COMMAND, MOTORS
from tests.system.rig import Terminal


def online(lines: list[str]) -> list[str]:
    """The motors that the newest table shows online and somewhere: a name, a state, a position."""
    rows = [row for line in lines if (row := re.search(r"(joint\d) +\S +(\w+) +\S +(-?\d\.\d{3}|-) ", line))]
    return [row[1] for row in rows[-len(MOTORS) :] if row[2] == "online" and row[3] != "-"]


def test_the_demo_shows_six_motors_online_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}
    terminal = Terminal([*COMMAND, "demo"], environment, tmp_path)
    try:
        terminal.wait(lambda lines: online(lines) == list(MOTORS), "a table of six motors online")
        assert terminal.press_ctrl_c() == 0
        terminal.read()
    finally:
        terminal.close()
    journal = tmp_path / "state" / "servo-gateway" / "sim-arm" / "journal.db"
    assert journal.is_file()
    assert f"Kept in {journal}" in "".join(terminal.lines)
