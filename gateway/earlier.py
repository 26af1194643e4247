"""Journals that were set aside go to the broker before the one of this run: what it lacks of them.

A partition's last record says how far it is: in one of these streams, or in a later one. So nothing has to be written
down about it, and a gateway that is killed meanwhile goes on where the partition ends.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from aiokafka import TopicPartition

from gateway.aside import Aside, open_aside
from gateway.config import Config
from gateway.flow import Ear, Flow
from gateway.journal import Lost, ProducerState
from gateway.lanes import Lane, Tails, lanes_of
from gateway.recent import Recent

log = logging.getLogger(__name__)

LACKING = "not in the journal, which was set aside"


class Earlier:
    """Yields a flow for each journal that the broker lacks something of, oldest first."""

    def __init__(
        self,
        config: Config,
        paths: Sequence[Path],
        successor: int,
        lost: Callable[[int, Sequence[Lost], str], Awaitable[None]],
        ear: Ear,
    ) -> None:
        """``paths``: the journals; ``successor``: the stream that comes after theirs.

        ``lost`` is called with (stream, what, why) for records that are nowhere; it writes that down.
        """
        self._config = config
        self.done_with = dict.fromkeys(paths, False)
        """Which of the journals the broker lacks nothing of any more that can be read."""
        self._successor = successor
        self._lost = lost
        self._ear = ear
        self._asides: list[Aside] | None = None
        self._flow: Flow | None = None

    async def begin(self, tails: Tails) -> Flow | None:
        """The flow that comes next, to be run until it is drained; None if no more is due.

        ``tails`` are those of now. Until ``done`` is called, the same flow begins again.
        """
        if self._asides is None:
            self._asides = [aside for path in self.done_with if (aside := open_aside(path))]
            opened = [aside.path for aside in self._asides]
            self.done_with = {path: path not in opened for path in self.done_with}
        while self._asides:
            flow = self._flow = self._flow or self._flow_of(self._asides[0])
            self._place(flow, self._asides[0], tails)
            if any(lane.pending() for lane in flow.lanes):
                log.info("publishing what the broker lacks of journal %s", self._asides[0].path)
                return flow
            await self.done()
        return None

    async def done(self) -> None:
        """The flow is drained."""
        assert self._asides  # noqa: S101  ``begin`` has returned a flow
        assert self._flow  # noqa: S101
        aside, flow = self._asides.pop(0), self._flow
        ends = [Lost(lane.partition, lane.seq + 1, _held(aside, lane), lane.name) for lane in flow.lanes]
        if lost := [end for end in ends if end.from_seq <= end.to_seq]:
            await self._lost(aside.stream, lost, LACKING)
        self._flow = None
        self.done_with[aside.path] = True
        aside.reader.close()

    def _flow_of(self, aside: Aside) -> Flow:
        ours = {motor.partition for motor in self._config.motors}
        motors = {at: name for at, name in aside.motors.items() if at in ours}
        lanes = lanes_of(self._config, aside.reader, Recent(*aside.ends), motors)

        async def past(lost: Lost) -> None:
            await self._lost(aside.stream, [lost], LACKING)

        return Flow(lanes, aside.producer, lambda *_: None, _forget, self._ear, past)

    def _place(self, flow: Flow, aside: Aside, tails: Tails) -> None:
        """Set each lane behind what its partition holds. Raises ForeignRecord."""
        assert self._asides  # noqa: S101
        later = {self._successor, *(other.stream for other in self._asides[1:])}
        for lane in flow.lanes:
            end, record = tails[TopicPartition(lane.topic, lane.partition)]
            lane.busy = False
            lane.next_offset = end
            stream, tail_seq = lane.seq_of(record) if record is not None else (0, 0)
            seq, row = aside.published.get((lane.name, lane.partition), (0, 0))
            if stream in later:
                seq = _held(aside, lane)
            elif stream == aside.stream:
                seq, row = tail_seq, row if seq <= tail_seq else 0
            lane.acknowledged(seq, row)
            if seq >= _held(aside, lane):
                lane.give_up()


def _held(aside: Aside, lane: Lane) -> int:
    """The newest of a lane's records that the journal holds, or held as far as it can be read."""
    return aside.held.get((lane.name, lane.partition), 0)


async def _forget(state: ProducerState) -> None:
    """Nothing is written into a journal that was set aside."""
