"""Three nodes: what was acknowledged outlives the node that led, and a proxy cuts only its own clients."""

import asyncio

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from hil.cluster import Cluster
from hil.kafka import RigError
from hil.logs import read

pytestmark = pytest.mark.at_full_rate

WITHIN_S = 30


async def test_a_killed_leader_is_replaced_and_costs_no_record() -> None:
    cluster = Cluster(proxied=True)
    try:
        await asyncio.to_thread(cluster.start)
        admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap)
        await admin.start()
        await admin.create_topics([NewTopic("topic", 1, -1, {})])
        await admin.close()
        producer = AIOKafkaProducer(bootstrap_servers=cluster.proxied, acks="all", enable_idempotence=True)
        await producer.start()
        try:
            await producer.send_and_wait("topic", b"before", partition=0)
            killed = await asyncio.to_thread(cluster.kill_leader, "topic", 0)
            assert not cluster.nodes[killed].running
            await asyncio.wait_for(producer.send_and_wait("topic", b"without it", partition=0), WITHIN_S)
            await asyncio.to_thread(cluster.start)
            for proxy in cluster.proxies.values():
                proxy.cut()
            assert [record.value async for record in read(cluster.bootstrap, "topic")] == [b"before", b"without it"]
            cut_off = asyncio.create_task(producer.send_and_wait("topic", b"behind the proxies", partition=0))
            done, _ = await asyncio.wait([cut_off], timeout=0.3)
            assert not done
            for proxy in cluster.proxies.values():
                proxy.flow()
            await asyncio.wait_for(cut_off, WITHIN_S)
        finally:
            await asyncio.wait_for(producer.stop(), WITHIN_S)
        values = [record.value async for record in read(cluster.bootstrap, "topic")]
        assert values == [b"before", b"without it", b"behind the proxies"]
        with pytest.raises(RigError, match="no partition 7"):
            await asyncio.to_thread(cluster.leader, "topic", 7)
    finally:
        await asyncio.to_thread(cluster.close)
