"""A simulated bus without a host: faults and wire time, at times that the test says."""

from collections.abc import Callable
from itertools import pairwise
from math import isclose
from typing import Any

import pytest

from drivers.clock import MS, SECOND, MonotonicNs, after
from drivers.protocols import damiao, feetech_sts
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.bus import BOOT_NS, CanError, SimulatedBus
from drivers.sim.responder import Faults
from drivers.sim.wire import wire_bits
from tests.memory_loop import make_motor

STILL = SimulationSettings(motion="still", enabled=True)
TIMED = SimulationSettings(motion="still", bits_per_s=1_000_000)
SYNC_READ = feetech_sts.make_sync_read([1, 2, 3], feetech_sts.FEEDBACK.address, feetech_sts.FEEDBACK.size)
REFRESHES = [damiao.make_refresh(bus_id) for bus_id in (1, 2, 3)]
US = 1000


class Bench:
    """Three motors of a family, and a time."""

    def __init__(self, family: str, settings: SimulationSettings = STILL) -> None:
        self.now = MonotonicNs(SECOND)
        motors = [make_motor(family, bus_id, bus_id - 1) for bus_id in (1, 2, 3)]
        self.bus: SimulatedBus[Any] = build_bus(motors, settings, self.now, "bus0")
        self.requests: list[Any] = [SYNC_READ] if family == "feetech_sts" else list(REFRESHES)

    @property
    def faults(self) -> Faults:
        """Of the second motor."""
        return self.bus.motors[1].faults

    def wait(self, duration_ns: int) -> list[tuple[MonotonicNs, Any]]:
        """What arrives meanwhile, to a host that looks whenever there is something, and every 20 ms."""
        end = MonotonicNs(self.now + duration_ns)
        arriving = []
        while self.now < end:
            wanted = self.bus.next_ns
            tick = min(end, after(self.now, 20 * MS))
            self.now = max(self.now, tick if wanted is None else min(tick, wanted))
            arriving += self.bus.advance(self.now)
        return arriving

    def ask(self, duration_ns: int = 10 * MS) -> list[tuple[int, Any]]:
        """(nanoseconds until it arrives, reply) to one request to each motor, written together."""
        start = self.now
        arriving = [reply for request in self.requests for reply in self.bus.respond(request, start)]
        return [(due - start, reply) for due, reply in arriving + self.wait(duration_ns)]


