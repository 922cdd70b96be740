"""Seeded random workflows: a program is JSON, and one registered workflow interprets it.

What a program returns is a function of what its journal says was committed, so its outcome can be computed again from
the journal alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from durable.core.ctx import Context
from durable.core.definition import durable_step, workflow
from durable.core.errors import StepFailed, WaitTimeout
from durable.core.hosted import remote_workflow
from durable.core.retry import RetryPolicy
from durable.testing import programs
from durable.testing.simulation.witness import body, witness_sleep, witness_time

Op = dict[str, Any]

RETRY = RetryPolicy(max_attempts=3, initial_delay=0.2, max_delay=2.0, jitter=0.5, non_retryable=("PlannedFinal",))


async def local(plan: dict[str, float]) -> str:
    """A local step's body."""
    return await body(plan, remote=False)


@durable_step("sim.remote", retries=2)
async def remote(plan: dict[str, float]) -> str:
    """A remote step's body."""
    return await body(plan, remote=True)


@workflow(name="sim.program", version="1")
async def program(ctx: Context, ops: list[Op]) -> list[Any]:
    """Do the ops, one after the other."""
    return await _Interpreter(ctx).sequence(ops)


@workflow(name="sim.deadline", version="1", timeout="6s")
async def deadline_program(ctx: Context, ops: list[Op]) -> list[Any]:
    """The same, under a run timeout."""
    return await _Interpreter(ctx).sequence(ops)


@workflow(name="sim.hosted", version="1")
async def hosted_program(ctx: Context, ops: list[Op]) -> list[Any]:
    """The same, in a worker."""
    return await _Interpreter(ctx).sequence(ops)


@workflow(name="sim.hosted.deadline", version="1")
async def hosted_deadline_program(ctx: Context, ops: list[Op]) -> list[Any]:
    """The same, in a worker; the engine keeps the deadline."""
    return await _Interpreter(ctx).sequence(ops)


HOSTED: dict[str, str] = {"sim.program": "sim.hosted", "sim.deadline": "sim.hosted.deadline"}
"""What a program is called when a worker hosts it."""
CODE: list[Any] = [hosted_program, hosted_deadline_program, programs.run_program]
"""What workers have the code of."""
WORKFLOWS: dict[str, Any] = {
    "sim.program": program,
    "sim.deadline": deadline_program,
    programs.PROGRAM: programs.run_program,
}
STEPS: list[Any] = [remote, programs.work_remotely]


def served(*, turn_timeout: float, step_timeout: float | None, programs_too: bool) -> dict[str, Any]:
    """What engines serve, by name, where some of it is hosted by workers."""

    def hosted(name: str, timeout: float | None = None) -> Any:
        return remote_workflow(
            name, timeout=timeout, turn_timeout=turn_timeout, step_retries=RETRY, step_timeout=step_timeout
        )

    found = {**WORKFLOWS, "sim.hosted": hosted("sim.hosted"), "sim.hosted.deadline": hosted("sim.hosted.deadline", 6.0)}
    if programs_too:
        found[programs.PROGRAM] = hosted(programs.PROGRAM)
    return found


BAD_CODE = (0.5, 4.0)
"""From when to when a bad deploy is out, seconds."""


def bad_code() -> bool:
    """Whether workflow code that runs now is of the bad deploy."""
    now = witness_time()
    return now is not None and BAD_CODE[0] <= now < BAD_CODE[1]


