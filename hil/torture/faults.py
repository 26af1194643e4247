"""The faults: each a function that causes it, lets it last, heals it, and returns what it did in words.

``chance`` decides when and how much, so that the same seed does the same again. Faults of one group follow each other;
faults of different groups overlap.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from drivers.clock import SECOND
from hil.arm import ArmError
from hil.cluster import Cluster
from hil.guard import guard
from hil.torture.rig import Rig, faketime, may_mount, mount

HOURS_NS = 3600 * SECOND
BITS = 8
PAGE = 4096


class NotNow(Exception):
    """The fault could not be caused at this moment; the message says why."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of trouble. ``missing`` says what it lacks on this machine, if anything."""

    name: str
    group: str
    cause: Callable[[Rig, random.Random], str]
    missing: Callable[[Cluster], str]


FAULTS: dict[str, Fault] = {}


def _nothing(_: Cluster) -> str:
    return ""


def _own_disk(_: Cluster) -> str:
    return "" if may_mount() else "no mount namespace: needs root, or user namespaces, and util-linux"


def _clock(_: Cluster) -> str:
    return "" if faketime() else "no libfaketime (Debian: apt-get install libfaketime)"


def _replicas(cluster: Cluster) -> str:
    return "" if len(cluster.nodes) > 1 else "a single node"


def fault(
    name: str, group: str, missing: Callable[[Cluster], str] = _nothing
) -> Callable[[Callable[[Rig, random.Random], str]], Callable[[Rig, random.Random], str]]:
    """Register a fault."""

    def register(cause: Callable[[Rig, random.Random], str]) -> Callable[[Rig, random.Random], str]:
        FAULTS[name] = Fault(name, group, cause, missing)
        return cause

    return register


# --- processes -----------------------------------------------------------------------------------------------------


@fault("gateway-killed", "gateway")
def kill_gateway(rig: Rig, chance: random.Random) -> str:
    """SIGKILL; sometimes again while it starts."""
    times = chance.choice((1, 1, 2, 3))
    for _ in range(times):
        rig.kill()
        rig.wait(chance.uniform(0.3, 1.5))
    return f"{times} times"


@fault("worker-killed", "processes")
def kill_worker(rig: Rig, chance: random.Random) -> str:
    """SIGKILL to one bus worker."""
    return _kill(rig, chance, "gateway.worker")


@fault("simulator-killed", "processes")
def kill_simulator(rig: Rig, chance: random.Random) -> str:
    """SIGKILL to the simulated motors of the serial bus."""
    return _kill(rig, chance, "gateway.simulator")


def _kill(rig: Rig, chance: random.Random, module: str) -> str:
    pids = sorted(pid for pid, command in rig.arm.processes().items() if module in command)
    if not pids:
        raise NotNow(f"no {module} runs")
    pid = chance.choice(pids)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    rig.wait(0.5)
    return f"process {pid}"


# --- brokers and the way to them -----------------------------------------------------------------------------------


@fault("brokers-killed", "brokers")
def kill_brokers(rig: Rig, chance: random.Random) -> str:
    """SIGKILL to every node at once, and a restart."""
    seconds = chance.uniform(0.5, 5)
    with rig.way:
        for node in rig.cluster.nodes.values():
            node.kill()
        rig.wait(seconds)
        rig.cluster.start()
    return f"away for {seconds:.1f} s"


@fault("brokers-stopped", "brokers")
def stop_brokers(rig: Rig, chance: random.Random) -> str:
    """SIGSTOP to every node: connections stay open, nothing answers. Longer than a request may take, sometimes."""
    seconds = chance.choice((chance.uniform(0.5, 4), chance.uniform(10, 14)))
    with rig.way:
        for node in rig.cluster.nodes.values():
            node.pause()
        try:
            rig.wait(seconds)
        finally:
            for node in rig.cluster.nodes.values():
                node.resume()
    return f"stopped for {seconds:.1f} s"


@fault("leader-killed", "brokers", _replicas)
def kill_leader(rig: Rig, chance: random.Random) -> str:
    """SIGKILL to the node that leads a motor's partition; the others go on, and it comes back."""
    partition = chance.randrange(len(rig.arm.motors))
    with rig.way:
        killed = rig.cluster.kill_leader(f"servo.{rig.arm.name}.telemetry", partition)
        try:
            rig.wait(chance.uniform(1, 4))
        finally:
            rig.cluster.start()
    return f"node {killed}, leader of partition {partition}"


