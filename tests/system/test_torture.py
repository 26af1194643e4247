"""Faults at random, short: every record is accounted for. ``make torture`` does it for longer, with every fault.

The account itself has to find what is wrong: records are taken away from a topic and a journal, and it says which.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hil.torture.account import settle
from hil.torture.rig import Kept
from tests.conftest import Kafka
from tests.system.journal_file import write_journal
from tests.system.rig import create_topic, send
from tests.system.test_judge import STREAM, message

pytestmark = pytest.mark.at_full_rate

SECONDS = 6


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(
            "gateway-killed worker-killed way-cut way-stalled replies-swallowed motor-silent garbage bits-flipped"
            " wal-flipped-live",
            id="killed",
        ),
        pytest.param("disk-full journal-locked reader-stopped clock-stepped way-cut motor-silent", id="disk and clock"),
    ],
)
def test_faults_at_random_leave_nothing_unaccounted_for(tmp_path: Path, faults: str) -> None:
    command = [sys.executable, "-m", "hil.torture", "--nodes", "1", "--times", "0", "--minutes", str(SECONDS / 60)]
    command += ["--json", str(tmp_path / "report.json"), "--only", *faults.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert run["account"]["offered"] > 1000
    assert len({caused["fault"] for caused in run["caused"]}) >= 3


async def topic(kafka: Kafka, arm: str, *seqs: int) -> None:
    """A telemetry topic of one motor, and empty events and outcomes."""
    for name in ("telemetry", "events", "outcomes"):
        await create_topic(kafka.bootstrap, f"servo.{arm}.{name}", 1)
    await send(kafka.bootstrap, f"servo.{arm}.telemetry", [(0, b"joint1", message(seq)) for seq in seqs])


async def tell(kafka: Kafka, arm: str, **details: object) -> None:
    event = {"type": "telemetry.gap", "motor": "joint1", "at_ns": 1, **details}
    await send(kafka.bootstrap, f"servo.{arm}.events", [(0, b"joint1", json.dumps(event).encode())])


def settled(kafka: Kafka, arm: str, state: Path) -> tuple[int, int, int, int]:
    account = settle(kafka.bootstrap, arm, [state], Kept(), [], flipped=False)
    return account.offered, account.published, account.lost, account.told


async def test_what_the_journal_has_and_the_topic_has_not_is_lost(kafka: Kafka, arm_name: str, tmp_path: Path) -> None:
    await topic(kafka, arm_name, 1, 2)
    write_journal(tmp_path / "journal.db", STREAM, [[(0, message(seq))] for seq in (1, 2, 3, 4, 5)])
    assert await asyncio.to_thread(settled, kafka, arm_name, tmp_path) == (5, 2, 3, 0)
    await tell(kafka, arm_name, stream=STREAM, from_seq=3, to_seq=4)
    assert await asyncio.to_thread(settled, kafka, arm_name, tmp_path) == (5, 2, 1, 2)
    await tell(kafka, arm_name, count=7)
    assert await asyncio.to_thread(settled, kafka, arm_name, tmp_path) == (12, 2, 1, 9)
