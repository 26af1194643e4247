"""Raw traffic of a gateway that runs: recorded beside it, whatever the recorder does, and played to its own codecs."""

import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drivers.buses import CanSpec
from drivers.buses.can import CanBus
from drivers.clock import MS, SECOND, after, monotonic_ns
from drivers.family import CanFrame
from drivers.protocols import feetech_sts
from drivers.traffic import Mark
from gateway.recordings.bus_file import BusFile
from hil.arm import COMMAND, Arm
from hil.logs import Damage, JournalFile
from tests.gateway_parts import DEADLINE_S, wait_for
from tests.system.conftest import MakeArm

pytestmark = pytest.mark.at_full_rate

CYCLES = 600
"""More than the socket of a recorder that is stopped takes datagrams."""


@contextmanager
def recording(arm: Arm, bus: str, out: Path) -> Iterator["subprocess.Popen[str]"]:
    """``record --bus`` until it is told to stop; from when the file has traffic on."""
    command = [*COMMAND, "record", str(arm.config), "--bus", bus, "--out", str(out)]
    process = subprocess.Popen(command, env=arm.environment, cwd=arm.directory, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: process.poll() is not None or (out.exists() and out.stat().st_size > 60_000))
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process: "subprocess.Popen[str]") -> str:
    """Ask a recorder to end; what it says."""
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0, told
    return told


def bus_status(arm: Arm, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(bus for bus in arm.status()["buses"] if bus["bus"] == name)
    return found


def sample_times(arm: Arm, motor: str) -> list[int]:
    journal = JournalFile(arm.state / "journal.db")
    try:
        blocks = [block for block in journal.blocks() if not isinstance(block, Damage) and block.motor == motor]
        return [int(at_ns) for block in blocks for at_ns in block.values["sampled_at_ns"]]
    finally:
        journal.close()


@pytest.mark.parametrize(("bus", "motor", "suffix"), [("can0", "joint1", ".log"), ("serial0", "joint4", ".serial")])
def test_every_sample_of_the_log_is_in_the_recorded_traffic_at_its_time(
    make_arm: MakeArm, tmp_path: Path, bus: str, motor: str, suffix: str
) -> None:
    arm, out = make_arm(), tmp_path / f"traffic{suffix}"
    arm.start()
    with recording(arm, bus, out) as process:
        assert "0 went past the recorder" in end(process)
    arm.stop()
    read = BusFile(out)
    units = list(read)
    assert read.broken == 0
    assert {unit.marks & Mark.SENT for unit in units} == {0, Mark.SENT}
    heard = np.array([unit.at_ns for unit in units if not unit.marks & Mark.SENT])
    times = np.array(sample_times(arm, motor))
    within = times[(times > heard[0] + 100 * MS) & (times < heard[-1] - 100 * MS)]
    assert len(within) > 100
    nearest = np.abs(heard[np.searchsorted(heard, within).clip(0, len(heard) - 1)] - within)
    before = np.abs(heard[np.searchsorted(heard, within) - 1] - within)
    assert np.median(np.minimum(nearest, before)) < 100_000  # two processes read the same two clocks


def test_recorder_that_is_stopped_delays_no_cycle_and_goes_on_where_it_was(make_arm: MakeArm, tmp_path: Path) -> None:
    arm, out = make_arm(), tmp_path / "traffic.serial"
    arm.start()
    with recording(arm, "serial0", out) as process:
        worker, before = arm.worker_of("serial0"), bus_status(arm, "serial0")
        process.send_signal(signal.SIGSTOP)
        size = out.stat().st_size
        arm.wait(lambda: bus_status(arm, "serial0")["cycles"] > before["cycles"] + CYCLES, "cycles go on")
        then = bus_status(arm, "serial0")
        assert arm.worker_of("serial0") == worker
        assert then["up"]
        assert then["skipped_cycles"] - before["skipped_cycles"] < CYCLES / 2
        assert out.stat().st_size == size
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: out.stat().st_size > size + 10_000)
        told = end(process)
    units = list(BusFile(out))
    assert f"{len(units):,} units, 0 went past the recorder" in told
    polls = [unit.at_ns for unit in units if unit.marks & Mark.SENT]
    assert len(polls) > CYCLES  # what was on the bus meanwhile is there too
    assert max(np.diff(polls)) < SECOND


def test_recorder_may_be_killed_and_its_file_read_and_another_begin(make_arm: MakeArm, tmp_path: Path) -> None:
    arm = make_arm()
    arm.start()
    with recording(arm, "can0", tmp_path / "first.log") as process:
        process.kill()
        process.wait()
        assert len(list(BusFile(tmp_path / "first.log"))) > 100
    with recording(arm, "can0", tmp_path / "second.log") as process:
        refused = arm.cli("record", str(arm.config), "--bus", "can0", "--out", str(tmp_path / "third.log"))
        assert refused.returncode == 1
        assert "another recorder has this bus" in refused.stderr
        assert "0 went past the recorder" in end(process)
    assert bus_status(arm, "can0")["up"]


