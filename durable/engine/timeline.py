"""Looking at runs: waiting for an outcome, tailing a journal. Local news at once; a run executing elsewhere by hints, and
by polling where hints are lost."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

from durable.core.errors import EngineStopped, RunNotFound, StoreError, StoreUnavailable
from durable.core.journal import RUN, Entry
from durable.engine.deps import Deps
from durable.engine.residents import Final, Resident
from durable.protocol.states import TERMINAL
from durable.store.records import RunRecord

log = logging.getLogger("durable.timeline")

T = TypeVar("T")

PAGE = 500
_LAST = frozenset(status.value for status in TERMINAL)


class Timeline:
    """Who waits for which run, in this process."""

    def __init__(self, deps: Deps, home: Callable[[str], str | None]) -> None:
        self._deps = deps
        self._home = home
        """Whether a run is resident: then its end will be told, and the store need not be asked."""
        self._waiting: dict[str, set[asyncio.Future[Final]]] = defaultdict(set)
        self._watching: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._poller: asyncio.Task[None] | None = None
        self._hint = asyncio.Event()
        self._hinted: set[str] | None = set()
        """Runs that may have ended elsewhere, since the last look. None: any."""

    # -- news

    def finished(self, run: Resident, final: Final) -> None:
        """A run has ended here."""
        self._settle(run.run_id, final)

    def committed(self, run: Resident) -> None:
        """A run's journal has grown here."""
        if self._watching:
            for event in self._watching.get(run.run_id, ()):
                event.set()

    def news(self, run_id: str, *, ended: bool) -> None:
        """Another engine says that this run has got further."""
        for event in self._watching.get(run_id, ()):
            event.set()
        if ended and run_id in self._waiting and self._hinted is not None:
            self._hinted.add(run_id)
            self._hint.set()

    def hint(self) -> None:
        """Something may have changed elsewhere."""
        self._hinted = None
        self._hint.set()
        for events in self._watching.values():
            for event in events:
                event.set()

    def close(self) -> None:
        """Nobody is told anything any more."""
        if self._poller is not None:
            self._poller.cancel()
        for futures in self._waiting.values():
            for future in futures:
                if not future.done():
                    future.set_exception(EngineStopped("The engine stopped while the run went on; ask another engine."))

    # -- questions

    async def wait(self, run_id: str, timeout: float | None = None, *, workspace: str) -> Final:
        """How the run ended. Raises RunNotFound, or TimeoutError after `timeout` seconds (the run goes on)."""
        future: asyncio.Future[Final] = asyncio.get_running_loop().create_future()
        self._waiting[run_id].add(future)
        try:
            if timeout is None:
                return await self._outcome(run_id, workspace, future)
            async with asyncio.timeout(timeout):
                return await self._outcome(run_id, workspace, future)
        finally:
            waiting = self._waiting[run_id]
            waiting.discard(future)
            if not waiting:
                del self._waiting[run_id]

    async def _outcome(self, run_id: str, workspace: str, future: asyncio.Future[Final]) -> Final:
        if self._home(run_id) != workspace:
            # After registering: an outcome between the look and the wait is not missed.
            final = await self._look(run_id, workspace)
            if final is not None:
                return final
        self._poll()
        return await future

    async def watch(self, run_id: str, after: int = 0, *, workspace: str) -> AsyncIterator[Entry]:
        """The journal above `after`, every kind, in order, without gap or repeat; ends with the run."""
        event = asyncio.Event()
        self._watching[run_id].add(event)
        try:
            record = await self._patiently(partial(self._record, run_id))
            if record is None or record.workspace != workspace:
                raise _unknown(run_id)
            while True:
                event.clear()
                entries = await self._patiently(partial(self._deps.store.page, run_id, after, PAGE))
                for entry in entries:
                    after = entry.seq
                    yield entry
                if len(entries) == PAGE:
                    continue
                if entries and entries[-1].kind == RUN and entries[-1].status in _LAST:
                    return
                if not entries:
                    record = await self._patiently(partial(self._record, run_id))
                    if record is None or (record.status in TERMINAL and record.seq <= after):
                        return
                try:
                    async with asyncio.timeout(self._deps.settings.poll_every):
                        await event.wait()
                except TimeoutError:
                    continue
        finally:
            self._watching[run_id].discard(event)
            if not self._watching[run_id]:
                del self._watching[run_id]

    async def _record(self, run_id: str) -> RunRecord | None:
        return (await self._deps.store.get([run_id]))[0]

    async def _patiently(self, look: Callable[[], Awaitable[T]]) -> T:
        """A watcher outlives a store that is out of reach: it goes on where it was."""
        while True:
            try:
                return await look()
            except StoreUnavailable as error:
                log.warning("cannot read a journal, trying again: %s", error)
                await asyncio.sleep(self._deps.settings.poll_every)

    async def _look(self, run_id: str, workspace: str) -> Final | None:
        record = await self._record(run_id)
        if record is None or record.workspace != workspace:
            raise _unknown(run_id)
        if record.status not in TERMINAL:
            return None
        return Final(record.status, record.output, record.error)

    def _poll(self) -> None:
        if self._poller is None:
            self._poller = asyncio.get_running_loop().create_task(self._run(), name="durable-waits")

    async def _run(self) -> None:
        """One look for all who wait, after each hint and at least every `poll_every`."""
        try:
            while self._waiting:
                try:
                    async with asyncio.timeout(self._deps.settings.poll_every):
                        await self._hint.wait()
                except TimeoutError:
                    self._hinted = None
                # Before the look: a hint that comes during it is about the next one.
                self._hint.clear()
                hinted, self._hinted = self._hinted, set()
                run_ids = [
                    run_id
                    for run_id in (self._waiting if hinted is None else hinted)
                    if run_id in self._waiting and self._home(run_id) is None
                ]
                for start in range(0, len(run_ids), PAGE):
                    part = run_ids[start : start + PAGE]
                    try:
                        records = await self._deps.store.get(part)
                    except StoreError as error:
                        log.warning("cannot look for outcomes, trying again: %s", error)
                        break
                    except Exception:
                        log.exception("looking for outcomes went wrong, trying again")  # whoever waits must not hang
                        break
                    for run_id, record in zip(part, records, strict=True):
                        if record is None:
                            self._forget(run_id)
                        elif record.status in TERMINAL:
                            self._settle(run_id, Final(record.status, record.output, record.error))
        finally:
            self._poller = None

    def _settle(self, run_id: str, final: Final) -> None:
        for future in self._waiting.get(run_id, ()):
            if not future.done():
                future.set_result(final)

    def _forget(self, run_id: str) -> None:
        """The run has ended and was deleted between two looks."""
        for future in self._waiting.get(run_id, ()):
            if not future.done():
                future.set_exception(_unknown(run_id))


def _unknown(run_id: str) -> RunNotFound:
    return RunNotFound(f"There is no run {run_id!r} here. Is it another workspace's?", run_id=run_id)
