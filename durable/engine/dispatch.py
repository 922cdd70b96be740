"""Remote tasks on their way out. The journal entry `dispatched` is the outbox: it is committed before the task is
published, and a `published` mark follows (D9). A new owner publishes again only what has no mark, with the same task id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from durable.core.clock import SECOND
from durable.core.commands import SendTask, TakeTurn
from durable.core.errors import StepTimeout, TransportError, UnknownTransport
from durable.core.journal import REMOTE, Entry
from durable.core.payload import describe, encode_error
from durable.engine.apply import DispatchNote, PublishNote, RetryNote
from durable.engine.residents import Arrival, Resident, Sent
from durable.protocol.messages import Heartbeat, RemoteTask, Task, WorkflowTask, routing_token, step_id, turn_id
from durable.protocol.trace import traceparent

if TYPE_CHECKING:
    from durable.engine.executor import Executor

log = logging.getLogger("durable.dispatch")


ASK_SECONDS_MIN = 0.1
ASK_SECONDS_MAX = 30.0
OUT_MAX = 10_000
"""Tasks of runs that left memory which are remembered."""
OFFER_SECONDS_MIN = 0.1
OFFER_SECONDS_MAX = 2.0
"""Between two offers of a task that no transport takes."""
ASK_MAX = 1_000
"""Tasks a transport is asked after at once."""


def _let_down(trace: Sequence[Entry]) -> str | None:
    """The member over which no answer came to the last attempt, by what an earlier owner wrote down."""
    last = trace[-1] if trace else None
    if last is None or last.status != "retrying" or last.payload is None:
        return None
    if msgspec.json.decode(last.payload, type=RetryNote).error.code != StepTimeout.code:
        return None
    mark = next((entry for entry in reversed(trace) if entry.status == "published"), None)
    return (
        None if mark is None or mark.payload is None else msgspec.json.decode(mark.payload, type=PublishNote).transport
    )


def task_id(run: Resident, command: SendTask, attempt: int) -> str:
    """What the world calls it. A step's id is the same for every attempt; a turn's is not, so that only one decision counts."""
    if isinstance(command, TakeTurn):
        return turn_id(run.run_id, command.number, attempt)
    return step_id(run.run_id, command.ordinal)


def _cancelled() -> bool:
    """Whether it is this task that somebody has cancelled, and not a future it waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Dispatch:
    """Sends tasks, and remembers for whom."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._awaited: dict[str, tuple[Resident, str]] = {}
        """Task id → who waits for it here, under which key."""
        self._held: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._out: dict[str, tuple[str, int]] = {}
        """Step id → key and attempt, of runs that left; the latest of them. What is told live of one wakes its run."""
        self._lost: dict[tuple[str, str], str] = {}
        """(Run, key) → the member whose attempt has come to nothing; until the next one is sent."""
        self._asking = False
        self._next_ask = 0

    def send(self, run: Resident, command: SendTask, attempt: int) -> None:
        """Journal a dispatch; publish once it is committed."""
        executor = self._executor
        now = executor.clock.now()
        sent = self._await(run, command, attempt, now)
        sent.avoid = self._lost.pop((run.run_id, command.key), None) if self._lost else None
        if sent.avoid is None and attempt > 1:
            sent.avoid = _let_down(run.machine.trace(command.key))
        note = DispatchNote(msgspec.Raw(command.input), sent.deadline)
        arrival = Arrival(
            now, REMOTE, "dispatched", key=command.key, attempt=attempt, payload=msgspec.json.encode(note)
        )
        executor.append(run, arrival, command)  # it may have been given up in the very turn that asked for it
        run.actions.append(partial(self._publish, run, command, attempt))

    def resume(self, run: Resident, command: SendTask, trace: Sequence[Entry]) -> None:
        """Take up a dispatch of an earlier owner: publish what has no mark, ask the transport after the rest."""
        dispatched = next((entry for entry in trace if entry.status == "dispatched"), None)
        if dispatched is None:
            self.send(run, command, max((entry.attempt for entry in trace), default=1))
            return
        assert dispatched.payload is not None
        note = msgspec.json.decode(dispatched.payload, type=DispatchNote)
        sent = self._await(run, command, dispatched.attempt, dispatched.at)
        sent.deadline = note.deadline
        # A silence must be heard by this engine before it proves anything.
        sent.last_beat = sent.asked_at = self._executor.clock.now()
        sent.published, sent.transport = self._published(trace)
        if not sent.published:
            run.actions.append(partial(self._publish, run, command, sent.attempt))
        elif self._executor.deps.transport.member(sent.transport).capabilities.holds:
            sent.asking = True
            # Not the coroutine itself: an action may never be called.
            run.actions.append(lambda: self._spawn(self._ask(run, command, sent)))

    def _published(self, trace: Sequence[Entry]) -> tuple[bool, str | None]:
        """Whether the task is out, and with whom. A member that is no longer in the pool could neither be asked nor
        heard: then it is not out, and is published again under the same id."""
        mark = next((entry for entry in reversed(trace) if entry.status == "published"), None)
        if mark is None or mark.payload is None:
            return mark is not None, None
        transport = msgspec.json.decode(mark.payload, type=PublishNote).transport
        if transport in self._executor.deps.transport:
            return True, transport
        log.warning("task %s was sent over %r, which is gone from the pool; it is sent again", mark.key, transport)
        return False, None

    def let_down(self, run: Resident, key: str) -> None:
        """No answer has come over the member that took it: the next attempt goes over another, where there is one."""
        sent = run.sent.get(key)
        if sent is not None and sent.transport is not None:
            self._lost[run.run_id, key] = sent.transport

    def settle(self, run: Resident, key: str) -> None:
        """The attempt is over."""
        sent = run.sent.pop(key, None)
        if sent is not None:
            self._awaited.pop(task_id(run, sent.command, sent.attempt), None)

    def cancel(self, run: Resident, key: str) -> None:
        """Nobody waits for it any more: tell its worker."""
        self.tell_worker(run, key)
        self.settle(run, key)
        run.attempts.pop(key, None)
        run.told.pop(key, None)

    def tell_worker(self, run: Resident, key: str) -> None:
        """Ask for the body to be cancelled; a hint."""
        sent = run.sent.get(key)
        if sent is not None:
            self._spawn(self._cancel(sent.transport, task_id(run, sent.command, sent.attempt)))
            self._executor.on_unwanted(run, sent)

    def forget(self, run: Resident) -> None:
        """The run leaves memory; its tasks go on."""
        for key, sent in list(run.sent.items()):
            if not run.ended and not isinstance(sent.command, TakeTurn):
                self._out[step_id(run.run_id, sent.command.ordinal)] = key, sent.attempt
                if len(self._out) > OUT_MAX:
                    del self._out[next(iter(self._out))]
            self.settle(run, key)
        if self._lost:
            for run_id, key in [lost for lost in self._lost if lost[0] == run.run_id]:
                del self._lost[run_id, key]

    def awaited(self, task: str) -> tuple[Resident, str] | None:
        """Who waits for this step id in this engine."""
        return self._awaited.get(task)

    def out(self, task: str) -> tuple[str, int] | None:
        """Key and attempt of a task whose run has left this engine's memory while it was out."""
        return self._out.get(task)

    def beat(self, heartbeat: Heartbeat) -> None:
        """A worker is alive, and at it."""
        now = self._executor.clock.now()
        if heartbeat.step_id is not None:
            found = self._awaited.get(heartbeat.step_id)
            if found is not None and found[1] in found[0].sent:
                found[0].sent[found[1]].last_beat = now
                found[0].sent[found[1]].beaten = True
            return
        run = self._executor.residents.get(heartbeat.run_id)
        if run is not None:
            for sent in run.sent.values():
                sent.last_beat = now
                sent.beaten = True

    def only_waits(self, run: Resident, key: str) -> bool:
        """Whether the silence over a turn may be that of a queue: nobody has begun it, and the transport can be asked whether it
        still has it. Then it is asked, and silence counts anew from now: sending the turn again would only lengthen the queue."""
        sent = run.sent[key]
        member = self._executor.deps.transport.member(sent.transport).capabilities
        if not (isinstance(sent.command, TakeTurn) and sent.published and member.holds and member.heartbeats):
            return False
        if sent.beaten or sent.asking:
            return False
        sent.last_beat = self._executor.clock.now()
        sent.asking = True
        self._spawn(self._ask(run, sent.command, sent))
        return True

    def release_held(self) -> None:
        """The lease has been renewed: publish what waited for that."""
        held, self._held = self._held, []
        for publish in held:
            publish()

    def _await(self, run: Resident, command: SendTask, attempt: int, now: int) -> Sent:
        timeout = command.options.timeout
        deadline = None if timeout is None else now + int(timeout * SECOND)
        sent = Sent(command, attempt, now, deadline, last_beat=now)
        run.sent[command.key] = sent
        self._out.pop(task_id(run, command, attempt), None)
        run.attempts[command.key] = attempt
        self._awaited[task_id(run, command, attempt)] = (run, command.key)
        return sent

    def _publish(self, run: Resident, command: SendTask, attempt: int) -> None:
        sent = run.sent.get(command.key)
        if run.dropped or sent is None or sent.attempt != attempt or self._executor.draining:
            return
        if not self._executor.lease.safe():
            self._held.append(partial(self._publish, run, command, attempt))
            return
        if run.paused is not None:
            run.paused.actions.append(partial(self._publish, run, command, attempt))
            return
        sent.offered = True
        self._spawn(self._publishing(run, command, attempt))

    async def _publishing(self, run: Resident, command: SendTask, attempt: int) -> None:
        task = self._task(run, command, attempt)
        waiting = run.sent.get(command.key)
        now = self._executor.clock.now
        try:
            transport = await self._offer(run, command, task, None if waiting is None else waiting.avoid)
            if transport is None:
                return
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and _cancelled():
                raise
            # Whatever a transport raises is an answer, a future that its driver gave up included: without one the run
            # would wait for a task that nobody has.
            payload = encode_error(describe(error))
            arrival = Arrival(now(), REMOTE, "failed", key=command.key, attempt=attempt, payload=payload)
        else:
            sent = run.sent.get(command.key)
            if sent is not None and sent.attempt == attempt:
                sent.transport = transport
            payload = msgspec.json.encode(PublishNote(transport))
            arrival = Arrival(now(), REMOTE, "published", key=command.key, attempt=attempt, payload=payload)
        self._executor.arrive(run, arrival)

    async def _offer(self, run: Resident, command: SendTask, task: Task, avoid: str | None) -> str | None:
        """Who took it. While nobody does it is offered again, for `dispatch_patience` seconds: a broker that is away for a moment
        uses up no retries. None: nobody waits for it any more, or its turn comes when the lease is renewed."""
        executor = self._executor
        pool = executor.deps.transport
        until = executor.clock.monotonic() + executor.settings.dispatch_patience
        delay = OFFER_SECONDS_MIN
        while True:
            try:
                return await pool.send(task, avoid=avoid)
            except UnknownTransport:
                raise
            except TransportError as error:
                if executor.clock.monotonic() + delay > until or not pool.fits(task):
                    raise
                if delay == OFFER_SECONDS_MIN:
                    log.debug("task %s is offered again until somebody takes it: %s", task.id, error)
            await asyncio.sleep(delay)
            delay = min(delay * 2, OFFER_SECONDS_MAX)
            sent = run.sent.get(command.key)
            if run.dropped or sent is None or sent.attempt != task.attempt or executor.draining:
                return None
            if not executor.lease.safe():
                self._held.append(partial(self._publish, run, command, task.attempt))
                return None

    def _task(self, run: Resident, command: SendTask, attempt: int) -> Task:
        name, options = task_id(run, command, attempt), command.options
        if isinstance(command, TakeTurn):
            return self._turn(run, command, attempt, name)
        return RemoteTask(
            run_id=run.run_id,
            seq=command.ordinal,
            step_id=name,
            name=command.name,
            group=routing_token(command.name, options.group),
            input=msgspec.Raw(command.input),
            attempt=attempt,
            traceparent=traceparent(run.run_id, name, attempt),
            transport=options.transport,
            priority=options.priority,
        )

    def _turn(self, run: Resident, command: TakeTurn, attempt: int, name: str) -> WorkflowTask:
        sent = run.sent.get(command.key)
        workflow, options = run.definition.name, command.options
        return WorkflowTask(
            task_id=name,
            run_id=run.run_id,
            workflow=workflow,
            workflow_version=run.definition.version,
            input=msgspec.Raw(run.machine.input or b"null"),
            history=sorted(command.history[: command.upto], key=lambda item: item.seq),
            group=routing_token(workflow, options.group),
            attempt=attempt,
            traceparent=traceparent(run.run_id, name, attempt),
            transport=options.transport,
            priority=options.priority,
            at=None if sent is None else sent.dispatched_at // 1_000,
            started_at=command.started_at // 1_000,
            seen=command.seen,
            patches=list(command.patches) or None,
            logs=command.logs or None,
        )

    def turn_of(self, run: Resident, task: str) -> str | None:
        """The key of the turn that awaits a decision under this id, if it is this run's."""
        found = self._awaited.get(task)
        return found[1] if found is not None and found[0] is run and found[1] in run.sent else None

    async def _ask(self, run: Resident, command: SendTask, sent: Sent) -> None:
        """Whether the transport still holds a task that was published; if not, publish it again."""
        task = task_id(run, command, sent.attempt)
        delay = ASK_SECONDS_MIN
        while True:
            try:
                held = await self._executor.deps.transport.member(sent.transport).holding([task])
                break
            except Exception as error:
                log.warning("could not ask after task %s, trying again: %s", task, error)
            await asyncio.sleep(delay)
            delay = min(delay * 2, ASK_SECONDS_MAX)
            if run.dropped or run.sent.get(command.key) is not sent:
                return
        sent.asking = False
        if task not in held and run.sent.get(command.key) is sent:
            sent.published = False
            sent.avoid = sent.transport
            self._publish(run, command, sent.attempt)
        elif not run.dropped:
            self._executor.wake(run)  # nothing keeps it here any more

    def ask_at(self, sent: Sent, now: int) -> int | None:
        """When its transport is to be asked after a task, µs: as long again as it has been out. None: it could not tell."""
        if not sent.published or not self._executor.deps.transport.member(sent.transport).capabilities.holds:
            return None
        asked = max(sent.asked_at, sent.dispatched_at)
        return asked + max(int(self._executor.settings.ask_every * SECOND), asked - sent.dispatched_at)

    def look_after(self) -> None:
        """Ask transports after the tasks that have been out for long: now and then, all of a member's in one question. What
        is not there twice in a row is sent again (B18): the first time its answer may just be on its way."""
        now = self._executor.clock.now()
        if self._asking or now < self._next_ask:
            return
        self._next_ask = now + int(self._executor.settings.ask_every * SECOND / 10)
        asked: dict[str | None, list[tuple[Resident, Sent]]] = {}
        for run, key in self._awaited.values():
            sent = run.sent.get(key)
            if sent is None or run.dropped:
                continue
            when = self.ask_at(sent, now)
            if when is not None and (sent.missed or when <= now) and len(asked.get(sent.transport, ())) < ASK_MAX:
                asked.setdefault(sent.transport, []).append((run, sent))
        if asked:
            self._asking = True
            self._spawn(self._ask_all(asked))

    async def _ask_all(self, asked: dict[str | None, list[tuple[Resident, Sent]]]) -> None:
        pool = self._executor.deps.transport
        try:
            for transport, tasks in asked.items():
                ids = [task_id(run, sent.command, sent.attempt) for run, sent in tasks]
                try:
                    async with asyncio.timeout(ASK_SECONDS_MAX):
                        held = set(await pool.member(transport).holding(ids))
                except Exception as error:
                    log.warning("could not ask transport %s after %d tasks: %r", transport, len(ids), error)
                    continue
                now = self._executor.clock.now()
                for (run, sent), task in zip(tasks, ids, strict=True):
                    sent.asked_at = now
                    missed, sent.missed = sent.missed, task not in held
                    if missed and sent.missed and not run.dropped and run.sent.get(sent.command.key) is sent:
                        log.warning("transport %s no longer has task %s; it is sent again", transport, task)
                        sent.missed = sent.published = False
                        sent.avoid = transport
                        self._publish(run, sent.command, sent.attempt)
        finally:
            self._asking = False

    async def _cancel(self, transport: str | None, task: str) -> None:
        try:
            await self._executor.deps.transport.member(transport).cancel(task)
        except TransportError as error:
            log.warning("could not cancel task %s: %s", task, error)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
