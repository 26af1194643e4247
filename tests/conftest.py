"""What all tests share: a real Kafka, names that do not collide, and no task left behind.

``SERVO_GATEWAY_TEST_KAFKA=host:port`` points the tests at a broker that runs already. Without it they start one of
their own; where Java or Maven is missing they fail and say what to install.
"""

import asyncio
import inspect
import os
import secrets
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import settings

from hil.kafka import Broker

settings.register_profile("untimed", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("untimed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored


@dataclass(frozen=True, slots=True)
class Kafka:
    """The broker that all tests share; none of them may stop it (see ``own_broker``)."""

    bootstrap: str


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """A broker for the whole session. Topics outlive a test: name them after ``arm_name``."""
    if bootstrap := os.environ.get("SERVO_GATEWAY_TEST_KAFKA"):
        yield Kafka(bootstrap)
    else:
        with Broker() as broker:
            yield Kafka(broker.bootstrap)


@pytest.fixture
def own_broker() -> Iterator[Broker]:
    """A broker that this test alone uses, and may stop, kill, pause and start again."""
    with Broker() as broker:
        yield broker


@pytest.fixture
def arm_name() -> str:
    """A name that no other test uses."""
    return f"arm{secrets.token_hex(5)}"


@pytest.fixture(autouse=True)
def no_task_left_behind(request: pytest.FixtureRequest) -> None:
    """Fail a test that ends while tasks of its own, or of its fixtures, still run."""
    function = getattr(request, "function", None)
    if inspect.iscoroutinefunction(function):
        request.getfixturevalue("_watch_tasks")  # before the test's other fixtures, so that it ends after them


@pytest.fixture
async def _watch_tasks() -> AsyncIterator[None]:
    yield
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:
        _, tasks = await asyncio.wait(tasks, timeout=0.1)  # one that was cancelled has not noticed yet
    assert not tasks, "tasks left behind:\n" + "\n".join(map(str, tasks))
