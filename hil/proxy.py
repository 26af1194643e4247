"""A TCP proxy that disturbs on command: stands between the gateway and a broker, a thread of its own.

    client --requests--> proxy --requests--> broker
           <--replies---       <--replies---

What a client has sent is taken at once, also while it is held, and outlives the client: a killed program's bytes are
delivered on release, as a paused broker's socket buffer or a slow network would. It knows nothing of Kafka. A Kafka
client goes where the broker tells it to, so the broker needs a listener that tells the proxy's address
(``hil.kafka.Broker(proxy=...)``).
"""

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

LOOPBACK = "127.0.0.1"
CHUNK = 1 << 16


@dataclass(slots=True)
class _Gate:
    """What holds for the connections that were made in one spell."""

    requests: asyncio.Event = field(default_factory=asyncio.Event)  # set: they flow
    replies: asyncio.Event = field(default_factory=asyncio.Event)
    swallowing: bool = False  # replies are read and thrown away

    def set(self, *, requests: bool, replies: bool) -> None:
        for event, flows in ((self.requests, requests), (self.replies, replies)):
            event.set() if flows else event.clear()


class Proxy:
    """Listens on a free loopback port from construction to ``close``; forwards to ``target`` (``host:port``).

    The commands hold for every connection, those that come later included, until the next one. They may be called
    from any thread, and have taken effect when they return.
    """

    def __init__(self, target: str | None = None) -> None:
        """``target`` may be set later, before the first client comes."""
        self.target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._gate = _Gate()
        self._gates = [self._gate]
        self._gate.set(requests=True, replies=True)
        self._refusing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._taken = 0
        self._server = self._call(asyncio.start_server(self._serve, LOOPBACK, 0))
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"{host}:{port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- commands ------------------------------------------------------------------------------------------------

    def flow(self) -> None:
        """Let everything through; what was held is delivered, also that of clients which are gone."""

        async def apply() -> None:
            self._refusing = False
            for gate in self._gates:
                gate.swallowing = False
                gate.set(requests=True, replies=True)
            self._gates = [self._gate]

        self._call(apply())

    def stall(self, *, requests: bool = True, replies: bool = True) -> None:
        """Hold these directions."""

        async def apply() -> None:
            self._gate.set(requests=not requests, replies=not replies)

        self._call(apply())

    def swallow_replies(self) -> None:
        """Requests go through; nobody hears of it, ever."""

        async def apply() -> None:
            self._gate.swallowing = True

        self._call(apply())

    def let_new_pass(self) -> None:
        """Connections that are made from now on pass; what holds for the others stays, until ``flow``."""

        async def apply() -> None:
            self._gate = _Gate()
            self._gate.set(requests=True, replies=True)
            self._gates.append(self._gate)

        self._call(apply())

    def cut(self) -> None:
        """Close all connections, throw away what was held, and refuse new ones until ``flow``."""

        async def apply() -> None:
            self._refusing = True
            for writer in self._writers:
                writer.transport.abort()

        self._call(apply())

    @property
    def taken(self) -> int:
        """Bytes of requests that came from clients so far, delivered or not."""
        return self._taken

    def close(self) -> None:
        """Close all connections and the port."""

        async def apply() -> None:
            self._server.close()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if self._thread.is_alive():
            self._call(apply())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _call(self, part: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(part, self._loop).result(10)

    # -- on its thread -------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self.target, "a client came before the target was set"
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        ends = [writer]
        try:
            if not self._refusing:
                host, _, port = self.target.rpartition(":")
                up_reader, up_writer = await asyncio.open_connection(host, int(port))
                ends.append(up_writer)
                self._writers.update(ends)
                gate = self._gate
                replies = asyncio.create_task(self._replies(up_reader, writer, gate))
                try:
                    await self._requests(reader, up_writer, gate)
                    await replies
                finally:
                    replies.cancel()
        except OSError:  # one end is gone, or the broker is not there: the other learns it by being closed
            pass
        finally:
            self._writers.difference_update(ends)
            for end in ends:
                end.transport.abort()
            self._tasks.discard(task)

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: _Gate) -> None:
        """Take everything as it comes; deliver while the gate is open, then say that nothing follows."""
        held: asyncio.Queue[bytes] = asyncio.Queue()
        taking = asyncio.create_task(self._take(reader, held))
        try:
            while chunk := await held.get():
                await gate.requests.wait()
                writer.write(chunk)
                await writer.drain()
            await gate.requests.wait()
            writer.write_eof()
        finally:
            taking.cancel()

    async def _take(self, reader: asyncio.StreamReader, held: "asyncio.Queue[bytes]") -> None:
        try:
            while chunk := await reader.read(CHUNK):
                self._taken += len(chunk)
                held.put_nowait(chunk)
        except OSError:  # reset: the client was killed
            pass
        held.put_nowait(b"")

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: _Gate) -> None:
        """Pass replies on until the broker closes; a client that is gone does not end it."""
        try:
            while chunk := await reader.read(CHUNK):
                await gate.replies.wait()
                if not gate.swallowing and not writer.is_closing():
                    writer.write(chunk)
            await gate.replies.wait()
        finally:
            writer.close()
