"""One run of the real gateway behind feeders: ``python -m hil.bench.pipeline JSON``, a process of its own a run.

    feeder(s) ==link==> gateway.app.Gateway, whole: writer, journal on disk, board, commander, publisher ==> broker

Only what would open a bus is replaced: the module that the gateway starts for each bus is hil.bench.feeder.
The result is one line of JSON on standard output.
"""

import asyncio
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from drivers.clock import MS, SECOND, monotonic_ns
from drivers.cycle import Ticket
from drivers.motor import Kind, Order
from gateway import config as configuration
from gateway import workers
from gateway.app import Gateway
from gateway.config import Config
from gateway.state_dir import StateDir
from gateway.worker import Plan
from gateway.writer import Committed, LogWriter
from hil.bench.feeder import FeederPlan
from hil.bench.meter import Meter, replace
from hil.bench.report import spread

SETTLE_S = 2.0
CREDIT_S = 0.004

LINK, STAMP, JOURNAL, PAGES, APPEND, SEND, TOLD, WRITER, PUBLISHER, LOOP, REST = STAGES = (
    "link: receive, decode, hand over",
    "stamp",
    "journal: commit",
    "pages: split, encode",
    "batch append (aiokafka)",
    "send and acknowledge (aiokafka, sockets)",
    "board, health, commander",
    "writer thread: gather, wake, tell",
    "publisher: lanes, acknowledgements",
    "event loop: select and queues",
    "rest",
)

_WRITER_THREAD = {
    "gateway.stamp:Stamp.stamp": STAMP,
    "gateway.journal:Journal.commit": JOURNAL,
    "gateway.journal:Journal.plan_trim": JOURNAL,
    "gateway.damage:Scrubber.look": JOURNAL,
}
_MAIN_THREAD = {
    "gateway.recent:Recent.append": PAGES,
    "gateway.lanes:Pages.behind": PAGES,
    "gateway.lanes:TelemetryLane.take": PAGES,
    "gateway.flow:Flow._send": APPEND,  # what is not in another stage: the loop of appends
    "gateway.publisher:Publisher.committed": PUBLISHER,
    "gateway.app:Gateway.committed": TOLD,
    "aiokafka:AIOKafkaProducer.create_batch": SEND,
    "aiokafka:AIOKafkaProducer.send_batch": SEND,
}


