"""Recording a gateway that runs: killed, stopped and gone on with; from Kafka; and the whole round with replay."""

import asyncio
import functools
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from mcap.reader import make_reader

from gateway.config import Config
from gateway.journal_reader import JournalLog
from gateway.kafka import ensure_topics
from gateway.kafka_reader import KafkaLog
from gateway.log_reader import TOPICS, Entries, LogEntry, LogError, LogReader, Part, Samples, Start, Topic
from gateway.recordings.file import RecordingFile
from gateway.recordings.into_journal import into_journal
from gateway.recordings.into_kafka import into_kafka
from gateway.recordings.reader import RecordingLog
from gateway.recordings.recorder import Recorder
from gateway.source import IN_JOURNAL
from gateway.state_dir import StateDir
from hil.arm import COMMAND, Arm
from tests.conftest import Kafka
from tests.system.conftest import MakeArm
from tests.system.rig import Terminal, send
from tests.system.test_replay import held, kafka_config, play, write_journal


def of_recording(directory: Path, topic: Topic) -> LogReader:
    return RecordingLog(directory, [topic])


def recorded_bytes(directory: Path) -> int:
    """How much is reported written."""
    whole = 0
    for path in directory.glob("*.mcap"):
        if path.stat().st_size:  # else it is just begun
            with closing(RecordingFile(path)) as file:
                whole += file.whole
    return whole


@contextmanager
def recording(arm: Arm, out: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [*COMMAND, "record", str(arm.config), "--out", str(out), *options]
    with subprocess.Popen(command, cwd=arm.directory, env=arm.environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def test_recorder_that_is_killed_again_and_again_leaves_neither_gap_nor_repeat(
    make_arm: MakeArm, tmp_path: Path
) -> None:
    arm, out = make_arm(), tmp_path / "recording"
    arm.start()
    for number in range(5):
        before = recorded_bytes(out)
        with recording(arm, out) as process:
            arm.wait(lambda before=before: recorded_bytes(out) > before + 5_000, "a second's recording")  # type: ignore[misc]
            process.kill()
        if number == 2:  # the log goes on in the same journal
            arm.kill()
            arm.start()
    arm.stop()
    ended = arm.cli("record", str(arm.config), "--out", str(out), "--no-follow")
    assert ended.returncode == 0, ended.stderr

    state = StateDir(arm.state)
    everything = asyncio.run(held(lambda topic: JournalLog(state, [topic], "beginning", follow=False)))
    assert asyncio.run(held(functools.partial(of_recording, out))) == everything
    seqs = asyncio.run(numbers(RecordingLog(out, ["telemetry"])))
    assert len(seqs) == len(arm.motors)
    for motor, found in seqs.items():
        assert found == list(range(1, len(found) + 1)), motor
        assert len(found) > 100
    assert len(list(out.glob("*.mcap"))) == 1  # each went on in the file of the one before
    for path in out.glob("*.mcap"):
        with path.open("rb") as file:
            summary = make_reader(file, validate_crcs=True).get_summary()
            assert summary
            assert summary.statistics
            assert summary.statistics.message_count == sum(map(len, everything.values()))


async def numbers(log: LogReader) -> dict[str, list[int]]:
    """{motor: the number of each of its samples}; fails if anything was missed."""
    found: dict[str, list[int]] = {}
    async for part in read(log):
        assert isinstance(part, Samples)
        found.setdefault(part.motor, []).extend(part.records["seq"].tolist())
    return found


def test_on_a_terminal_it_tells_what_it_has_written_and_ctrl_c_finishes_the_file(
    make_arm: MakeArm, tmp_path: Path
) -> None:
    arm, out = make_arm(), tmp_path / "recording"
    arm.start()
    terminal = Terminal([*COMMAND, "record", str(arm.config), "--out", str(out)], arm.environment, arm.directory)
    try:
        terminal.wait(lambda lines: any("/s, newest" in line for line in lines), "what is written")
        assert terminal.press_ctrl_c() == 0
        assert "records, " in [line for line in terminal.lines if line.strip()][-1]
    finally:
        terminal.close()
    (path,) = out.glob("*.mcap")
    with closing(RecordingFile(path)) as file:
        assert file.finished


# --- Kafka ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, kafka: Kafka, arm_name: str) -> Config:
    return kafka_config(tmp_path, kafka, arm_name)


async def record(directory: Path, open_log: Callable[[Start], LogReader]) -> None:
    """Record what a log holds."""
    with Recorder(directory, rotate_bytes=20_000) as recorder:
        await recorder.record(open_log, "beginning")


def in_journal(state: StateDir) -> Callable[[Start], LogReader]:
    return lambda start: JournalLog(state, IN_JOURNAL, start, follow=False)


def in_kafka(config: Config, topics: tuple[Topic, ...] = IN_JOURNAL) -> Callable[[Start], LogReader]:
    return lambda start: KafkaLog(config, topics, start, follow=False)


async def test_round_through_recordings_kafka_and_a_journal_is_bit_for_bit(tmp_path: Path, config: Config) -> None:
    state, back = StateDir(tmp_path / "recorded"), StateDir(tmp_path / "back")
    write_journal(state, 400).close()
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    await record(first, in_journal(state))
    everything = await held(functools.partial(of_recording, first))
    assert everything == await held(lambda topic: JournalLog(state, [topic], "beginning", follow=False))
    assert sum(map(len, everything.values())) == 960

    assert config.kafka
    await play(functools.partial(of_recording, first), into_kafka(config.kafka, config.arm.name))
    await record(second, in_kafka(config))
    assert await held(functools.partial(of_recording, second)) == everything

    await play(functools.partial(of_recording, second), into_journal(back, "arm2"))
    await record(third, in_journal(back))
    assert await held(functools.partial(of_recording, third)) == everything
    with pytest.raises(LogError, match="holds a recording of the journal"):
        await record(third, in_kafka(config))


async def test_commands_and_what_is_none_are_recorded_as_they_are_and_gone_on_with(
    tmp_path: Path, config: Config
) -> None:
    await ensure_topics(config)
    topic = config.topic("commands")
    batch = [(1, b"joint2", b'{"id": "a1", "motor": "joint2"}'), (0, None, b"\xff"), (1, b"any \x00 key", b"{}")]
    for number in range(2):
        await send(config.kafka.bootstrap_servers[0], topic, batch)  # type: ignore[union-attr]
        await record(tmp_path / "recording", in_kafka(config, TOPICS))
        found = [part async for part in read(RecordingLog(tmp_path / "recording", ["commands"]))]
        live = [part async for part in read(KafkaLog(config, ["commands"], "beginning", follow=False))]
        assert entries(found) == entries(live)
        assert len(entries(found)) == 3 * (number + 1)


async def read(log: LogReader) -> AsyncIterator[Part]:
    async with log:
        async for part in log:
            yield part


def entries(parts: Sequence[Part]) -> list[tuple[int, LogEntry]]:
    found = [(part.partition, entry) for part in parts if isinstance(part, Entries) for entry in part.entries]
    return sorted(found, key=lambda entry: entry[0])
