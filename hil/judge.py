"""The judge: proves from outside that an arm's telemetry in Kafka is complete and in order, or says where it is not.

``python -m hil.judge --bootstrap HOST:PORT --arm NAME`` reads servo.<arm>.telemetry from its beginning to where it ends
now. It stands for anybody's program: it knows the contract (config/telemetry.proto, or JSON with the same names) and
nothing of the gateway, imports nothing of it, and reads with aiokafka and google.protobuf.

Proved for each partition:
- one key: the motor's name, which has no other partition;
- for each (stream, motor), seq 1, 2, 3, ... without gap, repeat or disorder;
- sampled_at_ns that never falls, and finite positions;
- nothing else in between.

A gap that an event ``telemetry.gap`` names is counted apart: it is a loss, but one that was told.
"""

import argparse
import asyncio
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from grpc_tools import protoc

PROTO = Path(__file__).parent.parent / "config" / "telemetry.proto"
FAULTS_KEPT = 50  # each counts; so many are shown
ANSWER_S = 30.0  # a broker that brings nothing for so long does not answer


class JudgeError(Exception):
    """There is nothing to judge, or the broker does not answer."""


class FaultKind(StrEnum):
    """What can be wrong."""

    GAP = "gap"  # a sequence number is missing
    REPEAT = "repeat"  # a sequence number comes again
    DISORDER = "disorder"  # one comes after a higher one, or a stream comes back after another
    TIME = "falling time"
    KEY = "key"  # not the motor's name, or two motors in a partition, or one in two
    POSITION = "position"  # not finite
    FOREIGN = "foreign"  # no telemetry record
    EMPTY = "empty"  # no record at all


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, and its exact place."""

    kind: FaultKind
    partition: int
    offset: int
    expected: str
    found: str

    def __str__(self) -> str:
        place = f"partition {self.partition}, offset {self.offset}"
        return f"{place}: {self.kind}: expected {self.expected}, found {self.found}"


class Sample(NamedTuple):
    """A record that could be read."""

    partition: int
    offset: int
    motor: str
    stream: int
    seq: int
    sampled_at_ns: int
    position_rad: float
    velocity_rad_s: float
    temperature_c: float
    status: int
    vendor_error: int


@dataclass(frozen=True, slots=True)
class PartitionVerdict:
    """What one partition holds. ``gaps`` and ``told_gaps`` count missing records, the latter named by an event."""

    partition: int
    motor: str
    records: int
    last_seq: int  # of the newest stream
    span_s: float
    rate_hz: float
    streams: int
    gaps: int
    told_gaps: int
    repeats: int
    disorders: int
    other_faults: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the whole topic holds. ``faults`` are the first ones; ``fault_count`` counts all, told gaps left out."""

    arm: str
    partitions: tuple[PartitionVerdict, ...]
    streams: int
    faults: tuple[Fault, ...]
    fault_count: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.fault_count == 0

    @property
    def records(self) -> int:
        """Of all partitions."""
        return sum(partition.records for partition in self.partitions)

    def total(self, column: str) -> int:
        """The sum of a column of the partitions."""
        return sum(getattr(partition, column) for partition in self.partitions)

    def __str__(self) -> str:
        columns = [name for name in PartitionVerdict.__dataclass_fields__ if name != "other_faults"]
        rows = [[_cell(getattr(partition, name)) for name in columns] for partition in self.partitions]
        lines = [
            table([*columns, "other"], [[*r, str(p.other_faults)] for r, p in zip(rows, self.partitions, strict=True)])
        ]
        lines += map(str, self.faults)
        if self.fault_count > len(self.faults):
            lines.append(f"... and {self.fault_count - len(self.faults)} more")
        wrong = "nothing is wrong" if self.ok else f"{self.fault_count} faults"
        return "\n".join([*lines, f"arm {self.arm}: {self.records} records, {self.streams} streams: {wrong}"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns as wide as they have to be; words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        words = (c.ljust(w) if c[:1].isalpha() else c.rjust(w) for c, w in zip(cells, widths, strict=True))
        return "  ".join(words).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


# --- the contract --------------------------------------------------------------------------------------------------


class Unreadable(Exception):
    """A record that is no telemetry; the message says why."""


@cache
def telemetry_class() -> Any:
    """The class of message ``servo.Telemetry``, compiled from config/telemetry.proto."""
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory, "telemetry.pb")
        arguments = ["protoc", f"--proto_path={PROTO.parent}", f"--descriptor_set_out={compiled}", PROTO.name]
        if status := protoc.main(arguments):
            raise JudgeError(f"protoc does not take {PROTO}: exit status {status}")
        files = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("servo.Telemetry"))