class _Interpreter:
    """Does ops. Each gives a JSON value."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    async def sequence(self, ops: list[Op]) -> list[Any]:
        return [await self.do(op) for op in ops]

    async def do(self, op: Op) -> Any:
        return await getattr(self, "op_" + op["op"])(op)

    async def op_step(self, op: Op) -> Any:
        return await self.ctx.step(op["name"], local, op["plan"], retries=RETRY, timeout=op.get("timeout"))

    async def op_remote(self, op: Op) -> Any:
        return await self.ctx.remote(
            remote,
            op["plan"],
            retries=RETRY,
            timeout=op.get("timeout"),
            heartbeat_timeout=op.get("heartbeat_timeout"),
        )

    async def op_effect(self, op: Op) -> Any:
        return await self.ctx.side_effect(lambda: 7)

    async def op_sleep(self, op: Op) -> Any:
        self._tell_sleep(op["seconds"])
        await self.ctx.sleep(op["seconds"])
        return "slept"

    async def op_nap(self, op: Op) -> Any:
        self._tell_sleep(op["seconds"])
        await asyncio.sleep(op["seconds"])
        return "napped"

    def _tell_sleep(self, seconds: float, further: int = 0) -> None:
        """In a worker: the operation after the next `further` ones is a timer."""
        ordinal = getattr(self.ctx._machine.loop.ordinals, "next", None)
        witness_sleep(self.ctx.run_id, None if ordinal is None else ordinal + further, seconds)

    async def op_signal(self, op: Op) -> Any:
        return await self.ctx.wait_for_signal(op["name"])

    async def op_signal_or_not(self, op: Op) -> Any:
        self._tell_sleep(op["timeout"], 0)
        self._tell_sleep(op["timeout"], 1)
        try:
            return await self.ctx.wait_for_signal(op["name"], timeout=op["timeout"])
        except WaitTimeout:
            return "no signal"

    async def op_event(self, op: Op) -> Any:
        # One that a client is sure to publish, once it knows of the run: however early that is, the wait takes it.
        event = await self.ctx.wait_for_event(op["name"], match={"plan": op["plan"], "n": op["n"]})
        return event.data["n"]

    async def op_event_or_not(self, op: Op) -> Any:
        # Its very own: it must not take what a wait without a timeout needs.
        where = f"event.data.plan == {op['plan']} and event.data.n == {op['n']}"
        try:
            event = await self.ctx.wait_for_event(op["name"], where=where, timeout=op["timeout"], early=op["early"])
        except WaitTimeout:
            return "none"
        return event.data["n"]

    async def op_emit(self, op: Op) -> Any:
        return await self.ctx.send_event(op["name"], {"plan": op["plan"], "n": op["n"]})

    async def op_child(self, op: Op) -> Any:
        return await self.ctx.child(op["workflow"], op["ops"])

    async def op_start_child(self, op: Op) -> Any:
        handle = self.ctx.start_child(op["workflow"], op["ops"], on_parent_close=op["close"])
        first = await self.sequence(op["meanwhile"])
        return [first, await handle.result() if op["joins"] else handle.run_id]

    async def op_gather(self, op: Op) -> Any:
        return await asyncio.gather(*[self.sequence(branch) for branch in op["branches"]])

    async def op_settled(self, op: Op) -> Any:
        done = await asyncio.gather(*[self.sequence(branch) for branch in op["branches"]], return_exceptions=True)
        return [_shown(one) for one in done]

    async def op_group(self, op: Op) -> Any:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.sequence(branch)) for branch in op["branches"]]
        return [task.result() for task in tasks]

    async def op_race(self, op: Op) -> Any:
        tasks = [asyncio.create_task(self.sequence(branch)) for branch in op["branches"]]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return [_shown(task.exception() or task.result()) if task in done else None for task in tasks]

    async def op_within(self, op: Op) -> Any:
        try:
            self._tell_sleep(op["seconds"])
            async with asyncio.timeout(op["seconds"]):
                return await self.sequence(op["ops"])
        except TimeoutError:
            return "too long"

    async def op_attempt(self, op: Op) -> Any:
        try:
            return await self.sequence(op["ops"])
        except StepFailed as error:
            return ["failed", error.key, error.error.message if error.error else ""]

    async def op_cleanup(self, op: Op) -> Any:
        try:
            return await self.sequence(op["ops"])
        finally:
            await self.sequence(op["after"])

    async def op_drawn(self, op: Op) -> Any:
        return [self.ctx.random(), str(self.ctx.uuid()), self.ctx.now().isoformat()]

    async def op_dice(self, op: Op) -> Any:
        # An argument that replay must draw again, in every life of the run.
        return await self.ctx.step("dice", local, {"takes": round(self.ctx.random() / 100, 6)}, retries=RETRY)

    async def op_fickle(self, op: Op) -> Any:
        # Code that changes under the run: a bad deploy, and a fix.
        return await self.ctx.step("bad" if bad_code() else "good", local, {}, retries=RETRY)

    async def op_log(self, op: Op) -> Any:
        self.ctx.log("line", number=op["number"])
        return None

    async def op_patched(self, op: Op) -> Any:
        return self.ctx.patched("a-patch")


def _shown(one: Any) -> Any:
    return [type(one).__name__, str(one)] if isinstance(one, BaseException) else one


class Plan:
    """One run of a seed: its program, and what clients do with it."""

    def __init__(
        self,
        seed: int,
        number: int,
        *,
        span: float,
        lossy: bool,
        more: bool = False,
        hosts: bool = False,
        talks: bool = False,
        events: bool = False,
    ) -> None:
        self.number = number
        draw = Random(f"program/{seed}/{number}")
        self._draw = draw
        self._lossy = lossy
        self.signals: list[str] = []
        """Names that must be sent, once for each wait that has no timeout."""
        self.extra: list[str] = []
        """Names that may be sent."""
        self.events: list[tuple[str, int]] = []
        """Name and number of what must be published."""
        self.workflow = "sim.deadline" if draw.random() < 0.1 else "sim.program"
        self.ops = self._sequence(draw.randint(1, 4), 0)
        self.at = draw.random() * span
        self.key = f"key-{number}" if draw.random() < 0.4 else None
        self.doubled = self.key is not None and draw.random() < 0.6
        self.later = draw.random() < 0.1
        self.cancel_at = self.at + draw.random() * span if draw.random() < 0.2 else None
        self.requeues = draw.random() < 0.7
        self.waits = draw.random() < 0.5
        self.delays: list[float] | None = None
        """When each signal is sent, seconds after the start is known; None: drawn."""
        self.priority: int | None = None
        self.watches = False
        self.blocks = False
        """Whether it may be blocked: an operator has it looked at again once the code is mended."""
        self.input: Any = self.ops
        if more:
            self._more(Random(f"program, more/{seed}/{number}"))
        if hosts:
            chosen = Random(f"program, hosted/{seed}/{number}")
            self.host(lambda: chosen.random() < 0.25)
        if talks:
            _talk(self.ops, Random(f"program, lines/{seed}/{number}"))
        if events and self.workflow in HOSTED:
            self._eventful(Random(f"program, events/{seed}/{number}"))

    def host(self, chosen: Callable[[], bool] = lambda: True) -> None:
        """Have workers host it and its children, each if `chosen`."""
        if chosen():
            self.workflow = HOSTED.get(self.workflow, self.workflow)
        for op in _each(self.ops):
            if "workflow" in op and chosen():
                op["workflow"] = HOSTED[op["workflow"]]

    def _more(self, draw: Random) -> None:
        self.watches = draw.random() < 0.2
        self.priority = draw.choice((None, None, 0, 1, 5))
        if draw.random() < 0.2:
            self.ops.append({"op": "dice"})
        if draw.random() < 0.25:
            made = programs.generate(draw.randrange(1_000_000), max_nodes=16)
            self.workflow, self.input, self.ops, self.signals = programs.PROGRAM, made, [], []
            self.extra = list(programs.SIGNALS)

    def _eventful(self, draw: Random) -> None:
        """Put waits for events among the ops, and events of its own; some of them in a race."""
        for number in range(draw.choice((0, 1, 1, 2, 3))):
            name = draw.choice(("sim.tick", "sim.tock"))
            op: Op = {"op": "event", "name": name, "plan": self.number, "n": number}
            kind = draw.random()
            if kind < 0.5:
                self.events.append((name, number))
            elif kind < 0.8:
                op |= {"op": "event_or_not", "timeout": draw.choice((0.1, 1.0, 4.0)), "early": draw.random() < 0.5}
                self.events.append((name, number))
            else:
                op["op"] = "emit"
            if draw.random() < 0.25:
                step: Op = {"op": "step", "name": "rival", "plan": {"takes": draw.choice((0.05, 0.5, 2.0))}}
                op = {"op": draw.choice(("gather", "race")), "branches": [[op], [step]]}
            self.ops.insert(draw.randint(0, len(self.ops)), op)

    @classmethod
    def fixed(cls, ops: list[Op], *, workflow: str = "sim.program", **fields: Any) -> Plan:
        """A plan that is not drawn. Signals are those of `signals`, at `delays`."""
        plan = cls.__new__(cls)
        plan.number, plan.workflow, plan.ops, plan.input = 0, workflow, ops, ops
        plan.priority, plan.watches, plan.blocks = None, False, False
        plan.signals, plan.extra, plan.events, plan.delays = [], [], [], None
        plan.at, plan.key, plan.doubled, plan.later = 0.0, "key-0", False, False
        plan.cancel_at, plan.requeues, plan.waits = None, False, True
        for name, value in fields.items():
            assert hasattr(plan, name), name
            setattr(plan, name, value)
        return plan

    def _sequence(self, length: int, depth: int) -> list[Op]:
        return [self._op(depth) for _ in range(length)]

    def _op(self, depth: int) -> Op:
        simple = ["step", "step", "step", "remote", "remote", "sleep", "nap", "signal", "signal_or_not", "effect"]
        simple += ["drawn", "log", "patched"]
        deep = ["gather", "settled", "group", "race", "within", "attempt", "cleanup", "child", "start_child"]
        kind = self._draw.choice(simple if depth >= 2 else simple + deep)
        fill = getattr(self, "_" + kind, None)
        return {"op": kind} if fill is None else {"op": kind, **fill(depth + 1)}

    def _plan(self) -> dict[str, float]:
        draw = self._draw
        plan: dict[str, float] = {}
        if draw.random() < 0.5:
            plan["takes"] = draw.choice((0.001, 0.05, 0.5, 2.0))
        if draw.random() < 0.25:
            plan["fails"] = draw.choice((1, 1, 2, 3))
        if draw.random() < 0.05:
            plan["final"] = 1
        return plan

    def _step(self, depth: int) -> Op:
        op: Op = {"name": self._draw.choice("abc"), "plan": self._plan()}
        if self._draw.random() < 0.1:
            op["timeout"] = 0.3
        return op

    def _remote(self, depth: int) -> Op:
        op: Op = {"plan": self._plan()}
        if self._lossy or self._draw.random() < 0.3:
            op["timeout"] = self._draw.choice((1.0, 3.0, 8.0))
        if self._draw.random() < 0.2:
            op["heartbeat_timeout"] = 3.0
        return op

    def _log(self, depth: int) -> Op:
        return {"number": self._draw.randint(0, 9)}

    def _sleep(self, depth: int) -> Op:
        return {"seconds": self._draw.choice((0.01, 0.3, 2.0, 6.0))}

    _nap = _sleep

    def _signal(self, depth: int) -> Op:
        name = self._draw.choice("xyz")
        self.signals.append(name)
        return {"name": name}

    def _signal_or_not(self, depth: int) -> Op:
        # A name of its own: it must not take what a wait without a timeout needs.
        self.extra.append("w")
        return {"name": "w", "timeout": self._draw.choice((0.1, 1.0, 4.0))}

    def _branches(self, depth: int) -> Op:
        count = self._draw.randint(2, 3)
        return {"branches": [self._sequence(self._draw.randint(1, 2), depth) for _ in range(count)]}

    _gather = _settled = _group = _race = _branches

    def _within(self, depth: int) -> Op:
        return {"seconds": self._draw.choice((0.05, 1.0, 5.0)), "ops": self._sequence(self._draw.randint(1, 2), depth)}

    def _attempt(self, depth: int) -> Op:
        return {"ops": self._sequence(self._draw.randint(1, 2), depth)}

    def _cleanup(self, depth: int) -> Op:
        return {
            "ops": self._sequence(self._draw.randint(1, 2), depth),
            "after": [{"op": "step", "name": "undo", "plan": {}}],
        }

    def _child(self, depth: int) -> Op:
        # A child hears no signals: its id is known to nobody but its parent.
        signals, extra = list(self.signals), list(self.extra)
        ops = [op for op in self._sequence(self._draw.randint(1, 2), depth + 1) if not _waits_for_signal(op)]
        self.signals, self.extra = signals, extra
        workflow = "sim.deadline" if self._draw.random() < 0.1 else "sim.program"
        return {"workflow": workflow, "ops": ops or [{"op": "effect"}]}

    def _start_child(self, depth: int) -> Op:
        return {
            **self._child(depth),
            "close": self._draw.choice(("cancel", "abandon")),
            "joins": self._draw.random() < 0.6,
            "meanwhile": self._sequence(1, depth + 1),
        }


def _each(op: Any) -> Iterator[Op]:
    """Every op of a program."""
    if isinstance(op, list):
        for one in op:
            yield from _each(one)
    elif isinstance(op, dict):
        if "op" in op:
            yield op
        for one in op.values():
            yield from _each(one)


def _talk(ops: list[Op], draw: Random) -> None:
    """Let steps tell lines of themselves."""
    for op in _each(ops):
        if op["op"] in ("step", "remote") and draw.random() < 0.5:
            op["plan"]["says"] = draw.choice((1, 3, 3, 12))


def _waits_for_signal(op: Any) -> bool:
    if isinstance(op, dict):
        return op.get("op") == "signal" or any(_waits_for_signal(value) for value in op.values())
    if isinstance(op, list):
        return any(_waits_for_signal(value) for value in op)
    return False
