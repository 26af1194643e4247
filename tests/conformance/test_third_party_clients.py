"""Programs that others wrote, against the simulated motors: what they understand is the protocol."""

import time
from collections.abc import Callable, Iterator

import can
import pytest
import scservo_sdk
from can.interfaces.slcan import slcanBus
from damiao_motor import DaMiaoController

from drivers.clock import SECOND, after, monotonic_ns
from drivers.protocols.damiao import make_refresh
from drivers.sim.build import build_bus
from drivers.sim.hosts import PtySerialHost, SlcanHost
from tests.memory_loop import STILL, make_motor

IDS = (1, 2, 3, 4, 5, 6)


def wait_for(seen: Callable[[], object]) -> None:
    deadline = after(monotonic_ns(), 10 * SECOND)
    while not seen():
        assert monotonic_ns() < deadline
        time.sleep(0.005)


# --- feetech-servo-sdk ------------------------------------------------------------------------------------------------


class _Port(scservo_sdk.PortHandler):  # type: ignore[misc]  # published without types
    """Its port, with patience: a busy machine may not give a simulated servo its turn within the usual 34 ms."""

    def setPacketTimeout(self, packet_length: int) -> None:  # noqa: N802  its name
        self.setPacketTimeoutMillis(1000 + packet_length)


@pytest.fixture
def port() -> Iterator[_Port]:
    motors = [make_motor("feetech_sts", bus_id, index) for index, bus_id in enumerate(IDS)]
    with PtySerialHost(build_bus(motors, STILL, monotonic_ns())) as host:
        port = _Port(host.port)
        assert port.openPort()
        assert port.setBaudRate(1_000_000)
        yield port
        port.closePort()


def test_feetech_sdk_pings_every_servo(port: _Port) -> None:
    handler = scservo_sdk.PacketHandler(0)
    for bus_id in IDS:
        assert handler.ping(port, bus_id) == (777, scservo_sdk.COMM_SUCCESS, 0)


def test_feetech_sdk_moves_a_servo_and_sees_it_arrive(port: _Port) -> None:
    handler = scservo_sdk.PacketHandler(0)
    reader = scservo_sdk.GroupSyncRead(port, handler, 56, 15)
    for bus_id in IDS:
        assert reader.addParam(bus_id)

    def positions() -> list[int]:
        assert reader.txRxPacket() == scservo_sdk.COMM_SUCCESS
        assert all(reader.isAvailable(bus_id, 56, 15) for bus_id in IDS)
        return [reader.getData(bus_id, 56, 2) for bus_id in IDS]

    assert positions() == [2048] * 6
    assert reader.getData(1, 62, 1) == 120
    assert handler.write1ByteTxRx(port, 3, 40, 1) == (scservo_sdk.COMM_SUCCESS, 0)
    assert handler.write2ByteTxRx(port, 3, 46, 1000) == (scservo_sdk.COMM_SUCCESS, 0)
    assert handler.write2ByteTxRx(port, 3, 42, 2348) == (scservo_sdk.COMM_SUCCESS, 0)
    wait_for(lambda: positions()[2] == 2348)
    assert positions() == [2048, 2048, 2348, 2048, 2048, 2048]


def test_feetech_sdk_turns_a_servo_in_velocity_mode(port: _Port) -> None:
    handler = scservo_sdk.PacketHandler(0)
    assert handler.write1ByteTxRx(port, 4, 33, 1) == (scservo_sdk.COMM_SUCCESS, 0)
    assert handler.write2ByteTxRx(port, 4, 46, 0x8000 | 500) == (scservo_sdk.COMM_SUCCESS, 0)
    assert handler.write1ByteTxRx(port, 4, 40, 1) == (scservo_sdk.COMM_SUCCESS, 0)
    wait_for(lambda: handler.read2ByteTxRx(port, 4, 58)[0] == 0x8000 | 500)
    assert handler.write2ByteTxRx(port, 4, 46, 0) == (scservo_sdk.COMM_SUCCESS, 0)
    wait_for(lambda: handler.read2ByteTxRx(port, 4, 58)[0] & 0x7FFF == 0)


def test_feetech_sdk_writes_to_several_at_once(port: _Port) -> None:
    handler = scservo_sdk.PacketHandler(0)
    writer = scservo_sdk.GroupSyncWrite(port, handler, 48, 2)
    for bus_id in IDS:
        assert writer.addParam(bus_id, [bus_id, 1])
    assert writer.txPacket() == scservo_sdk.COMM_SUCCESS
    for bus_id in IDS:
        assert handler.read2ByteTxRx(port, bus_id, 48) == (256 + bus_id, scservo_sdk.COMM_SUCCESS, 0)


