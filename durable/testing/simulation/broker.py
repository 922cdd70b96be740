"""A shared transport and its workers, and a control plane: at least once, out of order, and lossy where a seed says so.

The broker is a server like the store: a dispatch, a reply and an acknowledgement each travel. Tasks are leased to workers
and results to engines; what is not acknowledged within `VISIBILITY` comes again, to anybody.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from random import Random
from typing import Any

from durable.control_plane.interface import ControlHandler
from durable.core.errors import TransportError
from durable.protocol.messages import Answer, ControlMessage, Heartbeat, Task, WorkflowDecision
from durable.testing.simulation.faults import Faults, Tripwire
from durable.testing.simulation.loop import Node, SimLoop, SimTask
from durable.transports.interface import Capabilities, Concurrency, HeartbeatHandler, ResultHandler, TaskHandler

VISIBILITY = 3.0
BEAT_EVERY = 0.5


class _Job:
    """A task at the broker, until its result has been accepted."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.worker: Worker | None = None
        self.work: SimTask[None] | None = None
        self.leased_until = 0.0
        self.forgotten = False
        """The broker knows nothing of it any more; a worker may be at it all the same."""


class Worker:
    """A process that serves."""

    def __init__(self, node: Node, handler: TaskHandler) -> None:
        self.node = node
        self.handler = handler


