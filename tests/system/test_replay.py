"""A log replayed into another arm's journal and into real Kafka: bit for bit, once, however often it is killed."""

import asyncio
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from math import pi
from pathlib import Path

import msgspec
import numpy as np
import pytest

from drivers.buses import CanSpec
from drivers.clock import MS, SECOND
from gateway import kafka as kafka_clients
from gateway import telemetry
from gateway.aside import set_aside
from gateway.config import Config, load, loads
from gateway.journal import Batch, Changes, Journal, JournalError, StoredEntry
from gateway.journal_reader import JournalLog
from gateway.kafka import TopicMismatch
from gateway.kafka_reader import KafkaLog
from gateway.log_reader import Entries, LogError, LogReader, Position, Positions, Samples, Start, Topic
from gateway.plans import worker_plans
from gateway.recordings.into_journal import into_journal
from gateway.recordings.into_kafka import into_kafka
from gateway.recordings.motion import as_virtual
from gateway.recordings.pace import Pace
from gateway.recordings.replay import WRITTEN, OpenTarget, Played, replay
from gateway.state_dir import StateDir, StateDirError
from hil import judge
from hil.arm import COMMAND
from hil.kafka import Broker
from tests.conftest import Kafka
from tests.gateway_parts import ARM, DEADLINE_S, KAFKA, MOTORS, wait_for
from tests.system.conftest import MakeArm
from tests.system.rig import create_topic, send

START_NS = 1_790_000_000_000_000_000
Source = Callable[[Topic], LogReader]
Held = dict[tuple[str, int], list[tuple[object, ...]]]
"""{(topic, partition): every record with its stream and number}"""


def write_journal(state: StateDir, rows: int, first_ns: int = START_NS) -> Journal:
    """A journal of arm1, or more of it: ``rows`` of both motors, with events of each and of the arm now and then."""
    state.make()
    journal = Journal(state.journal, "arm1", MOTORS, 1 << 30)
    for row in range(journal.row + 1, rows + 1):
        at_ns = first_ns + row * 5 * MS
        records = telemetry.blank(2)
        records["partition"] = (0, 1)
        records["stream"], records["seq"], records["sampled_at_ns"] = journal.stream, row, (at_ns, at_ns + 1)
        records["position_rad"] = (row / 1000, -row / 3000)
        records["torque_nm"] = float("nan")
        entries: list[StoredEntry] = []
        tenth = row // 10
        if row % 10 == 0:
            for partition, key, number in ((0, "*", 2 * tenth - 1), (0, "joint1", 2 * tenth), (1, "joint2", tenth)):
                event_ns = at_ns - number % 3 * 40 * MS  # times of events may fall
                value = msgspec.json.encode({"type": "test", "motor": key, "at_ns": event_ns})
                at = journal.entry + 1 + len(entries)
                entries.append(StoredEntry(at, "events", partition, number, event_ns, key, value))
            value = msgspec.json.encode({"motor": "nobody", "at_ns": at_ns})  # of a command to no motor there is
            at = journal.entry + 1 + len(entries)
            entries.append(StoredEntry(at, "outcomes", 0, tenth, at_ns, "nobody", value))
        journal.commit(Changes(batch=Batch(row, records), entries=entries))
    return journal


@pytest.fixture
def recorded(tmp_path: Path) -> StateDir:
    """The state directory of arm1, where 400 samples of each motor lie."""
    state = StateDir(tmp_path / "recorded")
    write_journal(state, 400).close()
    return state


def kafka_config(directory: Path, kafka: Kafka, arm: str) -> Config:
    text = ARM.replace('"arm1"', f'"{arm}"') + KAFKA.replace("broker:9092", kafka.bootstrap)
    return loads(text, directory / "arm.toml")


@pytest.fixture
def replayed_arm(tmp_path: Path, kafka: Kafka, arm_name: str) -> Config:
    """An arm with topics of its own, none of which is there yet."""
    return kafka_config(tmp_path, kafka, arm_name)


def broker(config: Config) -> str:
    assert config.kafka
    return config.kafka.bootstrap_servers[0]


def into(config: Config) -> OpenTarget:
    assert config.kafka
    return into_kafka(config.kafka, config.arm.name)


async def held(source: Source) -> Held:
    """Everything that a log holds."""
    found: Held = {}
    for topic in WRITTEN:
        async with asyncio.timeout(DEADLINE_S), source(topic) as log:
            async for part in log:
                if isinstance(part, Samples):
                    rows = [(part.motor, record.tobytes()) for record in part.records]
                    found.setdefault((part.topic, part.partition), []).extend(rows)
                elif isinstance(part, Entries):
                    found.setdefault((part.topic, part.partition), []).extend(entry[1:] for entry in part.entries)
    return found


