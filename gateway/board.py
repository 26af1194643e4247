"""What is known just now of each motor and bus, kept up to date from what is committed and told: for people.

Read by the live view, the status file and the commander; nothing that is acted upon over time is decided here.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from drivers import protocols
from drivers.clock import SECOND, monotonic_ns
from drivers.motor import Status
from drivers.notices import CycleStats
from gateway.config import Config, Motor
from gateway.event_time import EventTime, boot_id
from gateway.events import ARM
from gateway.latches import Latch
from gateway.telemetry import Split

RATE_WINDOW_NS = 2 * SECOND
NO_STATUS = Status(0)


@dataclass(slots=True)
class MotorView:
    """One motor as it was last seen. NaN and 0: never."""

    config: Motor
    online: bool = False
    late: bool = False
    model: str = ""
    firmware: str = ""
    seq: int = 0
    sampled_at_ns: int = 0
    position_rad: float = float("nan")
    velocity_rad_s: float = float("nan")
    temperature_c: float = float("nan")
    status: Status = NO_STATUS
    vendor_error: int = 0
    polls: int = 0
    misses: int = 0
    acknowledged_seq: int = 0
    hot: bool = False  # above its temperature limit
    outside: bool = False  # of its position limits
    told_faults: Status = NO_STATUS  # those that the last event named
    _rates: deque[tuple[int, int]] = field(default_factory=deque)  # (monotonic, seq)

    @property
    def rate_hz(self) -> float:
        """Samples a second over the last two seconds."""
        if len(self._rates) < 2:
            return 0.0
        (first_at, first_seq), (last_at, last_seq) = self._rates[0], self._rates[-1]
        return (last_seq - first_seq) / max(1e-9, (last_at - first_at) / SECOND)

    @property
    def vendor_faults(self) -> list[str]:
        """The vendor's error word in the vendor's words, one for each fault."""
        return list(protocols.load(self.config.protocol).explain(self.vendor_error))

    @property
    def fault(self) -> str:
        """Its faults in words, the common ones and then the vendor's; empty if there are none."""
        common = ", ".join(str(flag.name).removeprefix("FAULT_").lower() for flag in self.status & Status.faults())
        if not self.vendor_error:
            return common
        vendor = f"{self.config.protocol}: {', '.join(self.vendor_faults)} {self.vendor_error:#04x}"
        return f"{common} ({vendor})" if common else vendor

    def note_rate(self, now: int) -> None:
        """Remember the sequence number at this moment; call a few times a second."""
        if self.seq:
            self._rates.append((now, self.seq))
        while self._rates and now - self._rates[0][0] > RATE_WINDOW_NS:
            self._rates.popleft()


@dataclass(slots=True)
class BusView:
    """One bus as its worker last told."""

    name: str
    rate_hz: float
    up: bool = False
    detail: str = "starting"
    troubles: dict[str, int] = field(default_factory=dict)  # since the bus was opened; words of drivers.bus
    stats: CycleStats | None = None
    worker_starts: int = 0


