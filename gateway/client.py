"""Commands for programs: give one and wait for what comes of it, or stream setpoints. ``docs/commands.md`` shows how.

One reader of the arm's outcomes serves every command of a client, however many are under way. Commands go through
Kafka where the configuration has it, else through the state directory of this machine.
"""

import asyncio
import os
import secrets
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from drivers.clock import SECOND, after, epoch_ns, left_s, monotonic_ns
from drivers.motor import Kind
from gateway import auth, kafka, local_commands
from gateway.commands import Command, Outcome, State, decode_outcome, encode_command
from gateway.config import Config
from gateway.events import ARM
from gateway.journal_reader import JournalLog
from gateway.kafka_reader import KafkaLog
from gateway.log_reader import Entries, LogError, LogReader, Topic
from gateway.state_dir import StateDir

P = ParamSpec("P")
T = TypeVar("T")

UNDER_WAY = 256
"""Setpoints of a stream whose outcome is still waited for; beyond, the oldest are given up."""
ESTOP_TIMEOUT_S = 5.0


class CommandError(Exception):
    """A command could not be sent, or nothing was heard of it in time."""


def runs_here(config: Config) -> bool:
    """Whether the arm's gateway runs on this machine, and this user may command it here."""
    state = StateDir(config.arm.state_dir)
    return state.running_pid() is not None and os.access(state.path, os.W_OK)


def open_log(config: Config, topic: Topic, *, local: bool) -> LogReader:
    """What comes to ``topic`` from now on, where commands go: in Kafka, or in the journal of this machine."""
    if local or config.kafka is None:
        return JournalLog(StateDir(config.arm.state_dir), [topic], "end", follow=True)
    return KafkaLog(config, [topic], "end", follow=True)


class Sent:
    """A command that was handed over, and what came of it so far."""

    def __init__(self, command: Command, on_final: Callable[[Outcome], None] | None = None) -> None:
        self.command = command
        self._on_final = on_final
        self._heard: list[Outcome] = []
        self._deaf: str | None = None  # why nothing more can be heard
        self._news = asyncio.Event()

    @property
    def final(self) -> Outcome | None:
        """The final outcome, if it is known."""
        return self._heard[-1] if self._heard and self._heard[-1].final else None

    async def outcome(self, timeout_s: float | None = 30.0) -> Outcome:
        """The final outcome. Raises CommandError if it does not come in time."""
        return [outcome async for outcome in self.outcomes(timeout_s)][-1]

    async def outcomes(self, timeout_s: float | None = 30.0) -> AsyncIterator[Outcome]:
        """Every outcome up to the final one, as they come. Raises CommandError if that does not come in time."""
        deadline = None if timeout_s is None else after(monotonic_ns(), int(timeout_s * SECOND))
        told = 0
        while True:
            while told < len(self._heard):  # more may come while who asked looks at one
                told += 1
                yield self._heard[told - 1]
            if self.final:
                return
            if self._deaf is not None:
                raise CommandError(f"command {self.command.id}: its outcome cannot be heard: {self._deaf}")
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), None if deadline is None else left_s(deadline))
            except TimeoutError:
                raise CommandError(f"command {self.command.id}: no final outcome within {timeout_s:g} s") from None

    def hear(self, outcome: Outcome) -> None:
        """Take an outcome from the log. Once it was accepted, a rejection is another's who used the same id."""
        if self.final or (self._heard and outcome.state in (State.REJECTED, State.EXPIRED)):
            return
        self._heard.append(outcome)
        self._news.set()
        if outcome.final and self._on_final:
            self._on_final(outcome)

    def go_deaf(self, why: str) -> None:
        """Nothing more can be heard."""
        self._deaf = why
        self._news.set()


class _Way(Protocol):
    """How commands reach the gateway."""

    async def put(self, commands: Sequence[Command]) -> None:
        """Hand them over, together and in this order."""


class _StateDirWay:
    def __init__(self, state: StateDir) -> None:
        self._state = state

    async def put(self, commands: Sequence[Command]) -> None:
        if self._state.running_pid() is None:  # what is put in now would wait for a gateway that expires it
            raise CommandError(f"no gateway runs on state_dir {self._state.path}; start it with: servo-gateway run")
        await asyncio.to_thread(local_commands.append, self._state.commands, *map(encode_command, commands))


