"""The canopen library, against the simulated CiA 402 drives: what it understands is the protocol."""

import time
from collections.abc import Callable, Iterator
from math import pi

import canopen
import pytest
from canopen import objectdictionary as od
from canopen.profiles.p402 import BaseNode402

from drivers.clock import SECOND, after, monotonic_ns
from drivers.sim.build import build_bus
from drivers.sim.hosts import CanHost
from drivers.sim.servo import Servo
from tests.memory_loop import STILL, make_motor

NODE = 3
OBJECTS = [  # index, subindex, type; of the first of ``Cia402.examples``, in 36000 units a turn
    (0x1000, 0, od.UNSIGNED32), (0x1001, 0, od.UNSIGNED8), (0x1008, 0, od.VISIBLE_STRING), (0x1017, 0, od.UNSIGNED16),
    (0x2000, 0, od.VISIBLE_STRING), (0x200D, 1, od.REAL32), (0x603F, 0, od.UNSIGNED16), (0x6040, 0, od.UNSIGNED16),
    (0x6041, 0, od.UNSIGNED16), (0x6060, 0, od.INTEGER8), (0x6061, 0, od.INTEGER8), (0x6064, 0, od.INTEGER32),
    (0x606C, 0, od.INTEGER32), (0x607A, 0, od.INTEGER32), (0x607D, 1, od.INTEGER32), (0x607D, 2, od.INTEGER32),
    (0x6081, 0, od.UNSIGNED32), (0x60FF, 0, od.INTEGER32), (0x6502, 0, od.UNSIGNED32),
]  # fmt: skip
PDO_PARAMETERS = [
    *((base + number, sub, kind) for base in (0x1400, 0x1800) for number in range(4)
      for sub, kind in ((0, od.UNSIGNED8), (1, od.UNSIGNED32), (2, od.UNSIGNED8))),
    *((base + number, sub, od.UNSIGNED32 if sub else od.UNSIGNED8) for base in (0x1600, 0x1A00) for number in range(4)
      for sub in range(9)),
]  # fmt: skip


def make_dictionary() -> canopen.ObjectDictionary:
    dictionary = canopen.ObjectDictionary()
    for index, sub, kind in [*OBJECTS, *PDO_PARAMETERS]:
        variable = od.ODVariable(f"{index:04X}:{sub}", index, sub)
        variable.data_type = kind
        if (index, 1, od.UNSIGNED32) not in PDO_PARAMETERS and index not in (0x200D, 0x607D):
            dictionary.add_object(variable)
            continue
        if index not in dictionary:
            dictionary.add_object(od.ODRecord(f"{index:04X}", index))
        record = dictionary[index]
        assert isinstance(record, od.ODRecord)
        record.add_member(variable)
    return dictionary


@pytest.fixture
def drive() -> Iterator[tuple[BaseNode402, Servo]]:
    """A client's view of the third of six drives, and its physics."""
    motors = [make_motor("cia402", bus_id, index) for index, bus_id in enumerate(range(1, 7))]
    bus = build_bus(motors, STILL, monotonic_ns())
    servo = next(motor.servo for motor in bus.motors if motor.motor.bus_id == NODE)
    channel = f"canopen-{monotonic_ns()}"
    with CanHost(bus, channel):
        network = canopen.Network()
        network.NOTIFIER_CYCLE = 0.02  # so that it ends soon
        network.connect(interface="virtual", channel=channel)
        node = BaseNode402(NODE, make_dictionary())
        # a busy machine may not give the drive its turn within the usual 0.2 to 0.8 s
        node.sdo.RESPONSE_TIMEOUT = node.TIMEOUT_CHECK_TPDO = node.TIMEOUT_SWITCH_OP_MODE = 5
        node.TIMEOUT_SWITCH_STATE_SINGLE = node.TIMEOUT_SWITCH_STATE_FINAL = 5
        network.add_node(node)
        yield node, servo
        network.sync.stop()
        network.disconnect()


