"""The transport over two tables: both ends, on either database. At least once: a claim that is not extended for `lease`
is anybody's again.

The tables are found by looking, every `poll` at the latest, since workers of other languages say nothing; news (NOTIFY, or a
file that has changed) only makes it sooner. The engine end sees signs of life in the claims of its tasks, by one question
for all of them every `heartbeat_interval`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import secrets
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from durable.core.errors import (
    DefinitionError,
    EngineStopped,
    ErrorData,
    MessageRefused,
    PayloadError,
    TransportError,
)
from durable.protocol import names
from durable.protocol.messages import Answer, Heartbeat, Task, sanitize
from durable.protocol.messages import step_id as step_id_of
from durable.transports.answers import failed, given_up
from durable.transports.db.rows import (
    TURN,
    ClaimedResult,
    ClaimedTask,
    ResultRow,
    TaskRow,
    answer_of,
    bare_task,
    bare_turn,
    result_row,
    task_of,
    task_row,
)
from durable.transports.db.tables import CANCELS, KEY_MAX, RESULTS, TASKS, Fold, Tables
from durable.transports.db.watch import Watch
from durable.transports.interface import Capabilities, Concurrency, HeartbeatHandler, ResultHandler, TaskHandler
from durable.transports.serving import Cut, Server, Workbench, beat_of
from durable.transports.trouble import PAUSE_MAX, PAUSE_MIN, Trouble

log = logging.getLogger("durable.transports")

T = TypeVar("T")
Claim = tuple[str, str]
"""Step id and `claimed_by`."""

CLAIM_MOST = 100
"""Rows of one claim."""
SPREAD = 1.2
"""Polls are this much apart at most, in polls: many who look at the same moment are in each other's way."""
HANDS = 400
"""Results that handlers may have at once."""
DISPATCH_SECONDS = 8.0
LAST_SECONDS = 2.0
"""What `close` gives to what is under way at the database."""