def of_journal(place: StateDir | Path, start: Start = "beginning") -> Source:
    return lambda topic: JournalLog(place, [topic], start, follow=False)


def of_kafka(config: Config) -> Source:
    return lambda topic: KafkaLog(config, [topic], "beginning", follow=False)


async def play(source: Source, target: OpenTarget) -> Played:
    """Replay as fast as can be."""
    played = Played()
    async with asyncio.timeout(DEADLINE_S):
        await replay(source, target, Pace(None), played)
    return played


# --- what arrives -----------------------------------------------------------------------------------------------------


async def test_a_journal_holds_the_same_bit_for_bit_and_the_judge_finds_nothing_wrong(
    recorded: StateDir, tmp_path: Path
) -> None:
    state = StateDir(tmp_path / "replayed")
    played = await play(of_journal(recorded), into_journal(state, "arm2"))
    assert played.records == {"telemetry": 800, "events": 120, "outcomes": 40}
    assert await held(of_journal(state)) == await held(of_journal(recorded))
    for topic in ("telemetry", "events"):
        verdict = judge.judge_journal(state.journal, topic)
        assert verdict.ok, verdict
        assert verdict.arm == "arm2"


async def test_kafka_holds_the_same_bit_for_bit_and_the_judge_finds_nothing_wrong(
    recorded: StateDir, replayed_arm: Config
) -> None:
    arm, bootstrap = replayed_arm.arm.name, broker(replayed_arm)
    await play(of_journal(recorded), into(replayed_arm))
    assert await held(of_kafka(replayed_arm)) == await held(of_journal(recorded))
    assert (verdict := await judge.judge(bootstrap, arm)).ok, verdict
    assert (verdict := await judge.judge_entries(bootstrap, arm, "events")).ok, verdict
    async for record in judge.read(bootstrap, f"servo.{arm}.telemetry"):
        assert dict(record.headers) == {"servo-replayed": b"arm1"}


async def test_streams_follow_each_other_in_kafka_and_in_journals_set_aside(
    tmp_path: Path, replayed_arm: Config
) -> None:
    recorded = StateDir(tmp_path / "recorded")
    with closing(write_journal(recorded, 300)) as first:
        began: Positions = {(topic, partition): Position(first.stream, 0) for topic in WRITTEN for partition in (0, 1)}
    set_aside(recorded.journal, "test")
    write_journal(recorded, 200, START_NS + 10 * SECOND).close()
    two_streams = of_journal(recorded, began)

    await play(two_streams, into(replayed_arm))
    assert await held(of_kafka(replayed_arm)) == await held(two_streams)
    state = StateDir(tmp_path / "replayed")
    for count in (1000, 0):  # the second time all is there
        played = await play(of_kafka(replayed_arm), into_journal(state, "arm3"))
        assert played.records["telemetry"] == count
    assert await held(of_journal(state.path / "journal.aside-1")) == await held(
        of_journal(recorded.path / "journal.aside-1")
    )
    assert await held(of_journal(state.journal)) == await held(of_journal(recorded.journal))


def test_a_recording_is_replayed_as_the_log_that_it_recorded(tmp_path: Path, replayed_arm: Config) -> None:
    recorded = StateDir(tmp_path / "recorded")
    for rows in (9, 400):  # no motor has an event when the recording begins
        write_journal(recorded, rows).close()
        run("record", str(recorded.journal), "--out", str(tmp_path / "recording"), "--no-follow")
    state = StateDir(tmp_path / "replayed")
    for arm, *options in (
        ("arm2", "--state-dir", str(state.path)),
        (replayed_arm.arm.name, "--kafka", broker(replayed_arm)),
    ):
        run("replay", str(tmp_path / "recording"), "--into", arm, "--speed", "max", *options)
    assert asyncio.run(held(of_journal(state))) == asyncio.run(held(of_journal(recorded)))
    assert asyncio.run(held(of_kafka(replayed_arm))) == asyncio.run(held(of_journal(recorded)))