class Board:
    """All motors by partition, all buses by name, and the broker."""

    def __init__(self, config: Config, time: EventTime, journal: Path, stream: int = 0) -> None:
        self._time = time
        self.journal = journal
        self.stream = stream
        self.arm = config.arm.name
        self.motors = {motor.partition: MotorView(motor) for motor in config.motors}
        self.buses = {bus.name: BusView(bus.name, bus.rate_hz) for bus in config.buses}
        self.kafka = "down" if config.kafka else "not used"
        self.kafka_detail = ""
        self.journal_detail = ""
        self.set_aside: Mapping[Path, bool] = {}  # earlier journals, and whether the broker has them
        self.motion = ""  # how far simulated motors are in a recording
        self.latches: Mapping[str, Latch] = {}  # of motors by name, and of the arm

    def update(self, split: Split) -> list[MotorView]:
        """Take over the newest record of each motor in ``split``; the motors that they concern."""
        views = []
        for partition, mine in split.items():
            view = self.motors[partition]
            record = mine[-1]
            view.seq = int(record["seq"])
            view.sampled_at_ns = int(record["sampled_at_ns"])
            view.position_rad = float(record["position_rad"])
            view.velocity_rad_s = float(record["velocity_rad_s"])
            view.temperature_c = float(record["temperature_c"])
            view.status = Status(int(record["status"]))
            view.vendor_error = int(record["vendor_error"])
            view.late = False  # it has answered again; late is told anew for the next episode
            views.append(view)
        return views

    def take_stats(self, bus: str, stats: CycleStats) -> None:
        """Take over a worker's counts."""
        self.buses[bus].stats = stats
        for counts in stats.motors:
            view = self.motors[counts.motor]
            view.polls, view.misses = counts.polls, counts.misses

    def note_rates(self) -> None:
        """Call a few times a second, so that the rates are right."""
        now = monotonic_ns()
        for view in self.motors.values():
            view.note_rate(now)

    def age_ms(self, view: MotorView) -> float:
        """How old the motor's newest sample is; NaN if it never had one."""
        return (self._time.now() - view.sampled_at_ns) / 1e6 if view.sampled_at_ns else float("nan")

    def lag(self, view: MotorView) -> int:
        """Samples of this motor that the broker does not have yet."""
        return view.seq - view.acknowledged_seq

    def snapshot(self) -> dict[str, Any]:
        """Everything, as JSON values (NaN: None), for the status file."""
        return {
            "arm": self.arm,
            "at_ns": self._time.now(),
            "monotonic_ns": monotonic_ns(),
            "boot": boot_id(),
            "kafka": {"state": self.kafka, "detail": self.kafka_detail},
            "journal": {
                "path": str(self.journal),
                "stream": self.stream,
                "detail": self.journal_detail,
                "set_aside": {path.name: published for path, published in self.set_aside.items()},
            },
            "estop": _latch(self.latches.get(ARM)),
            "buses": [self._bus(view) for view in self.buses.values()],
            "motors": [self._motor(view) for _, view in sorted(self.motors.items())],
        }

    @staticmethod
    def _bus(view: BusView) -> dict[str, Any]:
        stats = view.stats
        return {
            "bus": view.name,
            "up": view.up,
            "detail": view.detail,
            "troubles": view.troubles,
            "rate_hz": view.rate_hz,
            "worker_starts": view.worker_starts,
            "cycles": stats.cycles if stats else 0,
            "skipped_cycles": stats.skipped if stats else 0,
            "stray_packets": stats.strays if stats else 0,
            "garbage": stats.garbage if stats else 0,
            "late_p50_us": stats.late_p50_us if stats else None,
            "late_max_us": stats.late_max_us if stats else None,
        }

    def _motor(self, view: MotorView) -> dict[str, Any]:
        known = view.sampled_at_ns > 0
        return {
            "motor": view.config.name,
            "partition": view.config.partition,
            "bus": view.config.bus,
            "protocol": view.config.protocol,
            "state": "online" if view.online and not view.late else "late" if view.online else "offline",
            "model": view.model,
            "firmware": view.firmware,
            "seq": view.seq,
            "position_rad": view.position_rad if known else None,
            "velocity_rad_s": view.velocity_rad_s if known else None,
            "temperature_c": view.temperature_c if known else None,
            "rate_hz": round(view.rate_hz, 1),
            "age_ms": round(self.age_ms(view), 1) if known else None,
            "polls": view.polls,
            "misses": view.misses,
            "status": [flag.name for flag in view.status],
            "vendor_error": view.vendor_error,
            "faults": view.vendor_faults,
            "fault": view.fault,
            "latched": _latch(self.latches.get(view.config.name)),
            "lag": self.lag(view) if self.kafka != "not used" else None,
        }


def _latch(latch: Latch | None) -> dict[str, Any] | None:
    return msgspec.structs.asdict(latch) if latch else None