class DbTransport:
    """One end, for an engine or a worker; several processes, and several languages, share the tables."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = names.DEFAULT_PREFIX,
        namespace: str | None = None,
        lease: float = 30.0,
        max_deliveries: int = 3,
        heartbeat_interval: float = 5.0,
        max_message: int = 16 << 20,
        signed: bool = False,
        schema: str | None = None,
        poll: float = 1.0,
        create_tables: bool = True,
        notifications: bool = True,
        instance: str | None = None,
    ) -> None:
        """`postgresql://…` or `sqlite:///…`; the database may be the store's own. Durations are seconds: after `lease` without
        an extension a claimed row is claimed again, the same on all ends; `poll` is the longest pause between two looks.
        `max_deliveries`: how many workers may die with a task before it is answered as failed. `schema`: on Postgres; else the
        first of the search path. `notifications=False`: only polls. `instance` stands in `claimed_by`. `signed`: results must
        echo their task's token. Raises DefinitionError."""
        if min(lease, poll, heartbeat_interval) <= 0 or max_deliveries < 1:
            raise DefinitionError(
                "lease, poll and heartbeat_interval are seconds above 0, max_deliveries is at least 1."
            )
        self._tables = _tables(url, names.effective_prefix(prefix, namespace), schema, lease, notifications)
        self._capabilities = Capabilities(
            name=self._tables.name,
            shared=True,
            holds=True,
            broadcast=False,
            heartbeats=True,
            max_message=max_message,
            signed=signed,
        )
        self._lease = lease
        self._poll = poll
        self._interval = heartbeat_interval
        self._max_deliveries = max_deliveries
        self._create = create_tables
        self._claimant = (instance or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}")[:150]
        self._claim_numbers = itertools.count(1)
        self._started = False
        self._turn = asyncio.Lock()
        self._bench = Workbench(max_message=max_message)
        self._put = Fold[TaskRow](self._tables.put, lambda row: row.step_id)
        self._finish = Fold[ResultRow](self._tables.finish, lambda row: row.step_id)
        self._settle = Fold[Claim](self._tables.settle, lambda claim: claim)
        self._drop = Fold[Claim](self._tables.drop, lambda claim: claim)
        self._handler: ResultHandler | None = None
        self._on_heartbeat: HeartbeatHandler | None = None
        self._wakes: dict[Server, asyncio.Event] = {}
        self._takers: dict[Server, asyncio.Task[None]] = {}
        self._claims: dict[Claim, Task] = {}
        """What is under way here and whose lease is kept."""
        self._keeper: asyncio.Task[None] | None = None
        self._checking = False
        self._hearer: asyncio.Task[None] | None = None
        self._results_wake = asyncio.Event()
        self._in_hand: set[asyncio.Task[None]] = set()
        self._untaken: dict[str, float] = {}
        """Results that the handler did not take, and how long they were left alone for the last time."""
        self._cancelling: dict[str, asyncio.Future[None]] = {}
        self._watch = Watch(
            self._tables,
            interval=heartbeat_interval,
            max_deliveries=max_deliveries,
            alive=self._saw_alive,
            give_up=lambda row, reason: self._spawn(self._give_up(row, reason)),
        )
        """Of tasks dispatched or asked after here."""
        self._background: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    # -- life

    async def start(self) -> None:
        """Connect, and make the tables where they are not. Raises TransportError."""
        async with self._turn:
            if not self._started:
                await self._tables.open(self._create, self._news)
                self._started = True
            for server in self._bench.servers:
                self._begin_taking(server)
            self._begin_hearing()

    async def close(self, timeout: float = 10.0) -> None:
        """Drain: what is cut short is anybody's again at once. Idempotent."""
        async with self._turn:
            if not self._started:
                return
            self._started = False
            await _end(*self._takers.values())
            await self._bench.drain(timeout)
            self._bench.servers.clear()
            self._takers.clear()
            self._wakes.clear()
            if self._hearer is not None:
                await _end(self._hearer)
                self._hearer = None
            if self._in_hand:
                await asyncio.wait(self._in_hand, timeout=min(timeout, LAST_SECONDS))
            await _end(*self._in_hand)
            if self._background:
                await asyncio.wait(self._background, timeout=LAST_SECONDS)
            await self._watch.close()
            await _end(*self._background, *([] if self._keeper is None else [self._keeper]))
            self._keeper = None
            self._claims.clear()
            self._untaken.clear()
            await self._tables.close()

    # -- engine end

    async def dispatch(self, task: Task) -> None:
        """Write its row. An older attempt of the step, and one that was cancelled, makes room for it; of the same attempt
        nothing changes. Raises TransportError."""
        self._open()
        try:
            row = task_row(task, self._capabilities.max_message)
        except PayloadError as error:
            raise TransportError(f"Task {task.id} cannot be written: {error}") from error
        try:
            async with asyncio.timeout(DISPATCH_SECONDS):
                if (cancelling := self._cancelling.get(row.step_id)) is not None:
                    await asyncio.wait({cancelling})  # it means the attempts before this one
                await self._put(row)
        except TimeoutError:
            raise TransportError(f"The database did not take task {task.id} within {DISPATCH_SECONDS:g} s.") from None
        self._watch.add(row.step_id)
        self._tell(TASKS, row.grp)

    async def cancel(self, task_id: str) -> None:
        """Delete it if it waits. If it is claimed, mark it: its worker looks when it hears of it, and at its next extension
        at the latest. A worker that knows only the documented columns goes on."""
        self._open()
        self._watch.drop(task_id)
        before = self._cancelling.get(task_id)
        done = self._cancelling[task_id] = asyncio.get_running_loop().create_future()
        try:
            if before is not None:
                await asyncio.wait({before})
            if await self._tables.cancel(task_id):
                self._tell(CANCELS, task_id)
        finally:
            done.set_result(None)
            if self._cancelling[task_id] is done:
                del self._cancelling[task_id]

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Those whose task or result lies in the tables."""
        self._open()
        # In this order: a task that is finished in between is seen as its result.
        tasks = {seen.row.step_id for seen in await self._tables.look(task_ids) if not seen.cancelled}
        for step_id in tasks:
            self._watch.add(step_id)  # whoever asks has taken it over, and wants to know that it lives
        return tasks | set(await self._tables.answered(task_ids))

    def on_result(self, handler: ResultHandler) -> None:
        """Hear answers from now on."""
        self._handler = handler

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        """Hear signs of life: claims, and their extensions, of tasks that were dispatched here. A worker that does not extend
        its claims gives one."""
        self._on_heartbeat = handler

    # -- worker end

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        """Claim tasks of these groups, from `start` on."""
        server = self._bench.add([sanitize(group) for group in groups], handler, concurrency)
        if self._started:
            self._begin_taking(server)

    async def reply(self, answer: Answer) -> None:
        """Write an answer. Raises TransportError."""
        self._open()
        try:
            row = result_row(answer)
        except PayloadError as error:
            raise TransportError(f"The answer of {answer.id} cannot be written: {error}") from error
        await self._finish(row)
        self._tell(RESULTS)

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Extend the claim of a step's task, whoever has it. Turns under way here extend theirs by themselves."""
        self._open()
        if beat.step_id is not None:
            await self._tables.touch(beat.step_id)

    # -- news

    def _tell(self, what: str, which: str = "") -> None:
        self._news(what, which)
        self._tables.tell(what, which)

    def _news(self, what: str, which: str | None) -> None:
        """Of one kind; "": of any."""
        if what in (TASKS, ""):
            for server, wake in self._wakes.items():
                if not which or which in server.groups:
                    wake.set()
        if what in (RESULTS, ""):
            self._results_wake.set()
        ours = any(not which or step_id == which for step_id, _ in self._claims)
        if what in (CANCELS, "") and ours and not self._checking:
            self._checking = True
            self._spawn(self._check())

    # -- taking tasks

    def _begin_taking(self, server: Server) -> None:
        if server not in self._takers:
            self._wakes[server] = asyncio.Event()
            self._takers[server] = asyncio.get_running_loop().create_task(
                self._take(server, self._wakes[server]), name="durable-db-tasks"
            )

    async def _take(self, server: Server, wake: asyncio.Event) -> None:
        trouble = Trouble("tasks cannot be claimed", "tasks are claimed again")
        while True:
            most = min(await server.has_room(), CLAIM_MOST)
            wake.clear()
            name = self._new_claim()
            try:
                claimed = await _whole(self._tables.claim_tasks(server.groups, most, name), self._claimed_in_vain)
            except Exception as error:
                await trouble.wait(error)
                continue
            trouble.over()
            for one in claimed:
                self._receive(server, one)
            if len(claimed) < most:
                await _first(wake, self._poll * random.uniform(1.0, SPREAD))

    def _new_claim(self) -> str:
        return f"{self._claimant}/{next(self._claim_numbers)}"

    async def _claimed_in_vain(self, claimed: list[ClaimedTask]) -> None:
        if claimed:
            await self._tables.give_back([(one.row.step_id, one.claim) for one in claimed])

    def _receive(self, server: Server, one: ClaimedTask) -> None:
        row, claim = one.row, (one.row.step_id, one.claim)
        if one.cancelled:  # whoever had it died before it heard of that
            self._spawn(self._drop(claim))
            return
        if one.deliveries > self._max_deliveries:
            self._spawn(self._give_up(row, f"{one.deliveries - 1} workers took the task and none finished it"))
            return
        try:
            task = task_of(row, self._capabilities.max_message)
        except Exception as error:  # in SQLite any column may hold anything
            self._spawn(self._refuse(one, error))
            return
        self._claims[claim] = task
        self._begin_keeping()

        async def done(answer: Answer | None) -> None:
            try:
                if answer is None:
                    await self._drop(claim)
                else:
                    await self._answer(result_row(answer, row.attempt))
            finally:
                self._claims.pop(claim, None)

        async def back() -> None:
            self._claims.pop(claim, None)
            await self._tables.give_back([claim])
            self._tell(TASKS, row.grp)

        self._bench.begin(server, task, done, back)

    async def _refuse(self, one: ClaimedTask, error: Exception) -> None:
        """Put it away. Whoever waits for that step is told."""
        row = one.row
        log.warning("task %s cannot be read and is put away: %s", row.step_id, error)
        await self._tables.refuse_task(row.step_id, one.claim, _put_away(row.step_id), str(error))
        if row.kind is None and row.step_id == step_id_of(row.run_id, row.seq):
            code = getattr(error, "code", PayloadError.code)
            data = ErrorData(message=f"The task cannot be read: {error}", code=code, retryable=False)
            await self._finish(result_row(failed(bare_task(row), data), row.attempt))
            self._tell(RESULTS)

    async def _answer(self, row: ResultRow) -> None:
        """Tried for as long as the claim may hold: a body need not run again because the database was away for a moment."""
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + self._lease, PAUSE_MIN
        while True:
            try:
                await self._finish(row)
                break
            except TransportError:
                if loop.time() + pause > until or not self._started:
                    raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_MAX)
        self._tell(RESULTS)

    async def _give_up(self, row: TaskRow, reason: str) -> None:
        log.warning("task %s is given up: %s", row.step_id, reason)
        task = bare_turn(row) if row.kind == TURN else bare_task(row)
        await self._finish(result_row(given_up(task, reason), row.attempt))
        self._tell(RESULTS)

    # -- keeping claims

    def _begin_keeping(self) -> None:
        if self._keeper is None:
            self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="durable-db-leases")

    async def _keep(self) -> None:
        """One for all; it ends when there is nothing to keep."""
        trouble = Trouble("claims cannot be extended", "claims are extended again")
        try:
            while True:
                await asyncio.sleep(min(self._lease / 3, self._interval))
                claims = list(self._claims)
                if not claims:
                    return
                try:
                    self._compare(claims, await self._tables.renew(claims))
                except Exception as error:
                    trouble.tell(error)
                else:
                    trouble.over()
        finally:
            self._keeper = None

    async def _check(self) -> None:
        """Whether anything under way here is wanted no more. Only looked at: a write would be news to others."""
        self._checking = False
        claims = list(self._claims)
        seen = await self._tables.look([step_id for step_id, _ in claims])
        self._compare(claims, {(one.row.step_id, one.claim or ""): one.cancelled for one in seen})

    def _compare(self, claims: list[Claim], held: dict[Claim, bool]) -> None:
        for claim in claims:
            task = self._claims.get(claim)
            if task is not None and held.get(claim, True):
                if claim not in held:
                    log.info("task %s is not ours any more; its body is cancelled if it still runs", task.id)
                self._bench.cut(task, Cut.DROPPED)

    # -- hearing results

    def _begin_hearing(self) -> None:
        if self._handler is not None and (self._hearer is None or self._hearer.done()):
            self._hearer = asyncio.get_running_loop().create_task(self._hear(self._handler), name="durable-db-results")

    async def _hear(self, handler: ResultHandler) -> None:
        trouble = Trouble("results cannot be claimed", "results are claimed again")
        while True:
            while len(self._in_hand) >= HANDS:
                await asyncio.wait(self._in_hand, return_when=asyncio.FIRST_COMPLETED)
            most = min(HANDS - len(self._in_hand), CLAIM_MOST)
            self._results_wake.clear()
            try:
                claimed = await _whole(self._tables.claim_results(most, self._new_claim()), self._heard_in_vain)
            except Exception as error:
                await trouble.wait(error)
                continue
            trouble.over()
            for one in claimed:
                work = asyncio.get_running_loop().create_task(
                    self._deliver(handler, one), name=f"result {one.row.step_id}"
                )
                self._in_hand.add(work)
                work.add_done_callback(self._in_hand.discard)
            if len(claimed) < most:
                await _first(self._results_wake, self._poll * random.uniform(1.0, SPREAD))

    async def _heard_in_vain(self, claimed: list[ClaimedResult]) -> None:
        if claimed:
            await self._tables.release([(one.row.step_id, one.claim) for one in claimed], 0)
            self._tables.tell(RESULTS)

    async def _deliver(self, handler: ResultHandler, one: ClaimedResult) -> None:
        step_id, claim = one.row.step_id, (one.row.step_id, one.claim)
        try:
            try:
                await handler(self._read(one.row))
            except MessageRefused as error:
                log.warning("the result of %s is put away: %s", step_id, error)
                await self._tables.refuse_result(*claim, _put_away(step_id), str(error))
            except EngineStopped:
                if self._hearer is not None:
                    self._hearer.cancel()
                await self._heard_in_vain([one])
            except asyncio.CancelledError:
                await self._heard_in_vain([one])
                raise
            except Exception as error:
                pause = min(self._untaken.get(step_id, PAUSE_MIN / 2) * 2, PAUSE_MAX)
                log.warning("the result of %s was not taken and comes again in %g s: %r", step_id, pause, error)
                self._untaken[step_id] = pause
                await self._tables.release([claim], pause)
                asyncio.get_running_loop().call_later(pause + 0.002, self._results_wake.set)
                return
            else:
                self._watch.drop(step_id)
                await self._settle(claim)
            self._untaken.pop(step_id, None)
        except TransportError as error:
            log.warning("what came of the result of %s could not be written; it comes again: %s", step_id, error)

    def _read(self, row: ResultRow) -> Answer:
        try:
            return answer_of(row, self._capabilities.max_message)
        except Exception as error:  # in SQLite any column may hold anything
            raise MessageRefused(f"It cannot be read: {error}") from error

    # -- small things

    def _saw_alive(self, row: TaskRow) -> None:
        if self._on_heartbeat is not None:
            self._on_heartbeat(beat_of(bare_turn(row) if row.kind == TURN else bare_task(row)))

    def _open(self) -> None:
        if not self._started:
            raise TransportError("The transport is not open: call start() first, and nothing after close().")

    def _spawn(self, work: Awaitable[None]) -> None:
        """A write whose failure is mended by time: the claim runs out, and somebody comes to it again."""

        async def quietly() -> None:
            try:
                await work
            except TransportError as error:
                log.warning("the transport's tables could not be written or read; it is tried again later: %s", error)
            except Exception:
                log.exception("a row of the transport's tables could not be dealt with")

        task = asyncio.get_running_loop().create_task(quietly(), name="durable-db-write")
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _tables(url: str, prefix: str, schema: str | None, lease: float, notifications: bool) -> Tables:
    tasks, results = names.tasks_table(prefix), names.results_table(prefix)
    if url.startswith("sqlite:"):
        from durable.transports.db.sqlite import SqliteTables

        if schema is not None:
            raise DefinitionError("SQLite has no schemas: leave schema= out, or give a prefix of its own.")
        return SqliteTables(url, tasks, results, lease=lease)
    if url.startswith(("postgresql:", "postgres:")):
        try:
            from durable.transports.db.postgres import PostgresTables
        except ImportError as error:
            raise DefinitionError("Postgres needs its driver: pip install 'durable[postgres]'.") from error
        return PostgresTables(url, tasks, results, schema=schema, lease=lease, notifications=notifications)
    raise DefinitionError("The tables live in postgresql://user:password@host/database or sqlite:///path/to/file.db.")


def _put_away(step_id: str) -> str:
    """The key of a row that nobody claims any more: the step's own is free for the next."""
    return f"refused:{secrets.token_hex(6)}:{step_id}"[:KEY_MAX]


async def _whole(claim: Awaitable[T], undo: Callable[[T], Awaitable[None]]) -> T:
    """Claim to the end. Cancelled meanwhile, what was claimed is given back."""
    work = asyncio.ensure_future(claim)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        with contextlib.suppress(TransportError):
            await undo(await work)
        raise


async def _first(wake: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):  # not wait_for: 3.11's may swallow a cancellation
        async with asyncio.timeout(seconds):
            await wake.wait()


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=LAST_SECONDS)
