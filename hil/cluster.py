"""Several Kafka nodes on loopback, each broker and controller at once, with small heaps: ``with Cluster() as cluster``.

Topics have a replica on every node, and a record is acknowledged when a majority of them has it, so that one node of
three may be killed without a loss. With ``proxied``, every node tells clients the address of a proxy of its own
(``hil.proxy``), which disturbs the way to it on command.
"""

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from drivers.clock import MS, SECOND, after, left_s, monotonic_ns, sleep_until
from hil.kafka import LOOPBACK, Broker, RigError, free_port
from hil.proxy import Proxy

HEAP_MB = 160


class Cluster:
    """So many nodes, ``node(1)`` to ``node(count)``. They end with the process that started them."""

    def __init__(self, count: int = 3, *, proxied: bool = False) -> None:
        """Nothing is started yet."""
        self._closing = contextlib.ExitStack()
        ports = {number: free_port() for number in range(1, count + 1)}
        voters = ",".join(f"{number}@{LOOPBACK}:{port}" for number, port in ports.items())
        majority = str(count // 2 + 1)
        common = {
            "controller.quorum.voters": voters,
            "default.replication.factor": str(count),
            "min.insync.replicas": majority,
            "offsets.topic.replication.factor": str(count),
            "transaction.state.log.replication.factor": str(count),
            "transaction.state.log.min.isr": majority,
        }
        self.proxies: dict[int, Proxy] = {}
        self.nodes: dict[int, Broker] = {}
        for number, port in ports.items():
            proxy = self._closing.enter_context(Proxy()) if proxied else None
            node = Broker(
                {**common, "node.id": str(number)},
                controller_port=port,
                heap_mb=HEAP_MB,
                proxy=proxy.address if proxy else None,
            )
            self._closing.callback(node.close)
            self.nodes[number] = node
            if proxy:
                proxy.target = node.behind_proxy
                self.proxies[number] = proxy

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bootstrap(self) -> str:
        """What a client takes as ``bootstrap_servers``, past the proxies: ``host:port,host:port``."""
        return ",".join(node.bootstrap for node in self.nodes.values())

    @property
    def proxied(self) -> str:
        """The same for a client behind the proxies."""
        return ",".join(proxy.address for proxy in self.proxies.values())

    def start(self, *, within_s: float = 90) -> None:
        """Start the nodes that do not run; return once all answer. Raises RigError."""
        for node in self.nodes.values():
            if not node.running:
                node.launch()
        for node in self.nodes.values():
            node.wait(within_s=within_s)

    def leader(self, topic: str, partition: int) -> int:
        """The node that leads a partition. Raises RigError if it has none."""
        return asyncio.run(self._leader(topic, partition))

    def kill_leader(self, topic: str, partition: int, *, within_s: float = 30) -> int:
        """Kill the node that leads a partition; which that was, once another one leads. ``start`` brings it back."""
        killed = self.leader(topic, partition)
        self.nodes[killed].kill()
        deadline = after(monotonic_ns(), int(within_s * SECOND))
        while True:
            with contextlib.suppress(RigError):
                if self.leader(topic, partition) != killed:
                    return killed
            if not left_s(deadline):
                raise RigError(f"topic {topic}, partition {partition} has no other leader than node {killed}, killed")
            sleep_until(after(monotonic_ns(), 100 * MS))

    async def _leader(self, topic: str, partition: int) -> int:
        running = [node.bootstrap for node in self.nodes.values() if node.running]
        admin = AIOKafkaAdminClient(bootstrap_servers=running, request_timeout_ms=5_000)
        try:
            await admin.start()
            for found in (await admin.describe_topics([topic]))[0]["partitions"]:
                if found["partition"] == partition and found["leader"] in self.nodes:
                    return int(found["leader"])
        except (KafkaError, OSError) as error:
            raise RigError(f"the cluster does not say who leads {topic}: {error}") from error
        finally:
            await admin.close()
        raise RigError(f"topic {topic} has no partition {partition} with a leader")

    def close(self) -> None:
        """Kill all nodes and remove their data."""
        self._closing.close()
