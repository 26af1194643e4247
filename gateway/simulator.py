"""Simulated motors for a configuration: behind pseudo-terminals, in a process of their own or in the foreground.

Run by the gateway as ``python -m gateway.simulator FD`` for a configuration with ``[simulation]``, and by
``servo-gateway simulate``. A serial bus is its bytes, a CAN bus an slcan adapter; ``links/<bus>`` leads to each.
(On python-can's virtual interface, which ends at the process, the bus worker hosts them itself.)
"""

import contextlib
import pickle
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from drivers.clock import monotonic_ns
from drivers.motor import Motor
from drivers.sim.build import FaultsFile, SimulationSettings, build_bus
from drivers.sim.hosts import Host, PtySerialHost, SlcanHost, VirtualCanHost
from gateway.realtime import set_realtime

REALTIME_PRIORITY = 21  # above the workers: the motors that it stands for wait for no processor


@dataclass(frozen=True, slots=True)
class SimulatedBusPlan:
    """One simulated bus. ``where``: the link to its pseudo-terminal, or the channel of a virtual CAN bus."""

    host: Literal["serial", "slcan", "virtual"]
    where: str
    motors: tuple[Motor, ...]
    settings: SimulationSettings
    faults: Path | None
    elsewhere: tuple[str, ...]  # motors on other buses, which a faults file may name too


@dataclass(frozen=True, slots=True)
class SimulatorPlan:
    """What the simulator process hosts."""

    buses: tuple[SimulatedBusPlan, ...]
    realtime: bool


def build_host(plan: SimulatedBusPlan) -> Host[Any]:
    """The host of a simulated bus; start it by entering it."""
    bus = build_bus(plan.motors, plan.settings, monotonic_ns())
    housekeeping = FaultsFile(plan.faults, bus.motors, plan.elsewhere).poll if plan.faults else lambda: None
    if plan.host == "virtual":
        return VirtualCanHost(bus, plan.where, housekeeping)
    link = Path(plan.where)
    link.parent.mkdir(parents=True, exist_ok=True)
    host = PtySerialHost if plan.host == "serial" else SlcanHost
    return host(bus, link, housekeeping)


def main() -> None:
    """Entry of the process: host the buses until the gateway closes the link."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway decides when to stop
    end = socket.socket(fileno=int(sys.argv[1]))
    end.setblocking(True)
    plan: SimulatorPlan = pickle.loads(end.recv(1 << 20))  # noqa: S301  written by our parent on a private socket
    if plan.realtime:
        set_realtime(REALTIME_PRIORITY)
    with contextlib.ExitStack() as stack:
        for bus in plan.buses:
            stack.enter_context(build_host(bus))
        with contextlib.suppress(ConnectionError):
            end.recv(1)  # nothing is ever sent: returns when the gateway is gone


if __name__ == "__main__":
    main()
