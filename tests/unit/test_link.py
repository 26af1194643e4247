"""The link: what is sent arrives in order; beyond the bound the oldest samples go, and the count of them is exact."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivers.cycle import Ticket
from drivers.motor import SAMPLE, Kind, Order
from drivers.notices import (
    AnyNotice,
    BusDown,
    BusUp,
    CycleStats,
    MotorCounts,
    MotorLate,
    MotorOffline,
    MotorOnline,
    OrderDone,
    OrderFailed,
    SamplesLost,
)
from gateway import link
from gateway.link import GatewayEnd, Samples, WorkerEnd
from tests.gateway_parts import make_samples

Ends = tuple[GatewayEnd, WorkerEnd]

NOTICES: list[AnyNotice] = [
    BusUp(),
    BusDown("gone", retriable=True),
    MotorOnline(1, "STS3215", "3.10"),
    MotorLate(1, 2**62, 3),
    MotorOffline(1, 0, 4, "no reply for 300 ms"),
    OrderDone(2**40, 1, "torque is on"),
    OrderFailed(7, 1, "stale", "was due"),
    SamplesLost(1, 5),
    CycleStats(1, 2, 3, 4, 4.5, 6.5, (MotorCounts(0, 1, 2), MotorCounts(1, 3, 4))),
]


def make_ends(queue_bytes: int = 1 << 20) -> Ends:
    ours, theirs = link.pair()
    return GatewayEnd(ours), WorkerEnd(theirs, queue_bytes)


def close(ends: Ends) -> None:
    ends[0].close()
    ends[1]._end.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = make_ends()
    yield both
    close(both)


def receive_all(gateway: GatewayEnd) -> list[Samples | AnyNotice]:
    received: list[Samples | AnyNotice] = []
    while True:
        try:
            message = gateway.receive()
        except BlockingIOError:
            return received
        assert message is not None
        received.append(message)


@pytest.mark.parametrize("notice", NOTICES, ids=lambda notice: type(notice).__name__)
def test_notice_arrives_as_it_was(ends: Ends, notice: AnyNotice) -> None:
    gateway, worker = ends
    worker.send_notice(notice)
    assert receive_all(gateway) == [notice]


def test_samples_arrive_as_they_were(ends: Ends) -> None:
    gateway, worker = ends
    samples = make_samples([0, 1, 5], 99, position_rad=1.5, torque_nm=np.nan)
    worker.send_samples(samples)
    (received,) = receive_all(gateway)
    assert isinstance(received, np.ndarray)
    assert received.tobytes() == samples.tobytes()


def test_cycle_without_samples_sends_nothing(ends: Ends) -> None:
    gateway, worker = ends
    worker.send_samples(make_samples([]))
    assert receive_all(gateway) == []


@given(
    st.builds(
        Order,
        st.sampled_from(Kind),
        st.floats(allow_nan=False),
        st.floats(allow_nan=False),
    ),
    st.integers(0, 2**63 - 1),
)
def test_ticket_arrives_as_it_was(order: Order, expires_ns: int) -> None:
    gateway, worker = ends = make_ends()
    ticket = Ticket(2**50, 3, order, expires_ns)
    assert gateway.send(ticket)
    assert worker.receive() == ticket
    close(ends)


def test_nothing_there_is_told_from_the_end(ends: Ends) -> None:
    gateway, worker = ends
    with pytest.raises(BlockingIOError):
        gateway.receive()
    with pytest.raises(BlockingIOError):
        worker.receive()


def test_worker_hears_that_the_gateway_is_gone(ends: Ends) -> None:
    gateway, worker = ends
    gateway.close()
    assert worker.receive() is None
    worker.send_notice(BusUp())  # and is not stopped by it
    worker.send_samples(make_samples([0]))
    assert worker.receive() is None


def test_gateway_hears_that_the_worker_is_gone_after_all_it_said(ends: Ends) -> None:
    gateway, worker = ends
    worker.send_notice(BusUp())
    worker._end.close()
    assert gateway.receive() == BusUp()
    assert gateway.receive() is None
    assert not gateway.send(Ticket(1, 0, Order(Kind.STOP), 0))


def test_hung_worker_takes_no_orders_in_the_end_and_stops_nobody(ends: Ends) -> None:
    gateway, _ = ends
    ticket = Ticket(1, 0, Order(Kind.STOP), 0)
    assert any(not gateway.send(ticket) for _ in range(100_000))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("samples"), st.lists(st.integers(0, 3), min_size=1, max_size=1000)),
        st.tuples(st.just("notice"), st.just([])),
        st.tuples(st.just("take"), st.just([])),
    ),
    max_size=80,
)


@given(STEPS)
def test_slow_gateway_gets_every_notice_in_order_and_the_exact_count_of_lost_samples(
    steps: list[tuple[str, list[int]]],
) -> None:
    gateway, worker = ends = make_ends(queue_bytes=20_000)
    worker._end.setsockopt(1, 7, 1)  # SO_SNDBUF at its least: the queue fills soon
    sent: Counter[int] = Counter()
    notices = number = 0
    received: list[Samples | AnyNotice] = []
    for what, motors in steps:
        if what == "samples":
            samples = make_samples(motors)
            samples["sampled_at_ns"] = np.arange(number, number + len(motors))
            number += len(motors)
            sent.update(motors)
            worker.send_samples(samples)
        elif what == "notice":
            notices += 1
            worker.send_notice(OrderDone(notices, 0, ""))
        else:
            received += receive_all(gateway)
        assert worker._waiting_bytes <= 20_000 + 100 * notices + 1000 * SAMPLE.itemsize
    for _ in range(100):  # a queue that has waited goes with the next messages
        worker.send_notice(BusUp())
        received += receive_all(gateway)
    told = [message for message in received if isinstance(message, OrderDone)]
    assert [message.ticket for message in told] == list(range(1, notices + 1))
    samples_in = [message for message in received if isinstance(message, np.ndarray)]
    times = [at for samples in samples_in for at in samples["sampled_at_ns"].tolist()]
    assert times == sorted(set(times))
    arrived = Counter(motor for samples in samples_in for motor in samples["motor"].tolist())
    lost: Counter[int] = Counter()
    for message in received:
        if isinstance(message, SamplesLost):
            lost[message.motor] += message.count
    assert arrived + lost == sent
    close(ends)


def test_the_newest_samples_survive_an_overflow() -> None:
    gateway, worker = ends = make_ends(queue_bytes=50_000)
    count = 20_000
    for number in range(count):
        worker.send_samples(make_samples([0], number))
    received = receive_all(gateway)
    worker.send_notice(BusUp())
    while more := receive_all(gateway):
        received += more
        worker.send_notice(BusUp())
        if isinstance(received[-1], BusUp) and len(more) == 1:
            break
    times = [int(message["sampled_at_ns"][0]) for message in received if isinstance(message, np.ndarray)]
    lost = sum(message.count for message in received if isinstance(message, SamplesLost))
    assert lost > 0
    assert times[-1] == count - 1
    assert len(times) + lost == count
    (gap,) = [at for at, after in pairwise(times) if after != at + 1]
    assert times[times.index(gap) + 1] - gap - 1 == lost
    close(ends)
