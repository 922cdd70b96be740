"""Finds work: due runs, runs of engines that are gone, mail for runs that are here. One loop an engine, woken by hints
and by the clock; losing every hint costs `poll_every` and nothing else."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from durable.core.clock import SECOND
from durable.core.errors import StoreError
from durable.core.replay import Machine
from durable.engine import lines
from durable.engine.executor import Executor
from durable.engine.recovery import Recovery, back_from_the_dead
from durable.engine.requeue import dropped_lines
from durable.engine.residents import Resident
from durable.engine.resume import Resume
from durable.store.records import ClaimedRun, ClaimRequest, InboxRow, Journal

log = logging.getLogger("durable.scheduler")

MAX_CLAIM = 250
SWEEP_BEATS = 3


class Scheduler:
    """Claims runs for one engine."""

    def __init__(self, executor: Executor, recovery: Recovery, resume: Resume) -> None:
        self._executor = executor
        self._recovery = recovery
        self._resume = resume
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._next_due: int | None = None
        self._sweep = False
        self._beats = 0
        self._blocked_after: str | None = ""
        """Where the look at blocked runs stands: once, after a start with possibly new code. None: done."""
        self.starting: set[str] = set()
        """Ids of runs being born claimed: theirs is no lost claim."""

    def start(self) -> None:
        """Begin claiming."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="durable-scheduler")

    async def stop(self) -> None:
        """Claim nothing more. A claim under way is waited for and taken in."""
        task, self._task = self._task, None
        if task is not None:
            self._wake.set()
            await asyncio.wait({task})

    def nudge(self) -> None:
        """Something may have become due."""
        self._wake.set()

    def sweep(self) -> None:
        """After each heartbeat: see that the store calls no runs mine that are not here. Only an answer that got lost can leave
        such a run behind, so without one it is enough to ask now and then."""
        self._beats += 1
        if self._executor.unsure or self._beats % SWEEP_BEATS == 0:
            self._sweep = True
        self._executor.settler.evict()

    def reset(self) -> None:
        """A new incarnation starts from nothing."""
        self._next_due = None
        self._blocked_after = ""  # those taken under the old name are blocked runs again
        self._wake.set()

    async def _run(self) -> None:
        while self._task is not None:
            self._wake.clear()
            try:
                await self._look()
            except StoreError as error:
                self._executor.unsure = True
                self._next_due = None  # it is past by now: this would look again every 5 ms
                log.warning("cannot look for work, trying again: %s", error)
            except Exception:
                self._executor.unsure = True
                self._next_due = None
                log.exception("looking for work went wrong, trying again")
            await self._sleep()

    async def _sleep(self) -> None:
        delay = self._executor.settings.poll_every
        if self._next_due is not None:
            delay = min(delay, max(0.0, (self._next_due - self._executor.clock.now()) / SECOND))
        if delay <= 0 and not self._wake.is_set():
            # Full, with work waiting: look again when a run has left, or soon.
            delay = 0.005
        try:
            async with asyncio.timeout(delay):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _look(self) -> None:
        executor = self._executor
        store = executor.deps.store
        if self._sweep:
            self._sweep = False
            await self._release_strangers()
            self._executor.unsure = False
        if executor.residents:
            for run_id in await store.unread(executor.lease.incarnation):
                run = executor.residents.get(run_id)
                if run is not None and not run.fetching:
                    self._resume.mail(run)
        while await self._claim():
            pass

    async def _claim(self) -> bool:
        """One claim. True: there may be more."""
        executor = self._executor
        room = min(executor.settings.max_running - executor.running - len(self.starting), MAX_CLAIM)
        if self._task is None or room <= 0 or not executor.lease.safe():
            self._next_due = None
            executor.full = room <= 0
            return False
        routes = executor.deps.catalog.routes()
        if not routes:
            return False
        blocked = self._blocked_after is not None
        request = ClaimRequest(executor.lease.incarnation, routes, room, blocked, self._blocked_after or "")
        incarnation = executor.lease.incarnation
        claim = await executor.deps.store.claim(request)
        if claim.runs:
            await self._take_in(claim.runs, incarnation)
        if incarnation != executor.lease.incarnation:
            return True  # the lease was lost meanwhile: what this look found says nothing any more
        if blocked:
            self._blocked_after = claim.runs[-1].run.id if len(claim.runs) == room else None
            return True
        self._next_due = claim.next_due_at
        return len(claim.runs) == room

    async def _take_in(self, claimed: list[ClaimedRun], incarnation: str) -> None:
        """Read what the claimed runs need, and admit them. The store owns them as ours: this is tried until done."""
        store = self._executor.deps.store
        while True:
            try:
                journals = await store.load([c.run.id for c in claimed])
                inboxes = await store.inbox([(c.run.id, c.run.inbox_read) for c in claimed])
                heard = [
                    await lines.told(store, one.run.id, journal.entries, one.run.seq)
                    for one, journal in zip(claimed, journals, strict=True)
                ]
                break
            except Exception as error:
                known = isinstance(error, StoreError)
                log.warning("claimed runs cannot be read, trying again: %s", error, exc_info=not known)
                if self._task is None:  # stopping: they are for somebody else
                    with suppress(StoreError):
                        await store.release([(one.run.id, one.run.epoch) for one in claimed])
                    return
            await asyncio.sleep(0.1)
        if incarnation != self._executor.lease.incarnation:
            return  # the lease was lost meanwhile: they are no longer ours
        for one, journal, rows, told in zip(claimed, journals, inboxes, heard, strict=True):
            self._admit(one, journal, rows, told)

    def _admit(self, claimed: ClaimedRun, journal: Journal, rows: list[InboxRow], told: lines.Told) -> None:
        executor = self._executor
        record = claimed.run
        before = executor.residents.get(record.id)
        if before is not None:
            executor.drop(before)  # an older epoch of ours, fenced by this very claim
        definition = executor.deps.catalog.of(record.workspace).workflow(record.workflow, record.version)
        generation = sum(1 for e in journal.entries if e.kind == "run" and e.status == "requeued")
        logs = journal.logs - dropped_lines(journal.entries)
        machine = Machine(definition, run_id=record.id, input=record.input, generation=generation, logs=logs)
        machine.meta = record.meta
        run = Resident(
            record.id,
            record.workspace,
            definition,
            machine,
            record.parent,
            record.epoch,
            record.seq,
            record.activity,
            record.inbox_read,
            record.recovery_attempts,
            born=record.created_at,
            lane=record.lane,
        )
        run.told = told
        self._resume.take(run, rows)  # first: a run that is buried at once is to be seen with its mail
        if record.recovery_attempts > 0 or back_from_the_dead(journal.entries):
            self._recovery.admit(run, journal)
        else:
            executor.admit(run, journal)

    async def _release_strangers(self) -> None:
        lost = await self._strangers()
        # Runs that ended while the answer was on its way are none; asked again, the store does not name them any more.
        if lost and (lost := lost & await self._strangers()):
            log.warning("releasing %d runs that the store says are ours and that are not here", len(lost))
            await self._executor.deps.store.release(sorted(lost))

    async def _strangers(self) -> set[tuple[str, int]]:
        """(run, epoch) that the store says are ours and that are not here."""
        executor = self._executor
        owned = await executor.deps.store.owned(executor.lease.incarnation)
        return {
            (run_id, epoch)
            for run_id, epoch in owned
            if run_id not in self.starting and ((run := executor.residents.get(run_id)) is None or run.epoch < epoch)
        }
