"""A transport whose workers are the test: it keeps what was sent, and answers what it is told to, to whom it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from durable.core.errors import DurableError, ErrorData, TransportError
from durable.protocol.messages import (
    Answer,
    Heartbeat,
    RemoteTask,
    StepResult,
    Task,
    TurnCommand,
    WorkflowDecision,
    WorkflowTask,
)
from durable.testing.facts import eventually
from durable.transports.interface import Capabilities, Concurrency, HeartbeatHandler, ResultHandler, TaskHandler


class Broker:
    """What all ends share: the tasks published, in order, and those it still holds."""

    def __init__(self) -> None:
        self.tasks: list[RemoteTask] = []
        self.turns: list[WorkflowTask] = []
        self.held: dict[str, Task] = {}
        self.cancelled: list[str] = []
        self.ends: list[BrokerTransport] = []
        self.refusing: str | None = None
        """Why nothing is taken."""
        self.hanging = False
        """Nothing is answered."""
        self.doubting = False
        """What is taken is said not to be."""

    def end(self) -> BrokerTransport:
        """One engine's end."""
        end = BrokerTransport(self)
        self.ends.append(end)
        return end

    async def sent(self, count: int = 1) -> RemoteTask:
        """Until so many tasks have been published; the last of them."""
        await eventually(lambda: len(self.tasks) >= count, f"{count} tasks are published")
        return self.tasks[count - 1]

    async def answer(
        self,
        task: RemoteTask,
        output: Any = None,
        *,
        error: ErrorData | None = None,
        through: BrokerTransport | None = None,
        attempt: int | type | None = int,
    ) -> None:
        """A worker's answer, delivered to one engine, and again while its handler raises: that is the contract."""
        result = StepResult(
            run_id=task.run_id,
            seq=task.seq,
            step_id=task.step_id,
            status="completed" if error is None else "failed",
            output=msgspec.Raw(msgspec.json.encode(output)) if error is None else msgspec.UNSET,
            error=error,
            attempt=task.attempt if attempt is int else attempt,  # type: ignore[arg-type]
        )
        await self.deliver(result, through)

    async def turn(self, count: int = 1) -> WorkflowTask:
        """Until so many turns have been published; the last of them."""
        await eventually(lambda: len(self.turns) >= count, f"{count} turns are published")
        return self.turns[count - 1]

    async def decide(
        self,
        turn: WorkflowTask,
        status: str,
        *commands: TurnCommand,
        output: Any = None,
        error: ErrorData | None = None,
        through: BrokerTransport | None = None,
        task_id: str | None = None,
        **fields: Any,
    ) -> None:
        """A worker's decision, delivered as an answer is."""
        decision = WorkflowDecision(
            task_id=task_id or turn.task_id,
            run_id=turn.run_id,
            status=status,  # type: ignore[arg-type]
            commands=list(commands),
            output=msgspec.Raw(msgspec.json.encode(output)) if status == "completed" else msgspec.UNSET,
            error=error,
            **fields,
        )
        await self.deliver(decision, through)

    async def deliver(self, answer: Answer, through: BrokerTransport | None = None) -> None:
        """To one engine, and again while its handler raises: that is the contract."""
        end = through or next(end for end in self.ends if end.open)
        assert end.results is not None
        for tries in range(200):
            try:
                await end.results(answer)
                break
            except DurableError:
                if tries == 199:
                    raise
                await asyncio.sleep(0.005)
        self.held.pop(answer.id, None)

    def beat(self, task: Task) -> None:
        """A worker's sign of life: for a step, or for the run whose turn it is."""
        step = task.step_id if isinstance(task, RemoteTask) else None
        for end in self.ends:
            if end.open and end.beats is not None:
                end.beats(Heartbeat(run_id=task.run_id, seq=max(task.seq, 0), step_id=step, group=task.group))


class BrokerTransport:
    """One end of a broker."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.open = False
        self.results: ResultHandler | None = None
        self.beats: HeartbeatHandler | None = None
        self.served: list[str] = []
        self.signed = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name="broker",
            shared=True,
            holds=True,
            broadcast=False,
            heartbeats=True,
            max_message=64 << 20,
            signed=self.signed,
        )

    async def start(self) -> None:
        self.open = True

    async def close(self, timeout: float = 10.0) -> None:
        self.open = False

    def crashed(self) -> None:
        self.open = False

    async def dispatch(self, task: Task) -> None:
        if self.broker.refusing is not None:
            raise TransportError(self.broker.refusing)
        if self.broker.hanging:
            await asyncio.Event().wait()
        if isinstance(task, RemoteTask):
            self.broker.tasks.append(task)
        else:
            self.broker.turns.append(task)
        self.broker.held[task.id] = task
        if self.broker.doubting:
            raise TransportError("the connection broke")

    async def cancel(self, task_id: str) -> None:
        self.broker.cancelled.append(task_id)
        self.broker.held.pop(task_id, None)

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        return [task_id for task_id in task_ids if task_id in self.broker.held]

    def on_result(self, handler: ResultHandler) -> Any:
        self.results = handler
        return lambda: None

    def on_heartbeat(self, handler: HeartbeatHandler) -> Any:
        self.beats = handler
        return lambda: None

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        self.served = list(groups)

    async def reply(self, answer: Answer) -> None: ...

    async def heartbeat(self, beat: Heartbeat) -> None: ...
