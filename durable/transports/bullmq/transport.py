"""The transport over BullMQ: engine end, worker end and control plane on one Redis.

    engine ──add──→ <prefix>-tasks-<group> ──take──→ worker ──add──→ <prefix>-results ──take──→ any engine
       ↑                                               │
       └── pub/sub: heartbeats, cancels ───────────────┘

An answer is added before its task is finished, and finished itself once the engine has made it durable; whatever breaks in
between is delivered again. Any worker with BullMQ's package, in any language, is as good as ours.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from functools import partial
from typing import Any

import msgspec
from redis.exceptions import RedisError

from durable.control_plane.interface import ControlHandler
from durable.control_plane.redis import RedisControlPlane
from durable.control_plane.redis_channel import RedisChannel
from durable.core.errors import EngineStopped, MessageRefused, PayloadError, TransportError
from durable.protocol import names
from durable.protocol.codec import (
    decode_any_task,
    decode_decision,
    decode_heartbeat,
    decode_result,
    decode_start_run,
    decode_step_event,
    encode,
)
from durable.protocol.liveness import BEAT_SECONDS, WorkerAlive
from durable.protocol.messages import (
    Answer,
    ControlMessage,
    Heartbeat,
    RemoteTask,
    StepResult,
    Task,
    WorkflowStepEvent,
    sanitize,
)
from durable.transports.bullmq import durability
from durable.transports.bullmq.intake import Intake
from durable.transports.bullmq.jobs import FAILED_SECONDS, Job, JobQueue, LostJob, Scriptbook
from durable.transports.bullmq.link import PAUSE_MAX, PAUSE_MIN, Link
from durable.transports.bullmq.liveness import Liveness, alive
from durable.transports.bullmq.locks import Locks
from durable.transports.bullmq.watch import Watch
from durable.transports.interface import (
    Capabilities,
    Concurrency,
    HeartbeatHandler,
    ResultHandler,
    StartHandler,
    TaskHandler,
)
from durable.transports.serving import Server, Workbench

log = logging.getLogger("durable.transports")

StepEventHandler = Callable[[WorkflowStepEvent], Awaitable[None]]

RETURNS_AT_ONCE = 256
"""Messages of one return queue that are with the engine at the same time."""
NEAR_SECONDS = 1.0
"""How long a message is tried again here, before it goes back to the queue for whoever is next."""
FAR_MAX = 30.0
"""Seconds between two deliveries of a message that nobody can take in."""
NEVER = 1_000_000
"""Answers are not failed for having lost their engine, however often."""
SETTLE_SECONDS = 5.0


class _Life:
    """What there is between `start` and `close`."""

    def __init__(self, link: Link, lock_ms: int, blocked_max: float) -> None:
        self.link = link
        self.book = Scriptbook(link)
        self.lock_ms = lock_ms
        self.locks = Locks(link.url, lock_ms=lock_ms, blocked_max=blocked_max)
        self.queues: dict[str, JobQueue] = {}
        self.tasks: list[Intake] = []
        self.returns: list[Intake] = []
        self.returning: set[asyncio.Task[None]] = set()
        self.chores: set[asyncio.Task[Any]] = set()
        self.stalled: asyncio.Task[None] | None = None
        self.watch: Watch | None = None
        self.closing = False
        self.deaf = False
        """The engine has stopped: it hears no more answers."""

    def queue(self, name: str) -> JobQueue:
        found = self.queues.get(name)
        if found is None:
            found = self.queues[name] = JobQueue(self.book, name, lock_ms=self.lock_ms)
        return found

    def chore(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """In the background; `close` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self.chores.add(task)
        task.add_done_callback(self.chores.discard)
        return task