class _KafkaWay:
    def __init__(self, config: Config, producer: AIOKafkaProducer) -> None:
        self._topic = config.topic("commands")
        self._partitions = {motor.name: motor.partition for motor in config.motors}
        self._producer = producer

    async def put(self, commands: Sequence[Command]) -> None:
        answers = [
            await self._producer.send(
                self._topic, encode_command(command), command.motor.encode(), self._partitions.get(command.motor, 0)
            )
            for command in commands
        ]
        await asyncio.gather(*answers)


class Client:
    """Commands one arm. ``async with Client(load("arm.toml")) as client: await client.command("joint2", "enable")``."""

    def __init__(self, config: Config, *, issuer: str | None = None, sign: bool = False, local: bool = False) -> None:
        """``issuer`` is named in every command, which is signed with its key from the configuration if ``sign``.

        ``local``: through the state directory, even if there is Kafka. Raises ConfigError if there is no such key.
        """
        self._config = config
        self._issuer = issuer
        self._secret = auth.secret_of(config.commands, issuer or "") if sign else None
        self._local = local or config.kafka is None
        self._sent: WeakValueDictionary[str, Sent] = WeakValueDictionary()  # what nobody holds, nobody waits for

    async def __aenter__(self) -> Self:
        """Begin to listen. Raises CommandError, LogError or KafkaError if the arm cannot be reached."""
        async with AsyncExitStack() as undo:
            self._way: _Way
            if self._local:
                self._way = _StateDirWay(StateDir(self._config.arm.state_dir))
                await self._way.put([])  # is there a gateway, and may this user write there?
            else:
                assert self._config.kafka is not None  # noqa: S101  else it is local
                await kafka.partitions_of(self._config.kafka, self._config.topic("commands"))
                options = kafka.client_options(self._config.kafka)
                producer = await undo.enter_async_context(kafka.running(AIOKafkaProducer(**options, acks="all")))
                self._way = _KafkaWay(self._config, producer)
            log = await undo.enter_async_context(open_log(self._config, "outcomes", local=self._local))
            listening = asyncio.create_task(self._listen(log))
            undo.push_async_callback(_cancel, listening)
            self._undo = undo.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._undo.aclose()
        self._go_deaf("the client was closed")

    async def command(
        self,
        motor: str,
        kind: Kind | str,
        value: float | None = None,
        *,
        targets: Mapping[str, float] | None = None,
        velocity_rad_s: float | None = None,
        ttl_ms: float = 500.0,
        timeout_s: float = 30.0,
    ) -> Outcome:
        """Give a command and wait for its final outcome: ``done``, or why not.

        ``value``: rad, rad/s or N m, by kind. Raises CommandError if no outcome comes in time, and as ``send``.
        """
        deadline = after(monotonic_ns(), int(timeout_s * SECOND))
        try:
            async with asyncio.timeout(timeout_s):
                sent = await self.send(
                    motor, kind, value, targets=targets, velocity_rad_s=velocity_rad_s, ttl_ms=ttl_ms
                )  # fmt: skip
        except TimeoutError:
            raise CommandError(f"{kind} for {motor}: could not be sent within {timeout_s:g} s") from None
        return await sent.outcome(left_s(deadline))

    async def targets(
        self,
        targets: Mapping[str, float],
        kind: Kind | str = Kind.POSITION,
        *,
        velocity_rad_s: float | None = None,
        ttl_ms: float = 500.0,
        timeout_s: float = 30.0,
    ) -> Outcome:
        """Several motors in one command, which begin together; all or none. Else as ``command``."""
        return await self.command(
            ARM, kind, targets=targets, velocity_rad_s=velocity_rad_s, ttl_ms=ttl_ms, timeout_s=timeout_s
        )

    async def estop(self, timeout_s: float = ESTOP_TIMEOUT_S) -> Outcome:
        """Stop the arm, and let nothing move it until ``reset_estop``.

        Through the state directory if the arm's gateway runs on this machine: no broker is in the way then.
        """
        if not self._local and runs_here(self._config):
            with suppress(OSError, sqlite3.Error, LogError):  # may not write there: through Kafka, then
                async with Client(self._config, issuer=self._issuer, local=True) as here:
                    return await here.estop(timeout_s)
        return await self.command(ARM, Kind.ESTOP, timeout_s=timeout_s)

    async def send(
        self,
        motor: str,
        kind: Kind | str,
        value: float | None = None,
        *,
        targets: Mapping[str, float] | None = None,
        velocity_rad_s: float | None = None,
        ttl_ms: float = 500.0,
    ) -> Sent:
        """Give a command and go on; ``outcome`` of what is returned waits. Raises CommandError, KafkaError, OSError."""
        sent = Sent(self._make(motor, Kind(kind), value, targets, velocity_rad_s, ttl_ms))
        await self._put([sent])
        return sent

    def stream(
        self,
        kind: Kind | str,
        *,
        period_s: float = 0.01,
        velocity_rad_s: float | None = None,
        ttl_ms: float = 100.0,
    ) -> "Stream":
        """Setpoints of one kind, as fast as they come but at most one a motor every ``period_s``.

        Nothing is repeated: a program that ends or hangs lets velocity and torque end (``setpoint_timeout_ms``).
        """

        def make(motor: str, value: float, on_final: Callable[[Outcome], None]) -> Sent:
            return Sent(self._make(motor, Kind(kind), value, None, velocity_rad_s, ttl_ms), on_final)

        return Stream(make, self._put, period_s)

    def _make(
        self,
        motor: str,
        kind: Kind,
        value: float | None,
        targets: Mapping[str, float] | None,
        velocity_rad_s: float | None,
        ttl_ms: float,
    ) -> Command:
        command = Command(
            id=secrets.token_hex(8),
            motor=motor,
            kind=kind,
            ttl_ms=ttl_ms,
            issued_at_ns=epoch_ns(),
            value=value,
            targets=None if targets is None else dict(targets),
            velocity_rad_s=velocity_rad_s,
            issuer=self._issuer,
        )
        return command if self._secret is None else auth.sign(command, self._config.arm.name, self._secret)

    async def _put(self, sents: Sequence[Sent]) -> None:
        self._sent.update({sent.command.id: sent for sent in sents})
        await self._way.put([sent.command for sent in sents])

    async def _listen(self, log: LogReader) -> None:
        try:
            async for part in log:
                if isinstance(part, Entries):
                    for entry in part.entries:
                        with suppress(msgspec.DecodeError):  # written by somebody else
                            outcome = decode_outcome(entry.value)
                            if sent := self._sent.get(outcome.command_id):
                                sent.hear(outcome)
        except (KafkaError, LogError, OSError, sqlite3.Error) as error:
            self._go_deaf(str(error) or type(error).__name__)

    def _go_deaf(self, why: str) -> None:
        for sent in list(self._sent.values()):
            sent.go_deaf(why)


