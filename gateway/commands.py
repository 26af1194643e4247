"""The commands and outcomes topics: records in, records out. Pure; ``gateway.commander`` decides and acts."""

import math
from enum import StrEnum
from typing import Any

import msgspec

from drivers.motor import SETPOINTS, Kind
from gateway.events import ARM
from gateway.journal import Entry

MOST_BYTES = 64 << 10
MOST_ID = 128
MOST_TTL_MS = 600_000


class State(StrEnum):
    """``state`` of an outcome: ``accepted`` and then one of the next three, or one of the last two at once."""

    ACCEPTED = "accepted"
    DONE = "done"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    REJECTED = "rejected"
    EXPIRED = "expired"


class Reason(StrEnum):
    """Why a command did not come to ``done``."""

    MALFORMED = "malformed"
    UNAUTHORIZED = "unauthorized"  # gateway.auth
    UNKNOWN_MOTOR = "unknown_motor"
    UNSUPPORTED = "unsupported"
    DUPLICATE = "duplicate"
    STALE = "stale"
    CLOCK_SKEW = "clock_skew"
    ESTOP_LATCHED = "estop_latched"
    MOTOR_LATCHED = "motor_latched"  # stopped by itself (stop_on), until clear_fault
    MOTOR_OFFLINE = "motor_offline"
    NOT_ENABLED = "not_enabled"
    OUT_OF_LIMITS = "out_of_limits"
    OVERLOADED = "overloaded"
    NO_REPLY = "no_reply"
    REFUSED = "refused"
    NOT_REACHED = "not_reached"
    NEWER_COMMAND = "newer_command"
    INTERRUPTED = "interrupted"
    NOT_RECORDED = "not_recorded"  # the journal is sick


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A record of the commands topic."""

    id: str
    motor: str
    kind: Kind
    ttl_ms: float
    issued_at_ns: int
    value: float | None = None
    targets: dict[str, float] | None = None
    velocity_rad_s: float | None = None
    issuer: str | None = None
    signature: str | None = None  # gateway.auth


class Unreadable(Exception):
    """A record that is no command. ``command_id`` and ``motor`` as far as they could be made out."""

    def __init__(self, detail: str, command_id: str | None = None, motor: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.command_id = command_id
        self.motor = motor


def decode_command(raw: bytes) -> Command:
    """The command in a record. Raises Unreadable, saying what is wrong and where."""
    if len(raw) > MOST_BYTES:
        raise Unreadable(f"the record has {len(raw)} bytes, at most {MOST_BYTES} are read")
    try:
        found: Any = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise Unreadable(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Unreadable(f"must be a JSON object, is {type(found).__name__}")
    known = {name: found[name] for name in ("id", "motor") if isinstance(found.get(name), str)}
    command_id, motor = known.get("id"), known.get("motor")
    if command_id is not None and not 0 < len(command_id) <= MOST_ID:
        raise Unreadable(f"id has {len(command_id)} characters, 1 to {MOST_ID} are allowed", None, motor)
    try:
        command = msgspec.convert(found, Command)
        _check(command)
    except (msgspec.ValidationError, ValueError) as error:
        raise Unreadable(str(error), command_id, motor) from error
    return command


def _check(command: Command) -> None:
    """What the types cannot say."""
    if abs(command.issued_at_ns) >= 1 << 63:
        raise ValueError("issued_at_ns: must be nanoseconds since 1970, within 64 bits")
    if not 0 < command.ttl_ms <= MOST_TTL_MS:
        raise ValueError(f"ttl_ms = {command.ttl_ms:g}: must be above 0 and at most {MOST_TTL_MS}")
    takes_value = command.kind in SETPOINTS
    if command.targets is not None:
        _check_targets(command, command.targets)
    elif takes_value and command.value is None:
        raise ValueError(f"kind {command.kind} needs a value")
    elif not takes_value and command.value is not None:
        raise ValueError(f"kind {command.kind} takes no value, got {command.value:g}")
    for name in ("value", "velocity_rad_s"):
        number = getattr(command, name)
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name} = {number}: must be a finite number")


def _check_targets(command: Command, targets: dict[str, float]) -> None:
    if command.kind not in SETPOINTS:
        raise ValueError(f"kind {command.kind} takes no targets; {', '.join(sorted(SETPOINTS))} do")
    if command.motor != ARM:
        raise ValueError(f'motor = "{command.motor}": must be "{ARM}" where targets names the motors')
    if command.value is not None:
        raise ValueError(f"targets has the values; value = {command.value:g} is one too many")
    if not targets:
        raise ValueError("targets: must name one motor at least")


def encode_command(command: Command) -> bytes:
    """The record of a command; fields that are not set are left out."""
    return msgspec.json.encode(command)


class Outcome(msgspec.Struct, frozen=True):
    """A record of the outcomes topic. ``latency_us``: since the gateway read the command."""

    command_id: str
    motor: str
    state: State
    at_ns: int
    latency_us: int
    reason: Reason | None = None
    detail: str = ""

    @property
    def final(self) -> bool:
        """Whether nothing more follows for this command."""
        return self.state is not State.ACCEPTED

    def entry(self, partition: int) -> Entry:
        """The outcome as a journal entry."""
        return Entry("outcomes", partition, self.motor or ARM, msgspec.json.encode(self), self.at_ns)


def decode_outcome(raw: bytes) -> Outcome:
    """The outcome in a record. Raises msgspec.DecodeError for anything else."""
    return msgspec.json.decode(raw, type=Outcome)