@cache
def message_size() -> int:
    """Bytes of a message: every field is written, a byte of tag and the value in its fixed width."""
    fixed32 = {descriptor_pb2.FieldDescriptorProto.TYPE_FIXED32, descriptor_pb2.FieldDescriptorProto.TYPE_FLOAT}
    return sum(5 if field.type in fixed32 else 9 for field in telemetry_class().DESCRIPTOR.fields)


@cache
def field_names() -> tuple[str, ...]:
    """Names of the message's fields, which are those of the JSON format."""
    return tuple(field.name for field in telemetry_class().DESCRIPTOR.fields)


def read_sample(record: ConsumerRecord) -> Sample:
    """The sample in a record of the telemetry topic, in either format. Raises Unreadable."""
    value = record.value or b""
    try:
        motor = (record.key or b"").decode()
        values = _from_json(value, motor) if value.startswith(b"{") else _from_protobuf(value)
    except (DecodeError, ValueError) as error:
        raise Unreadable(str(error)) from error
    if values["stream"] <= 0 or values["seq"] <= 0:
        raise Unreadable(f"stream {values['stream']}, seq {values['seq']}: both count from 1")
    return Sample(record.partition, record.offset, motor, *(values[name] for name in Sample._fields[3:]))


def _from_protobuf(value: bytes) -> dict[str, Any]:
    if len(value) != message_size():
        raise Unreadable(f"{len(value)} bytes, servo.Telemetry has {message_size()}")
    message = telemetry_class().FromString(value)
    return {name: getattr(message, name) for name in field_names()}