def test_recorder_that_was_there_first_hears_the_bus_from_its_first_frame_on(make_arm: MakeArm, tmp_path: Path) -> None:
    arm, out = make_arm(), tmp_path / "traffic.serial"
    command = [*COMMAND, "record", str(arm.config), "--bus", "serial0", "--out", str(out)]
    with subprocess.Popen(
        command, env=arm.environment, cwd=arm.directory, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for((arm.state / "taps" / "serial0").exists)
        arm.start()
        wait_for(lambda: out.stat().st_size > 10_000)
        end(process)
    first = next(iter(BusFile(out)))
    assert first.marks & Mark.SENT
    assert list(feetech_sts.Decoder().feed(first.data))


def test_recorded_replies_are_packets_to_whoever_listens_to_the_replay(make_arm: MakeArm, tmp_path: Path) -> None:
    """The whole way: a simulated bus, its gateway, the recorder, the replay's terminal, the codec."""
    arm, out, link = make_arm(), tmp_path / "traffic.serial", tmp_path / "played"
    arm.start()
    with recording(arm, "serial0", out) as process:
        end(process)
    arm.stop()
    command = [*COMMAND, "replay", "--bus", str(out), "--link", str(link), "--only", "heard", "--speed", "max"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as player:
        wait_for(link.exists)
        decoder, seen = feetech_sts.Decoder(), Counter[int]()
        with link.open("rb", buffering=0) as port:
            try:
                while chunk := port.read(4096):
                    seen.update(packet.bus_id for packet in decoder.feed(chunk))
            except OSError:  # the terminal is hung up at the end
                pass
        assert player.wait(DEADLINE_S) == 0, player.communicate()
    assert set(seen) >= {4, 5, 6}
    assert min(seen[bus_id] for bus_id in (4, 5, 6)) > 20


def hear(client: CanBus) -> int:
    received = client.receive(after(monotonic_ns(), DEADLINE_S * SECOND))
    assert received
    return received.unit.can_id


def test_span_of_somebody_elses_candump_is_played_as_slcan_with_a_pause(tmp_path: Path) -> None:
    path = tmp_path / "candump.log"
    path.write_text("".join(f"({number / 100:.6f}) can0 {number:03X}#{number:04X}\n" for number in range(200)))
    link = tmp_path / "can0"
    command = [*COMMAND, "replay", "--bus", str(path), "--link", str(link), "--from", "0.5", "--to", "1.5"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as player:
        wait_for(link.exists)
        client = CanBus(CanSpec("can0", "slcan", str(link), 1_000_000, {"sleep_after_open": 0}))
        try:
            heard = [hear(client)]
            player.send_signal(signal.SIGUSR1)
            client.send([CanFrame(1, b"")], after(monotonic_ns(), DEADLINE_S * SECOND))  # is heeded by nobody
            player.send_signal(signal.SIGUSR1)
            heard += [hear(client) for _ in range(99)]
            told = player.communicate(timeout=DEADLINE_S)[1]
        finally:
            client.close()
    assert heard == list(range(50, 150)), told
    assert "100 played" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--onto", "socketcan:lo"), "the kernel says that it is a physical link"),
        (("--onto", "slcan:/dev/ttyACM0"), "a replay opens no physical bus"),
        (("--onto", "virtual:x", "--link", "here"), "a link leads to a pseudo-terminal"),
        (("--only", "both"), "must be sent or heard"),
        (("--from", "yesterday"), "must be seconds from the first frame on"),
        (("--speed", "0"), "must be a number from 0.1, or max"),
    ],
)
def test_wrong_use_of_a_replay_is_told(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    path = tmp_path / "candump.log"
    path.write_text("(1.0) can0 001#\n")
    done = subprocess.run(
        [*COMMAND, "replay", "--bus", str(path), *arguments],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert told in " ".join(done.stderr.replace("│", " ").split())


def test_wrong_bus_and_wrong_file_are_told(make_arm: MakeArm, tmp_path: Path) -> None:
    arm = make_arm()
    unknown = arm.cli("record", str(arm.config), "--bus", "can9")
    assert (unknown.returncode, "there are can0, serial0" in unknown.stderr) == (2, True)
    unfit = arm.cli("record", str(arm.config), "--bus", "can0", "--out", str(tmp_path / "x.serial"))
    assert (unfit.returncode, "the file must end in .log" in unfit.stderr) == (2, True)
    empty = tmp_path / "empty.blf"
    empty.touch()
    played = arm.cli("replay", "--bus", str(empty))
    assert (played.returncode, played.stderr) == (2, f"{empty}: is empty\n")
