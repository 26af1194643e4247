"""Who may command the arm: the ``[commands]`` table. ``docs/commands.md`` is the same for programs in other languages.

A signature is HMAC-SHA-256 over one text that every language makes alike: a JSON object of texts only, so that nobody
has to agree on how a number is written. It holds the command and the arm's name; the command's id and time, which the
gateway remembers and checks, are what makes a copy worthless.
"""

import hmac
import json
import struct

import msgspec

from drivers.motor import Kind
from gateway.commands import Command
from gateway.config import Commands, Config, ConfigError, Fault

LOCAL = "local"
"""The source whose writers the permissions of the state directory have let in."""

_DOUBLE = struct.Struct(">d")


def canonical(command: Command, arm: str) -> bytes:
    """What a signature is made over: an object of texts, its names in order, without spaces, in UTF-8.

    A number is the 16 hexadecimal digits of its IEEE 754 double; ``issued_at_ns`` is decimal. Fields that are not set
    and the signature are left out; -0 is 0. Texts are escaped as in RFC 8785, 3.2.2.2: only what JSON demands.
    """
    given = msgspec.structs.asdict(command).items()
    fields = {name: _as_text(value) for name, value in given if value is not None and name != "signature"}
    texts = {**fields, "issued_at_ns": str(command.issued_at_ns), "arm": arm}
    return json.dumps(texts, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def _as_text(value: object) -> object:
    match value:
        case int() | float():
            return _DOUBLE.pack(value + 0.0).hex()  # -0.0 + 0.0 is 0.0
        case dict():
            return {name: _as_text(each) for name, each in value.items()}
        case _:
            return str(value)


def sign(command: Command, arm: str, secret: str) -> Command:
    """The command with its signature, made with its issuer's secret."""
    return msgspec.structs.replace(command, signature=_signature(command, arm, secret.encode()))


def _signature(command: Command, arm: str, secret: bytes) -> str:
    return hmac.digest(secret, canonical(command, arm), "sha256").hex()


def secret_of(commands: Commands, issuer: str) -> str:
    """The secret that ``issuer`` signs with. Raises ConfigError if it has none."""
    for key in commands.keys:
        if key.issuer == issuer:
            return key.secret()
    known = ", ".join(key.issuer for key in commands.keys) or "none"
    raise ConfigError("commands", [Fault("commands.key", None, f"no key of issuer {issuer!r}; there are: {known}")])


class Authority:
    """Says of each command whether its sender may give it; ``[commands]`` with its secrets read."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError where a secret cannot be had."""
        self._arm = config.arm.name
        self._issuers = config.commands.issuers
        self._local_signed = config.commands.local == "signed"
        self._secrets = {key.issuer: key.secret().encode() for key in config.commands.keys}

    def refusal(self, command: Command, source: str) -> str | None:
        """Why a command from ``source`` is not taken; None if it is. Says nothing of what would be right.

        An estop is taken from anybody: it moves nothing, and to refuse one for its signature would be the worse fault.
        """
        if command.kind is Kind.ESTOP:
            return None
        who = f"issuer {command.issuer!r}" if command.issuer is not None else "a command without an issuer"
        if self._issuers is not None and command.issuer not in self._issuers:
            return f"{who}: not among those who may command this arm"
        if not self._secrets:
            return None
        if command.signature is None:
            unsigned_will_do = source == LOCAL and not self._local_signed
            return None if unsigned_will_do else f"{who}: must be signed"
        secret = self._secrets.get(command.issuer or "")
        if secret is None:
            return f"{who}: has no key here to sign with"
        if not hmac.compare_digest(_signature(command, self._arm, secret).encode(), command.signature.encode()):
            return f"{who}: the signature is not this command's for arm {self._arm!r}"
        return None