def _from_json(value: bytes, motor: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(value)
    if values.keys() != {"motor", *field_names()}:
        odd = ", ".join(sorted(values.keys() ^ {"motor", *field_names()}))
        raise Unreadable(f"JSON with names missing or unknown: {odd}")
    if values["motor"] != motor:
        raise Unreadable(f"motor {values['motor']!r} under the key {motor!r}")
    for name in ("stream", "seq", "sampled_at_ns"):
        if type(values[name]) is not int:
            raise Unreadable(f"{name} is {values[name]!r}, no integer")
    return {name: math.nan if number is None else number for name, number in values.items()}


# --- the proof -----------------------------------------------------------------------------------------------------


class _Gap(NamedTuple):
    """Sequence numbers that did not come when they were due."""

    stream: int
    from_seq: int
    to_seq: int
    offset: int  # of the record that came instead
    found: int

    @property
    def missing(self) -> int:
        return self.to_seq - self.from_seq + 1


class _Told(NamedTuple):
    """A loss that an event names."""

    motor: str
    stream: int
    from_seq: int
    to_seq: int


@dataclass(slots=True)
class _Partition:
    """The proof for one partition; give it every record in the order of the offsets."""

    number: int
    begins_at: int  # the offset of its oldest record; above 0 where older ones have expired
    motor: str = ""
    records: int = 0
    stream: int = 0
    highest: dict[int, int] = field(default_factory=dict)  # stream -> seq
    gaps: list[_Gap] = field(default_factory=list)
    first_ns: int = 0
    last_ns: int = 0
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[FaultKind] = field(default_factory=Counter)

    def fault(self, kind: FaultKind, offset: int, expected: object, found: object) -> None:
        self.counts[kind] += 1
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(Fault(kind, self.number, offset, str(expected), str(found)))

    def take(self, record: ConsumerRecord) -> Sample | None:
        self.records += 1
        try:
            sample = read_sample(record)
        except Unreadable as error:
            self.fault(
                FaultKind.FOREIGN, record.offset, "a telemetry record", f"{(record.value or b'')[:24]!r}: {error}"
            )
            return None
        if not self.first_ns:
            self.motor, self.first_ns, self.last_ns = sample.motor, sample.sampled_at_ns, sample.sampled_at_ns
            if not sample.motor:
                self.fault(FaultKind.KEY, sample.offset, "the motor's name", "no key")
        if sample.motor != self.motor:
            self.fault(FaultKind.KEY, sample.offset, f"key {self.motor!r}", f"key {sample.motor!r}")
            return None
        self._order(sample)
        if sample.sampled_at_ns < self.last_ns:
            expected = f"sampled_at_ns {self.last_ns} or later"
            self.fault(FaultKind.TIME, sample.offset, expected, sample.sampled_at_ns)
        self.last_ns = max(self.last_ns, sample.sampled_at_ns)
        if not math.isfinite(sample.position_rad):
            self.fault(FaultKind.POSITION, sample.offset, "a finite position_rad", sample.position_rad)
        return sample

    def _order(self, sample: Sample) -> None:
        stream, seq = sample.stream, sample.seq
        if stream != self.stream:
            if stream in self.highest:
                self.fault(FaultKind.DISORDER, sample.offset, f"stream {self.stream}", f"stream {stream} again")
            self.stream = stream
        if stream not in self.highest and self.begins_at and not self.highest:
            self.highest[stream] = seq - 1  # what came before has expired
        due = self.highest.setdefault(stream, 0) + 1
        if seq > due:
            self.gaps.append(_Gap(stream, due, seq - 1, sample.offset, seq))
        elif seq < due:
            kind = FaultKind.DISORDER if self._fill(stream, seq) else FaultKind.REPEAT
            self.fault(kind, sample.offset, f"seq {due}", f"seq {seq}")
        self.highest[stream] = max(seq, due - 1)

    def _fill(self, stream: int, seq: int) -> bool:
        """Whether a number that comes late was missing; it is not any more."""
        for at, gap in enumerate(self.gaps):
            if gap.stream == stream and gap.from_seq <= seq <= gap.to_seq:
                parts = [gap._replace(to_seq=seq - 1), gap._replace(from_seq=seq + 1)]
                self.gaps[at : at + 1] = [part for part in parts if part.missing > 0]
                return True
        return False

    def verdict(self, told: Sequence[_Told]) -> PartitionVerdict:
        """Call once, at the end: the gaps that are left become faults, unless they were told."""
        missing = told_gaps = 0
        for gap in self.gaps:
            if _is_told(gap, self.motor, told):
                told_gaps += gap.missing
            else:
                missing += gap.missing
                self.fault(FaultKind.GAP, gap.offset, f"seq {gap.from_seq}", f"seq {gap.found}")
        span_s = (self.last_ns - self.first_ns) / 1e9
        ordinary = {FaultKind.GAP, FaultKind.REPEAT, FaultKind.DISORDER}
        return PartitionVerdict(
            partition=self.number,
            motor=self.motor or "-",
            records=self.records,
            last_seq=self.highest.get(self.stream, 0),
            span_s=span_s,
            rate_hz=(self.records - 1) / span_s if span_s > 0 else 0.0,
            streams=len(self.highest),
            gaps=missing,
            told_gaps=told_gaps,
            repeats=self.counts[FaultKind.REPEAT],
            disorders=self.counts[FaultKind.DISORDER],
            other_faults=sum(count for kind, count in self.counts.items() if kind not in ordinary),
        )


def _is_told(gap: _Gap, motor: str, told: Sequence[_Told]) -> bool:
    at = gap.from_seq
    for one in sorted(one for one in told if (one.motor, one.stream) == (motor, gap.stream)):
        if one.from_seq <= at:
            at = max(at, one.to_seq + 1)
    return at > gap.to_seq


async def judge(bootstrap: str, arm: str, watch: Callable[[Sample], None] = lambda _: None) -> Verdict:
    """The proof, over everything that servo.<arm>.telemetry holds now. ``watch`` sees each sample that belongs there.

    Raises JudgeError if there is no such topic, or the broker does not answer.
    """
    topic = f"servo.{arm}.telemetry"
    partitions: dict[int, _Partition] = {}
    async for record in read(bootstrap, topic):
        partition = partitions.setdefault(record.partition, _Partition(record.partition, record.offset))
        if sample := partition.take(record):
            watch(sample)
    told = [one async for one in _told(bootstrap, f"servo.{arm}.events")]
    if not partitions:
        fault = Fault(FaultKind.EMPTY, 0, 0, "telemetry records", "none")
        return Verdict(arm, (), 0, (fault,), 1)
    _one_partition_each(partitions)
    in_order = [partitions[number] for number in sorted(partitions)]
    verdicts = tuple(partition.verdict(told) for partition in in_order)
    faults = sorted((f for partition in in_order for f in partition.faults), key=lambda f: (f.partition, f.offset))
    streams = {stream for partition in in_order for stream in partition.highest}
    count = sum(partition.counts.total() for partition in in_order)
    return Verdict(arm, verdicts, len(streams), tuple(faults[:FAULTS_KEPT]), count)


def _one_partition_each(partitions: dict[int, _Partition]) -> None:
    first: dict[str, int] = {}
    for number, partition in sorted(partitions.items()):
        other = first.setdefault(partition.motor, number)
        if other != number:
            place = partition.begins_at
            partition.fault(FaultKind.KEY, place, f"{partition.motor!r} in partition {other} alone", "it here too")


async def _told(bootstrap: str, topic: str) -> AsyncIterator[_Told]:
    try:
        async for record in read(bootstrap, topic):
            event = json.loads(record.value)
            if event["type"] == "telemetry.gap" and "from_seq" in event:
                yield _Told(event["motor"], int(event["stream"]), event["from_seq"], event["to_seq"])
    except NoTopic:  # nobody told anything
        return


# --- reading -------------------------------------------------------------------------------------------------------


class NoTopic(JudgeError):
    """The broker has no such topic."""


async def read(bootstrap: str, topic: str) -> AsyncIterator[ConsumerRecord]:
    """Every record that a topic holds now, in order within each partition. Never creates the topic.

    Raises NoTopic, or JudgeError if the broker does not answer.
    """
    try:
        partitions = [TopicPartition(topic, number) for number in range(await partition_count(bootstrap, topic))]
        consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            request_timeout_ms=10_000,
        )
        await consumer.start()
        try:
            ends = await consumer.end_offsets(partitions)
            left = {tp for tp, first in (await consumer.beginning_offsets(partitions)).items() if first < ends[tp]}
            consumer.assign(sorted(left))
            while left:
                async with asyncio.timeout(ANSWER_S):
                    found: dict[TopicPartition, list[ConsumerRecord]] = {}
                    while not found:
                        found = await consumer.getmany(*left, timeout_ms=500)
                for tp, records in found.items():
                    for record in records:
                        if record.offset < ends[tp]:
                            yield record
                    if records[-1].offset + 1 >= ends[tp]:
                        left.discard(tp)
        finally:
            await consumer.stop()
    except (KafkaError, TimeoutError) as error:
        raise JudgeError(f"{bootstrap}, topic {topic}: {type(error).__name__}: {error}") from error


async def partition_count(bootstrap: str, topic: str) -> int:
    """How many partitions a topic has. Raises NoTopic."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        if topic not in await admin.list_topics():
            raise NoTopic(f"{bootstrap} has no topic {topic}")
        return len((await admin.describe_topics([topic]))[0]["partitions"])
    finally:
        await admin.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict; exit status 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m hil.judge", description="Prove an arm's telemetry in Kafka.")
    parser.add_argument("--bootstrap", default="127.0.0.1:9092", metavar="HOST:PORT", help="broker (%(default)s)")
    parser.add_argument("--arm", required=True, metavar="NAME", help="name of the arm")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        verdict = asyncio.run(judge(options.bootstrap, options.arm))
    except JudgeError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"ok": verdict.ok, **asdict(verdict)}, indent=2) if options.json else verdict)
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
