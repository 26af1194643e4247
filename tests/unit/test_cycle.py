"""The cycle of one bus, on simulated motors and a clock that passes when somebody reads it or waits."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivers import cycle as cycle_module
from drivers import orders as orders_module
from drivers import protocols
from drivers import turns as turns_module
from drivers.buses import memory as memory_module
from drivers.buses.memory import MemoryBus
from drivers.clock import MS, MonotonicNs
from drivers.cycle import ALL, Cycle, Ticket, Timing
from drivers.errors import BusError, MotorRefused
from drivers.family import Exchange, Family, Overheard, Procedure, Ready
from drivers.motor import DRIVES, Feedback, Kind, Motor, MotorInfo, Order, Status
from drivers.notices import AnyNotice, MotorLate, MotorOffline, MotorOnline, MotorStopped, OrderDone, OrderFailed
from drivers.orders import ORDER_TRIES, ORDERS_PER_MOTOR, STOPS_AT_ONCE
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.bus import SimulatedBus
from drivers.sim.responder import Responder, SimulatedMotor
from drivers.sim.servo import Servo
from drivers.sim.spread import GoalTimes
from tests.memory_loop import make_motor

STILL = SimulationSettings(motion="still", enabled=True)
READ_NS = 1000  # what looking at the clock costs


class Clock:
    """Stands still between readings; a wait is over at once, at its deadline."""

    def __init__(self) -> None:
        self.now_ns = 10**12

    def monotonic_ns(self) -> MonotonicNs:
        self.now_ns += READ_NS
        return MonotonicNs(self.now_ns)

    def sleep_until(self, deadline: int) -> None:
        self.now_ns = max(self.now_ns, deadline)


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield from make_clock()


def make_clock() -> Iterator[Clock]:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        for module in (cycle_module, orders_module, turns_module, memory_module):
            patch.setattr(module, "monotonic_ns", clock.monotonic_ns)
        patch.setattr(memory_module, "sleep_until", clock.sleep_until)
        yield clock


class Rig:
    """A cycle on a memory bus, run period by period."""

    def __init__(
        self,
        clock: Clock,
        bus: SimulatedBus[Any],
        families: Sequence[Family[Any, Any]],
        period_ns: int = 10 * MS,
    ) -> None:
        self.clock = clock
        self.period_ns = period_ns
        self.simulated = bus
        self.bus: MemoryBus[Any] = MemoryBus(bus)
        self.families = families
        self.cycle: Cycle[Any] = Cycle(families, Timing(period_ns, late_after_ns=50 * MS, offline_after_ns=300 * MS))
        self.cycle.attach(self.bus)
        self.notices: list[AnyNotice] = []
        self._numbers = 0
        self._groups = 0

    def motor(self, index: int) -> SimulatedMotor:
        return next(motor for motor in self.simulated.motors if motor.motor.index == index)

    def period(self) -> list[int]:
        """One period; the motors that gave a sample, in the order of the samples."""
        start = MonotonicNs(self.clock.now_ns)
        rows = self.cycle.poll(start)
        assert len(set(rows["motor"].tolist())) == len(rows)
        self.cycle.work(MonotonicNs(start + self.period_ns * 19 // 20))
        self.clock.sleep_until(start + self.period_ns)
        self.notices += self.cycle.take_notices()
        return [int(motor) for motor in rows["motor"]]

    def run(self, ms: float) -> Counter[int]:
        """Periods for so long; samples of each motor."""
        end = self.clock.now_ns + round(ms * MS)
        samples: Counter[int] = Counter()
        while self.clock.now_ns < end:
            samples.update(self.period())
        return samples

    def connect(self) -> None:
        """Run until every motor is online."""
        for _ in range(400):
            self.period()
            if len(self.of(MotorOnline)) == len(self.simulated.motors):
                self.notices.clear()
                return
        raise AssertionError(self.notices)

    def submit(
        self,
        kind: Kind,
        motor: int = 0,
        value: float = nan,
        expires_in_ms: float = 1000,
        group: int = 0,
        size: int = 1,
        not_before_ns: int = 0,
    ) -> int:
        self._numbers += 1
        order = Order(kind, value, 1.0)
        expires_ns = self.clock.now_ns + round(expires_in_ms * MS)
        self.cycle.submit(Ticket(self._numbers, motor, order, expires_ns, group, size, not_before_ns))
        return self._numbers

    def submit_group(self, values: Mapping[int, float], kind: Kind = Kind.POSITION, **more: Any) -> list[int]:
        """Setpoints of several motors, to be fired together."""
        self._groups += 1
        return [
            self.submit(kind, motor, value, group=self._groups, size=len(values), **more)
            for motor, value in values.items()
        ]

    def of(self, kind: type[AnyNotice]) -> list[Any]:
        return [notice for notice in self.notices if isinstance(notice, kind)]

    def end_of(self, ticket: int) -> OrderDone | OrderFailed | None:
        """What became of it; None: nothing yet."""
        self.notices += self.cycle.take_notices()
        ends = [n for n in self.notices if isinstance(n, OrderDone | OrderFailed) and n.ticket == ticket]
        assert len(ends) <= 1, ends
        return ends[0] if ends else None

    def reason(self, ticket: int) -> str:
        end = self.end_of(ticket)
        assert isinstance(end, OrderFailed), end
        return end.reason


def make_rig(
    clock: Clock,
    family: str = "feetech_sts",
    count: int = 3,
    period_ns: int = 10 * MS,
    settings: SimulationSettings = STILL,
    watchdog_ns: int = 0,
) -> Rig:
    motors = [
        replace(make_motor(family, bus_id, bus_id - 1), watchdog_ns=watchdog_ns) for bus_id in range(1, count + 1)
    ]
    bus = build_bus(motors, settings, MonotonicNs(clock.now_ns))
    return Rig(clock, bus, [protocols.load(family)(motors)], period_ns)


# --- a family of one-byte packets, for what the real ones cannot be brought to do -------------------------------------

POLL, CONNECT, REFRESH, ORDER = 0x00, 0x40, 0x80, 0xC0


class Plain(Family[bytes, int]):
    """Answers each byte with the same byte. ``refusals``: what ``connect`` has against a motor."""

    name = "plain"
    medium = "serial"
    bus_ids = range(64)
    kinds = frozenset(Kind)
    refusals: ClassVar[dict[int, str]] = {}
    steps = 1  # exchanges of an order
    refresh_steps = 1
    patience_ns = 0  # of everything but polls

    def __init__(self, motors: Sequence[Motor]) -> None:
        super().__init__(motors)
        self.told = Feedback(0.0, 0.0, 25.0)
        self.orders: list[Order] = []
        self.fired: list[list[int]] = []
        self.halts: list[list[int]] = []
        self.unfit: dict[int, str] = {}  # why a motor cannot be prepared
        self.driven: set[int] = set()  # motors that are found running
        self.begun = 0

    @classmethod
    def poll_bits(cls, motors: Sequence[Motor]) -> int:
        return 2 * 10 * len(motors)

    def unpack(self, unit: bytes) -> Sequence[int]:
        return list(unit)

    def poll(self, bus_ids: Sequence[int]) -> Exchange[bytes, int]:
        def match(packet: int) -> tuple[int, Feedback] | None:
            return (packet, self.told) if packet < CONNECT else None

        return Exchange([bytes([bus_id]) for bus_id in bus_ids], frozenset(bus_ids), match, begin=self._begin)

    def _begin(self) -> None:
        self.begun += 1

    def _ask(self, bus_id: int, what: int) -> Exchange[bytes, int]:
        wanted = bus_id | what

        def match(packet: int) -> tuple[int, int] | None:
            return (bus_id, packet) if packet == wanted else None

        return Exchange([bytes([wanted])], frozenset({bus_id}), match, patience_ns=self.patience_ns)

    def connect(self, bus_id: int) -> Procedure[bytes, int, MotorInfo | None]:
        replies = yield self._ask(bus_id, CONNECT)
        if not replies:
            return None
        if bus_id in self.refusals:
            raise MotorRefused("refused", self.refusals[bus_id])
        return MotorInfo("plain", "1", driven=bus_id in self.driven)

    def identify(self, bus_id: int) -> Procedure[bytes, int, MotorInfo | None]:
        return self.connect(bus_id)

    def refresh(self, bus_id: int) -> Procedure[bytes, int, None] | None:
        return self._refresh(bus_id)

    def _refresh(self, bus_id: int) -> Procedure[bytes, int, None]:
        for _ in range(self.refresh_steps):
            yield self._ask(bus_id, REFRESH)

    def order(self, bus_id: int, order: Order) -> Procedure[bytes, int, str]:
        self.orders.append(order)
        for _ in range(self.steps):
            if not (yield self._ask(bus_id, ORDER)):
                raise MotorRefused("no_reply", "kept silent")
        return "ok"

    def prepare(self, bus_id: int, order: Order) -> Procedure[bytes, int, Ready]:
        for _ in range(self.steps):
            if not (yield self._ask(bus_id, REFRESH)):
                raise MotorRefused("no_reply", "kept silent")
        if bus_id in self.unfit:
            raise MotorRefused("not_enabled", self.unfit[bus_id])
        return Ready(order, f"{order.value}")

    def fire(self, ready: Mapping[int, Ready]) -> Exchange[bytes, int]:
        self.fired.append([*ready])
        self.orders += [one.trigger for one in ready.values()]
        return self._ask_all([*ready], ORDER)

    def confirm(self, bus_id: int, ready: Ready, reply: int | None) -> Procedure[bytes, int, str]:
        if reply is None:
            raise MotorRefused("no_reply", "kept silent when it was fired")
        yield from ()
        return ready.told

    def halt(self, bus_ids: Iterable[int]) -> Exchange[bytes, int]:
        self.halts.append([*bus_ids])
        return self._ask_all(self.halts[-1], ORDER)

    def _ask_all(self, bus_ids: Sequence[int], what: int) -> Exchange[bytes, int]:
        def match(packet: int) -> tuple[int, int] | None:
            return (packet & 0x3F, packet) if packet & 0xC0 == what else None

        return Exchange([bytes(bus_id | what for bus_id in bus_ids)], frozenset(bus_ids), match)


class PlainMotors(Responder[bytes]):
    """The other side of ``Plain``; ``asked`` counts requests by kind."""

    def __init__(self, motors: Sequence[SimulatedMotor]) -> None:
        super().__init__(motors)
        self.asked: Counter[int] = Counter()
        self.deaf = False  # to orders
        self.unasked: list[tuple[SimulatedMotor, bytes]] = []

    def tick(self, now: MonotonicNs) -> list[tuple[SimulatedMotor, bytes]]:
        sent, self.unasked = self.unasked, []
        return sent

    def reboot(self, simulated: SimulatedMotor) -> None:
        return

    def respond(self, unit: bytes) -> list[tuple[SimulatedMotor, bytes]]:
        self.asked.update(byte & 0xC0 for byte in unit if byte & 0x3F in self.motors)
        heard = [byte for byte in unit if byte & 0x3F in self.motors and not (self.deaf and byte & 0xC0 == ORDER)]
        return [(self.motors[byte & 0x3F], bytes([byte])) for byte in heard]


def make_plain_rig(
    clock: Clock,
    groups: Sequence[Sequence[int]] = ((1, 2, 3),),
    period_ns: int = 10 * MS,
    steps: int = 1,
    family: type[Plain] = Plain,
) -> tuple[Rig, list[PlainMotors]]:
    """A bus with a family for each group of bus ids; a motor's index is its bus id less one."""
    families: list[Plain] = []
    responders: list[PlainMotors] = []
    for group in groups:
        motors = [Motor(bus_id - 1, f"joint{bus_id}", "plain", bus_id, position_rad=(-1.0, 1.0)) for bus_id in group]
        families.append(family(motors))
        families[-1].steps = steps
        responders.append(PlainMotors([SimulatedMotor(motor, Servo()) for motor in motors]))
    return Rig(clock, SimulatedBus(responders, MonotonicNs(clock.now_ns)), families, period_ns), responders


