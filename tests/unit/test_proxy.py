"""The rig's proxy between a client and a server that says what it hears and answers with the same."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from hil.proxy import LOOPBACK, Proxy
from tests.gateway_parts import DEADLINE_S, wait_for


class Server:
    """Keeps what it heard, in all connections, and sends it back."""

    def __init__(self) -> None:
        self.heard = b""
        self._listener = socket.create_server((LOOPBACK, 0))
        self.address = f"{LOOPBACK}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while data := connection.recv(4096):
                self.heard += data
                connection.sendall(data)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.address) as made:
        yield made


def connect(proxy: Proxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def test_bytes_pass_both_ways(proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(5, socket.MSG_WAITALL) == b"hello"


def test_what_a_dead_client_had_sent_is_delivered_on_release_and_not_before(proxy: Proxy, server: Server) -> None:
    proxy.stall()
    with connect(proxy) as client:
        client.sendall(b"late")
        wait_for(lambda: proxy.taken == 4)
    proxy.let_new_pass()
    with connect(proxy) as other:
        other.sendall(b"early ")
        assert other.recv(6, socket.MSG_WAITALL) == b"early "
        assert server.heard == b"early "
        proxy.flow()
        wait_for(lambda: server.heard == b"early late")


def test_held_replies_come_later_and_swallowed_ones_never(proxy: Proxy, server: Server) -> None:
    with connect(proxy) as client:
        proxy.stall(requests=False)
        client.sendall(b"one")
        wait_for(lambda: server.heard == b"one")
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        client.settimeout(DEADLINE_S)
        proxy.flow()
        assert client.recv(3, socket.MSG_WAITALL) == b"one"
        proxy.swallow_replies()
        client.sendall(b"two")
        wait_for(lambda: server.heard == b"onetwo")
        proxy.cut()
        assert is_closed(client), "the answer to the second never came"


def test_cut_closes_what_there_is_and_refuses_what_comes_until_it_flows_again(proxy: Proxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        proxy.cut()
        assert is_closed(client)
    with connect(proxy) as refused:
        assert is_closed(refused)
    proxy.flow()
    with connect(proxy) as client:
        client.sendall(b"y")
        assert client.recv(1) == b"y"


def is_closed(client: socket.socket) -> bool:
    """Whether the other end has closed; waits for either that or a byte."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
