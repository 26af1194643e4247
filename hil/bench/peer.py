"""The peer of the pipeline: aiokafka's batch calls and nothing else. ``python -m hil.bench.peer BOOTSTRAP SECONDS``.

As many partitions, the same values (76 bytes), keys and batch sizes, one batch in flight a partition, acks=all with
idempotence; the values are made beforehand. One line of JSON on standard output.
"""

import asyncio
import json
import secrets
import sys
import time

import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from drivers.clock import MS, SECOND, epoch_ns, monotonic_ns
from gateway import telemetry
from gateway.lanes import BATCH_RECORDS
from gateway.producer import BATCH_BYTES

PARTITIONS = 6


async def main(bootstrap: str, seconds: float) -> dict[str, float]:
    """Events a second and their cost."""
    topic = f"peer-{secrets.token_hex(4)}"
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(topic, PARTITIONS, 1)])
    await admin.close()
    records = telemetry.blank(BATCH_RECORDS)
    records["seq"] = np.arange(1, BATCH_RECORDS + 1)
    values = telemetry.messages(records)
    counts = [0] * PARTITIONS
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, enable_idempotence=True, acks="all", max_batch_size=BATCH_BYTES
    )
    await producer.start()

    async def feed(partition: int) -> None:
        key = f"joint{partition + 1}".encode()
        while True:
            batch = producer.create_batch()
            at_ms = epoch_ns() // MS
            for value in values:
                batch.append(timestamp=at_ms, key=key, value=value, headers=[])
            sent = batch.record_count()
            await (await producer.send_batch(batch, topic, partition=partition))
            counts[partition] += sent

    feeds = [asyncio.create_task(feed(partition)) for partition in range(PARTITIONS)]
    await asyncio.sleep(2)
    before, cpu_ns, since = sum(counts), time.process_time_ns(), monotonic_ns()
    await asyncio.sleep(seconds)
    events = sum(counts) - before
    cpu_ns, took_ns = time.process_time_ns() - cpu_ns, monotonic_ns() - since
    for task in feeds:
        task.cancel()
    await asyncio.gather(*feeds, return_exceptions=True)
    await producer.stop()
    return {"events_per_s": events / took_ns * SECOND, "cpu_us_per_event": cpu_ns / 1000 / events}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], float(sys.argv[2])))))