# --- polling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["feetech_sts", "damiao"])
def test_every_poll_brings_one_sample_of_every_motor(clock: Clock, family: str) -> None:
    rig = make_rig(clock, family)
    rig.connect()
    for _ in range(50):
        assert sorted(rig.period()) == [0, 1, 2]
    assert rig.notices == []


def test_sample_holds_what_the_motor_told_and_when_it_arrived(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    rig.motor(1).servo.position_rad = rig.motor(1).servo.goal_rad = 0.5
    rig.motor(1).faults.delay_ms = 2.0
    start = clock.now_ns
    samples = rig.cycle.poll(MonotonicNs(start))
    sample = samples[samples["motor"] == 1][0]
    assert sample["position_rad"] == pytest.approx(0.5, abs=0.002)
    assert sample["status"] & Status.ENABLED
    assert start + 2 * MS <= sample["sampled_at_ns"] <= clock.now_ns
    assert 2000 <= sample["round_trip_us"] < 3000


@pytest.mark.parametrize("family", ["feetech_sts", "damiao"])
def test_silent_motor_costs_nobody_else_a_sample(clock: Clock, family: str) -> None:
    rig = make_rig(clock, family)
    rig.connect()
    rig.motor(1).faults.silent = True
    for _ in range(100):
        assert sorted(rig.period()) == [0, 2]
    (offline,) = rig.of(MotorOffline)
    assert offline.motor == 1
    rig.motor(1).faults.silent = False
    rig.run(1000)
    assert [online.motor for online in rig.of(MotorOnline)] == [1]
    assert sorted(rig.period()) == [0, 1, 2]


def test_silent_motor_is_late_once_then_offline_once(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    heard_before = clock.now_ns
    rig.motor(2).faults.silent = True
    rig.run(2000)
    assert [type(notice) for notice in rig.notices] == [MotorLate, MotorOffline]
    late, offline = rig.notices
    assert isinstance(late, MotorLate)
    assert isinstance(offline, MotorOffline)
    assert (late.motor, offline.motor) == (2, 2)
    assert late.last_heard_ns == offline.last_heard_ns <= heard_before
    assert 3 <= late.misses <= 4  # of the polls that it was in: it rests for one or two after each miss
    assert 10 <= offline.misses <= 12
    assert "no reply for 3" in offline.reason


def test_each_episode_of_silence_is_told(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    for _ in range(3):
        rig.motor(0).faults.silent = True
        rig.run(100)
        rig.motor(0).faults.silent = False
        rig.run(50)
    assert [type(notice) for notice in rig.notices] == [MotorLate] * 3


def test_single_missed_poll_costs_one_poll_of_rest_and_is_told_nobody(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    polls, misses = rig.cycle.counts()[1].polls, rig.cycle.counts()[1].misses
    rig.motor(1).faults.silent = True
    rig.period()
    rig.motor(1).faults.silent = False
    rig.period()
    rig.period()
    rig.period()
    counts = rig.cycle.counts()[1]
    assert (counts.polls - polls, counts.misses - misses) == (3, 1)
    assert rig.notices == []


@given(st.lists(st.floats(0, 9.5), min_size=1, max_size=12))
@settings(max_examples=50)
def test_late_reply_never_passes_for_the_next_polls(delays_ms: list[float]) -> None:
    """Whenever within its period a reply comes: in time it is the poll's own, later it is nobody's."""
    for clock in make_clock():
        rig = make_rig(clock)
        rig.connect()
        rests = False
        for number, delay_ms in enumerate(delays_ms, start=1):
            servo = rig.motor(1).servo
            servo.position_rad = servo.goal_rad = number * 0.05
            rig.motor(1).faults.delay_ms = delay_ms
            samples = rig.cycle.poll(MonotonicNs(start := clock.now_ns))
            told = {int(s["motor"]): float(s["position_rad"]) for s in samples}
            assert told.get(1, number * 0.05) == pytest.approx(number * 0.05, abs=0.002)
            assert set(told) >= {0, 2}
            assert 1 in told or delay_ms > 6 or rests
            rests = 1 not in told
            rig.cycle.work(MonotonicNs(start + 9_500_000))
            clock.sleep_until(start + 10 * MS)


def test_reply_later_than_a_period_never_passes_for_the_next_polls(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    rig.motor(1).faults.delay_ms = 12.0
    for number in range(1, 20):
        servo = rig.motor(1).servo
        servo.position_rad = servo.goal_rad = number * 0.05
        start = clock.now_ns
        samples = rig.cycle.poll(MonotonicNs(start))
        told = {int(s["motor"]): float(s["position_rad"]) for s in samples}
        assert told.get(1, number * 0.05) == pytest.approx(number * 0.05, abs=0.002)
        rig.cycle.work(MonotonicNs(start + 9_500_000))
        clock.sleep_until(start + 10 * MS)


def test_strays_are_counted(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    before = rig.cycle.strays
    rig.motor(1).faults.delay_ms = 9.0
    misses = rig.cycle.counts()[1].misses
    for _ in range(6):
        rig.period()
    rig.motor(1).faults.delay_ms = 0.0
    rig.period()
    assert rig.cycle.strays - before == rig.cycle.counts()[1].misses - misses >= 2


def test_silent_motor_of_one_family_costs_another_family_nothing(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, [(1, 2), (3, 4)], period_ns=2 * MS)
    for motor in (0, 1, 2, 3):
        rig.motor(motor).faults.delay_ms = 0.3
    rig.connect()
    rig.motor(0).faults.silent = True
    samples = rig.run(200)
    assert samples[2] == samples[3] == samples[1] > 50
    assert samples[0] == 0
    assert rig.cycle.counts()[2].misses == 0


@pytest.mark.parametrize("period_us", [500, 1000, 2000, 5000])
def test_every_rate_that_a_configuration_may_ask_for_brings_samples_and_takes_orders(
    clock: Clock, period_us: int
) -> None:
    rig, _ = make_plain_rig(clock, period_ns=period_us * 1000)
    for motor in rig.simulated.motors:
        motor.faults.delay_ms = 0.1
    rig.connect()
    ticket = rig.submit(Kind.ENABLE)
    rig.run(20)
    assert isinstance(rig.end_of(ticket), OrderDone)
    for _ in range(20):
        assert sorted(rig.period()) == [0, 1, 2]


def test_cycle_that_starts_late_still_gives_the_motors_time_to_answer(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    for motor in rig.simulated.motors:
        motor.faults.delay_ms = 1.0
    rig.connect()
    samples = rig.cycle.poll(MonotonicNs(clock.now_ns - 10 * MS))
    assert len(samples) == 3


# --- connecting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["feetech_sts", "damiao"])
def test_motors_are_found_and_told_once(clock: Clock, family: str) -> None:
    rig = make_rig(clock, family)
    rig.run(1000)
    assert sorted(notice.motor for notice in rig.of(MotorOnline)) == [0, 1, 2]
    assert len(rig.notices) == 3
    assert all(notice.model and notice.firmware for notice in rig.of(MotorOnline))


def test_motor_that_is_not_there_costs_the_others_nothing_and_is_told_nobody(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.motor(0).faults.silent = True
    rig.run(500)
    assert sorted(notice.motor for notice in rig.of(MotorOnline)) == [1, 2]
    for _ in range(100):
        assert sorted(rig.period()) == [1, 2]
    assert rig.of(MotorOffline) == []


def test_refusal_to_be_connected_is_told_once_and_again_when_it_changes(clock: Clock) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plain, "refusals", {2: "wrong mode 3"})
        rig, _ = make_plain_rig(clock)
        rig.run(3000)
        assert sorted(notice.motor for notice in rig.of(MotorOnline)) == [0, 2]
        assert [(notice.motor, notice.reason) for notice in rig.of(MotorOffline)] == [(1, "refused: wrong mode 3")]
        Plain.refusals[2] = "wrong mode 4"
        rig.run(3000)
        assert [notice.reason for notice in rig.of(MotorOffline)][1:] == ["refused: wrong mode 4"]
        del Plain.refusals[2]
        rig.run(1000)
        assert [notice.motor for notice in rig.of(MotorOnline)][2:] == [1]


def test_refresh_that_is_waiting_when_its_motor_goes_offline_takes_no_part_in_finding_it(clock: Clock) -> None:
    """A refresh and a connect of one motor in the queue: the end of the first is not that of the second."""
    rig, (motors,) = make_plain_rig(clock, [(1, 2)], period_ns=2 * MS)
    rig.motor(0).faults.delay_ms = 1.3  # no slack: a step of the background in 100 ms
    rig.connect()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plain, "refresh_steps", 8)
        motors.asked.clear()
        while not motors.asked[REFRESH]:
            rig.period()
        rig.motor(1).faults.silent = True
        rig.run(1200)
        assert [notice.motor for notice in rig.of(MotorOffline)] == [1]
        rig.motor(1).faults.silent = False
        rig.run(2500)
    assert rig.notices[-1] == MotorOnline(1, "plain", "1")
    assert motors.asked[CONNECT] == 1


def test_background_is_not_starved_by_a_bus_without_slack(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock, [(1, 2)], period_ns=2 * MS)
    rig.motor(0).faults.delay_ms = 1.3
    rig.motor(1).faults.silent = True
    rig.run(500)
    rig.motor(1).faults.silent = False
    rig.run(3000)
    assert sorted(notice.motor for notice in rig.of(MotorOnline)) == [0, 1]
    motors.asked.clear()
    rig.run(3000)
    assert motors.asked[REFRESH] >= 2


# --- a bus that goes --------------------------------------------------------------------------------------------------


def test_unplugged_bus_is_a_bus_error_and_motors_are_found_again_on_the_next(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    rig.bus.unplug()
    with pytest.raises(BusError):
        rig.cycle.poll(MonotonicNs(clock.now_ns))
    rig.cycle.give_up("adapter gone")
    rig.notices += rig.cycle.take_notices()
    assert [(n.motor, n.reason) for n in rig.of(MotorOffline)] == [(index, "adapter gone") for index in range(3)]
    rig.cycle.give_up("adapter gone")
    assert rig.cycle.take_notices() == []
    rig.notices.clear()
    rig.cycle.attach(MemoryBus(rig.simulated))
    rig.run(500)
    assert sorted(notice.motor for notice in rig.of(MotorOnline)) == [0, 1, 2]
    assert sorted(rig.period()) == [0, 1, 2]


def test_bus_that_goes_in_the_middle_of_an_order_leaves_its_effect_unknown(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, steps=5)
    rig.motor(0).faults.delay_ms = 3.0
    rig.connect()
    started, waiting = rig.submit(Kind.ENABLE, 0), rig.submit(Kind.ENABLE, 1)
    rig.period()
    rig.cycle.give_up("adapter gone")
    assert rig.reason(started) == "interrupted"
    assert rig.reason(waiting) == "motor_offline"
    after = rig.submit(Kind.ENABLE, 2)
    rig.cycle.give_up("adapter gone")
    assert rig.reason(after) == "motor_offline"


class Unplugging(Plain):
    """Its bus vanishes when an order is sent."""

    bus: ClassVar[MemoryBus[bytes]]

    def order(self, bus_id: int, order: Order) -> Procedure[bytes, int, str]:
        exchange = self._ask(bus_id, ORDER)
        yield Exchange(exchange.requests, exchange.expects, exchange.match, self.bus.unplug)
        return "ok"


def test_order_whose_sending_finds_the_bus_gone_is_interrupted(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, family=Unplugging)
    rig.connect()
    Unplugging.bus = rig.bus
    ticket = rig.submit(Kind.ENABLE, 0)
    with pytest.raises(BusError):
        rig.period()
    rig.cycle.give_up("adapter gone")
    assert rig.reason(ticket) == "interrupted"


# --- orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["feetech_sts", "damiao"])
def test_order_is_carried_out_and_told(clock: Clock, family: str) -> None:
    rig = make_rig(clock, family)
    rig.connect()
    enable = rig.submit(Kind.ENABLE, 1)
    move = rig.submit(Kind.POSITION, 1, 0.5)
    rig.run(100)
    for ticket in (enable, move):
        end = rig.end_of(ticket)
        assert isinstance(end, OrderDone), end
        assert end.motor == 1
        assert end.detail
    rig.run(2000)
    assert rig.motor(1).servo.position_rad == pytest.approx(0.5, abs=0.01)


def test_order_that_the_family_does_not_know_is_refused_with_its_reason(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    ticket = rig.submit(Kind.TORQUE, 0, 1.0)
    rig.period()
    assert rig.reason(ticket) == "unsupported"


def test_order_to_a_motor_that_keeps_silent_fails_and_the_next_is_carried_out(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    rig.motor(0).faults.silent = True
    silent, heard = rig.submit(Kind.STOP, 0), rig.submit(Kind.STOP, 1)
    rig.run(100)
    assert isinstance(rig.end_of(heard), OrderDone)
    rig.run(300)
    assert rig.of(MotorOffline)
    assert rig.reason(silent) == "no_reply"


def begin_unheard(rig: Rig, kind: Kind, value: float = nan, **more: Any) -> int:
    """Submit an order to a motor that has just fallen silent, and let it be said."""
    rig.connect()
    rig.motor(1).faults.silent = True
    ticket = rig.submit(kind, 1, value, **more)
    while not plain(rig).orders:
        rig.period()
    assert rig.end_of(ticket) is None
    return ticket


def told(rig: Rig) -> list[tuple[Kind, float]]:
    return [(order.kind, order.value) for order in plain(rig).orders]


@pytest.mark.parametrize("silent_ms", [0, 20, 200])
def test_order_that_nobody_acknowledged_is_said_again_when_its_motor_is_heard(clock: Clock, silent_ms: float) -> None:
    rig, _ = make_plain_rig(clock)
    ticket = begin_unheard(rig, Kind.POSITION, 0.5)
    rig.run(silent_ms)
    rig.motor(1).faults.silent = False
    rig.run(100)
    assert isinstance(rig.end_of(ticket), OrderDone)
    assert told(rig) == [(Kind.POSITION, 0.5)] * 2
    assert rig.of(MotorOffline) == []


def test_order_that_a_motor_never_acknowledges_is_said_so_often_and_no_more(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock)
    rig.connect()
    motors.deaf = True
    ticket = rig.submit(Kind.POSITION, 1, 0.5)
    rig.run(500)
    assert rig.reason(ticket) == "no_reply"
    assert told(rig) == [(Kind.POSITION, 0.5)] * ORDER_TRIES


def test_stop_is_said_again_at_once_and_then_whenever_its_motor_is_heard(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock)
    rig.connect()
    motors.deaf = rig.motor(1).faults.silent = True
    ticket = rig.submit(Kind.STOP, 1, expires_in_ms=500)
    rig.run(200)
    assert len(told(rig)) == STOPS_AT_ONCE
    rig.motor(1).faults.silent = False
    rig.run(200)
    assert len(told(rig)) > ORDER_TRIES
    assert rig.end_of(ticket) is None
    rig.run(200)
    assert rig.reason(ticket) == "no_reply"


@pytest.mark.parametrize("kind", [Kind.POSITION, Kind.STOP])
def test_order_that_was_not_acknowledged_ends_when_its_motor_is_offline(clock: Clock, kind: Kind) -> None:
    rig, _ = make_plain_rig(clock)
    ticket = begin_unheard(rig, kind, 0.5, expires_in_ms=5000)
    while not rig.of(MotorOffline):
        assert rig.end_of(ticket) is None
        rig.period()
    assert rig.reason(ticket) == "no_reply"


@pytest.mark.parametrize("grouped", [False, True])
def test_newer_setpoint_takes_the_place_of_one_that_is_to_be_said_again(clock: Clock, grouped: bool) -> None:
    rig, _ = make_plain_rig(clock)
    if grouped:  # its motor cannot be prepared
        rig.connect()
        rig.motor(1).faults.silent = True
        older, other = rig.submit_group({1: 0.1, 2: 0.2})
        rig.run(20)
        assert plain(rig).fired == []
    else:
        older, other = begin_unheard(rig, Kind.POSITION, 0.1), rig.submit(Kind.POSITION, 2, 0.2)
    rig.run(20)
    newer = rig.submit(Kind.POSITION, 1, 0.3)
    assert rig.reason(older) == "newer_command"
    rig.motor(1).faults.silent = False
    rig.run(100)
    assert isinstance(rig.end_of(newer), OrderDone)
    assert isinstance(rig.end_of(other), OrderFailed if grouped else OrderDone)
    assert told(rig).count((Kind.POSITION, 0.1)) == (0 if grouped else 1)
    assert told(rig)[-1] == (Kind.POSITION, 0.3)


def test_order_is_not_said_again_when_it_has_expired(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.motor(1).faults.silent = True
    ticket = rig.submit(Kind.STOP, 1, expires_in_ms=25)
    rig.run(100)
    assert rig.reason(ticket) == "no_reply"
    assert len(plain(rig).orders) == 1


def test_order_to_a_motor_that_is_offline_fails_at_once(clock: Clock) -> None:
    rig = make_rig(clock)
    rig.connect()
    rig.motor(0).faults.silent = True
    rig.run(500)
    ticket = rig.submit(Kind.STOP, 0)
    rig.period()
    assert rig.reason(ticket) == "motor_offline"


def test_order_to_an_unknown_motor_fails_at_once(clock: Clock) -> None:
    rig = make_rig(clock)
    assert rig.reason(rig.submit(Kind.STOP, 77)) == "unknown_motor"


@pytest.mark.parametrize(("expires_in_ms", "done"), [(-1, False), (5, True)])
def test_order_past_its_time_is_not_begun(clock: Clock, expires_in_ms: float, done: bool) -> None:
    rig, (motors,) = make_plain_rig(clock)
    rig.connect()
    ticket = rig.submit(Kind.ENABLE, 0, expires_in_ms=expires_in_ms)
    rig.period()
    assert isinstance(rig.end_of(ticket), OrderDone) is done
    assert motors.asked[ORDER] == int(done)
    if not done:
        assert rig.reason(ticket) == "stale"


def test_order_that_found_no_time_is_not_begun_when_its_time_has_passed(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock)
    rig.connect()
    ticket = rig.submit(Kind.ENABLE, 0, expires_in_ms=5)
    rig.cycle.work(MonotonicNs(clock.now_ns + 100))  # no time for an exchange
    assert rig.end_of(ticket) is None
    clock.sleep_until(clock.now_ns + 10 * MS)
    rig.period()
    assert rig.reason(ticket) == "stale"
    assert motors.asked[ORDER] == 0


def test_orders_are_not_starved_by_a_bus_without_slack(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, period_ns=2 * MS, steps=3)
    rig.motor(0).faults.delay_ms = 1.3
    rig.connect()
    tickets = [rig.submit(Kind.ENABLE, motor) for motor in (0, 1, 2)]
    samples = rig.run(100)
    assert all(isinstance(rig.end_of(ticket), OrderDone) for ticket in tickets)
    assert samples[0] > 20


@pytest.mark.parametrize("delay_ms", [0.5, 1.2, 2.0, 3.0, 4.5])
def test_order_of_many_steps_succeeds_on_a_bus_whose_replies_take_their_time(clock: Clock, delay_ms: float) -> None:
    """An exchange that is begun in the last of a period still gets its reply."""
    rig, _ = make_plain_rig(clock, steps=20)
    for motor in rig.simulated.motors:
        motor.faults.delay_ms = delay_ms
    rig.connect()
    ticket = rig.submit(Kind.ENABLE, 0)
    samples = rig.run(400)
    assert isinstance(rig.end_of(ticket), OrderDone)
    assert samples[1] >= 25


@pytest.mark.parametrize("newer", [Kind.POSITION, Kind.VELOCITY, Kind.STOP, Kind.DISABLE])
def test_waiting_setpoint_gives_way_to_a_newer_one_and_to_what_ends_the_motion(clock: Clock, newer: Kind) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    older, other, enable = rig.submit(Kind.POSITION, 0), rig.submit(Kind.POSITION, 1), rig.submit(Kind.ENABLE, 0)
    newest = rig.submit(newer, 0)
    assert rig.reason(older) == "newer_command"
    rig.run(100)
    for ticket in (other, newest):
        assert isinstance(rig.end_of(ticket), OrderDone)
    assert ends(rig, [enable]) == ["newer_command" if newer is Kind.DISABLE else "done"]  # a disable goes ahead of it


def test_too_many_orders_for_one_motor_are_refused_and_the_others_still_get_theirs(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    tickets = [rig.submit(Kind.ENABLE, 0) for _ in range(ORDERS_PER_MOTOR + 1)]
    other = rig.submit(Kind.ENABLE, 1)
    assert rig.reason(tickets[-1]) == "overloaded"
    rig.run(100)
    assert all(isinstance(rig.end_of(ticket), OrderDone) for ticket in [*tickets[:-1], other])


def test_orders_of_a_motor_are_carried_out_in_their_order(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, steps=2)
    rig.connect()
    tickets = [rig.submit(kind, 0) for kind in (Kind.ENABLE, Kind.CLEAR_FAULT, Kind.POSITION)]
    rig.run(100)
    assert [notice.ticket for notice in rig.of(OrderDone)] == tickets


STEP = st.one_of(
    st.tuples(
        st.just("order"), st.integers(-1, 3), st.sampled_from(sorted(Kind)), st.sampled_from([-1.0, 0.5, 8.0, 500.0])
    ),
    st.tuples(st.just("order"), st.integers(0, 1), st.just(Kind.POSITION), st.just(500.0)),
    st.tuples(
        st.just("group"),
        st.integers(1, 4),
        st.sampled_from([Kind.POSITION, Kind.VELOCITY]),
        st.sampled_from([0.0, 25.0, 600.0]),
    ),
    st.tuples(st.just("silent"), st.integers(0, 2), st.just(Kind.STOP), st.just(0.0)),
    st.tuples(st.just("delay"), st.integers(0, 2), st.just(Kind.STOP), st.sampled_from([0.0, 3.0, 9.0, 15.0])),
    st.tuples(st.just("run"), st.just(0), st.just(Kind.STOP), st.sampled_from([1.0, 30.0, 400.0])),
    st.tuples(st.just("unplug"), st.just(0), st.just(Kind.STOP), st.just(0.0)),
)


def play(rig: Rig, what: str, motor: int, kind: Kind, number: float) -> None:
    match what:
        case "order":
            rig.submit(kind, motor, 0.1, number)
        case "group":  # of four there is one too many
            moment_ns = rig.clock.now_ns + round(number * MS)
            rig.submit_group(dict.fromkeys(range(motor), 0.1), kind, expires_in_ms=500, not_before_ns=moment_ns)
        case "silent":
            rig.motor(motor).faults.silent = not rig.motor(motor).faults.silent
        case "delay":
            rig.motor(motor).faults.delay_ms = number
        case "run":
            rig.run(number)
        case _:
            rig.bus.unplug()
            with pytest.raises(BusError):
                rig.period()
            rig.cycle.give_up("unplugged")
            rig.bus = MemoryBus(rig.simulated)
            rig.cycle.attach(rig.bus)


@pytest.mark.parametrize("make", [make_rig, lambda clock: make_plain_rig(clock, [(1, 2), (3,)], 2 * MS, 3)[0]])
@settings(max_examples=60)
@given(steps=st.lists(STEP, max_size=25), gives_up=st.booleans())
def test_every_ticket_ends_exactly_once_whatever_happens(
    make: Callable[[Clock], Rig], steps: list[tuple[str, int, Kind, float]], gives_up: bool
) -> None:
    for clock in make_clock():
        rig = make(clock)
        for step in steps:
            play(rig, *step)
        if gives_up:
            rig.cycle.give_up("the end")
        else:
            rig.run(1000)
        rig.notices += rig.cycle.take_notices()
        ends = Counter(n.ticket for n in rig.notices if isinstance(n, OrderDone | OrderFailed))
        assert ends == Counter(range(1, rig._numbers + 1))


# --- packets that nobody asked for ------------------------------------------------------------------------------------


class Listening(Plain):
    """Takes an uninvited CONNECT for "I have restarted", an uninvited REFRESH for a sign of life."""

    def overhear(self, packet: int) -> Overheard | None:
        kind, bus_id = packet & 0xC0, packet & 0x3F
        if kind == REFRESH:
            return Overheard(bus_id)
        return Overheard(bus_id, "it has restarted") if kind == CONNECT else None


def test_motor_that_says_it_has_restarted_is_connected_anew(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock, family=Listening)
    rig.connect()
    motors.unasked.append((motors.motors[2], bytes([2 | CONNECT])))
    samples = rig.run(100)
    assert [(n.motor, n.reason) for n in rig.of(MotorOffline)] == [(1, "it has restarted")]
    assert [n.motor for n in rig.of(MotorOnline)] == [1]
    assert samples[0] == samples[2] == 10


def test_sign_of_life_is_no_stray_and_changes_nothing(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock, family=Listening)
    rig.connect()
    strays = rig.cycle.strays
    motors.unasked.append((motors.motors[2], bytes([2 | REFRESH])))
    assert rig.run(100) == {0: 10, 1: 10, 2: 10}
    assert rig.notices == []
    assert rig.cycle.strays == strays


def test_family_hears_its_motors_while_another_is_polled(clock: Clock) -> None:
    rig, (_, theirs) = make_plain_rig(clock, groups=((1, 2), (3,)), family=Listening)
    rig.connect()
    theirs.unasked.append((theirs.motors[3], bytes([3 | CONNECT])))
    rig.run(100)
    assert {n.motor for n in rig.of(MotorOffline)} == {2}


# --- replies that take longer than a cycle ----------------------------------------------------------------------------


class Patient(Plain):
    patience_ns = 50 * MS


def test_reply_slower_than_a_cycle_is_waited_for_where_it_can_be_told_apart(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock, family=Patient)
    rig.motor(1).faults.delay_ms = 34
    samples = rig.run(400)
    assert 1 in {n.motor for n in rig.of(MotorOnline)}
    assert samples[0] >= 30
    assert samples[2] >= 30
    assert motors.asked[CONNECT] >= 3


def test_slow_reply_without_patience_is_none(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.motor(1).faults.delay_ms = 34
    rig.run(400)
    assert {n.motor for n in rig.of(MotorOnline)} == {0, 2}


def test_patience_ends(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock, family=Patient)
    rig.motor(0).faults.silent = True
    rig.run(300)
    assert {n.motor for n in rig.of(MotorOnline)} == {1, 2}
    assert motors.asked[CONNECT] >= 4


def test_every_turn_begins_anew(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    family = rig.families[0]
    assert isinstance(family, Plain)
    family.begun = 0
    rig.run(100)
    assert family.begun == 10


# --- velocity and torque: the deadman ---------------------------------------------------------------------------------


def plain(rig: Rig) -> Plain:
    family = rig.families[0]
    assert isinstance(family, Plain)
    return family


@pytest.mark.parametrize("kind", [Kind.VELOCITY, Kind.TORQUE])
def test_motor_without_a_fresh_setpoint_is_stopped_and_told_once(clock: Clock, kind: Kind) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    ticket = rig.submit(kind, 1, 0.5)
    rig.run(450)
    assert isinstance(rig.end_of(ticket), OrderDone)
    assert [order.kind for order in plain(rig).orders] == [kind]
    rig.run(2000)
    assert [order.kind for order in plain(rig).orders] == [kind, Kind.STOP]
    (stopped,) = rig.of(MotorStopped)
    assert (stopped.motor, stopped.reason) == (1, "no fresh setpoint for 500 ms")


def test_stream_of_setpoints_keeps_a_motor_going(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    for _ in range(10):
        rig.submit(Kind.VELOCITY, 1, 0.5)
        rig.run(300)
    assert rig.of(MotorStopped) == []


@pytest.mark.parametrize("kind", [Kind.STOP, Kind.DISABLE, Kind.POSITION])
def test_what_ends_a_drive_ends_its_deadman(clock: Clock, kind: Kind) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.submit(Kind.VELOCITY, 1, 0.5)
    rig.run(100)
    rig.submit(kind, 1, 0.5)
    rig.run(2000)
    assert [order.kind for order in plain(rig).orders] == [Kind.VELOCITY, kind]
    assert rig.of(MotorStopped) == []


def test_stop_that_is_not_acknowledged_is_repeated_and_told_once(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.submit(Kind.VELOCITY, 1, 0.5)
    rig.run(100)
    rig.motor(1).faults.silent = True
    rig.run(2500)
    rig.motor(1).faults.silent = False
    rig.run(2500)
    stops = [order.kind for order in plain(rig).orders].count(Kind.STOP)
    assert stops >= 1
    assert len(rig.of(MotorStopped)) == 1
    rig.run(2500)
    assert [order.kind for order in plain(rig).orders].count(Kind.STOP) == stops


def test_velocity_that_was_not_acknowledged_is_stopped_all_the_same(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock)
    rig.connect()
    motors.deaf = True
    ticket = rig.submit(Kind.VELOCITY, 1, 0.5)
    rig.run(300)
    assert rig.reason(ticket) == "no_reply"
    motors.deaf = False
    rig.run(2000)
    assert [order.kind for order in plain(rig).orders] == [*[Kind.VELOCITY] * ORDER_TRIES, Kind.STOP]


@pytest.mark.parametrize(
    ("position_rad", "velocity_rad_s", "stopped"),
    [(1.01, 0.5, True), (-1.01, -0.5, True), (1.01, -0.5, False), (-1.01, 0.5, False), (0.99, 5.0, False)],
)
def test_motor_that_is_driven_out_of_its_range_is_stopped_at_once(
    clock: Clock, position_rad: float, velocity_rad_s: float, stopped: bool
) -> None:
    rig, _ = make_plain_rig(clock, groups=((1,),))
    rig.connect()
    rig.submit(Kind.VELOCITY, 0, 0.5)
    rig.run(50)
    plain(rig).told = Feedback(position_rad, velocity_rad_s, 25.0)
    rig.run(30)
    assert (Kind.STOP in [order.kind for order in plain(rig).orders]) is stopped
    assert len(rig.of(MotorStopped)) == stopped


def test_stop_of_its_own_goes_ahead_of_orders_that_wait(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.submit(Kind.VELOCITY, 1, 0.5)
    rig.run(480)
    rig.motor(0).faults.delay_ms = 4  # each of its orders takes the slack of a cycle
    for _ in range(6):
        rig.submit(Kind.ENABLE, 0)
    rig.run(500)
    kinds = [order.kind for order in plain(rig).orders]
    assert kinds.count(Kind.ENABLE) >= 6
    assert kinds.index(Kind.STOP) < len(kinds) - 1


def test_motor_that_is_found_running_is_stopped_and_told_once(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    plain(rig).driven = {2}
    rig.run(2000)
    assert [order.kind for order in plain(rig).orders] == [Kind.STOP]
    (stopped,) = rig.of(MotorStopped)
    assert (stopped.motor, stopped.reason) == (1, "found running at a velocity or torque that nobody renews")


def test_motor_that_was_away_for_a_moment_goes_on_with_the_setpoint_that_it_has(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    plain(rig).driven = {2}
    rig.submit(Kind.VELOCITY, 1, 0.5)
    rig.run(50)
    rig.motor(1).faults.silent = True
    rig.run(350)
    rig.motor(1).faults.silent = False
    rig.run(80)
    assert (len(rig.of(MotorOffline)), len(rig.of(MotorOnline))) == (1, 1)
    assert rig.of(MotorStopped) == []
    rig.run(500)
    assert [order.kind for order in plain(rig).orders] == [Kind.VELOCITY, Kind.STOP]


def test_cycle_that_is_left_stops_what_is_driven_and_begins_nothing(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    position, velocity = rig.submit(Kind.POSITION, 0, 0.5), rig.submit(Kind.VELOCITY, 1, 0.5)
    rig.run(100)
    waiting = rig.submit(Kind.VELOCITY, 1, 0.6)
    rig.cycle.leave(MonotonicNs(clock.now_ns + 100 * MS))
    assert ends(rig, [position, velocity, waiting]) == ["done", "done", "interrupted"]
    assert [order.kind for order in plain(rig).orders] == [Kind.POSITION, Kind.VELOCITY, Kind.STOP]


RUNNING = [
    (f"{name}#{number}", kind)
    for name in protocols.family_names()
    for number in range(len(protocols.load(name).examples))
    for kind in sorted(DRIVES & protocols.load(name).kinds_of(make_motor(name, 1, example=number)))
]


@pytest.mark.parametrize(("example", "kind"), RUNNING)
def test_motor_that_a_dead_process_left_running_is_stopped_by_the_next(clock: Clock, example: str, kind: Kind) -> None:
    family, _, number = example.partition("#")
    motor = make_motor(family, 1, example=int(number))
    bus = build_bus([motor], SimulationSettings(motion="still", enabled=False), MonotonicNs(clock.now_ns))
    dead = Rig(clock, bus, [protocols.load(family)([motor])])
    dead.connect()
    tickets = [dead.submit(Kind.ENABLE)]
    dead.run(500)
    tickets.append(dead.submit(kind, value=0.5))
    dead.run(300)
    assert ends(dead, tickets) == ["done"] * 2
    assert bus.motors[0].servo.velocity_rad_s > 0.1
    following = Rig(clock, bus, [protocols.load(family)([motor])])
    following.run(1000)
    assert bus.motors[0].servo.velocity_rad_s == pytest.approx(0, abs=0.01)
    assert len(following.of(MotorStopped)) == 1
    assert bus.motors[0].servo.enabled


@pytest.mark.parametrize("family", protocols.family_names())
@pytest.mark.parametrize("motion", ["wave", "still"])
def test_motor_that_is_found_holding_or_on_its_way_is_left_alone(
    clock: Clock, family: str, motion: Literal["wave", "still"]
) -> None:
    rig = make_rig(clock, family, settings=SimulationSettings(motion=motion, enabled=True))
    rig.run(1000)
    assert len(rig.of(MotorOnline)) == 3
    assert rig.of(MotorStopped) == []


# --- orders of several motors -----------------------------------------------------------------------------------------


def test_motor_does_not_wait_for_the_slow_order_of_another(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, family=Patient, steps=3)
    rig.connect()
    rig.motor(0).faults.delay_ms = 34
    slow = rig.submit(Kind.ENABLE, 0)
    rig.run(10)
    quick = rig.submit(Kind.STOP, 1)
    rig.run(20)
    assert isinstance(rig.end_of(quick), OrderDone)
    assert rig.end_of(slow) is None
    rig.run(200)
    assert isinstance(rig.end_of(slow), OrderDone)


def test_stop_breaks_off_what_its_motor_is_being_told(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, family=Patient, steps=3)
    rig.connect()
    rig.motor(0).faults.delay_ms = 34
    enable = rig.submit(Kind.ENABLE, 0)
    rig.run(20)
    stop = rig.submit(Kind.STOP, 0)
    assert rig.reason(enable) == "newer_command"
    rig.run(200)
    assert isinstance(rig.end_of(stop), OrderDone)


# --- the motors' own watchdogs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in protocols.family_names() if protocols.load(name).watchdog])
def test_motors_run_while_the_cycle_does_and_stop_when_it_stalls(clock: Clock, family: str) -> None:
    settings = SimulationSettings(motion="still", enabled=False)
    rig = make_rig(clock, family, settings=settings, watchdog_ns=500 * MS)
    rig.connect()
    for kind in (Kind.ENABLE, Kind.POSITION):
        tickets = [rig.submit(kind, motor, 0.5) for motor in (0, 1, 2)]
        rig.run(1500)
        assert ends(rig, tickets) == ["done"] * 3
    assert all(motor.servo.position_rad == pytest.approx(0.5, abs=0.01) for motor in rig.simulated.motors)
    assert rig.of(MotorOffline) == []
    rig.submit(Kind.POSITION, 0, -3.0)
    rig.run(100)
    for _ in range(60):
        clock.sleep_until(clock.now_ns + 20 * MS)
        rig.simulated.advance(MonotonicNs(clock.now_ns))
    stopped_rad = rig.motor(0).servo.position_rad
    rig.run(2000)
    assert rig.motor(0).servo.position_rad == pytest.approx(stopped_rad, abs=0.05)
    assert sorted(rig.period()) == [0, 1, 2]  # monitored again
    assert ends(rig, [rig.submit(Kind.POSITION, 0, 0.0)]) == [""]
    rig.run(100)
    if Kind.CLEAR_FAULT in protocols.load(family).kinds:
        rig.submit(Kind.CLEAR_FAULT, 0)
    enable = rig.submit(Kind.ENABLE, 0)
    rig.run(500)
    assert ends(rig, [enable]) == ["done"]


# --- setpoints of a group ---------------------------------------------------------------------------------------------

GOALS = {0: 0.1, 1: 0.2, 2: 0.3}


def ends(rig: Rig, tickets: Sequence[int]) -> list[str]:
    """ "done", or the reason, of each."""
    found = [rig.end_of(ticket) for ticket in tickets]
    return ["" if end is None else end.reason if isinstance(end, OrderFailed) else "done" for end in found]


def test_group_is_fired_in_one_exchange_when_all_of_it_is_prepared(clock: Clock) -> None:
    rig, (motors,) = make_plain_rig(clock, steps=4)
    rig.connect()
    for motor in rig.simulated.motors:
        motor.faults.delay_ms = 2
    tickets = rig.submit_group(GOALS)
    rig.run(10)
    assert plain(rig).fired == []
    rig.run(200)
    assert ends(rig, tickets) == ["done"] * 3
    assert plain(rig).fired == [[1, 2, 3]]
    assert motors.asked[ORDER] == 3


def test_group_waits_until_it_is_complete(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    first, second = rig.submit(Kind.POSITION, 0, group=7, size=3), rig.submit(Kind.POSITION, 1, group=7, size=3)
    other = rig.submit(Kind.ENABLE, 2)
    rig.run(50)
    assert ends(rig, [first, second, other]) == ["", "", "done"]
    third = rig.submit(Kind.POSITION, 2, group=7, size=3)
    rig.run(50)
    assert ends(rig, [first, second, third]) == ["done"] * 3


def test_group_that_stays_incomplete_is_stale_and_fires_nothing(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    tickets = [rig.submit(Kind.POSITION, motor, expires_in_ms=50, group=7, size=3) for motor in (0, 1)]
    rig.run(100)
    assert ends(rig, tickets) == ["stale"] * 2
    assert plain(rig).fired == []


def test_group_of_which_one_refuses_to_be_prepared_fires_nothing_and_says_which(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    plain(rig).unfit[2] = "torque is off"
    tickets = rig.submit_group(GOALS)
    rig.run(100)
    assert ends(rig, tickets) == ["not_enabled"] * 3
    assert plain(rig).fired == []
    assert {n.detail for n in rig.of(OrderFailed)} == {"torque is off", "joint2 of its group: torque is off"}


def test_group_of_which_one_is_offline_fires_nothing(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.motor(1).faults.silent = True
    rig.run(500)
    tickets = rig.submit_group(GOALS)
    rig.run(100)
    assert ends(rig, tickets) == ["motor_offline"] * 3
    assert plain(rig).fired == []


@pytest.mark.parametrize("kind", [Kind.STOP, Kind.POSITION])
def test_group_that_waits_gives_way_as_a_whole_to_what_overtakes_one_of_it(clock: Clock, kind: Kind) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    tickets = [rig.submit(Kind.POSITION, motor, group=7, size=3) for motor in (0, 1)]
    rig.run(20)
    newer = rig.submit(kind, 1)
    rig.run(50)
    assert ends(rig, [*tickets, newer]) == ["newer_command", "newer_command", "done"]
    assert plain(rig).fired == []


def test_stop_breaks_off_a_group_that_waits_for_its_moment(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    tickets = rig.submit_group(GOALS, not_before_ns=clock.now_ns + 200 * MS)
    rig.run(100)
    stop = rig.submit(Kind.STOP, 1)
    rig.run(300)
    assert ends(rig, [*tickets, stop]) == ["newer_command"] * 3 + ["done"]
    assert plain(rig).fired == []


class Timed(Plain):
    """Notes when it is fired."""

    clock: ClassVar[Clock]

    def fire(self, ready: Mapping[int, Ready]) -> Exchange[bytes, int]:
        exchange = super().fire(ready)

        def begin() -> None:
            self.fired_ns = self.clock.now_ns

        return Exchange(exchange.requests, exchange.expects, exchange.match, begin)


@pytest.mark.parametrize("after_us", [15_000, 31_000, 49_900, 52_300, 59_990])
def test_group_is_fired_at_its_moment_wherever_that_lies_in_a_period(clock: Clock, after_us: int) -> None:
    rig, _ = make_plain_rig(clock, family=Timed)
    rig.connect()
    Timed.clock = clock
    family = rig.families[0]
    assert isinstance(family, Timed)
    moment_ns = clock.now_ns + after_us * 1000
    tickets = rig.submit_group(GOALS, not_before_ns=moment_ns)
    rig.run(100)
    assert ends(rig, tickets) == ["done"] * 3
    late_ns = family.fired_ns - moment_ns
    assert 0 <= late_ns < 0.6 * MS  # Rig, as a worker, leaves the last twentieth of a period alone


def test_group_whose_moment_comes_after_its_time_is_stale(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    tickets = rig.submit_group(GOALS, expires_in_ms=100, not_before_ns=clock.now_ns + 200 * MS)
    rig.run(300)
    assert ends(rig, tickets) == ["stale"] * 3
    assert plain(rig).fired == []


def test_motor_that_did_not_hear_its_group_is_told_again_alone(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    tickets = rig.submit_group(GOALS, not_before_ns=clock.now_ns + 45 * MS)
    rig.run(40)
    rig.motor(1).faults.silent = True
    while not plain(rig).fired:
        rig.period()
    rig.motor(1).faults.silent = False
    rig.run(50)
    assert ends(rig, tickets) == ["done"] * 3
    assert plain(rig).fired == [[1, 2, 3]]
    assert len(plain(rig).orders) == 4


def test_group_of_two_families_is_fired_as_one(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, [(1, 2), (3,)])
    rig.connect()
    tickets = rig.submit_group(GOALS)
    rig.run(100)
    assert ends(rig, tickets) == ["done"] * 3
    assert [family.fired for family in rig.families if isinstance(family, Plain)] == [[[1, 2]], [[3]]]


def test_group_of_velocities_is_stopped_when_nothing_follows(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.submit_group(GOALS, Kind.VELOCITY)
    rig.run(1500)
    assert sorted(notice.motor for notice in rig.of(MotorStopped)) == [0, 1, 2]


def test_group_takes_setpoints_only(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    assert ends(rig, rig.submit_group(GOALS, Kind.ENABLE)) == ["unsupported"] * 3


@pytest.mark.parametrize(
    ("family", "most_us"), [("feetech_sts", 0), ("dynamixel2", 0), ("damiao", 600), ("rmd_x", 300), ("cia402", 0)]
)
def test_motors_of_a_group_take_their_goals_as_close_together_as_the_wire_allows(
    clock: Clock, family: str, most_us: int
) -> None:
    """A burst on CAN is as long as its frames; Damiao's replies outrank its commands, and go in between."""
    rig = make_rig(clock, family, settings=SimulationSettings(motion="still", enabled=False, bits_per_s=1_000_000))
    rig.connect()
    enabled = [rig.submit(Kind.ENABLE, motor) for motor in GOALS]
    rig.run(600)
    assert ends(rig, enabled) == ["done"] * 3
    times = GoalTimes(rig.simulated)
    tickets = rig.submit_group(GOALS)
    rig.run(300)
    assert ends(rig, tickets) == ["done"] * 3
    assert sorted(times.at_ns) == [0, 1, 2]
    assert times.spread_ns <= most_us * 1000


# --- emergency stop ---------------------------------------------------------------------------------------------------


def test_estop_goes_ahead_of_everything_and_is_done_when_every_motor_has_stopped(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, steps=3)
    rig.connect()
    orders = [rig.submit(Kind.ENABLE, motor) for motor in (0, 1, 2) for _ in range(3)]
    estop = rig.submit(Kind.ESTOP, ALL)
    rig.period()
    assert ends(rig, orders) == ["estop_latched"] * 9
    assert plain(rig).halts[0] == [1, 2, 3]
    rig.run(50)
    end = rig.end_of(estop)
    assert isinstance(end, OrderDone)
    assert (end.motor, end.detail) == (ALL, "latched; 3 stopped")
    assert [order.kind for order in plain(rig).orders] == [Kind.STOP] * 3
    halts = len(plain(rig).halts)
    rig.run(100)
    assert len(plain(rig).halts) == halts


def test_estop_is_sent_at_once_on_a_bus_without_slack(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, period_ns=2 * MS)
    rig.motor(0).faults.delay_ms = 1.3
    rig.connect()
    start = MonotonicNs(clock.now_ns)
    rig.cycle.poll(start)
    rig.submit(Kind.ESTOP, ALL)
    rig.cycle.work(MonotonicNs(clock.now_ns))  # no time left
    assert plain(rig).halts[0] == [1, 2, 3]


def test_estop_breaks_off_what_motors_are_being_told_and_groups_that_wait(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, family=Patient, steps=3)
    rig.connect()
    rig.motor(0).faults.delay_ms = 34
    slow = rig.submit(Kind.ENABLE, 0)
    waiting = [rig.submit(Kind.POSITION, motor, group=7, size=3) for motor in (1, 2)]
    rig.run(20)
    estop = rig.submit(Kind.ESTOP, ALL)
    assert ends(rig, [slow, *waiting]) == ["estop_latched"] * 3
    rig.run(400)
    assert ends(rig, [estop]) == ["done"]
    assert Kind.POSITION not in {order.kind for order in plain(rig).orders}


def test_estop_is_repeated_until_a_motor_acknowledges_it(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.motor(1).faults.silent = True
    estop = rig.submit(Kind.ESTOP, ALL)
    rig.run(100)
    assert ends(rig, [estop]) == [""]
    assert plain(rig).halts[-1] == [2]
    assert 5 <= len(plain(rig).halts) <= 12
    rig.motor(1).faults.silent = False
    rig.run(100)
    assert ends(rig, [estop]) == ["done"]


def test_estop_does_not_wait_for_a_motor_that_is_offline(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.motor(1).faults.silent = True
    estop = rig.submit(Kind.ESTOP, ALL)
    rig.run(600)
    end = rig.end_of(estop)
    assert isinstance(end, OrderDone)
    assert end.detail == "latched; 2 stopped; offline: joint2"


def test_estop_is_said_once_to_motors_too_that_do_not_answer(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.motor(1).faults.silent = True  # it may hear
    rig.run(500)
    rig.submit(Kind.ESTOP, ALL)
    rig.run(30)
    assert [1, 2, 3] in plain(rig).halts
    assert all(2 not in halt for halt in plain(rig).halts[1:])


def test_estop_that_is_reset_before_its_time_says_so(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.motor(1).faults.silent = True
    estop = rig.submit(Kind.ESTOP, ALL)
    rig.run(50)
    reset = rig.submit(Kind.RESET_ESTOP, ALL)
    assert ends(rig, [estop, reset]) == ["newer_command", "done"]
    halts = len(plain(rig).halts)
    rig.run(100)
    assert len(plain(rig).halts) == halts


def test_latched_motor_takes_nothing_but_stops_until_the_stop_is_reset(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.submit(Kind.ESTOP, ALL)
    rig.run(50)
    assert rig.cycle.latched == {0, 1, 2}
    refused = [Kind.ENABLE, Kind.POSITION, Kind.VELOCITY, Kind.TORQUE, Kind.CLEAR_FAULT]
    assert ends(rig, [rig.submit(kind, 0, 0.5) for kind in refused]) == ["estop_latched"] * 5
    taken = [rig.submit(Kind.STOP, 0), rig.submit(Kind.DISABLE, 1), rig.submit(Kind.ESTOP, ALL)]
    rig.run(50)
    assert ends(rig, taken) == ["done"] * 3
    reset = rig.submit(Kind.RESET_ESTOP, ALL)
    enable = rig.submit(Kind.ENABLE, 0)
    rig.run(50)
    assert ends(rig, [reset, enable]) == ["done"] * 2


def test_estop_of_one_motor_leaves_the_others_alone(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    estop, other = rig.submit(Kind.ESTOP, 1), rig.submit(Kind.ENABLE, 0)
    rig.run(50)
    assert ends(rig, [estop, other]) == ["done"] * 2
    assert rig.cycle.latched == {1}
    assert plain(rig).halts[0] == [2]


def test_motor_that_comes_online_while_latched_is_stopped_too(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.motor(1).faults.silent = True
    rig.run(300)
    rig.submit(Kind.ESTOP, ALL)
    rig.run(100)
    plain(rig).halts.clear()
    plain(rig).orders.clear()
    rig.motor(1).faults.silent = False
    rig.run(1000)
    assert plain(rig).halts[0] == [2]
    assert [order.kind for order in plain(rig).orders] == [Kind.STOP]


def test_latch_outlasts_the_bus(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock)
    rig.connect()
    rig.bus.unplug()
    rig.cycle.give_up("adapter gone")
    estop = rig.submit(Kind.ESTOP, ALL)
    assert ends(rig, [estop]) == ["done"]
    rig.cycle.give_up("adapter gone")
    rig.bus = MemoryBus(rig.simulated)
    rig.cycle.attach(rig.bus)
    rig.run(1000)
    assert plain(rig).halts[0] == [1, 2, 3]
    assert [order.kind for order in plain(rig).orders] == [Kind.STOP] * 3
    assert ends(rig, [rig.submit(Kind.ENABLE, 0)]) == ["estop_latched"]


@pytest.mark.parametrize("family", ["feetech_sts", "dynamixel2", "damiao", "rmd_x", "cia402"])
def test_estop_stops_moving_motors_of_every_family(clock: Clock, family: str) -> None:
    rig = make_rig(clock, family, settings=SimulationSettings(motion="still", enabled=False))
    rig.connect()
    for kind in (Kind.ENABLE, Kind.POSITION):
        tickets = [rig.submit(kind, motor, 2.0) for motor in GOALS]
        rig.run(500)
        assert ends(rig, tickets) == ["done"] * 3
    estop = rig.submit(Kind.ESTOP, ALL)
    rig.period()
    rig.run(400)
    stopped = [motor.servo.position_rad for motor in rig.simulated.motors]
    assert ends(rig, [estop]) == ["done"]
    rig.run(500)
    assert [motor.servo.position_rad for motor in rig.simulated.motors] == pytest.approx(stopped, abs=0.01)
    assert all(0.1 < position < 1.5 for position in stopped)


# --- polls that every motor answers -----------------------------------------------------------------------------------


class Broadcast(Plain):
    """Each byte asks all motors, as a SYNC does."""

    asks_all = True
    patience_ns = 50 * MS

    def poll(self, bus_ids: Sequence[int]) -> Exchange[bytes, int]:
        exchange = super().poll(bus_ids)
        return Exchange([bytes(self.motors)], exchange.expects, exchange.match, exchange.begin)


def test_reply_to_the_poll_before_is_no_sample_where_nobody_can_be_left_out(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, family=Broadcast)
    rig.connect()
    rig.run(500)
    rig.motor(1).faults.delay_ms = 15  # a period and a half
    samples = rig.run(500)
    assert samples[1] == 0
    assert samples[0] == samples[2] == 50
    offline = rig.of(MotorOffline)[0]
    assert offline.motor == 1
    assert "may be to one before" in offline.reason
    rig.motor(1).faults.delay_ms = 0
    rig.run(1000)
    assert rig.run(100)[1] == 10


def test_prompt_reply_after_a_lost_one_is_a_sample(clock: Clock) -> None:
    rig, _ = make_plain_rig(clock, family=Broadcast)
    rig.connect()
    rig.run(500)
    rig.motor(1).faults.silent = True
    rig.run(20)
    rig.motor(1).faults.silent = False
    assert rig.run(200)[1] >= 17
