"""The events topic: what happened besides samples, as JSON, one flat object an event."""

from enum import StrEnum
from typing import Any

import msgspec

from gateway.journal import Entry

ARM = "*"
"""Key of records that concern the whole arm; they go to partition 0."""


class EventType(StrEnum):
    """Every ``type`` that the events topic may hold."""

    GATEWAY_STARTED = "gateway.started"
    GATEWAY_STOPPING = "gateway.stopping"
    BUS_UP = "bus.up"
    BUS_DOWN = "bus.down"
    BUS_TROUBLE = "bus.trouble"
    MOTOR_ONLINE = "motor.online"
    MOTOR_LATE = "motor.late"
    MOTOR_OFFLINE = "motor.offline"
    MOTOR_FAULT = "motor.fault"
    MOTOR_FAULT_CLEARED = "motor.fault_cleared"
    MOTOR_STOPPED = "motor.stopped"
    MOTOR_OVER_TEMPERATURE = "motor.over_temperature"
    MOTOR_LATCHED = "motor.latched"
    MOTOR_RELEASED = "motor.released"
    ESTOP_LATCHED = "estop.latched"
    ESTOP_RESET = "estop.reset"
    TELEMETRY_GAP = "telemetry.gap"
    JOURNAL_FULL = "journal.full"
    JOURNAL_FAILED = "journal.failed"
    JOURNAL_RECOVERED = "journal.recovered"
    JOURNAL_SET_ASIDE = "journal.set_aside"
    KAFKA_UP = "kafka.up"
    KAFKA_DOWN = "kafka.down"
    KAFKA_REFUSED = "kafka.refused"
    KAFKA_CONTESTED = "kafka.contested"
    KAFKA_TIMESTAMP_REFUSED = "kafka.timestamp_refused"
    CLOCK_STEPPED = "clock.stepped"
    COMMAND_UNREADABLE = "command.unreadable"


def make_event(kind: EventType, at_ns: int, motor: str = ARM, partition: int = 0, **details: Any) -> Entry:
    """An event for the journal. ``details`` must be JSON values; their names carry units."""
    value = msgspec.json.encode({"type": kind, "motor": motor, "at_ns": at_ns, **details})
    return Entry("events", partition, motor, value, at_ns)
