"""A log as the motion of simulated motors: what is written for them."""

from pathlib import Path

import numpy as np
import pytest

from drivers.clock import MS
from drivers.sim.trace import TRACE, Playhead
from gateway.journal import Batch, Changes, Journal
from gateway.journal_reader import JournalLog
from gateway.log_reader import LogError
from gateway.recordings.motion import Motion
from gateway.state_dir import StateDir
from tests.gateway_parts import MOTORS, Numbering, make_config


def log_of(directory: Path, arm: str, motors: dict[int, str]) -> JournalLog:
    """A log in which each motor has three samples, at 1, 2 and 3 ns."""
    state = StateDir(directory)
    state.make()
    journal = Journal(state.journal, arm, motors, 1 << 30)
    numbering = Numbering(journal.stream, tuple(motors))
    for row in (1, 2, 3):
        records = numbering.records(tuple(motors))
        records["position_rad"], records["velocity_rad_s"] = row / 10, 2.0
        journal.commit(Changes(batch=Batch(row, records)))
    journal.close()
    return JournalLog(state, ["telemetry"], "beginning", follow=False)


async def test_a_motor_is_known_by_its_name_and_stands_behind_its_last_sample(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    log = log_of(tmp_path / "recorded", "other", {4: "joint2", 7: "elsewhere"})
    await Motion(config, log, speed=2.0).prepare()
    directory = StateDir(config.arm.state_dir).motion
    assert not (directory / "0.trace").exists()
    rows = np.fromfile(directory / "1.trace", TRACE)
    assert rows["at_ns"].tolist() == [1, 2, 3, 3 + 100 * MS]
    assert rows["position_rad"].tolist() == [0.1, 0.2, 0.3, 0.3]
    assert rows["velocity_rad_s"].tolist() == [2.0, 2.0, 2.0, 0.0]
    playhead = Playhead(directory / "playhead")
    assert (playhead.stands, playhead.now_ns()) == (True, 1)


async def test_what_comes_after_the_span_is_left_out(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    await Motion(config, log_of(tmp_path / "recorded", "other", MOTORS), until_ns=3).prepare()
    rows = np.fromfile(StateDir(config.arm.state_dir).motion / "0.trace", TRACE)
    assert rows["position_rad"].tolist() == [0.1, 0.2, 0.2]


@pytest.mark.parametrize(
    ("arm", "motors", "why"),
    [("arm1", MOTORS, "needs another name"), ("other", {0: "elsewhere"}, "no samples of joint1, joint2")],
)
async def test_a_log_that_is_its_own_or_has_none_of_its_motors_is_refused(
    arm: str, motors: dict[int, str], why: str, tmp_path: Path
) -> None:
    with pytest.raises(LogError, match=why):
        await Motion(make_config(tmp_path), log_of(tmp_path / "recorded", arm, motors)).prepare()