class Stream:
    """Setpoints on their way, of which only the newest of each motor counts: ``async with client.stream(kind)``.

    Leaving it sends what is set; leaving it by an error does not.
    """

    def __init__(
        self,
        make: Callable[[str, float, Callable[[Outcome], None]], Sent],
        put: Callable[[Sequence[Sent]], Awaitable[None]],
        period_s: float,
    ) -> None:
        self._make = make
        self._put = put
        self._period_s = period_s
        self._newest: dict[str, float] = {}
        self._news = asyncio.Event()
        self._closed = False
        self._under_way: deque[Sent] = deque(maxlen=UNDER_WAY)
        self._last: dict[str, Sent] = {}
        self.counts: Counter[State] = Counter()
        """How many ended how; mostly ``superseded``, by the next one."""
        self.trouble: Outcome | None = None
        """The newest outcome that is neither ``done`` nor ``superseded``."""

    async def __aenter__(self) -> Self:
        self._sending = asyncio.create_task(self._send())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            await asyncio.gather(_cancel(self._sending), return_exceptions=True)
            return
        self._closed = True
        self._news.set()
        await self._sending

    def set(self, setpoints: Mapping[str, float]) -> None:
        """{motor: rad, rad/s or N m}, in place of what was set and not sent yet. Never waits.

        Raises what kept earlier ones from being sent.
        """
        self._check()
        self._newest.update(setpoints)
        self._news.set()

    async def settle(self, timeout_s: float = 30.0) -> dict[str, Outcome]:
        """What came of the newest setpoint of each motor. Raises CommandError if it takes longer, and as ``set``."""
        while self._newest:
            self._check()
            await asyncio.sleep(self._period_s)
        sents = dict(self._last)
        outcomes = await asyncio.gather(*(sent.outcome(timeout_s) for sent in sents.values()))
        return dict(zip(sents, outcomes, strict=True))

    def _check(self) -> None:
        if self._sending.done():
            self._sending.result()

    async def _send(self) -> None:
        while not self._closed or self._newest:
            await self._news.wait()
            self._news.clear()
            if self._newest:
                due = after(monotonic_ns(), int(self._period_s * SECOND))
                sents = {motor: self._make(motor, value, self._heard) for motor, value in self._newest.items()}
                self._newest = {}
                self._last |= sents
                self._under_way.extend(sents.values())
                await self._put(list(sents.values()))
                if not self._closed:
                    await asyncio.sleep(left_s(due))

    def _heard(self, outcome: Outcome) -> None:
        self.counts[outcome.state] += 1
        if outcome.state not in (State.DONE, State.SUPERSEDED):
            self.trouble = outcome