@fault("way-cut", "brokers")
def cut(rig: Rig, chance: random.Random) -> str:
    """All connections to the brokers break, and new ones are refused."""
    seconds = chance.uniform(0.1, 5)
    with rig.brokers_away():
        rig.wait(seconds)
    return f"for {seconds:.1f} s"


@fault("way-stalled", "brokers")
def stall(rig: Rig, chance: random.Random) -> str:
    """Nothing comes through, one way or both; a gateway that is killed meanwhile may have sent what comes late."""
    seconds, kill = chance.uniform(0.5, 5), chance.random() < 0.5
    directions = chance.choice(({"requests": True}, {"replies": True}, {"requests": True, "replies": True}))
    both = {"requests": False, "replies": False} | directions
    with rig.way:
        for proxy in rig.cluster.proxies.values():
            proxy.stall(**both)
        try:
            rig.wait(seconds)
            if kill:
                rig.kill()
                for proxy in rig.cluster.proxies.values():
                    proxy.let_new_pass()  # the next run gets through; what the killed one sent does not yet
                rig.wait(chance.uniform(1, 4))
        finally:
            for proxy in rig.cluster.proxies.values():
                proxy.flow()
    return f"{' and '.join(directions)} for {seconds:.1f} s{', the gateway killed meanwhile' if kill else ''}"


@fault("replies-swallowed", "brokers")
def swallow(rig: Rig, chance: random.Random) -> str:
    """Brokers take everything and the gateway hears of nothing; then the connections break."""
    seconds = chance.uniform(0.5, 4)
    with rig.way:
        for proxy in rig.cluster.proxies.values():
            proxy.swallow_replies()
        try:
            rig.wait(seconds)
            for proxy in rig.cluster.proxies.values():
                proxy.cut()
        finally:
            for proxy in rig.cluster.proxies.values():
                proxy.flow()
    return f"for {seconds:.1f} s"


# --- the disk ------------------------------------------------------------------------------------------------------


@fault("disk-full", "disk", _own_disk)
def fill_disk(rig: Rig, chance: random.Random) -> str:
    """A file takes all the room that is left on the state directory's disk; then it is removed."""
    seconds = chance.uniform(2, 8)
    ballast = rig.arm.state / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        rig.wait(seconds)
    finally:
        ballast.unlink(missing_ok=True)
    return f"for {seconds:.1f} s"


@fault("disk-read-only", "gateway", _own_disk)
def read_only(rig: Rig, chance: random.Random) -> str:
    """The state directory is read-only: at once where the kernel allows it, else from the next start on."""
    seconds, how = chance.uniform(1, 3), "while it ran"
    with rig.process:
        try:
            mount("-o", "remount,ro", str(rig.arm.state))
        except OSError:  # busy: it is being written to
            how = "while it was killed"
            rig.kill()
            rig.wait_ended()
            mount("-o", "remount,ro", str(rig.arm.state))
        rig.read_only = True
    try:
        rig.wait(seconds)
    finally:
        with rig.process:
            mount("-o", "remount,rw", str(rig.arm.state))
            rig.read_only = False
    return f"for {seconds:.1f} s, {how}"


LOCK = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
db.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""

READ = """
import sqlite3, sys
db = sqlite3.connect("file:" + sys.argv[1] + "?mode=ro", uri=True, isolation_level=None, timeout=30)
rows = db.execute("SELECT id, records FROM telemetry UNION ALL SELECT id, records FROM telemetry")
rows.fetchone()
print("reading", flush=True)
sys.stdin.read()
"""


@fault("journal-locked", "disk")
def lock_journal(rig: Rig, chance: random.Random) -> str:
    """Another program holds the journal's write lock, as a backup tool may."""
    seconds = chance.uniform(1, 7)
    with _beside(LOCK, rig):
        rig.wait(seconds)
    return f"for {seconds:.1f} s"


@fault("reader-stopped", "disk")
def stop_reader(rig: Rig, chance: random.Random) -> str:
    """A reader of the journal is stopped (SIGSTOP) in the middle of a read."""
    seconds = chance.uniform(2, 10)
    with _beside(READ, rig) as reader:
        reader.send_signal(signal.SIGSTOP)
        rig.wait(seconds)
    return f"for {seconds:.1f} s"


