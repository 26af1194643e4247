"""Stands in for a bus worker: ``python -m hil.bench.feeder FD``, started by the gateway's own code for children.

Samples come paced, one datagram a period on absolute deadlines, or flat out with a bound on what the broker has not
acknowledged yet: the gateway's end tells it how far that is, as the number of a ticket.
"""

import pickle
import select
import signal
import socket
import sys
from dataclasses import dataclass

import numpy as np

from drivers.clock import MS, after, left_s, monotonic_ns
from drivers.motor import SAMPLE
from drivers.notices import BusUp, MotorOnline
from gateway.link import WorkerEnd
from gateway.realtime import set_realtime
from gateway.worker import REALTIME_PRIORITY

ALIVE_S = 0.5  # a worker that says nothing for longer would be killed


@dataclass(frozen=True, slots=True)
class FeederPlan:
    """``period_ns`` 0: flat out, with at most ``in_flight`` samples unacknowledged."""

    motors: tuple[int, ...]
    period_ns: int
    in_flight: int
    cycles_a_datagram: int = 1


def main() -> None:
    """Feed until the gateway closes the link."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    end.setblocking(True)
    plan: FeederPlan = pickle.loads(end.recv(1 << 20))
    end.setblocking(False)
    link = WorkerEnd(end)
    link.send_notice(BusUp())
    for motor in plan.motors:
        link.send_notice(MotorOnline(motor, "bench", "0"))
    if plan.period_ns:
        set_realtime(REALTIME_PRIORITY)
        _paced(plan, link)
    else:
        _flat_out(plan, link, end)


def _samples(plan: FeederPlan) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    samples = np.zeros(len(plan.motors) * plan.cycles_a_datagram, SAMPLE)
    samples["motor"] = plan.motors * plan.cycles_a_datagram
    samples["position_rad"] = np.linspace(-3, 3, len(samples))
    samples["temperature_c"] = 40.0
    samples["torque_nm"] = np.nan
    return samples


def _paced(plan: FeederPlan, link: WorkerEnd) -> None:
    samples = _samples(plan)
    due = after(monotonic_ns(), 10 * MS)
    while True:
        if select.select([link], [], [], left_s(due))[0] and link.receive() is None:
            return
        if monotonic_ns() < due:
            continue
        samples["sampled_at_ns"] = monotonic_ns()
        link.send_samples(samples)
        due = after(due, plan.period_ns)


def _flat_out(plan: FeederPlan, link: WorkerEnd, end: socket.socket) -> None:
    samples = _samples(plan)
    times = samples["sampled_at_ns"]
    sent = acknowledged = 0
    while True:
        while sent - acknowledged < plan.in_flight:
            times[:] = monotonic_ns()
            try:
                end.send(b"S" + samples.tobytes())
            except BlockingIOError:
                select.select([], [end], [])
                continue
            except ConnectionError:
                return
            sent += len(samples)
        if select.select([link], [], [], ALIVE_S)[0]:
            ticket = link.receive()
            if ticket is None:
                return
            acknowledged = ticket.number
        else:
            link.send_notice(BusUp())


if __name__ == "__main__":
    main()
