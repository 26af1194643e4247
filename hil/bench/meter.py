"""Processor time by stage, measured from outside: functions and the event loop's callbacks are wrapped, not changed.

A stage's time is exclusive: what a wrapped function spends in another wrapped one counts there. One meter serves one
thread. Reading the thread's clock is a system call; its share is measured once and taken off.
"""

import asyncio
import functools
import importlib
import inspect
import time
import types
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any

_CALIBRATION = 20_000
_CALLBACK = "_callback"  # of asyncio.Handle: CPython's own, there is no public way


class Meter:
    """Wraps functions of one thread. ``ns`` and ``calls`` by stage."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner = 0
        self._own_ns = 0.0
        self._own_ns = self._calibrate()

    def _calibrate(self) -> float:
        nothing = self.wrap(lambda: None, "")
        for _ in range(_CALIBRATION):
            nothing()
        return self.ns.pop("") / self.calls.pop("")

    def clear(self) -> None:
        """Count from here."""
        self.ns.clear()
        self.calls.clear()

    def spent(self) -> dict[str, float]:
        """{stage: ns}, without what the reading of the clock took."""
        return {stage: max(0.0, ns - self.calls[stage] * self._own_ns) for stage, ns in self.ns.items()}

    def wrap(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """``function``, measured."""
        clock, ns, calls = time.thread_time_ns, self.ns, self.calls

        def measured(*values: Any, **names: Any) -> Any:
            outer, self._inner = self._inner, 0
            start = clock()
            try:
                return function(*values, **names)
            finally:
                spent = clock() - start
                ns[stage] += spent - self._inner
                calls[stage] += 1
                self._inner = outer + spent

        return measured

    def wrap_coroutine(
        self, function: Callable[..., Coroutine[Any, Any, Any]], stage: str
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """An ``async def``, measured step by step: what runs while it waits does not count."""
        send = self.wrap(lambda coroutine: coroutine.send(None), stage)

        @types.coroutine
        def steps(coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
            step: Callable[[], Any] = functools.partial(send, coroutine)
            while True:
                try:
                    waiting_for = step()
                except StopIteration as end:
                    return end.value
                try:
                    yield waiting_for
                except BaseException as error:  # noqa: BLE001  it is for the coroutine
                    step = functools.partial(coroutine.throw, error)
                else:
                    step = functools.partial(send, coroutine)

        async def measured(*values: Any, **names: Any) -> Any:
            return await steps(function(*values, **names))

        return measured

    def install(self, targets: Mapping[str, str]) -> None:
        """Wrap ``{"module:Class.method": stage}`` in place. Raises AttributeError if one is gone."""
        for target, stage in targets.items():
            module, _, path = target.partition(":")
            *owners, name = path.split(".")
            owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
            asynchronous = inspect.iscoroutinefunction(getattr(owner, name))
            wrap = self.wrap_coroutine if asynchronous else self.wrap
            replace(owner, name, functools.partial(wrap, stage=stage))

    def install_in_loop(self, stage_of: Callable[[str], str]) -> None:
        """Measure every callback of the event loop; ``stage_of`` names the stage of the file or module it is from."""
        known: dict[str, Callable[..., Any]] = {}

        def measure(run: Callable[..., Any]) -> Callable[..., Any]:
            def measured(handle: asyncio.Handle) -> Any:
                origin = _origin(handle)
                timed = known.get(origin)
                if timed is None:
                    timed = known[origin] = self.wrap(run, stage_of(origin))
                return timed(handle)

            return measured

        replace(asyncio.Handle, "_run", measure)  # the one place that all callbacks go through


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(what is there)`` in the place of an attribute, in this process, for good."""
    setattr(owner, name, make(getattr(owner, name)))


def _origin(handle: asyncio.Handle) -> str:
    """The file of a task's coroutine, or the module of a callback."""
    callback: Any = getattr(handle, _CALLBACK)
    if isinstance(callback, functools.partial):
        callback = callback.func
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        coroutine: Any = owner.get_coro()
        origin: str = coroutine.cr_code.co_filename
        return origin
    return type(owner).__module__ if owner is not None else str(getattr(callback, "__module__", ""))