@pytest.fixture(params=["feetech_sts", "damiao"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


# --- wire time --------------------------------------------------------------------------------------------------------


def test_without_wire_time_replies_are_there_at_once(bench: Bench) -> None:
    assert [after_ns for after_ns, _ in bench.ask()] == [0, 0, 0]


@pytest.mark.parametrize("delay", [0, 50])
def test_serial_replies_follow_the_request_byte_by_byte_after_the_return_delay(delay: int) -> None:
    bench = Bench("feetech_sts", SimulationSettings(motion="still", bits_per_s=500_000))
    set_return_delay = {bus_id: bytes((delay,)) for bus_id in (1, 2, 3)}
    bench.bus.respond(feetech_sts.make_sync_write(feetech_sts.Register.RETURN_DELAY_TIME, set_return_delay), bench.now)
    bench.wait(5 * MS)
    request_ns, reply_ns, delay_ns = 20 * US * len(SYNC_READ), 20 * US * 21, 2 * US * delay
    replies = [request_ns + delay_ns + number * reply_ns for number in (1, 2, 3)]
    assert [after_ns for after_ns, _ in bench.ask()] == replies


def test_can_frames_take_their_true_bits_and_never_overlap() -> None:
    bench = Bench("damiao", TIMED)
    replies = bench.ask()
    assert len(replies) == 3
    bits = sum(wire_bits(unit) for unit in [*bench.requests, *(reply for _, reply in replies)])
    assert replies[-1][0] == bits * US
    for (earlier_ns, _), (later_ns, reply) in pairwise(replies):
        assert later_ns - earlier_ns >= wire_bits(reply) * US


def test_next_request_passes_while_a_motor_thinks_about_its_answer() -> None:
    bench = Bench("damiao", SimulationSettings(motion="still", bits_per_s=1_000_000, turnaround_ns=300 * US))
    replies = bench.ask()
    requests_ns = sum(wire_bits(request) for request in bench.requests) * US
    first_ns = wire_bits(bench.requests[0]) * US + 300 * US + wire_bits(replies[0][1]) * US
    assert replies[0][0] == max(first_ns, requests_ns + wire_bits(replies[0][1]) * US)
    assert replies[2][0] < requests_ns + 300 * US + 3 * 135 * US


def test_request_that_comes_while_the_wire_is_busy_waits() -> None:
    bench = Bench("damiao", TIMED)
    for request in bench.requests:
        bench.bus.respond(request, bench.now)
    assert len({due for due, _ in bench.wait(10 * MS)}) == 3


# --- faults of a motor ------------------------------------------------------------------------------------------------


def test_silent_motor_is_the_only_one_that_is_not_heard(bench: Bench) -> None:
    everything = [reply for _, reply in bench.ask()]
    bench.faults.silent = True
    assert [reply for _, reply in bench.ask()] == [everything[0], everything[2]]


def test_delayed_motor_delays_nobody_else(bench: Bench) -> None:
    bench.faults.delay_ms = 5
    assert [after_ns for after_ns, _ in bench.ask()] == [0, 0, 5 * MS]


@pytest.mark.parametrize("fault", ["drop", "corrupt"])
@pytest.mark.parametrize("family", ["feetech_sts", "damiao"])
def test_share_of_the_replies_is_struck_and_with_the_same_seed_the_same_ones(family: str, fault: str) -> None:
    good = Bench(family).ask()[1][1]

    def struck(seed: int) -> list[int]:
        bench = Bench(family, SimulationSettings(motion="still", enabled=True, seed=seed))
        setattr(bench.faults, fault, 0.3)
        return [number for number in range(300) if good not in [reply for _, reply in bench.ask(MS)]]

    first = struck(7)
    assert 50 < len(first) < 130
    assert struck(7) == first
    assert struck(8) != first


def test_everything_dropped_is_nothing_heard_and_still_takes_its_time() -> None:
    bench = Bench("damiao", TIMED)
    whole = bench.ask()
    bench.faults.drop = 1.0
    assert bench.ask() == [whole[0], whole[2]]


def test_corrupt_serial_reply_is_one_bit_wrong_or_cut() -> None:
    bench = Bench("feetech_sts")
    good = [reply for _, reply in bench.ask()][1]
    bench.faults.corrupt = 1.0
    kinds = set()
    for _ in range(50):
        replies = [reply for _, reply in bench.ask()]
        damaged = replies[1] if len(replies) == 3 else b""
        if len(damaged) < len(good):
            assert good.startswith(damaged)
            kinds.add("cut")
        else:
            assert sum((a ^ b).bit_count() for a, b in zip(good, damaged, strict=True)) == 1
            kinds.add("bit")
    assert kinds == {"cut", "bit"}


def test_corrupt_can_frame_is_dropped_by_the_controller_which_says_so() -> None:
    bench = Bench("damiao")
    bench.faults.corrupt = 1.0
    assert len(bench.ask()) == 2
    assert list(bench.bus.errors) == [CanError.PROTOCOL | CanError.BUS_ERROR]


def test_stuck_encoder_freezes_where_it_was_and_is_freed_again(bench: Bench) -> None:
    servo = bench.bus.motors[1].servo
    servo.move_to(1.0, 1.0)
    bench.wait(500 * MS)
    bench.faults.stuck_encoder = True
    bench.wait(MS)
    frozen = servo.measured_rad
    bench.wait(SECOND)
    assert servo.measured_rad == frozen
    assert servo.position_rad == pytest.approx(1.0, abs=0.01)
    bench.faults.stuck_encoder = False
    bench.wait(MS)
    assert servo.measured_rad == servo.position_rad


def test_forced_temperature_holds_as_long_as_the_fault(bench: Bench) -> None:
    servo = bench.bus.motors[1].servo
    bench.faults.temperature_c = 90.0
    bench.wait(SECOND)
    assert servo.temperature_c == 90.0
    bench.faults.temperature_c = None
    bench.wait(SECOND)
    assert 25 < servo.temperature_c < 90


def test_forced_voltage_is_given_back(bench: Bench) -> None:
    servo = bench.bus.motors[1].servo
    supply_v = servo.voltage_v
    for forced_v in (9.0, 16.0):
        bench.faults.voltage_v = forced_v
        bench.wait(MS)
        assert servo.voltage_v == forced_v
        assert servo.enabled
    bench.faults.voltage_v = None
    bench.wait(MS)
    assert servo.voltage_v == supply_v


def brown_out(bench: Bench) -> None:
    bench.faults.voltage_v = 3.0
    bench.wait(MS)
    bench.faults.voltage_v = None


def be_rebooted(bench: Bench) -> None:
    bench.faults.reboot = True


@pytest.mark.parametrize("take_power", [brown_out, be_rebooted])
def test_motor_without_power_is_silent_and_limp_until_it_has_booted(
    bench: Bench, take_power: Callable[[Bench], None]
) -> None:
    servo = bench.bus.motors[1].servo
    take_power(bench)
    bench.wait(MS)
    assert len(bench.ask(MS)) == 2
    servo.enable()  # as an order would, which it does not hear
    bench.wait(BOOT_NS // 2)
    assert not servo.enabled
    assert len(bench.ask(MS)) == 2
    bench.wait(BOOT_NS)
    assert len(bench.ask(MS)) == 3
    assert not servo.enabled
    assert bench.bus.motors[0].servo.enabled


def test_motor_stays_off_as_long_as_its_supply_is_too_low(bench: Bench) -> None:
    bench.faults.voltage_v = 3.0
    bench.wait(10 * BOOT_NS)
    assert len(bench.ask()) == 2


def test_reboot_happens_once_however_long_the_fault_is_listed(bench: Bench) -> None:
    bench.faults.reboot = True
    bench.wait(2 * BOOT_NS)
    servo = bench.bus.motors[1].servo
    servo.enable()
    bench.wait(2 * BOOT_NS)
    assert servo.enabled
    bench.faults.reboot = False
    bench.wait(MS)
    bench.faults.reboot = True
    bench.wait(MS)
    assert not servo.enabled


# --- faults of a bus --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [STILL, TIMED])
def test_nothing_passes_a_bus_that_is_off_and_its_controller_says_so_once(settings: SimulationSettings) -> None:
    bench = Bench("damiao", settings)
    bench.bus.respond(bench.requests[0], bench.now)
    bench.bus.faults.bus_off = True
    bench.wait(MS)
    assert bench.ask() == []
    assert bench.ask() == []
    assert list(bench.bus.errors) == [CanError.BUS_OFF]
    bench.bus.faults.bus_off = False
    bench.wait(MS)
    assert len(bench.ask()) == 3
    assert list(bench.bus.errors) == [CanError.BUS_OFF, CanError.RESTARTED]


def test_motors_go_on_while_nobody_can_hear_them() -> None:
    bench = Bench("damiao")
    servo = bench.bus.motors[0].servo
    servo.move_to(0.5, 1.0)
    bench.bus.faults.bus_off = True
    bench.wait(2 * SECOND)
    assert isclose(servo.position_rad, 0.5, abs_tol=0.01)
