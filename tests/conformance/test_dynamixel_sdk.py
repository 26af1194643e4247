"""ROBOTIS's own SDK, against simulated Dynamixel servos: what it understands is the protocol."""

from collections.abc import Iterator

import dynamixel_sdk
import pytest

from drivers.clock import SECOND, after, monotonic_ns
from drivers.protocols._dynamixel2 import Register
from drivers.sim.build import build_bus
from drivers.sim.hosts import PtySerialHost
from tests.memory_loop import STILL, make_motor

IDS = (1, 2, 3, 4, 5, 6)
OK = dynamixel_sdk.COMM_SUCCESS


class _Port(dynamixel_sdk.PortHandler):  # type: ignore[misc]  # published without types
    """Its port, with patience: a busy machine may not give a simulated servo its turn within the usual 34 ms."""

    def setPacketTimeout(self, packet_length: int) -> None:  # noqa: N802  its name
        self.setPacketTimeoutMillis(1000 + packet_length)


@pytest.fixture
def port() -> Iterator[_Port]:
    motors = [make_motor("dynamixel2", bus_id, index) for index, bus_id in enumerate(IDS)]
    with PtySerialHost(build_bus(motors, STILL, monotonic_ns())) as host:
        port = _Port(host.port)
        assert port.openPort()
        yield port
        port.closePort()


@pytest.fixture
def handler() -> dynamixel_sdk.Protocol2PacketHandler:
    return dynamixel_sdk.PacketHandler(2.0)


def make_reader(
    port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler, address: int, size: int
) -> dynamixel_sdk.GroupSyncRead:
    reader = dynamixel_sdk.GroupSyncRead(port, handler, address, size)
    for bus_id in IDS:
        assert reader.addParam(bus_id)
    return reader


def test_pings_every_servo(port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler) -> None:
    for bus_id in IDS:
        assert handler.ping(port, bus_id) == (1020, OK, 0)


def test_broadcast_ping_finds_every_servo(port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler) -> None:
    assert handler.broadcastPing(port) == ({bus_id: [1020, 48] for bus_id in IDS}, OK)


def test_reads_and_writes_registers(port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler) -> None:
    assert handler.write4ByteTxRx(port, 3, Register.PROFILE_VELOCITY, 0x7FFF) == (OK, 0)
    assert handler.read4ByteTxRx(port, 3, Register.PROFILE_VELOCITY) == (0x7FFF, OK, 0)
    assert handler.read2ByteTxRx(port, 3, Register.PRESENT_INPUT_VOLTAGE) == (120, OK, 0)
    assert handler.write1ByteTxRx(port, 3, Register.OPERATING_MODE, 2) == (OK, dynamixel_sdk.ERRNUM_DATA_RANGE)


def test_stuffed_values_go_both_ways(port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler) -> None:
    goal = (-0x00020001).to_bytes(4, "little", signed=True)  # FF FF FD FF
    assert handler.write1ByteTxRx(port, 2, Register.OPERATING_MODE, 4) == (OK, 0)
    assert handler.writeTxRx(port, 2, Register.GOAL_POSITION, 4, list(goal)) == (OK, 0)
    assert handler.readTxRx(port, 2, Register.GOAL_POSITION, 4) == (list(goal), OK, 0)


def test_writes_a_goal_to_several_and_sees_them_arrive(
    port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler
) -> None:
    reader = make_reader(port, handler, Register.PRESENT_CURRENT, 21)
    writer = dynamixel_sdk.GroupSyncWrite(port, handler, Register.GOAL_POSITION, 4)
    for bus_id in IDS:
        assert handler.write1ByteTxRx(port, bus_id, Register.TORQUE_ENABLE, 1) == (OK, 0)
        assert writer.addParam(bus_id, [bus_id, 8, 0, 0])
    assert writer.txPacket() == OK
    deadline = after(monotonic_ns(), 10 * SECOND)
    while True:
        assert reader.txRxPacket() == OK
        positions = [reader.getData(bus_id, Register.PRESENT_POSITION, 4) for bus_id in IDS]
        if positions == [2048 + bus_id for bus_id in IDS]:
            break
        assert monotonic_ns() < deadline
    assert reader.getData(1, Register.PRESENT_TEMPERATURE, 1) == 25


def test_fast_sync_read_brings_every_servo(port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler) -> None:
    reader = make_reader(port, handler, Register.PRESENT_POSITION, 4)
    assert reader.fastSyncRead() == OK
    assert [reader.getData(bus_id, Register.PRESENT_POSITION, 4) for bus_id in IDS] == [2048] * 6


def test_bulk_reads_different_registers(port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler) -> None:
    reader = dynamixel_sdk.GroupBulkRead(port, handler)
    assert reader.addParam(1, Register.ID, 1)
    assert reader.addParam(2, Register.MODEL_NUMBER, 2)
    for read in (reader.txRxPacket, reader.fastBulkRead):
        assert read() == OK
        assert reader.getData(1, Register.ID, 1) == 1
        assert reader.getData(2, Register.MODEL_NUMBER, 2) == 1020


def test_rebooted_servo_has_no_torque(port: _Port, handler: dynamixel_sdk.Protocol2PacketHandler) -> None:
    assert handler.write1ByteTxRx(port, 4, Register.TORQUE_ENABLE, 1) == (OK, 0)
    assert handler.reboot(port, 4) == (OK, 0)
    assert handler.read1ByteTxRx(port, 4, Register.TORQUE_ENABLE) == (0, OK, 0)
