"""Sending commands and hearing of their outcomes, through Kafka or through the state directory of this machine."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import msgspec
from aiokafka import AIOKafkaProducer

from drivers.clock import epoch_ns
from drivers.motor import Kind
from gateway import kafka, local_commands
from gateway.commands import Command, Outcome, decode_outcome, encode_command
from gateway.config import Config
from gateway.events import ARM
from gateway.journal_reader import JournalLog
from gateway.kafka_reader import KafkaLog
from gateway.log_reader import Entries, LogReader
from gateway.state_dir import StateDir


class CommandError(Exception):
    """A command could not be sent, or nothing was heard of it in time."""


def make_command(
    motor: str, kind: Kind, value: float | None = None, *, ttl_ms: float = 500.0, velocity_rad_s: float | None = None
) -> Command:
    """A command with a new id, issued now. Units: rad, rad/s or N m by kind."""
    return Command(secrets.token_hex(8), motor, kind, ttl_ms, epoch_ns(), value, None, velocity_rad_s)


async def send(config: Config, command: Command, timeout_s: float | None) -> AsyncIterator[Outcome]:
    """Send ``command`` and yield its outcomes up to the final one; none if ``timeout_s`` is None.

    ``issued_at_ns`` is set to the moment of sending. Raises CommandError if the time runs out.
    """
    through = _through_kafka if config.kafka else _through_state_dir
    try:
        async with asyncio.timeout(timeout_s):
            async for outcome in through(config, command, wait=timeout_s is not None):
                yield outcome
    except TimeoutError as error:
        runs = "" if config.kafka else "; does the gateway run (servo-gateway status)?"
        raise CommandError(f"command {command.id}: no final outcome within {timeout_s:g} s{runs}") from error


def _issued_now(command: Command) -> bytes:
    return encode_command(msgspec.structs.replace(command, issued_at_ns=epoch_ns()))


async def _through_state_dir(config: Config, command: Command, *, wait: bool) -> AsyncIterator[Outcome]:
    state = StateDir(config.arm.state_dir)
    if state.running_pid() is None:
        raise CommandError(f"no gateway runs on state_dir {state.path}; start it with: servo-gateway run")
    async with JournalLog(state, ["outcomes"], "end", follow=True) as log:
        local_commands.append(state.commands, _issued_now(command))
        if wait:
            async for outcome in _outcomes(log, command.id):
                yield outcome


async def _through_kafka(config: Config, command: Command, *, wait: bool) -> AsyncIterator[Outcome]:
    assert config.kafka is not None  # noqa: S101  send() sees to it
    options = kafka.client_options(config.kafka)
    partition = next((motor.partition for motor in config.motors if motor.name == command.motor), 0)
    await kafka.partitions_of(config.kafka, config.topic("commands"))
    async with AsyncExitStack() as stack:
        # listen first, so that no outcome is missed
        log = await stack.enter_async_context(KafkaLog(config, ["outcomes"], "end", follow=True)) if wait else None
        producer = await stack.enter_async_context(kafka.running(AIOKafkaProducer(**options, acks="all")))
        key = (command.motor or ARM).encode()
        await producer.send_and_wait(config.topic("commands"), _issued_now(command), key, partition)
        if log:
            async for outcome in _outcomes(log, command.id):
                yield outcome


async def _outcomes(log: LogReader, command_id: str) -> AsyncIterator[Outcome]:
    """Outcomes of one command, up to the final one."""
    async for part in log:
        if isinstance(part, Entries):
            for entry in part.entries:
                outcome = decode_outcome(entry.value)
                if outcome.command_id == command_id:
                    yield outcome
                    if outcome.final:
                        return