def wait_for(seen: Callable[[], object]) -> None:
    deadline = after(monotonic_ns(), 10 * SECOND)
    while not seen():
        assert monotonic_ns() < deadline
        time.sleep(0.005)


def be_operational(node: BaseNode402) -> None:
    """Start the drive, with its statusword and mode at each SYNC, fifty of them a second."""
    node.tpdo.read()
    for tpdo in (node.tpdo[1], node.tpdo[2]):
        tpdo.trans_type = 1
        tpdo.save()
    node.sdo[0x1017].raw = 50
    node.nmt.wait_for_heartbeat(10)
    node.setup_402_state_machine()
    node.nmt.state = "OPERATIONAL"
    node.network.sync.start(0.02)
    wait_for(lambda: node.state == "SWITCH ON DISABLED")


def test_text_goes_both_ways_in_segments(drive: tuple[BaseNode402, Servo]) -> None:
    node, _ = drive
    assert node.sdo[0x1008].raw == "Simulated servo drive"
    node.sdo[0x2000].raw = "shoulder of the left arm"
    assert node.sdo[0x2000].raw == "shoulder of the left arm"


def test_abort_is_understood(drive: tuple[BaseNode402, Servo]) -> None:
    node, _ = drive
    with pytest.raises(canopen.SdoAbortedError, match="06010002"):
        node.sdo[0x6041].raw = 0


def test_heartbeat_and_boot_up_are_seen(drive: tuple[BaseNode402, Servo]) -> None:
    node, _ = drive
    node.sdo[0x1017].raw = 50
    assert node.nmt.wait_for_heartbeat(10) == "PRE-OPERATIONAL"
    node.nmt.state = "OPERATIONAL"
    wait_for(lambda: node.nmt.wait_for_heartbeat(10) == "OPERATIONAL")
    node.nmt.state = "RESET COMMUNICATION"
    node.nmt.wait_for_bootup(10)


def test_drive_is_enabled_and_moves_in_profile_position(drive: tuple[BaseNode402, Servo]) -> None:
    node, servo = drive
    be_operational(node)
    node.op_mode = "PROFILED POSITION"
    assert node.op_mode == "PROFILED POSITION"
    node.state = "OPERATION ENABLED"
    assert servo.enabled
    node.sdo[0x6081].raw = 36_000
    node.sdo[0x607A].raw = 9_000
    node.controlword = 0x3F
    wait_for(lambda: node.sdo[0x6041].raw & 1 << 12)
    node.controlword = 0x0F
    wait_for(lambda: node.sdo[0x6041].raw & 1 << 10)
    assert node.sdo[0x6064].raw == pytest.approx(9_000, abs=2)
    assert servo.position_rad == pytest.approx(pi / 2, abs=0.001)


def test_mapping_that_the_library_writes_is_sent_at_each_sync(drive: tuple[BaseNode402, Servo]) -> None:
    node, servo = drive
    servo.position_rad = 0.5
    node.tpdo.read()
    tpdo = node.tpdo[2]
    tpdo.clear()
    tpdo.add_variable(0x6064)
    tpdo.add_variable(0x200D, 1)
    tpdo.trans_type = 1
    tpdo.enabled = True
    tpdo.save()
    node.nmt.state = "OPERATIONAL"
    received: list[list[float]] = []
    tpdo.add_callback(lambda pdo: received.append([one.raw for one in pdo]))

    def synced() -> object:
        node.network.sync.transmit()
        return received

    wait_for(synced)
    assert received[0] == pytest.approx([0.5 / (2 * pi) * 36_000, 25], abs=2)


def test_emergency_message_is_understood(drive: tuple[BaseNode402, Servo]) -> None:
    node, servo = drive
    servo.temperature_c = 150.0
    error = node.emcy.wait(0x4310, 10)
    assert error is not None
    assert "Temperature" in error.get_desc()
    assert node.sdo[0x603F].raw == 0x4310
