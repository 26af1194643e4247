"""Simulated motors for a configuration: where their bus can be reached, in a process of their own or in the foreground.

Run by the gateway as ``python -m gateway.simulator FD`` for a configuration with ``[simulation]``, and by
``servo-gateway simulate``. A serial bus is its bytes on a pseudo-terminal, a CAN bus an slcan adapter there, and
``links/<bus>`` leads to each; or they are on an interface of python-can that reaches other processes (SocketCAN's vcan,
udp_multicast). On python-can's virtual interface, which ends at the process, the bus worker hosts them itself.
"""

import contextlib
import logging
import pickle
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from drivers.clock import monotonic_ns
from drivers.motor import Motor
from drivers.sim.build import SimulationSettings, build_bus
from drivers.sim.faults import FaultsFile
from drivers.sim.hosts import CanHost, Host, PtySerialHost, SlcanHost
from gateway.realtime import set_realtime

log = logging.getLogger(__name__)

REALTIME_PRIORITY = 21  # above the workers: the motors that it stands for wait for no processor
RETRY_S = 2.0
_TERMINALS: Final[dict[str, type[PtySerialHost] | type[SlcanHost]]] = {"serial": PtySerialHost, "slcan": SlcanHost}


@dataclass(frozen=True, slots=True)
class SimulatedBusPlan:
    """One simulated bus. ``where``: the link to its pseudo-terminal, or the channel of python-can's interface."""

    host: str  # "serial" or "slcan": a pseudo-terminal; else python-can's name of an interface
    where: str
    motors: tuple[Motor, ...]
    settings: SimulationSettings
    faults: Path | None
    elsewhere: tuple[str, ...]  # other buses and the motors there, which a faults file may name too
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)  # of python-can's interface

    @property
    def link(self) -> Path | None:
        """What leads to the pseudo-terminal, where there is one."""
        return Path(self.where) if self.host in _TERMINALS else None


@dataclass(frozen=True, slots=True)
class SimulatorPlan:
    """What the simulator process hosts."""

    buses: tuple[SimulatedBusPlan, ...]
    realtime: bool


def build_host(plan: SimulatedBusPlan) -> Host[Any]:
    """The host of a simulated bus; start it by entering it."""
    bus = build_bus(plan.motors, plan.settings, monotonic_ns(), plan.name)
    housekeeping = FaultsFile(plan.faults, bus, plan.elsewhere).poll if plan.faults else lambda: None
    if plan.link is None:
        return CanHost(bus, plan.where, housekeeping, interface=plan.host, options=plan.options)
    plan.link.parent.mkdir(parents=True, exist_ok=True)
    return _TERMINALS[plan.host](bus, plan.link, housekeeping)


def main() -> None:
    """Entry of the process: host the buses until the gateway closes the link."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gateway decides when to stop
    end = socket.socket(fileno=int(sys.argv[1]))
    end.setblocking(True)
    plan: SimulatorPlan = pickle.loads(end.recv(1 << 20))  # noqa: S301  written by our parent on a private socket
    if plan.realtime:
        set_realtime(REALTIME_PRIORITY)
    with contextlib.ExitStack() as stack:
        missing, tell = list(plan.buses), log.warning
        while True:
            missing = [bus for bus in missing if not _enter(stack, bus, tell)]
            tell = log.debug  # told once
            # nothing is ever sent on the link: it becomes readable when the gateway is gone
            if select.select([end], [], [], RETRY_S if missing else None)[0]:
                return


def _enter(stack: contextlib.ExitStack, plan: SimulatedBusPlan, tell: Callable[..., None]) -> bool:
    """Host a bus as long as the stack lasts; False if it cannot be opened now."""
    try:
        stack.enter_context(build_host(plan))
    except OSError as error:
        tell("simulated bus %s: %s; trying again", plan.name, error)
        return False
    return True


if __name__ == "__main__":
    main()