# --- slcan: damiao-motor, python-can ----------------------------------------------------------------------------------


def make_slcan_host() -> SlcanHost:
    motors = [make_motor("damiao", bus_id, index) for index, bus_id in enumerate(IDS)]
    return SlcanHost(build_bus(motors, STILL, monotonic_ns()))


@pytest.fixture(scope="module")  # opening takes 2 s, in case the adapter restarts; each test moves a motor of its own
def controller() -> Iterator[DaMiaoController]:
    with make_slcan_host() as host:
        controller = DaMiaoController(channel=host.port, bustype="slcan")
        for bus_id in IDS:
            controller.add_motor(motor_id=bus_id, feedback_id=0x10 + bus_id, motor_type="4310")
        yield controller
        controller.shutdown()


damiao_motor = pytest.mark.filterwarnings(
    # damiao-motor 1.0.6 opens its bus by a name that python-can has renamed
    "ignore:The 'bustype' argument is deprecated:DeprecationWarning",
)


@damiao_motor
def test_damiao_motor_reads_feedback_and_registers(controller: DaMiaoController) -> None:
    for motor in controller.all_motors():
        assert motor.get_register(21) == 12.5
        assert motor.get_register(7) == motor.feedback_id
        motor.request_motor_feedback()
    wait_for(lambda: all(motor.get_states() for motor in controller.all_motors()))
    for motor in controller.all_motors():
        states = motor.get_states()
        assert states["status"] == "DISABLED"
        assert states["arbitration_id"] == motor.feedback_id
        assert states["pos"] == pytest.approx(0, abs=0.001)
        assert states["t_rotor"] == 25


@damiao_motor
def test_damiao_motor_enables_and_moves_one_motor(controller: DaMiaoController) -> None:
    motor, other = controller.get_motor(2), controller.get_motor(1)
    motor.set_control_mode(2)
    motor.enable()
    wait_for(lambda: motor.get_states().get("status") == "ENABLED")
    motor.send_cmd_pos_vel(target_position=0.5, velocity_limit=3.0)

    def arrived() -> object:
        motor.request_motor_feedback()
        other.request_motor_feedback()
        return motor.get_states()["pos"] == pytest.approx(0.5, abs=0.001)

    wait_for(arrived)
    wait_for(lambda: bool(other.get_states()))
    assert other.get_states()["pos"] == pytest.approx(0, abs=0.001)


@damiao_motor
def test_damiao_motor_moves_in_mit_mode(controller: DaMiaoController) -> None:
    motor = controller.get_motor(6)
    motor.enable()
    wait_for(lambda: motor.get_states().get("status") == "ENABLED")

    def arrived() -> object:
        motor.send_cmd_mit(target_position=-0.3, stiffness=20, damping=1)
        return motor.get_states()["pos"] == pytest.approx(-0.3, abs=0.001)

    wait_for(arrived)


@damiao_motor
def test_damiao_motor_turns_a_motor_in_velocity_mode(controller: DaMiaoController) -> None:
    motor = controller.get_motor(4)
    motor.set_control_mode(3)
    motor.enable()
    wait_for(lambda: motor.get_states().get("status") == "ENABLED")
    for velocity_rad_s in (-0.5, 0.0):

        def turns(wanted: float = velocity_rad_s) -> object:
            motor.send_cmd_vel(target_velocity=wanted)
            return motor.get_states()["vel"] == pytest.approx(wanted, abs=0.02)

        wait_for(turns)


def test_python_can_talks_slcan_to_the_motors() -> None:
    with make_slcan_host() as host, slcanBus(host.port, bitrate=1_000_000, sleep_after_open=0) as bus:
        assert bus.get_version(2) == (10, 13)
        assert bus.get_serial_number(2) == "SIM1"
        for bus_id in IDS:
            request = make_refresh(bus_id)
            bus.send(can.Message(arbitration_id=request.can_id, data=request.data, is_extended_id=False))
        received: list[int] = []

        def all_came() -> bool:
            if message := bus.recv(0.1):
                received.append(message.arbitration_id)
            return len(received) == len(IDS)

        wait_for(all_came)
        assert received == [0x10 + bus_id for bus_id in IDS]
