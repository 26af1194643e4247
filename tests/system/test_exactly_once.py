"""Nothing twice and nothing lost in a real broker, whatever a killed gateway still had on its way.

Most tests run the publisher alone, with a journal of its own and records made by hand: what it sends is known exactly.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from drivers.clock import SECOND, epoch_ns
from gateway import claim, flow, telemetry
from gateway.aside import set_aside, set_aside_before
from gateway.commands import Outcome, State
from gateway.config import Config
from gateway.events import EventType
from gateway.journal import Batch, Changes, Journal, JournalReader, Lost, ProducerState, StoredEntry
from gateway.producer import SEQUENCE_BITS
from gateway.publisher import Publisher
from gateway.recent import Recent
from hil.arm import Arm
from hil.judge import Verdict, judge, read
from hil.kafka import Broker
from hil.proxy import Proxy
from tests.gateway_parts import DEADLINE_S, MOTORS, Numbering, make_config, until
from tests.system.rig import command_record, produce, see, wait_event, wait_outcome

DAY_NS = 24 * 3600 * SECOND
YEAR_NS = 365 * DAY_NS


class Gateway:
    """A gateway without motors: its log, and its publisher while it runs."""

    def __init__(self, directory: Path, arm: str, bootstrap: str) -> None:
        directory.mkdir(exist_ok=True)
        config = make_config(directory, f'[kafka]\nbootstrap_servers = ["{bootstrap}"]\n')
        self.config: Config = config.model_copy(update={"arm": config.arm.model_copy(update={"name": arm})})
        self.path = directory / "journal.db"
        self.arm = arm
        self.told: list[tuple[str, str]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.when_up: Callable[[], None] = lambda: None
        self.lost: list[tuple[int, list[Lost]]] = []
        self.damage: list[tuple[Lost, list[int]]] = []  # and what the broker had by then
        self.began_ns = epoch_ns()
        self.shift_ns = 0
        self.owner = f"owner of {arm}"
        self._begin_stream()

    def _begin_stream(self) -> None:
        with closing(self.journal()) as journal:
            self.stream = journal.stream
        self._numbering = Numbering(self.stream)
        self.newest = 0  # number of each motor

    def set_aside(self) -> Path:
        """Its journal gives way to another."""
        aside = set_aside(self.path, "for a test").path
        self.shift_ns += self.newest  # times go on
        self._begin_stream()
        return aside

    def journal(self) -> Journal:
        return Journal(self.path, self.arm, MOTORS, 1 << 30)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Run"]:
        """A run of it, which ends without waiting for anything that is under way."""
        with closing(self.journal()) as journal, closing(JournalReader(self.path)) as reader:
            run = Run(self, journal, reader)
            task = asyncio.create_task(run.publisher.run())
            try:
                yield run
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def records(self, count: int) -> telemetry.Records:
        """The next records of both motors, so many each."""
        self.newest += count
        records = self._numbering.records(sorted([0, 1] * count))
        records["sampled_at_ns"] += self.began_ns + self.shift_ns  # or the broker removes them as too old
        return records

    def outcome(self, number: int) -> StoredEntry:
        """The outcome of a command to the first motor."""
        value = msgspec.json.encode(Outcome(f"c{number}", "joint1", State.DONE, 1, 1))
        return StoredEntry(number, "outcomes", 0, number, self.began_ns + self.shift_ns, "joint1", value)

    def changed(self, state: str, detail: str) -> None:
        self.told.append((state, detail))
        if state == "up":
            self.when_up()

    def identity(self) -> ProducerState:
        with closing(JournalReader(self.path)) as reader:
            state = reader.producer()
        assert state is not None
        return state

    def change_identity(self, change: Callable[[ProducerState], ProducerState]) -> None:
        with closing(self.journal()) as journal:
            journal.commit(Changes(producer=change(self.identity())))

    def change_bases(self, change: Callable[[int], int]) -> None:
        """Change where the lanes' Kafka sequence numbers begin."""
        self.change_identity(lambda s: s._replace(bases={at: change(base) for at, base in s.bases.items()}))


