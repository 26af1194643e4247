"""The peer of the command path: aiokafka's consumer and nothing else. ``python -m hil.bench.arrivals BOOTSTRAP TOPIC``.

One line for each record that comes, as soon as it is there: the id of its command, and the monotonic time.
"""

import asyncio
import json
import sys

from aiokafka import AIOKafkaConsumer, TopicPartition

from drivers.clock import monotonic_ns
from gateway.kafka import running


async def main(bootstrap: str, topic: str) -> None:
    """Read partition 0 from its end, until killed."""
    async with running(AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)) as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        await consumer.seek_to_end()
        while True:
            for records in (await consumer.getmany(timeout_ms=1000)).values():
                at_ns = monotonic_ns()
                for record in records:
                    print(json.loads(record.value or b"{}").get("id"), at_ns, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
