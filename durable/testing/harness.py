"""A module app under test: real engine, memory store, virtual time, and whatever you put in place of the outside world.

    async with Test.create(AppModule).override(Gateway, FakeGateway()) as app:
        run = await app.start(Checkout, order)      # a workflow that sleeps 30 days
        assert await run.result() == "shipped"      # a millisecond later

What is overridden is never made. Time is `durable/testing/virtual.py`'s: it jumps when everything waits, so that sleeps,
timeouts and retries cost nothing and still happen in their order.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from durable.app import Durable
from durable.core.clock import EPOCH, microseconds_of
from durable.core.definition import is_step, step_of
from durable.core.durations import Duration, seconds
from durable.core.step import StepScope
from durable.module.application import Application
from durable.module.decorators import Provider, provide
from durable.module.durable_module import DurableOptions
from durable.store.memory import MemoryStore
from durable.testing.virtual import VirtualClock, VirtualTime
from durable.transports.event_emitter import EventEmitterTransport

START = datetime(2026, 1, 1, tzinfo=UTC)
_YEAR = 365 * 86_400.0

# Nothing of the engine's own housekeeping may come between two facts of a test, or a year would be full of it.
_QUIET = {
    "lease": 100 * _YEAR,
    "poll_every": 10 * _YEAR,
    "reconcile": 10 * _YEAR,
    "retention_every": 10 * _YEAR,
    "tick": 0.0,
    "threads": False,
}
_OUTSIDE = ("store", "transport", "transports", "control_plane", "worker", *_QUIET)
"""What for_root says of the world outside, and a test does without."""


class InjectedFailure(Exception):
    """A step was told to fail."""


class Test(Application):
    """An application on a memory store in virtual time. Options of `for_root` other than store, transports, control plane
    and lease hold; a factory of `for_root_async` is not called."""

    __test__ = False  # pytest: this is not a test

    def __init__(self, root: Any, *, start: datetime = START, **settings: Any) -> None:
        self._clock = VirtualClock(microseconds_of(start))
        self._settings = settings
        self._virtual: VirtualTime | None = None
        self._failures: dict[str, list[BaseException]] = {}
        self._attempts: Counter[str] = Counter()
        super().__init__(root, role="engine")

    @classmethod
    def create(cls, root: Any, *, start: datetime = START, **settings: Any) -> Test:
        """An app of this module: a whole app's, or one feature's. `settings`: any of for_root's, for this test."""
        return cls(root, start=start, **settings)

    # ------------------------------------------------------------------ time

    @property
    def now(self) -> datetime:
        """The time in the test's world; it begins at `start`."""
        return EPOCH + timedelta(microseconds=self._clock.now())

    async def advance(self, duration: Duration) -> None:
        """Let time pass; what becomes due on the way happens on the way."""
        await asyncio.sleep(seconds(duration))
        await self.settle()

    async def settle(self) -> None:
        """Let everything go on that can without time passing: afterwards each run has ended or waits."""
        if self._virtual is not None:
            await self._virtual.settle()

    # ------------------------------------------------------------------ faults

    def fail_once(self, step: Any, error: BaseException | type[BaseException] | None = None) -> None:
        """The next attempt of this step fails before its body begins."""
        self.fail_times(step, 1, error)

    def fail_times(self, step: Any, times: int, error: BaseException | type[BaseException] | None = None) -> None:
        """The next attempts of this step fail: by name, or the function or method itself. `error`: with what."""
        name = _name(step)
        for number in range(times):
            made = error() if isinstance(error, type) else error
            self._failures.setdefault(name, []).append(
                made or InjectedFailure(f"{name} was told to fail ({number + 1} of {times})")
            )

    def attempts(self, step: Any) -> int:
        """How often the step was tried, failures on purpose included."""
        return self._attempts[_name(step)]

    # ------------------------------------------------------------------ inside

    async def prepare(self) -> Durable:
        if self._virtual is None:
            self._virtual = VirtualTime.enter()
            self._clock.begin(self._virtual)
        try:
            return await super().prepare()
        except BaseException:
            self._leave()
            raise

    async def close(self, timeout: float | None = None) -> None:
        try:
            await super().close(timeout)
        finally:
            self._leave()

    def _leave(self) -> None:
        virtual, self._virtual = self._virtual, None
        if virtual is not None:
            virtual.leave()

    def _adjusted(self, spec: Provider) -> Provider:
        kept: dict[str, Any] = {}
        if spec.form == "value":
            kept = {name: value for name, value in spec.use_value.given.items() if name not in _OUTSIDE}
            named = spec.use_value.given.get("transports")
            if isinstance(named, Mapping):  # steps may be pinned to one of them
                kept["transports"] = {name: EventEmitterTransport() for name in named}
        given = kept | _QUIET | self._settings
        options = DurableOptions(
            MemoryStore(self._clock), **(given | {"clock": self._clock, "role": "engine", "on_step": self._on_step})
        )
        return provide(DurableOptions, use_value=options)

    def _on_step(self, scope: StepScope) -> None:
        self._attempts[scope.name] += 1
        waiting = self._failures.get(scope.name)
        if waiting:
            raise waiting.pop(0)


def _name(step: Any) -> str:
    if isinstance(step, str):
        return step
    if is_step(step):
        return step_of(step).name
    name: str = step.__name__
    return name