class Run:
    """One run of a gateway."""

    def __init__(self, gateway: Gateway, journal: Journal, reader: JournalReader) -> None:
        self.reader = reader
        self._journal = journal
        self._recent = Recent(journal.row, journal.entry)
        self._gateway = gateway
        self.publisher = Publisher(
            gateway.config,
            reader,
            dict(journal.heads),
            self._recent,
            set_aside_before(gateway.path),
            gateway.owner,
            bookmark=lambda *at: None,
            changed=gateway.changed,
            event=lambda kind, **details: gateway.events.append((kind, details)),
            damage_told=self._damage_told,
            lost=self._lost,
            remember=self._remember,
        )

    async def _damage_told(self, lost: Lost) -> None:
        self._gateway.damage.append((lost, [self.publisher.acknowledged(motor) for motor in MOTORS]))

    async def _lost(self, stream: int, lost: Sequence[Lost], why: str) -> None:
        self._gateway.lost.append((stream, list(lost)))

    async def _remember(self, state: ProducerState) -> None:
        self._journal.commit(Changes(producer=state))

    def write(self, count: int) -> None:
        """Append so many records of each motor to the log, as one row."""
        batch = Batch(self._recent.row + 1, self._gateway.records(count))
        self._journal.commit(Changes(batch=batch))
        self._recent.append(batch, ())
        self._recent.saved(batch.id, 0)
        self.publisher.committed(())

    def tell(self) -> None:
        """Append an outcome to the log."""
        entry = self._gateway.outcome(1)
        self._journal.commit(Changes(entries=[entry]))
        self._recent.append(None, [entry])
        self._recent.saved(self._recent.row, entry.id)
        self.publisher.committed([entry])

    async def up(self) -> None:
        """Return when it publishes."""
        await until(lambda: self.publisher.state == "up")

    async def acknowledged(self) -> None:
        """Return when the broker has everything."""
        await until(lambda: all(self.publisher.acknowledged(motor) == self._gateway.newest for motor in MOTORS))


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as made:
        yield made


@pytest.fixture(scope="module")
def broker(proxy: Proxy) -> Iterator[Broker]:
    """A broker with a listener behind the proxy."""
    # forgets producers of old records at once; usually it looks for them every ten minutes
    with Broker({"producer.id.expiration.check.interval.ms": "200"}, proxy=proxy.address) as made:
        proxy.target = made.behind_proxy
        yield made


@pytest.fixture
def gateway(tmp_path: Path, arm_name: str, broker: Broker, proxy: Proxy) -> Iterator[Gateway]:
    """Reaches the broker through the proxy."""
    yield Gateway(tmp_path, arm_name, proxy.address)
    proxy.flow()


@pytest.fixture
def quick_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"RENEW_S": 0.2, "LAPSE_S": 2.0, "TRUST_S": 1.0}.items():
        monkeypatch.setattr(claim, name, seconds)


async def judged(broker: Broker, gateway: Gateway) -> Verdict:
    """What the broker holds of the gateway's telemetry; everything was written by it once at most."""
    found = await judge(broker.bootstrap, gateway.arm)
    assert (found.total("repeats"), found.total("disorders"), found.total("other_faults")) == (0, 0, 0), str(found)
    return found


async def hold_what_a_killed_run_sent(gateway: Gateway, proxy: Proxy) -> None:
    """A run publishes ten records of each motor; the next ones are on their way when it is killed."""
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
        proxy.stall(replies=False)
        before = proxy.taken
        run.write(3)
        await until(lambda: proxy.taken - before > 6 * telemetry.MESSAGE_SIZE)
    proxy.let_new_pass()


async def deliver(broker: Broker, gateway: Gateway, proxy: Proxy) -> None:
    """Release what is held, and return when the broker has dealt with it: it answers one after the other."""
    proxy.flow()
    async with gateway.running() as run:
        run.write(1)
        await run.acknowledged()


# --- what a killed gateway had on its way -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("released", "more"),
    [("before it asks the tails", 4), ("before it sends", 0), ("before it sends", 4), ("when it has sent", 4)],
)
async def test_what_a_killed_gateway_had_on_its_way_comes_once(
    gateway: Gateway, broker: Broker, proxy: Proxy, released: str, more: int
) -> None:
    await hold_what_a_killed_run_sent(gateway, proxy)
    if released == "before it asks the tails":
        proxy.flow()
    elif released == "before it sends":
        gateway.when_up = proxy.flow
    async with gateway.running() as run:
        if more:
            run.write(more)  # the batch is longer than the one on its way
        await run.acknowledged()
    await deliver(broker, gateway, proxy)
    found = await judged(broker, gateway)
    assert found.ok
    assert found.records == 2 * gateway.newest