class Broker:
    """What engines and workers meet at."""

    def __init__(self, loop: SimLoop, faults: Faults, tripwire: Tripwire, *, holds: bool, seed: int | str) -> None:
        self.loop = loop
        self.faults = faults
        self.tripwire = tripwire
        self.holds = holds
        self.workers: list[Worker] = []
        self.ends: list[SimTransport] = []
        self.jobs: list[_Job] = []
        self.results: list[Answer] = []
        self.acknowledged = 0
        self.counts: Counter[str] = Counter()
        self.decided: set[str] = set()
        """Task ids of the decisions that engines acknowledged."""
        self._accepted: set[tuple[str, int]] = set()
        self._random = Random(f"broker/{seed}")

    def end(self, node: Node) -> SimTransport:
        """One process' end."""
        return SimTransport(self, node)

    # -- tasks

    def accept(self, task: Task) -> None:
        """A task has arrived."""
        for job in self.jobs:
            if job.task.id == task.id and job.task.attempt == task.attempt:
                return  # the same again is harmless
        if (task.id, task.attempt) in self._accepted:
            self.counts["broker sent again"] += 1
        self._accepted.add((task.id, task.attempt))
        copies = 2 if self.faults.hits("task_doubled", 5) else 1
        for _ in range(copies):
            delay = self.faults.delay(0.1, 4.0) if self.faults.hits("task_delayed", 5) else self.faults.latency()
            if self.faults.hits("task_lost", 5):
                continue
            job = _Job(task)
            self.jobs.append(job)
            self.loop.post(self.loop.world, delay, self._assign, job)

    def _assign(self, job: _Job) -> None:
        """To a worker; to another one when that one says nothing for too long."""
        if job not in self.jobs:
            return
        alive = [worker for worker in self.workers if not worker.node.dead]
        if alive and (job.work is None or self.loop.time() >= job.leased_until):
            worker = self._random.choice(alive)
            job.worker = worker
            job.leased_until = self.loop.time() + VISIBILITY
            job.work = self.loop.spawn(worker.node, self._work(job, worker))
            self.loop.post(worker.node, BEAT_EVERY, self._beat, job, worker)
        self.loop.post(self.loop.world, VISIBILITY, self._assign, job)

    async def _work(self, job: _Job, worker: Worker) -> None:
        """In the worker's process."""
        try:
            result = await worker.handler(job.task)
        except asyncio.CancelledError:
            self.drop(job)
            return
        self.loop.post(self.loop.world, self.faults.latency(), self._replied, job, worker, result)

    def _replied(self, job: _Job, worker: Worker, result: Answer) -> None:
        if job not in self.jobs and not job.forgotten:
            return
        when = self.tripwire.touch(worker.node, "reply") if not worker.node.dead else None
        if when == "before":
            self.loop.crash(worker.node)
            return
        self.drop(job)
        if when == "after":
            self.loop.crash(worker.node)
        if self.faults.hits("result_lost", 5):
            return
        self.results.append(result)
        if self.faults.hits("result_doubled", 5):
            self.results.append(result)
            self._offer_soon(result)
        self._offer_soon(result)

    def drop(self, job: _Job) -> None:
        if job in self.jobs:
            self.jobs.remove(job)

    def forget(self) -> None:
        """Everything: tasks, and results nobody has acknowledged."""
        for job in self.jobs:
            job.forgotten = True
        self.jobs.clear()
        self.results.clear()

    def _beat(self, job: _Job, worker: Worker) -> None:
        """In the worker's process: alive, and at it."""
        if (
            (job not in self.jobs and not job.forgotten)
            or job.worker is not worker
            or (job.work is not None and job.work.done())
        ):
            return
        job.leased_until = self.loop.time() + VISIBILITY
        task = job.task
        self.beat(Heartbeat(run_id=task.run_id, seq=max(task.seq, 0), step_id=task.id, group=task.group))
        self.loop.post(worker.node, BEAT_EVERY, self._beat, job, worker)

    def beat(self, heartbeat: Heartbeat) -> None:
        for end in self.ends:
            if end.on_beat is not None and not end.node.dead and not self.faults.hits("control_lost", 3):
                self.loop.post(end.node, self.faults.latency(), end.on_beat, heartbeat)

    # -- results

    def _offer_soon(self, result: Answer) -> None:
        delay = self.faults.delay(0.1, 4.0) if self.faults.hits("result_delayed", 5) else self.faults.latency()
        self.loop.post(self.loop.world, delay, self._offer, result)

    def _offer(self, result: Answer) -> None:
        """To an engine, any; again, to another, until one has acknowledged it."""
        if result not in self.results:
            return
        ends = [end for end in self.ends if end.handler is not None and not end.node.dead]
        if ends:
            end = self._random.choice(ends)
            self.loop.spawn(end.node, self._hand_over(end, result))
        self.loop.post(self.loop.world, VISIBILITY, self._redeliver, result)

    def _redeliver(self, result: Answer) -> None:
        if result in self.results:
            if not self.faults.healed and "result_redelivered" in self.faults.swarm.kinds:
                self.faults.tally["result_redelivered"] += 1
            self._offer(result)

    async def _hand_over(self, end: SimTransport, result: Answer) -> None:
        """In the engine's process."""
        assert end.handler is not None
        try:
            await end.handler(result)
        except Exception:
            if isinstance(result, WorkflowDecision):
                self.counts["hosted decision refused"] += 1
            return  # not taken: it comes again
        self.loop.post(self.loop.world, self.faults.latency(), self._acknowledged, end, result)

    def _acknowledged(self, end: SimTransport, result: Answer) -> None:
        when = self.tripwire.touch(end.node, "ack") if not end.node.dead else None
        if when != "before" and isinstance(result, WorkflowDecision):
            self.decided.add(result.task_id)
        if when != "before" and result in self.results:
            self.results.remove(result)
            self.acknowledged += 1
        if when is not None:
            self.loop.crash(end.node)