@dataclass(frozen=True, slots=True)
class Run:
    """What to run, and for how long. ``rate_hz`` 0: flat out, ``in_flight`` samples unacknowledged at most."""

    bootstrap: str
    seconds: float
    buses: int = 2
    motors_per_bus: int = 3
    rate_hz: float = 500.0
    in_flight: int = 60_000
    stages: bool = False
    flush_ms: float | None = None

    @property
    def motors(self) -> int:
        """Of the arm."""
        return self.buses * self.motors_per_bus

    def feeder(self, plan: Plan) -> FeederPlan:
        """What stands in for the worker of ``plan``."""
        indices = tuple(motor.index for motor in plan.motors)
        period_ns = round(SECOND / self.rate_hz) if self.rate_hz else 0
        return FeederPlan(indices, period_ns, self.in_flight // self.buses)


def make_config(run: Run, directory: Path) -> Config:
    """An arm of as many motors; its buses are never opened."""
    journal = "" if run.flush_ms is None else f"[journal]\nflush_ms = {run.flush_ms:.1f}"
    tables = [
        f'[arm]\nname = "bench-{directory.name}"\nstate_dir = "{directory}"',
        f'[kafka]\nbootstrap_servers = ["{run.bootstrap}"]\n{journal}',
    ]
    for bus in range(run.buses):
        tables.append(
            f'[[bus]]\nname = "can{bus}"\ntype = "can"\ninterface = "virtual"\nchannel = "{bus}"\n'
            f"rate_hz = {run.rate_hz or 1000.0:.1f}"
        )
        tables += [
            f'[[motor]]\nname = "joint{partition + 1}"\npartition = {partition}\nbus = "can{bus}"\n'
            f'protocol = "damiao"\nid = {partition % run.motors_per_bus + 1}\nposition_rad = [-3.0, 3.0]\n'
            "velocity_rad_s = 5.0\ntemperature_c = 80.0"
            for partition in range(bus * run.motors_per_bus, (bus + 1) * run.motors_per_bus)
        ]
    return configuration.loads("\n".join(tables), directory / "bench.toml")


class Acknowledgements:
    """Notes when each sample was taken and when the broker had acknowledged it."""

    def __init__(self) -> None:
        self._acknowledged: list[tuple[int, int, int]] = []
        self._records: list[Any] = []

    def install(self) -> None:
        """Listen in on what the gateway tells its own parts."""

        def note_bookmarks(bookmark: Callable[..., None]) -> Callable[..., None]:
            def noted(writer: LogWriter, topic: str, partition: int, seq: int, row: int) -> None:
                if topic == "telemetry":
                    self._acknowledged.append((monotonic_ns(), partition, seq))
                bookmark(writer, topic, partition, seq, row)

            return noted

        def note_commits(committed: Callable[..., None]) -> Callable[..., None]:
            def noted(gateway: Gateway, told: Committed) -> None:
                if told.batch is not None:
                    self._records.append(told.batch.records)
                committed(gateway, told)

            return noted

        replace(LogWriter, "published", note_bookmarks)
        replace(Gateway, "committed", note_commits)

    def clear(self) -> None:
        """Begin anew."""
        self._acknowledged.clear()
        self._records.clear()

    def latencies_ms(self, gateway: Gateway) -> list[float]:
        """Of every sample that was stamped and acknowledged since ``clear``."""
        records = np.concatenate(self._records)
        found: list[float] = []
        for partition in np.unique(records["partition"]):
            mine = records[records["partition"] == partition]
            acks = [(at, seq) for at, of, seq in self._acknowledged if of == partition]
            at_ns = gateway._time.of(np.array([at for at, _ in acks], np.int64))
            which = np.searchsorted(np.array([seq for _, seq in acks], np.uint64), mine["seq"])
            known = which < len(acks)
            found += ((at_ns[which[known]] - mine["sampled_at_ns"][known]) / MS).tolist()
        return found


class Stages:
    """The meters of the two threads that do the work."""

    def __init__(self) -> None:
        self._main, self._writer = Meter(), Meter()

    def install(self) -> None:
        """Wrap the gateway's functions; call before it is made."""
        self._main.install(_MAIN_THREAD)
        self._main.install_in_loop(_stage_of)
        self._writer.install(_WRITER_THREAD)

    def begin(self, gateway: Gateway) -> None:
        """Count from here; on the main thread."""
        self._main.clear()
        self._writer.clear()
        self._clock = time.pthread_getcpuclockid(gateway._writer._thread.ident or 0)
        self._since = (time.process_time_ns(), time.thread_time_ns(), time.clock_gettime_ns(self._clock))

    def end(self) -> dict[str, float]:
        """{stage: ns} of the whole process since ``begin``; what no wrapper saw is told as the loop's and the rest."""
        now = (time.process_time_ns(), time.thread_time_ns(), time.clock_gettime_ns(self._clock))
        process_ns, main_ns, writer_ns = (b - a for a, b in zip(self._since, now, strict=True))
        main, writer = self._main.spent(), self._writer.spent()
        stages = dict.fromkeys(STAGES, 0.0)
        for spent in (main, writer):
            for stage, ns in spent.items():
                stages[stage] += ns
        stages[LOOP] += main_ns - sum(self._main.ns.values())
        stages[WRITER] += writer_ns - sum(self._writer.ns.values())
        stages["(wrapping)"] = sum(self._main.ns.values()) + sum(self._writer.ns.values()) - sum(main.values())
        stages["(wrapping)"] -= sum(writer.values())
        stages["(other threads)"] = process_ns - main_ns - writer_ns
        return stages


_ORIGINS = {
    "workers": LINK,
    "writer": WRITER,
    "publisher": PUBLISHER,
    "app": TOLD,
}


def _stage_of(origin: str) -> str:
    """The stage of an event loop callback, by its module or by the file of its task's coroutine."""
    if "aiokafka" in origin or origin.startswith("asyncio.selector_events") or "asyncio/streams" in origin:
        return SEND
    module = origin.removesuffix(".py").replace("/", ".")
    package, _, name = module.rpartition(".")
    if package.endswith("gateway") and name in _ORIGINS:
        return _ORIGINS[name]
    if module.startswith("asyncio"):
        return LOOP
    return REST


async def measure(run: Run) -> dict[str, Any]:
    """Run the gateway and count."""
    notes, stages = Acknowledgements(), Stages()
    if run.rate_hz:
        notes.install()
    if run.stages:
        stages.install()
    replace(workers, "Child", lambda child: lambda _module, plan: child("hil.bench.feeder", run.feeder(plan)))
    with tempfile.TemporaryDirectory(prefix="servo-gateway-bench-") as directory:
        state = StateDir(Path(directory))
        with state.locked():
            gateway = Gateway(make_config(run, Path(directory)), state)
            parts: list[Coroutine[Any, Any, Any]] = [gateway.run()]
            if not run.rate_hz:
                parts.append(_give_credit(gateway))
            tasks = [asyncio.create_task(part) for part in parts]
            try:
                result = await _count(run, gateway, notes, stages, tasks[0])
            finally:
                gateway.stop()
                await tasks[0]
                for task in tasks[1:]:
                    task.cancel()
    return result


async def _count(
    run: Run, gateway: Gateway, notes: Acknowledgements, stages: Stages, running: "asyncio.Task[Any]"
) -> dict[str, Any]:
    while not _acknowledged(gateway):
        if running.done():
            running.result()
        await asyncio.sleep(0.05)
    await asyncio.sleep(SETTLE_S)
    gc.collect()
    notes.clear()
    if run.stages:
        stages.begin(gateway)
    before, written, cpu_ns, since = _acknowledged(gateway), _io(), time.process_time_ns(), monotonic_ns()
    await asyncio.sleep(run.seconds)
    events = _acknowledged(gateway) - before
    cpu_ns, took_ns = time.process_time_ns() - cpu_ns, monotonic_ns() - since
    result: dict[str, Any] = {
        "events": events,
        "events_per_s": events / took_ns * SECOND,
        "cpu_us_per_event": cpu_ns / 1000 / events,
        "cpu_share": cpu_ns / took_ns,
        "written_mb_per_s": (_io() - written) / took_ns * SECOND / 1e6,
    }
    if run.stages:
        result["stages_us"] = {stage: ns / 1000 / events for stage, ns in stages.end().items()}
    if run.rate_hz:
        result["latency_ms"] = spread(notes.latencies_ms(gateway))
    return result


def _acknowledged(gateway: Gateway) -> int:
    assert gateway._publisher is not None
    return sum(gateway._publisher.acknowledged(partition) for partition in gateway.board.motors)


async def _give_credit(gateway: Gateway) -> None:
    """Tell the feeders how far the broker is, so that the bound on what is in flight holds."""
    assert gateway._publisher is not None
    while True:
        await asyncio.sleep(CREDIT_S)
        for worker, partitions in gateway_buses(gateway).items():
            acknowledged = sum(gateway._publisher.acknowledged(partition) for partition in partitions)
            worker.send(Ticket(acknowledged, 0, Order(Kind.STOP), 0))


def gateway_buses(gateway: Gateway) -> dict[workers.Worker, list[int]]:
    """Which partitions each worker feeds."""
    found: dict[workers.Worker, list[int]] = {}
    for motor in gateway._config.motors:
        found.setdefault(gateway._workers[motor.bus], []).append(motor.partition)
    return found


def _io() -> int:
    """Bytes that this process has written to files; sockets do not count here."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def as_json(run: Run) -> str:
    """``run`` as the argument of this program."""
    return json.dumps(asdict(run))


def with_stages(run: Run) -> Run:
    """The same run, instrumented."""
    return changed(run, stages=True)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(msgspec.json.decode(sys.argv[1], type=Run)))))