async def test_a_producer_without_a_past_would_repeat_it(
    gateway: Gateway, broker: Broker, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test above guards against: without the identity the broker takes both."""
    monkeypatch.setattr(JournalReader, "producer", lambda _: None)
    await hold_what_a_killed_run_sent(gateway, proxy)
    async with gateway.running() as run:
        await run.acknowledged()
    await deliver(broker, gateway, proxy)
    assert (await judge(broker.bootstrap, gateway.arm)).total("repeats") > 0


async def test_what_was_on_its_way_does_not_come_behind_a_gap(gateway: Gateway, broker: Broker, proxy: Proxy) -> None:
    """The journal lost what the killed run had sent, and more: those numbers are left out."""
    await hold_what_a_killed_run_sent(gateway, proxy)
    with closing(sqlite3.connect(gateway.path)) as db:
        db.execute("DELETE FROM telemetry WHERE id > 1")
        db.commit()
    gateway.records(2)
    for _ in range(2):  # the second run finds its place at the beginning of the epoch, or behind it
        async with gateway.running() as run:
            run.write(4)
            await run.acknowledged()
    await deliver(broker, gateway, proxy)
    found = await judged(broker, gateway)
    assert [(part.gaps, part.last_seq) for part in found.partitions] == [(5, gateway.newest)] * 2
    assert gateway.damage[0] == (Lost(0, 11, 15), [10, 10])  # told before anything behind it is sent
    assert [lost for lost, _ in gateway.damage] == [Lost(0, 11, 15), Lost(1, 11, 15)]


async def test_a_damaged_outcome_is_told_and_left_out(gateway: Gateway, broker: Broker) -> None:
    with closing(gateway.journal()) as journal:
        journal.commit(Changes(entries=[gateway.outcome(number) for number in (1, 2, 3)]))
        journal.db.execute("UPDATE entries SET key = CAST(x'ff' AS TEXT) WHERE id = 2")
    async with gateway.running() as run:
        await until(lambda: run.publisher.acknowledged(0, "outcomes") == 3)
    assert [lost for lost, _ in gateway.damage] == [Lost(0, 2, 2, "outcomes")]
    seqs = [dict(r.headers)["servo-seq"] async for r in read(broker.bootstrap, f"servo.{gateway.arm}.outcomes")]
    assert seqs == [f"{gateway.stream}/{seq}".encode() for seq in (1, 3)]


# --- a journal that was set aside -------------------------------------------------------------------------------------


def write_unseen(gateway: Gateway, count: int) -> None:
    """Records of each motor, a row each, and an outcome, which no publisher learns of."""
    with closing(gateway.journal()) as journal:
        for _ in range(count):
            journal.commit(Changes(batch=Batch(journal.row + 1, gateway.records(1))))
        journal.commit(Changes(entries=[gateway.outcome(journal.entry + 1)]))


async def published(broker: Broker, gateway: Gateway, stream: int) -> dict[int, list[int]]:
    """{partition: sequence numbers of a stream}"""
    found: dict[int, list[int]] = {motor: [] for motor in MOTORS}
    async for record in read(broker.bootstrap, f"servo.{gateway.arm}.telemetry"):
        values = telemetry.decode([record.value], record.partition)[0]
        if values["stream"] == stream:
            found[record.partition].append(int(values["seq"]))
    return found


async def test_what_the_broker_lacks_of_a_journal_that_was_set_aside_comes_before_its_successor(
    gateway: Gateway, broker: Broker
) -> None:
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
    write_unseen(gateway, 5)
    first = gateway.stream
    gateway.set_aside()
    write_unseen(gateway, 4)  # no broker all its life
    second = gateway.stream
    gateway.set_aside()
    for _ in range(2):  # the second time there is nothing to be done
        async with gateway.running() as run:
            assert list(run.publisher.before.values()) == [False, False]
            run.write(3)
            await run.acknowledged()
            assert list(run.publisher.before.values()) == [True, True]
    found = await judged(broker, gateway)
    assert (found.ok, found.streams, gateway.lost) == (True, 3, [])
    assert await published(broker, gateway, first) == {motor: list(range(1, 16)) for motor in MOTORS}
    assert await published(broker, gateway, second) == {motor: list(range(1, 5)) for motor in MOTORS}
    outcomes = [record.value async for record in read(broker.bootstrap, f"servo.{gateway.arm}.outcomes")]
    assert len(outcomes) == 2


async def test_what_a_killed_gateway_had_on_its_way_comes_once_also_if_its_journal_was_set_aside(
    gateway: Gateway, broker: Broker, proxy: Proxy
) -> None:
    await hold_what_a_killed_run_sent(gateway, proxy)
    gateway.set_aside()
    async with gateway.running() as run:
        run.write(4)
        await run.acknowledged()
    await deliver(broker, gateway, proxy)
    found = await judged(broker, gateway)
    assert (found.ok, found.records) == (True, 2 * (13 + gateway.newest))


async def test_what_cannot_be_read_of_a_journal_that_was_set_aside_is_told(gateway: Gateway, broker: Broker) -> None:
    write_unseen(gateway, 9)
    first = gateway.stream
    path = gateway.set_aside()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE telemetry SET crc = crc + 1 WHERE id IN (3, 4)")
    async with gateway.running() as run:
        run.write(2)
        await run.acknowledged()
    assert sorted(gateway.lost) == [(first, [Lost(0, 3, 4)]), (first, [Lost(1, 3, 4)])]
    assert await published(broker, gateway, first) == {motor: [1, 2, 5, 6, 7, 8, 9] for motor in MOTORS}


# --- the identity and the broker --------------------------------------------------------------------------------------


async def test_runs_are_one_producer_also_when_the_broker_was_killed(gateway: Gateway, broker: Broker) -> None:
    identities = set()
    for _ in range(2):
        async with gateway.running() as run:
            run.write(10)
            await run.acknowledged()
            identities.add(gateway.identity()[:3])
            if len(gateway.told) == 1:
                broker.kill()
                broker.start()
    assert len(identities) == 1
    assert (await judged(broker, gateway)).records == 40


async def test_kafka_sequence_numbers_go_on_behind_the_last_one(gateway: Gateway, broker: Broker) -> None:
    async with gateway.running() as run:
        await run.up()
    last = (1 << SEQUENCE_BITS) - 1
    gateway.change_bases(lambda base: base - last + 7)
    for _ in range(3):
        async with gateway.running() as run:
            run.write(5)  # the second crosses it
            await run.acknowledged()
    assert (await judged(broker, gateway)).ok


async def test_a_topic_that_was_removed_is_filled_again(gateway: Gateway, broker: Broker) -> None:
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
    await admin(broker, lambda client: client.delete_topics([gateway.config.topic("telemetry")]))
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
    assert (await judged(broker, gateway)).records == 40


async def test_a_producer_that_the_broker_has_forgotten_goes_on(gateway: Gateway, broker: Broker) -> None:
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
    gateway.change_identity(lambda state: state._replace(pid=state.pid + 1_000_000))
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
    assert (await judged(broker, gateway)).ok


@pytest.mark.parametrize("shift", [100, 1 << SEQUENCE_BITS, 2 << SEQUENCE_BITS])
async def test_a_place_that_the_broker_does_not_accept_is_given_up_for_a_new_identity(
    gateway: Gateway, broker: Broker, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    """As with a state directory that was copied: numbers that do not fit, an epoch too low, and before the first."""
    monkeypatch.setattr(flow, "HIDDEN_NS", 0)
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
        gateway.records(1)  # a gap: the epoch after the first
        run.write(10)
        await run.acknowledged()
    before = gateway.identity()
    gateway.change_bases(lambda base: base + shift)
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
    assert gateway.identity().pid != before.pid
    assert [part.gaps for part in (await judged(broker, gateway)).partitions] == [1, 1]


# --- the disk, and the broker's own limits ----------------------------------------------------------------------------


async def test_a_disk_that_cannot_be_read_stops_nothing_that_is_in_memory(gateway: Gateway, broker: Broker) -> None:
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
        run.reader.close()
        run.write(10)
        await run.acknowledged()
        broker.kill()
        broker.start()
        run.write(10)
        await run.acknowledged()
    assert (await judged(broker, gateway)).records == 60


@pytest.mark.parametrize("shift_ns", [0, -2 * DAY_NS])
async def test_what_the_broker_took_and_gave_no_answer_to_comes_once_also_if_it_is_old(
    gateway: Gateway, broker: Broker, proxy: Proxy, shift_ns: int
) -> None:
    """A broker forgets producers of old records, and would take the same batch again."""
    gateway.shift_ns = shift_ns
    async with gateway.running() as run:
        run.write(10)
        await run.acknowledged()
        proxy.stall(requests=False)
        run.write(3)
        async with asyncio.timeout(DEADLINE_S):
            while (await judge(broker.bootstrap, gateway.arm)).records < 26:
                pass
        await asyncio.sleep(1)  # until it has forgotten
        proxy.cut()
        proxy.flow()
        run.write(3)
        await run.acknowledged()
    assert (await judged(broker, gateway)).records == 2 * 16


@pytest.mark.parametrize(("limit", "shift_ns"), [("before", -YEAR_NS), ("after", YEAR_NS)])
async def test_records_whose_time_the_broker_refuses_are_sent_without_it(
    gateway: Gateway, broker: Broker, limit: str, shift_ns: int
) -> None:
    topic, outcomes = gateway.config.topic("telemetry"), gateway.config.topic("outcomes")
    settings = {f"message.timestamp.{limit}.max.ms": "3600000"}
    topics = [NewTopic(name, 2, 1, topic_configs=settings) for name in (topic, outcomes)]
    await admin(broker, lambda client: client.create_topics(topics))
    gateway.shift_ns = shift_ns
    async with gateway.running() as run:
        run.tell()
        await until(lambda: run.publisher.acknowledged(0, "outcomes") == 1)
        for _ in range(3):
            run.write(10)
            await run.acknowledged()
    found = await judged(broker, gateway)
    assert found.ok
    assert found.records == 60
    assert {(kind, details["topic"]) for kind, details in gateway.events} == {
        (EventType.KAFKA_TIMESTAMP_REFUSED, outcomes)
    }
    assert [record.timestamp async for record in read(broker.bootstrap, outcomes)] == [-1]
    assert [record.timestamp async for record in read(broker.bootstrap, topic)] == [-1] * 60


# --- two gateways for one arm -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_claims")
async def test_a_gateway_that_was_cut_off_and_replaced_yields(
    gateway: Gateway, broker: Broker, proxy: Proxy, tmp_path: Path
) -> None:
    other = Gateway(tmp_path / "other", gateway.arm, broker.bootstrap)
    async with gateway.running() as first:
        first.write(10)
        await first.acknowledged()
        async with other.running() as second:
            await until(lambda: second.publisher.state == "contested")
            assert str(gateway.stream) in other.told[-1][1]
            assert first.publisher.claim.ours()
            assert not second.publisher.claim.ours()
            proxy.cut()
            second.write(10)
            await second.acknowledged()
            assert not first.publisher.claim.ours()
            first.write(10)
            proxy.flow()
            await until(lambda: first.publisher.state == "contested")
            assert str(other.stream) in gateway.told[-1][1]
            assert not first.publisher.claim.ours()
            second.write(10)
            await second.acknowledged()
        await first.up()  # the other has ended in order, and given up its claim
        first.write(10)
        await first.acknowledged()
    found = await judge(broker.bootstrap, gateway.arm)
    assert (found.streams, found.total("repeats"), found.total("gaps")) == (2, 0, 0), str(found)
    assert found.records == 2 * (gateway.newest + other.newest)


def test_of_two_gateways_for_one_arm_one_publishes_and_the_other_takes_over(
    broker: Broker, tmp_path: Path, arm_name: str
) -> None:
    first, second = (Arm(arm_name, tmp_path / name, broker.bootstrap, calm=True) for name in ("first", "second"))
    try:
        first.start()
        first.wait_status(lambda status: status["kafka"]["state"] == "up", "connected to the broker")
        second.start(online=False)
        second.wait_status(lambda status: status["kafka"]["state"] == "contested", "contested")
        produce(first, "commands", 0, [command_record("once", "nobody", 0.0, ttl_ms=60_000, age_ms=0)])
        wait_outcome(first, "once")
        with closing(JournalReader(second.state / "journal.db")) as reader:
            assert reader.partition_entries("outcomes", 0, 0, 1) == [], "the other takes no commands"
        streams = {sample.stream for samples in see(first).of.values() for sample in samples}
        assert len(streams) == 1
        first.kill()
        second.wait_status(lambda status: status["kafka"]["state"] == "up", "took over")
        contested = wait_event(second, "kafka.contested")
        assert str(*streams) in contested["detail"]
        second.stop()
        found = see(second).verdict
        assert found.streams == 2
        assert [found.total(kind) for kind in ("gaps", "repeats", "disorders")] == [0, 0, 0], str(found)
    finally:
        assert not [*first.close(), *second.close()]


async def admin(broker: Broker, act: Callable[[AIOKafkaAdminClient], Awaitable[Any]]) -> None:
    """Do something with an admin client."""
    client = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await client.start()
    try:
        await act(client)
    finally:
        await client.close()