# --- for programs without an event loop -------------------------------------------------------------------------------


def _blocking(
    method: Callable[Concatenate[Client, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["SyncClient", P], T]:
    """A method of ``Client`` as one of ``SyncClient``: the same, but it returns when it is done."""

    @wraps(method)
    def call(self: "SyncClient", /, *args: P.args, **options: P.kwargs) -> T:
        return self.wait(method(self._client, *args, **options))

    return call


class SyncClient:
    """``Client`` for programs without an event loop: ``with SyncClient(load("arm.toml")) as client: ...``.

    A thread of its own has the loop. The methods, their arguments and errors are those of ``Client``.
    """

    command = _blocking(Client.command)
    targets = _blocking(Client.targets)
    estop = _blocking(Client.estop)
    send = _blocking(Client.send)

    def __init__(self, config: Config, *, issuer: str | None = None, sign: bool = False, local: bool = False) -> None:
        self._client = Client(config, issuer=issuer, sign=sign, local=local)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servo-gateway client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.wait(self._client.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait(self._client.__aexit__(kind, error, trace))
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What a coroutine of ``Client``, ``Sent`` or ``Stream`` returns: ``client.wait(sent.outcome())``."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    @contextmanager
    def stream(
        self,
        kind: Kind | str,
        *,
        period_s: float = 0.01,
        velocity_rad_s: float | None = None,
        ttl_ms: float = 100.0,
    ) -> Iterator["SyncStream"]:
        """As ``Client.stream``."""
        stream = self._client.stream(kind, period_s=period_s, velocity_rad_s=velocity_rad_s, ttl_ms=ttl_ms)
        self.wait(stream.__aenter__())
        try:
            yield SyncStream(self, stream)
        except BaseException as error:
            self.wait(stream.__aexit__(type(error), error, error.__traceback__))
            raise
        self.wait(stream.__aexit__(None, None, None))


class SyncStream:
    """``Stream`` for programs without an event loop."""

    def __init__(self, client: SyncClient, stream: Stream) -> None:
        self._client = client
        self._stream = stream

    def set(self, setpoints: Mapping[str, float]) -> None:
        """As ``Stream.set``."""

        async def set_there() -> None:
            self._stream.set(setpoints)

        self._client.wait(set_there())

    def settle(self, timeout_s: float = 30.0) -> dict[str, Outcome]:
        """As ``Stream.settle``."""
        return self._client.wait(self._stream.settle(timeout_s))

    @property
    def counts(self) -> Counter[State]:
        """As ``Stream.counts``."""
        return self._stream.counts

    @property
    def trouble(self) -> Outcome | None:
        """As ``Stream.trouble``."""
        return self._stream.trouble


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