@contextlib.contextmanager
def _beside(program: str, rig: Rig) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has done what it is for, until its input is closed."""
    command = [sys.executable, "-c", program, str(rig.arm.state / "journal.db")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    watch = guard(process, rig.arm.directory)  # a stopped program does not notice that we are gone
    assert process.stdin
    assert process.stdout
    try:
        if not process.stdout.readline():
            raise NotNow("the journal could not be opened")
        yield process
    finally:
        watch.kill()
        watch.wait()
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@fault("bits-flipped", "gateway")
def flip_bits(rig: Rig, chance: random.Random) -> str:
    """Bits of the journal change while the gateway is killed and holds records that the brokers do not have."""
    return _flip_while_killed(rig, chance, "journal.db")


@fault("wal-flipped", "gateway")
def flip_wal(rig: Rig, chance: random.Random) -> str:
    """The same in its write-ahead log, which is read anew at the next start."""
    return _flip_while_killed(rig, chance, "journal.db-wal")


@fault("bits-flipped-live", "disk")
def flip_bits_live(rig: Rig, chance: random.Random) -> str:
    """Bits of the journal change under the running gateway, which holds records that the brokers do not have."""
    return _flip_live(rig, chance, "journal.db")


@fault("wal-flipped-live", "disk")
def flip_wal_live(rig: Rig, chance: random.Random) -> str:
    """The same in its write-ahead log, where the newest records are."""
    return _flip_live(rig, chance, "journal.db-wal")


def _flip_while_killed(rig: Rig, chance: random.Random, name: str) -> str:
    with rig.brokers_away():
        rig.wait(chance.uniform(0.5, 2))
        with rig.process:
            rig.kill()
            try:
                rig.wait_ended()
            except ArmError as error:
                raise NotNow(str(error)) from error
            rig.keep_for_the_account()
            return _flip(rig, chance, name)


def _flip_live(rig: Rig, chance: random.Random, name: str) -> str:
    with rig.brokers_away():
        rig.wait(chance.uniform(0.5, 2))
        rig.keep_for_the_account()
        told = _flip(rig, chance, name)
        rig.wait(0.5)
    return told


def _flip(rig: Rig, chance: random.Random, name: str) -> str:
    """Flip bits in a file, behind the page that says what it is."""
    part = rig.arm.state / name
    if not part.exists() or part.stat().st_size <= 2 * PAGE:
        raise NotNow(f"{name} is empty")
    rig.flipped = True
    with part.open("r+b", buffering=0) as file:
        for _ in range(BITS):
            at = chance.randrange(PAGE, part.stat().st_size)
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << chance.randrange(8)]), at)
    return f"{BITS} bits"


# --- the clock -----------------------------------------------------------------------------------------------------


@fault("clock-stepped", "clock", _clock)
def step_clock(rig: Rig, chance: random.Random) -> str:
    """The wall clock is somewhere within five hours of the true one, all of a sudden."""
    hours = chance.uniform(-5, 5)
    rig.set_clock(int(hours * HOURS_NS))
    rig.wait(chance.uniform(1, 3))
    return f"to {hours:+.2f} h"


# --- motors --------------------------------------------------------------------------------------------------------


@fault("motor-silent", "motors")
def silence(rig: Rig, chance: random.Random) -> str:
    """A motor answers nothing."""
    motor = chance.choice(list(rig.arm.motors))
    seconds = chance.uniform(0.5, 4)
    rig.silent.add(motor)
    rig.play({motor: "silent = true"})
    rig.wait(seconds)
    rig.play({})
    rig.wait(1.5)  # until it is found again
    rig.silent.discard(motor)
    return f"{motor} for {seconds:.1f} s"


@fault("garbage", "motors")
def garbage(rig: Rig, chance: random.Random) -> str:
    """A part of what a motor sends is corrupt."""
    motor, share = chance.choice(list(rig.arm.motors)), chance.uniform(0.02, 0.4)
    seconds = chance.uniform(1, 5)
    rig.silent.add(motor)  # may be late
    rig.play({motor: f"corrupt = {share:.2f}"})
    rig.wait(seconds)
    rig.play({})
    rig.wait(1.0)
    rig.silent.discard(motor)
    return f"{motor}, {share:.0%} for {seconds:.1f} s"