def run(*arguments: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr


# --- a replay that was killed -----------------------------------------------------------------------------------------


@contextmanager
def replaying(recorded: StateDir, arm: str, *options: str) -> Iterator[None]:
    """The program, killed at the end."""
    command = [*COMMAND, "replay", str(recorded.journal), "--into", arm, "--speed", "0.5", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield
        assert process.poll() is None, "it ended before it was killed"
    finally:
        process.kill()
        process.wait()


def finish(recorded: StateDir, arm: str, *options: str) -> None:
    run("replay", str(recorded.journal), "--into", arm, "--speed", "max", *options)


def test_a_killed_replay_into_a_journal_goes_on_without_gap_or_repeat(recorded: StateDir, tmp_path: Path) -> None:
    state = StateDir(tmp_path / "replayed")
    options = ("--state-dir", str(state.path))
    for rows in (20, 150):
        with replaying(recorded, "arm2", *options):
            wait_for(lambda least=rows: count_rows(state) >= least)  # type: ignore[misc]
    finish(recorded, "arm2", *options)
    assert asyncio.run(held(of_journal(state))) == asyncio.run(held(of_journal(recorded)))


def count_rows(state: StateDir) -> int:
    with suppress(sqlite3.OperationalError), closing(connect(state.journal)) as db:  # it is not there yet
        found: int = db.execute("SELECT count(*) FROM telemetry").fetchone()[0]
        return found
    return 0


def connect(journal: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{journal}?mode=ro", uri=True)


def test_a_killed_replay_into_kafka_goes_on_without_gap_or_repeat(recorded: StateDir, replayed_arm: Config) -> None:
    arm = replayed_arm.arm.name
    options = ("--kafka", broker(replayed_arm))
    for records in (20, 200):
        with replaying(recorded, arm, *options):
            wait_for(lambda least=records: asyncio.run(count_records(replayed_arm)) >= least)  # type: ignore[misc]
    finish(recorded, arm, *options)
    assert asyncio.run(held(of_kafka(replayed_arm))) == asyncio.run(held(of_journal(recorded)))
    assert (verdict := asyncio.run(judge.judge(broker(replayed_arm), arm))).ok, verdict


async def test_a_broker_that_goes_away_and_comes_back_has_everything_once(
    recorded: StateDir, tmp_path: Path, own_broker: Broker
) -> None:
    config = kafka_config(tmp_path, Kafka(own_broker.bootstrap), "arm2")
    told: list[Exception] = []
    playing = asyncio.create_task(replay(of_journal(recorded), into(config), Pace(0.5), Played(), failed=told.append))
    async with asyncio.timeout(2 * DEADLINE_S):
        while await count_records(config) < 50:  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.05)
        await asyncio.to_thread(own_broker.kill)
        await asyncio.to_thread(own_broker.start)
        await playing
    assert await held(of_kafka(config)) == await held(of_journal(recorded))


async def count_records(config: Config) -> int:
    with suppress(TopicMismatch):  # not there yet
        async with KafkaLog(config, ["telemetry"], "beginning", follow=False) as log:
            return log.left() or 0
    return 0


# --- what is refused --------------------------------------------------------------------------------------------------


async def test_an_arm_is_never_replayed_into_its_own_log(recorded: StateDir, tmp_path: Path, kafka: Kafka) -> None:
    own = kafka_config(tmp_path, kafka, "arm1")
    for target in (into_journal(StateDir(tmp_path / "other"), "arm1"), into(own)):
        with pytest.raises(LogError, match="needs another name"):
            await play(of_journal(recorded), target)


async def test_a_state_directory_where_a_gateway_runs_or_ran_is_refused_and_left_as_it_is(
    recorded: StateDir, tmp_path: Path
) -> None:
    state = StateDir(tmp_path / "gateway")
    write_journal(state, 10).close()
    before = state.journal.read_bytes()
    with pytest.raises(LogError, match="that of a gateway"):
        await play(of_journal(recorded), into_journal(state, "arm2"))
    with state.locked(), pytest.raises(StateDirError, match="a gateway runs this arm already"):
        await play(of_journal(recorded), into_journal(state, "arm2"))
    assert state.journal.read_bytes() == before


async def test_no_gateway_goes_on_with_a_replayed_journal(recorded: StateDir, tmp_path: Path) -> None:
    state = StateDir(tmp_path / "replayed")
    await play(of_journal(recorded), into_journal(state, "arm2"))
    with pytest.raises(JournalError, match="a replay, which no gateway goes on with"):
        Journal(state.journal, "arm2", MOTORS, 1 << 30)


async def test_a_journal_holds_the_replay_of_one_arm_and_one_source_alone(recorded: StateDir, tmp_path: Path) -> None:
    state = StateDir(tmp_path / "replayed")
    await play(of_journal(recorded), into_journal(state, "arm2"))
    with pytest.raises(LogError, match="'arm1', as arm 'arm2': a replay of 'arm1' as 'arm3'"):
        await play(of_journal(recorded), into_journal(state, "arm3"))
    other = StateDir(tmp_path / "other")
    write_journal(other, 10).close()
    with pytest.raises(LogError, match="the target holds stream"):
        await play(of_journal(other), into_journal(state, "arm2"))


async def test_topics_with_anything_else_in_them_are_refused_and_get_nothing(
    recorded: StateDir, replayed_arm: Config
) -> None:
    topic = replayed_arm.topic("events")
    await create_topic(broker(replayed_arm), topic, 2)
    await send(broker(replayed_arm), topic, [(1, b"joint2", b"{}")])
    with pytest.raises(LogError, match=f"topic {topic}, partition 1, offset 0: is no replay"):
        await play(of_journal(recorded), into(replayed_arm))
    assert await count_records(replayed_arm) == 0


async def test_topics_with_too_few_partitions_are_refused(recorded: StateDir, replayed_arm: Config) -> None:
    await create_topic(broker(replayed_arm), replayed_arm.topic("telemetry"), 1)
    with pytest.raises(TopicMismatch, match="has 1 partitions"):
        await play(of_journal(recorded), into(replayed_arm))


async def test_commands_and_what_has_no_number_are_left_out_and_counted(
    recorded: StateDir, tmp_path: Path, kafka: Kafka, arm_name: str, replayed_arm: Config
) -> None:
    await play(of_journal(recorded), into(replayed_arm))
    await create_topic(kafka.bootstrap, replayed_arm.topic("commands"), 2)
    await send(kafka.bootstrap, replayed_arm.topic("commands"), [(0, b"*", b"{}")] * 3)
    await send(kafka.bootstrap, replayed_arm.topic("outcomes"), [(0, b"*", b"{}")] * 2)
    again = kafka_config(tmp_path, kafka, f"{arm_name}-again")
    played = await play(of_kafka(replayed_arm), into(again))
    assert (played.commands, played.unnumbered) == (3, 2)
    assert played.records == {"telemetry": 800, "events": 120, "outcomes": 40}
    with pytest.raises(TopicMismatch, match="there is no topic"):
        await kafka_clients.partitions_of(again.kafka, again.topic("commands"))  # type: ignore[arg-type]


# --- as motors --------------------------------------------------------------------------------------------------------

COUNT_RAD = {"feetech_sts": 2 * pi / 4096, "damiao": 25 / 65535}
"""A count of the encoder, as each family tells it; config/simulated-arm.toml has both."""


def positions(journal: Path) -> dict[str, list[float]]:
    """{motor: every position}, oldest first."""

    async def read() -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        async with JournalLog(journal, ["telemetry"], "beginning", follow=False) as log:
            async for part in log:
                if isinstance(part, Samples):
                    found.setdefault(part.motor, []).extend(part.records["position_rad"].tolist())
        return found

    return asyncio.run(read())


def test_a_gateway_on_motors_that_live_through_a_log_polls_the_recorded_positions(
    make_arm: MakeArm, tmp_path: Path
) -> None:
    arm = make_arm()
    arm.start()
    arm.wait(lambda: min(arm.journal_ends().values()) > 100, "two seconds of samples")
    arm.stop()
    journal, again = arm.state / "journal.db", tmp_path / "again"
    said = arm.cli(
        "replay", str(journal), "--as-motors", str(arm.config), "--into", "virtual", "--state-dir", str(again)
    )
    assert said.returncode == 0, said.stderr
    assert (verdict := judge.judge_journal(again / "journal.db")).ok, verdict

    recorded, polled = positions(journal), positions(again / "journal.db")
    for motor, family in arm.families.items():
        then, now = np.array(recorded[motor]), polled[motor]
        at = 0
        for position_rad in now:
            near = np.flatnonzero(np.abs(then[at:] - position_rad) <= COUNT_RAD[family])
            assert near.size, f"{motor}: {position_rad} rad does not follow {then[at]} rad in the log"
            at += int(near[0])
        assert abs(now[-1] - then[-1]) <= COUNT_RAD[family]
        assert np.ptp(now) >= 0.95 * np.ptp(then)


def test_motors_live_through_no_log_of_their_own_arm(recorded: StateDir, tmp_path: Path, make_arm: MakeArm) -> None:
    arm = make_arm()
    options = ("--as-motors", str(arm.config), "--state-dir", str(tmp_path / "again"))
    said = arm.cli("replay", str(recorded.journal), "--into", "arm1", *options)
    assert said.returncode == 2
    assert "needs another name" in said.stderr


def test_whatever_a_configuration_says_its_buses_end_at_pseudo_terminals() -> None:
    real = load(Path(__file__).parents[2] / "config" / "real-arm.toml")
    links = Path("links")
    for plan in worker_plans(as_virtual(real, real.arm, Path("a.mcap")), links).values():
        where = plan.bus.channel if isinstance(plan.bus, CanSpec) else plan.bus.port
        assert where == str(links / plan.bus.name)
        assert not isinstance(plan.bus, CanSpec) or plan.bus.interface == "slcan"