class SimTransport:
    """One process' end of the broker. Implements the Transport contract."""

    def __init__(self, broker: Broker, node: Node) -> None:
        self.broker = broker
        self.node = node
        self.handler: ResultHandler | None = None
        self.on_beat: HeartbeatHandler | None = None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name="simulated",
            shared=True,
            holds=self.broker.holds,
            broadcast=False,
            heartbeats=True,
            max_message=1 << 20,
        )

    async def start(self) -> None:
        if self not in self.broker.ends:
            self.broker.ends.append(self)

    async def close(self, timeout: float = 10.0) -> None:
        if self in self.broker.ends:
            self.broker.ends.remove(self)
        self.broker.workers = [worker for worker in self.broker.workers if worker.node is not self.node]

    async def dispatch(self, task: Task) -> None:
        broker = self.broker
        reply: asyncio.Future[None] = broker.loop.create_future()
        if self.node.dead:
            await broker.loop.never()
        broker.loop.post(broker.loop.world, broker.faults.latency(), self._arrive, task, reply)
        if broker.faults.hits("task_hung", 5):
            reply.cancel()
            await broker.loop.never()
        await reply

    def _arrive(self, task: Task, reply: asyncio.Future[None]) -> None:
        broker = self.broker
        when = broker.tripwire.touch(self.node, "dispatch") if not self.node.dead else None
        if when == "before":
            broker.loop.crash(self.node)
            return
        error: Exception | None = None
        if broker.faults.hits("task_refused", 5):
            error = TransportError("the broker refused the task")
        else:
            broker.accept(task)
            if broker.faults.hits("task_ambiguous", 5):
                error = TransportError("the broker may have taken the task")
        if when == "after":
            broker.loop.crash(self.node)
        broker.loop.post(self.node, broker.faults.latency(), _settle, reply, error)

    async def cancel(self, task_id: str) -> None:
        for job in list(self.broker.jobs):
            if job.task.id == task_id:
                self.broker.drop(job)
                if job.work is not None and job.worker is not None:
                    self.broker.loop.post(job.worker.node, self.broker.faults.latency(), job.work.cancel)

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Asked and answered over the wire; at once in cases that were kept before that was so."""
        broker = self.broker
        far = not broker.faults.swarm.native
        if far:
            await asyncio.sleep(broker.faults.latency())
        held = {job.task.id for job in broker.jobs} | {result.id for result in broker.results}
        found = [task_id for task_id in task_ids if task_id in held]
        broker.counts["broker asked"] += len(task_ids)
        broker.counts["broker missed"] += len(task_ids) - len(found)
        if not broker.holds:
            broker.counts["asked in vain"] += 1
        if far:
            await asyncio.sleep(broker.faults.latency())
        return found

    def on_result(self, handler: ResultHandler) -> None:
        self.handler = handler

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        self.on_beat = handler

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        self.broker.workers.append(Worker(self.node, handler))

    async def reply(self, answer: Answer) -> None:
        self.broker.results.append(answer)

    async def heartbeat(self, beat: Heartbeat) -> None:
        self.broker.beat(beat)


def _settle(reply: asyncio.Future[None], error: Exception | None) -> None:
    if reply.done():
        return
    if error is None:
        reply.set_result(None)
    else:
        reply.set_exception(error)


class Bus:
    """What control planes of all nodes share."""

    def __init__(self, loop: SimLoop, faults: Faults) -> None:
        self.loop = loop
        self.faults = faults
        self.listeners: list[tuple[Node, str, ControlHandler]] = []

    def plane(self, node: Node) -> SimControlPlane:
        return SimControlPlane(self, node)


class SimControlPlane:
    """One node's control plane: hints that may be lost."""

    def __init__(self, bus: Bus, node: Node) -> None:
        self._bus = bus
        self._node = node

    @property
    def audience(self) -> bool:
        return True

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None

    async def publish_control(self, message: ControlMessage) -> None:
        bus = self._bus
        for node, incarnation, handler in bus.listeners:
            if incarnation != message.sender and not node.dead and not bus.faults.hits("control_lost", 10):
                bus.loop.post(node, bus.faults.latency(), handler, message)

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        entry = (self._node, incarnation, handler)
        self._bus.listeners.append(entry)

        def stop() -> None:
            if entry in self._bus.listeners:
                self._bus.listeners.remove(entry)

        return stop


Work = Coroutine[Any, Any, None]
