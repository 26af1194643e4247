"""A Kafka producer that goes on where another process ended. The one place that touches aiokafka's private parts.

For each partition a broker knows the batches of a producer id (pid) by their Kafka sequence numbers, and takes none
twice and none out of order. A fresh pid therefore knows nothing of what a killed gateway still had on its way. Here the
pid is kept, and a batch's place in its sequence follows from the records themselves:

    position = seq - base      lower 31 bits: the Kafka sequence number; above them: added to the epoch

So a request that was sent before and one that is sent now compete for the same place, and the broker takes one of them.
A partition that has to leave numbers out gets a base that puts its next record at the beginning of an epoch: the broker
takes sequence number 0 of a higher epoch from an idempotent producer, and nothing of a lower one after it (KIP-360).
Such a base is ``seq - position``, and negative: it carries the epochs that the partition has gone through.

A broker forgets a producer whose newest record is a day old, by the record's own time: when it starts, and every ten
minutes. Then it takes a batch twice. So a batch of old records is sent only once; if no answer comes, its outcome is
unknown, and the partition's tail has to be asked.
"""

from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.producer.message_accumulator import BatchBuilder, MessageBatch
from aiokafka.record.memory_records import MemoryRecords

from drivers.clock import MS, epoch_ns

SEQUENCE_BITS = 31  # Kafka counts 0 .. 2^31 - 1
BATCH_BYTES = 512 << 10  # well below the broker's default limit of 1 MiB
EPOCH_MOST = 32767
NO_COMPRESSION = 0
REMEMBERED_MS = 12 * 3600 * 1000  # half of what a broker keeps a producer for (producer.id.expiration.ms)


class NoPlace(Exception):
    """A position lies before the first place or behind the last epoch: a fresh identity is needed."""


def begins_epoch(position: int) -> bool:
    """Whether the Kafka sequence number of this position is 0. No batch may go across such a place."""
    return not position & ((1 << SEQUENCE_BITS) - 1)


def next_epoch(position: int) -> int:
    """The position at which the epoch after that of ``position`` begins."""
    return ((position >> SEQUENCE_BITS) + 1) << SEQUENCE_BITS


class OutcomeUnknown(KafkaError):  # type: ignore[misc]  # aiokafka is published without types
    """A batch may have reached the broker or not, and cannot be sent again without asking."""


class PlacedBatch(BatchBuilder):  # type: ignore[misc]  # aiokafka is published without types
    """A batch with a place of its own, whatever the producer has counted."""

    def __init__(self, identity: tuple[int, int], position: int) -> None:
        """``position`` is that of its first record."""
        super().__init__(BATCH_BYTES, NO_COMPRESSION)
        self._pid, epoch = identity
        self._epoch = epoch + (position >> SEQUENCE_BITS)
        self._sequence = position & ((1 << SEQUENCE_BITS) - 1)

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:  # noqa: ARG002
        """Called by aiokafka when it sends the batch for the first time."""
        super()._set_producer_state(self._pid, self._epoch, self._sequence)


class ContinuedProducer(AIOKafkaProducer):  # type: ignore[misc]  # aiokafka is published without types
    """An idempotent producer. Send only what ``place_batch`` makes, one batch of a partition after the other."""

    def __init__(self, identity: tuple[int, int] | None, **options: Any) -> None:
        """``identity``: (pid, epoch) to go on with; None: the broker gives a fresh one at the start."""
        super().__init__(**options, enable_idempotence=True, acks="all", max_batch_size=BATCH_BYTES)
        if identity:
            self._txn_manager.set_pid_and_epoch(*identity)
        self._send_again = self._message_accumulator.reenqueue
        self._message_accumulator.reenqueue = self._reenqueue

    def _reenqueue(self, batch: MessageBatch) -> None:
        """Called by aiokafka with a batch to which the broker gave no answer, or none for good."""
        sent = MemoryRecords(bytes(batch.get_data_buffer()))
        oldest_ms = min(record.timestamp for record in sent.next_batch())  # -1: it has none
        if oldest_ms > epoch_ns() // MS - REMEMBERED_MS:
            self._send_again(batch)
        else:
            batch.failure(exception=OutcomeUnknown(f"{batch.tp}: old records, and no answer"))

    @property
    def identity(self) -> tuple[int, int]:
        """(pid, epoch); the epoch is that of position 0. Known once the producer has started."""
        return self._txn_manager.producer_id, self._txn_manager.producer_epoch

    def place_batch(self, position: int) -> PlacedBatch:
        """An empty batch whose first record has this position. Raises NoPlace."""
        pid, epoch = self.identity
        if position < 0 or epoch + (position >> SEQUENCE_BITS) > EPOCH_MOST:
            raise NoPlace(f"position {position} from epoch {epoch}; epochs end with {EPOCH_MOST}")
        return PlacedBatch((pid, epoch), position)