class BullMQTransport:
    """One end. Engines and workers that use the same Redis, prefix and namespace reach each other."""

    def __init__(
        self,
        url: str = "redis://localhost:6379",
        *,
        prefix: str = names.DEFAULT_PREFIX,
        namespace: str | None = None,
        heartbeat_interval: float = 5.0,
        liveness_interval: float = BEAT_SECONDS,
        max_message: int = 16 << 20,
        signed: bool = False,
        lock: float = 30.0,
        stalled_interval: float = 30.0,
        max_stalled: int = 1,
        blocked_max: float = 300.0,
        failures_every: float = 5.0,
        timeout: float = 4.0,
        allow_eviction: bool = False,
    ) -> None:
        """Durations are seconds. `heartbeat_interval`: between two beats of a task under way; `liveness_interval`: of the
        worker's keys. `lock`: how long a job is a worker's after the worker was last heard of; `stalled_interval`: how often
        somebody looks for jobs that lost theirs; `max_stalled`: how often a task may, before it fails. `blocked_max`: a loop
        blocked for longer loses its jobs. `failures_every`: how often the engine looks what BullMQ has failed. `timeout`: for
        an answer of Redis. `allow_eviction`: take a Redis that may throw jobs away. Raises DefinitionError."""
        self._prefix = names.effective_prefix(prefix, namespace)
        self._namespace = namespace
        self._url = url
        self._connect: Callable[[], Link] = partial(Link, url, timeout=timeout)
        self._connect()
        self._capabilities = Capabilities(
            name="bullmq",
            shared=True,
            holds=True,
            broadcast=True,
            heartbeats=True,
            max_message=max_message,
            signed=signed,
        )
        self._liveness_interval = liveness_interval
        self._lock_ms = max(1, round(lock * 1000))
        self._stalled_ms = max(1, round(stalled_interval * 1000))
        self._max_stalled = max_stalled
        self._blocked_max = blocked_max
        self._failures_every = failures_every
        self._allow_eviction = allow_eviction
        self._control = RedisControlPlane(url, channel=names.control(self._prefix))
        self._channel: RedisChannel | None = None
        self._bench = Workbench(max_message=max_message, heartbeat_interval=heartbeat_interval, beat=self.heartbeat)
        self._arranged: list[Server] = []
        self._liveness: Liveness | None = None
        self._unhear: Callable[[], None] = lambda: None
        self._id = secrets.token_hex(8)
        self._life: _Life | None = None
        self._result_handler: ResultHandler | None = None
        self._heartbeat_handler: HeartbeatHandler | None = None
        self._start_handler: StartHandler | None = None
        self._event_handler: StepEventHandler | None = None
        self.durability = "It has not been started."
        """What its Redis may lose, as a sentence; known after `start`."""

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def prefix(self) -> str:
        """What all names begin with, the namespace included."""
        return self._prefix

    # -- life

    async def start(self) -> None:
        """Connect, look what the server may lose, and take messages. Raises TransportError."""
        if self._life is not None:
            return
        life = _Life(self._connect(), self._lock_ms, self._blocked_max)
        try:
            self._judge(await durability.look(life.link))
            await self._control.start()
        except BaseException:
            await life.link.close()
            raise
        self._life = life
        if self._heartbeat_handler is not None:
            self._channel = RedisChannel(self._url, name=names.heartbeat(self._prefix))
            self._channel.on(names.heartbeat(self._prefix), self._hear_beat)
            try:
                await self._channel.start()
            except Exception as error:
                await self.close(0.0)
                raise TransportError(f"Redis takes no subscriptions: {error or type(error).__name__}.") from error
        if self._result_handler is not None:
            self._hear(life)
        for server in self._arranged:
            await self._begin(life, server)
        life.stalled = life.chore(self._check_stalled(life))

    async def close(self, timeout: float = 10.0) -> None:
        """Take nothing more, let tasks and answers under way finish, give the rest back. Idempotent."""
        life = self._life
        if life is None or life.closing:
            return
        life.closing = True
        life.link.hurry()
        deadline = asyncio.get_running_loop().time() + timeout
        await asyncio.gather(*(intake.stop() for intake in life.tasks + life.returns))
        await self._bench.drain(timeout)
        if life.returning:
            left = max(0.0, deadline - asyncio.get_running_loop().time())
            _, late = await asyncio.wait(life.returning, timeout=left)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=SETTLE_SECONDS)
        if life.watch is not None:
            await life.watch.close()
        if life.stalled is not None:
            life.stalled.cancel()
        if life.chores:
            await asyncio.wait(set(life.chores), timeout=SETTLE_SECONDS)
        self._unhear()
        parts = [part for part in (self._liveness, self._channel, self._control, life.locks) if part is not None]
        await asyncio.gather(*(part.close() for part in parts))
        await life.link.close()
        self._bench.servers.clear()
        self._arranged.clear()
        self._liveness = self._channel = self._life = None

    def _judge(self, found: durability.Durability) -> None:
        self.durability = found.sentence
        if found.evicts and not self._allow_eviction:
            raise TransportError(
                f"This Redis cannot carry work. {found.sentence} Or say allow_eviction=True, if what it throws away may be lost."
            )
        if found.weak:
            log.warning("the Redis of transport %s: %s", self._capabilities.name, found.sentence)

    def _open(self) -> _Life:
        if self._life is None:
            raise TransportError("bullmq is not open: call start() first, and nothing after close().")
        return self._life

    async def _check_stalled(self, life: _Life) -> None:
        await asyncio.sleep(random.random() * min(1.0, self._stalled_ms / 1000))
        while True:
            returns = {intake.queue.name for intake in life.returns}
            for name in {intake.queue.name for intake in life.tasks + life.returns}:
                try:
                    most = NEVER if name in returns else self._max_stalled
                    for job in await life.queue(name).check_stalled(most, self._stalled_ms):
                        log.warning("job %s of %s had lost its worker and is delivered again", job, name)
                except Exception as error:
                    log.debug("could not look for jobs of %s that lost their worker: %s", name, error)
            await asyncio.sleep(self._stalled_ms / 1000)

    # -- engine end

    async def dispatch(self, task: Task) -> None:
        """Add a job to its group's queue. Raises TransportError."""
        life = self._open()
        name = "task" if isinstance(task, RemoteTask) else "workflow"
        data = self._encoded(task, f"The task {task.id}")
        queue = life.queue(names.tasks(self._prefix, task.group))
        try:
            if life.watch is not None:
                await life.watch.announce(task.group)
            keep = {"age": FAILED_SECONDS}
            job = await queue.add(name, data, priority=task.priority, remove_on_fail=keep)
        except (RedisError, TypeError) as error:
            raise _refused(error) from error
        if life.watch is not None:
            life.watch.sent(task, queue.name, job)

    def _encoded(self, message: Task | Answer, what: str) -> bytes:
        limit = self._capabilities.max_message
        try:
            data = encode(message, limit=limit)
        except PayloadError as error:
            raise TransportError(f"{what} cannot be sent: {error}") from error
        if len(data) > limit:
            raise TransportError(
                f"{what} has {len(data)} bytes and bullmq carries {limit}: send a reference to the data instead, or raise "
                "max_message."
            )
        return data

    async def cancel(self, task_id: str) -> None:
        """Tell all workers, and take it out of its queue where it still waits and this end has sent it."""
        life = self._open()
        run_id = task_id.rpartition(":")[0].removesuffix(":wf")
        event = {"type": "step.cancel", "runId": run_id, "stepId": task_id, "at": int(time.time() * 1000)}
        self._bench.cancel(task_id)
        await self._control.publish_control(ControlMessage(sender=self._id, kind="event", run_id=run_id, event=event))
        if life.watch is not None:
            try:
                await life.watch.take_back(task_id)
            except (RedisError, TypeError) as error:
                log.debug("task %s could not be taken back: %s", task_id, error)

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Looks through the queues. Raises TransportError."""
        life = self._open()
        watch = life.watch or self._watch(life)
        try:
            return await watch.holding(task_ids)
        except (RedisError, TypeError) as error:
            raise _refused(error) from error

    def on_result(self, handler: ResultHandler) -> None:
        self._result_handler = handler

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        self._heartbeat_handler = handler

    def on_start_run(self, handler: StartHandler) -> None:
        self._start_handler = handler

    def on_step_event(self, handler: StepEventHandler) -> None:
        """Hear what steps of hosted turns tell while they run. One handler; set before `start`. Unheard ones are dropped."""
        self._event_handler = handler

    async def workers(self) -> list[WorkerAlive]:
        """Who is alive, of whatever language, one entry for each group served. Raises TransportError."""
        try:
            return await alive(self._open().link, self._prefix)
        except RedisError as error:
            raise _refused(error) from error

    def _watch(self, life: _Life) -> Watch:
        limit = self._capabilities.max_message
        return Watch(life.link, self._prefix, life.queue, self._tell, every=self._failures_every, limit=limit)

    def _hear(self, life: _Life) -> None:
        """Take what comes back. Whatever engine takes a message, takes it for all."""
        limit = self._capabilities.max_message
        self._return(life, names.results(self._prefix), lambda data: decode_result(data, limit=limit), self._took)
        self._return(life, names.decisions(self._prefix), decode_decision, self._took)
        self._return(life, names.step_events(self._prefix), decode_step_event, self._heard_event)
        if self._start_handler is not None:
            decode = partial(decode_start_run, limit=limit)
            self._return(life, names.start_run(self._prefix), decode, self._start_handler)
        life.watch = self._watch(life)
        life.watch.start()

    def _return(
        self,
        life: _Life,
        name: str,
        decode: Callable[[bytes], Any],
        handle: Callable[[Any], Awaitable[None]],
    ) -> None:
        room = Server([name], _no_task, RETURNS_AT_ONCE)

        def begin(job: Job) -> None:
            room.under_way += 1
            task = asyncio.get_running_loop().create_task(
                self._settle(life, job, decode, handle), name=f"return {job.id}"
            )
            life.returning.add(task)
            life.locks.hold(job)

            def end(task: asyncio.Task[None]) -> None:
                life.returning.discard(task)
                life.locks.let_go(job)
                room.leave()

            task.add_done_callback(end)

        intake = Intake(life.queue(name), room, begin)
        life.returns.append(intake)
        intake.start()

    async def _settle(
        self, life: _Life, job: Job, decode: Callable[[bytes], Any], handle: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Hand it over and finish it. It goes back to the queue where that does not work here."""
        try:
            if life.closing or life.deaf:
                await job.queue.give_back(job)
                return
            try:
                await self._hand_over(decode(job.data), handle)
            except (PayloadError, MessageRefused) as error:
                await self._put_away(life, job, str(error))
            except EngineStopped:
                life.deaf = True
                for intake in life.returns:
                    intake.halt()
                await job.queue.give_back(job)
                for intake in life.returns:
                    life.chore(intake.stop())
                return
            except Exception as error:
                seconds = min(FAR_MAX, 0.5 * 2 ** min(job.starts, 10))
                log.warning("a message of %s is not taken, it comes again in %g s: %r", job.queue.name, seconds, error)
                await job.queue.delay(job, seconds)
                return
            await self._finish(job)
        except asyncio.CancelledError:
            life.chore(_quietly(job.queue.give_back(job)))
            raise
        except LostJob as error:
            log.info("a message of %s was somebody else's by the time it was settled: %s", job.queue.name, error)
        except Exception as error:
            log.warning("a message of %s could not be settled, it comes again by itself: %s", job.queue.name, error)

    async def _hand_over(self, message: Any, handle: Callable[[Any], Awaitable[None]]) -> None:
        """Again and again for a moment: a store that was away is often back soon."""
        delay, until = PAUSE_MIN, asyncio.get_running_loop().time() + NEAR_SECONDS
        while True:
            try:
                return await handle(message)
            except (EngineStopped, MessageRefused):
                raise
            except Exception as error:
                if asyncio.get_running_loop().time() + delay > until:
                    raise
                log.warning("a message was not taken and is tried again: %r", error)
            await asyncio.sleep(delay)
            delay *= 2

    async def _took(self, answer: Answer) -> None:
        assert self._result_handler is not None
        await self._result_handler(answer)
        if self._life is not None and self._life.watch is not None:
            self._life.watch.answered(answer.id)

    async def _tell(self, answer: Answer) -> bool:
        """An answer of our own. False: it must be told again."""
        try:
            await self._took(answer)
        except MessageRefused as error:
            log.warning("the answer of %s was refused: %s", answer.id, error)
        except Exception as error:
            log.warning("the answer of %s was not taken, it is told again: %r", answer.id, error)
            return False
        return True

    async def _heard_event(self, event: WorkflowStepEvent) -> None:
        """A hint: whoever hears it may fail without harm."""
        if self._event_handler is not None:
            try:
                await self._event_handler(event)
            except EngineStopped:
                raise
            except Exception as error:
                log.warning("an event of run %s is dropped: %r", event.run_id, error)

    async def _put_away(self, life: _Life, job: Job, why: str) -> None:
        """Where an operator finds it, with the reason."""
        log.error("a message of %s is put away in %s: %s", job.queue.name, names.dead(self._prefix), why)
        shown = {"queue": job.queue.name, "reason": why, "data": job.data.decode("utf-8", "replace")}
        await life.queue(names.dead(self._prefix)).add("refused", msgspec.json.encode(shown), remove_on_fail=False)

    def _hear_beat(self, data: bytes | None) -> None:
        if data is None or self._heartbeat_handler is None:
            return
        try:
            beat = decode_heartbeat(data)
        except PayloadError as error:
            log.debug("something that is no heartbeat was heard: %s", error)
            return
        self._heartbeat_handler(beat)

    # -- worker end

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        """Take tasks of these groups, from `start` on: one connection waits for each."""
        server = self._bench.add([sanitize(group) for group in groups], handler, concurrency)
        self._arranged.append(server)
        if self._life is not None:
            await self._begin(self._life, server)

    async def _begin(self, life: _Life, server: Server) -> None:
        if self._liveness is None:
            self._unhear = self._control.on_control(self._id, self._hear_control)
            self._liveness = Liveness(
                life.link,
                self._prefix,
                namespace=self._namespace,
                interval=self._liveness_interval,
                status=self._status,
            )
        for group in server.groups:
            queue = life.queue(names.tasks(self._prefix, group))
            intake = Intake(queue, server, partial(self._begin_task, life, server))
            life.tasks.append(intake)
            intake.start()
        await self._liveness.serve(server.groups)

    def _status(self) -> dict[str, Any]:
        room = sum(server.room for server in self._bench.servers)
        under_way = sum(server.under_way for server in self._bench.servers)
        return {"underWay": under_way, "concurrency": room + under_way}

    def _begin_task(self, life: _Life, server: Server, job: Job) -> None:
        if life.closing:
            life.chore(_quietly(job.queue.give_back(job)))
        elif job.doomed is not None:
            life.chore(_quietly(job.queue.fail(job, job.doomed)))
        else:
            try:
                task = decode_any_task(job.data, limit=self._capabilities.max_message)
            except PayloadError as error:
                log.error("job %s of %s is no task: %s", job.id, job.queue.name, error)
                life.chore(_quietly(job.queue.fail(job, f"it is no task: {error}")))
                return
            life.locks.hold(job)
            self._bench.begin(server, task, partial(self._done, life, job), partial(self._back, life, job))

    async def _done(self, life: _Life, job: Job, answer: Answer | None) -> None:
        """The work is done, so its answer is kept for as long as Redis is away."""
        pause = PAUSE_MIN
        while answer is not None:
            try:
                await self.reply(answer)
                break
            except TransportError as error:
                if life.closing:
                    raise
                log.warning("the answer of %s waits for Redis: %s", answer.id, error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, PAUSE_MAX)
        await self._finish(job)
        life.locks.let_go(job)

    async def _finish(self, job: Job) -> None:
        """It has had its effect: if this fails, it comes again and is counted once."""
        try:
            await job.queue.finish(job)
        except LostJob as error:
            log.info("job %s of %s was given to somebody else meanwhile: %s", job.id, job.queue.name, error)
        except (TransportError, RedisError) as error:
            log.warning("job %s of %s could not be finished, it comes again: %s", job.id, job.queue.name, error)

    async def _back(self, life: _Life, job: Job) -> None:
        life.locks.let_go(job)
        try:
            await job.queue.give_back(job)
        except LostJob as error:
            log.info("job %s of %s was given to somebody else meanwhile: %s", job.id, job.queue.name, error)

    async def reply(self, answer: Answer) -> None:
        """Add a job to the results, or the decisions. Raises TransportError."""
        life = self._open()
        is_result = isinstance(answer, StepResult)
        name = names.results(self._prefix) if is_result else names.decisions(self._prefix)
        data = self._encoded(answer, f"The answer of {answer.id}")
        try:
            await life.queue(name).add("result" if is_result else "decision", data)
        except (RedisError, TypeError) as error:
            raise _refused(error) from error

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Say it on the channel; a hint. Raises TransportError."""
        try:
            await self._open().link.ask("PUBLISH", names.heartbeat(self._prefix), encode(beat))
        except RedisError as error:
            raise _refused(error) from error

    def _hear_control(self, message: ControlMessage) -> None:
        """What a worker has to know: nobody waits for a run any more, or for one task of it."""
        if message.kind == "cancel" and message.run_id is not None:
            self._bench.cancel_run(message.run_id)
        elif message.kind == "event" and message.event is not None and message.event.get("type") == "step.cancel":
            self._bench.cancel(str(message.event.get("stepId")))

    # -- control plane

    @property
    def audience(self) -> bool:
        """Whether anybody else listens, a worker included."""
        return self._control.audience

    async def publish_control(self, message: ControlMessage) -> None:
        """Tell every engine and worker on this prefix."""
        await self._control.publish_control(message)

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Hear what others say. Returns the way to stop."""
        return self._control.on_control(incarnation, handler)


async def _no_task(task: Task) -> Answer:
    raise AssertionError("return queues carry no tasks")


async def _quietly(work: Awaitable[Any]) -> None:
    """What cannot be done now is done by BullMQ when the lock runs out."""
    try:
        await work
    except Exception as error:
        log.info("a job could not be settled, it comes again by itself: %s", error)


def _refused(error: Exception) -> TransportError:
    return TransportError(f"Redis did not take it: {error}")
