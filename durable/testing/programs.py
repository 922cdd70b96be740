"""Random workflow programs: seeded, printable, shrinkable. For property tests and for the simulation of whole engines.

A program is a tree of nodes, plain JSON, made from a seed by `generate`. `run_program` is a workflow that interprets
one: nested gather, TaskGroup, wait, timeouts, shield, cancellation, locks, queues, async generators, steps, remote
steps, children, signals, failures and the clean-up after them. What it returns is a trace in the order in which things
happened, so any other order shows. It always ends: every wait for a signal has a timeout.

Steps are functions of their input; `failures` says how many of a step's first attempts raise.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import aclosing
from copy import deepcopy
from typing import Any

from msgspec import Struct

from durable.core.ctx import Context
from durable.core.definition import durable_step, workflow
from durable.core.errors import DurableError
from durable.core.retry import RetryPolicy
from durable.core.step import current_step

Node = dict[str, Any]
Program = dict[str, Any]

PROGRAM = "testing.program"
REMOTE = "testing.remote"
SIGNALS = ("alpha", "beta")
MAX_NODES = 40
MAX_DEPTH = 5

_RETRY = RetryPolicy(max_attempts=2, backoff="fixed", initial_delay=0.01, jitter=0.0)


class Task(Struct):
    """A step's input."""

    value: int
    failures: int = 0


class ProgramError(Exception):
    """A failure that the program asked for."""


# ------------------------------------------------------------------ steps


def work(task: Task) -> int:
    """The body of every step: a function of its input, except that the first `failures` attempts raise."""
    if _attempt() <= task.failures:
        raise ProgramError(f"value {task.value} fails {task.failures} times")
    return task.value * 7 + 3


async def work_async(task: Task) -> int:
    return work(task)


@durable_step(REMOTE, retries=_RETRY, timeout=60)
async def work_remotely(task: Task) -> int:
    return work(task)


def _attempt() -> int:
    try:
        return current_step().attempt
    except DurableError:
        return 1


# ------------------------------------------------------------------ making programs


def generate(seed: int, *, max_nodes: int = MAX_NODES, signals: bool = True, children: bool = True) -> Program:
    """The program of a seed. `signals` lists what is to be sent to it, at any time, in this order."""
    maker = _Maker(random.Random(f"program {seed}"), max_nodes, signals, children)
    root = {"op": "seq", "id": 0, "body": maker.several(MAX_DEPTH, 3, 6)}
    return {"seed": seed, "root": root, "signals": maker.planned}


class _Maker:
    def __init__(self, rng: random.Random, nodes: int, signals: bool, children: bool) -> None:
        self.rng = rng
        self.left = nodes
        self.ids = 0
        self.planned: list[list[Any]] = []
        self.leaves: list[str] = [
            "step",
            "step",
            "step",
            "step",
            "remote",
            "sleep",
            "sleep",
            "yield",
            "draw",
            "log",
            "patch",
        ]
        if signals:
            self.leaves += ["signal", "signal"]
        if children:
            self.leaves += ["child", "handle"]

    def several(self, depth: int, least: int, most: int) -> list[Node]:
        return [self.node(depth) for _ in range(self.rng.randint(least, most))]

    def node(self, depth: int) -> Node:
        self.left -= 1
        self.ids += 1
        leaf = depth <= 0 or self.left <= 0 or self.rng.random() < 0.45
        op = self.rng.choice(self.leaves) if leaf else self.rng.choice(_INNER)
        node: Node = {"op": op, "id": self.ids}
        getattr(self, f"_{op}", self._plain)(node, depth - 1)
        return node

    def _plain(self, node: Node, depth: int) -> None:
        """An inner node of two or three bodies."""
        if node["op"] in _INNER:
            node["body"] = self.several(depth, 1 if node["op"] in _SINGLE else 2, 1 if node["op"] in _SINGLE else 3)

    def _step(self, node: Node, depth: int) -> None:
        node["name"] = self.rng.choice(["a", "a", "b", "c"])
        node["value"] = self.rng.randint(0, 9)
        node["failures"] = self.rng.choice([0, 0, 0, 0, 0, 0, 0, 1, 2])
        node["async"] = self.rng.random() < 0.7

    _remote = _step

    def _sleep(self, node: Node, depth: int) -> None:
        node["ms"] = self.rng.choice([0, 1, 5, 5, 10, 50])
        node["plain"] = self.rng.random() < 0.5

    def _signal(self, node: Node, depth: int) -> None:
        node["name"] = self.rng.choice(SIGNALS)
        node["ms"] = self.rng.choice([1, 20, 100])
        node["default"] = self.rng.random() < 0.5
        if self.rng.random() < 0.7:
            self.planned.append([node["name"], self.rng.randint(0, 99)])

    def _child(self, node: Node, depth: int) -> None:
        below = _Maker(self.rng, 4, signals=False, children=False)
        below.ids = self.ids + 1  # ids are unique in the whole tree
        root = {"op": "seq", "id": self.ids + 1, "body": below.several(2, 1, 3)}
        self.ids = below.ids
        node["program"] = {"seed": 0, "root": root, "signals": []}
        node["wait"] = self.rng.random() < 0.8

    _handle = _child

    def _timeout(self, node: Node, depth: int) -> None:
        node["ms"] = self.rng.choice([0, 1, 5, 20])
        node["body"] = self.several(depth, 1, 2)

    _wait_for = _timeout
    _cancel = _timeout

    def _wait(self, node: Node, depth: int) -> None:
        node["until"] = self.rng.choice(["FIRST_COMPLETED", "FIRST_EXCEPTION", "ALL_COMPLETED"])
        node["ms"] = self.rng.choice([None, None, 5, 20])
        node["body"] = self.several(depth, 2, 3)

    def _ctx_gather(self, node: Node, depth: int) -> None:
        node["mode"] = self.rng.choice(["all", "settled", "first"])
        node["body"] = self.several(depth, 2, 3)

    def _stream(self, node: Node, depth: int) -> None:
        node["take"] = self.rng.choice([1, 2, 9])
        node["close"] = self.rng.random() < 0.7
        node["body"] = self.several(depth, 1, 3)


_SINGLE = frozenset({"shield", "catch", "swallow", "spawn", "fail_after"})
_INNER = (
    "seq",
    "gather",
    "gather",
    "group",
    "group",
    "wait",
    "timeout",
    "wait_for",
    "cancel",
    "shield",
    "spawn",
    "catch",
    "catch",
    "swallow",
    "clean_up",
    "fail_after",
    "ctx_gather",
    "completed",
    "stream",
    "lock",
    "event",
    "queue",
)


def nodes(program: Program) -> Iterator[Node]:
    """Every node, children's programs included."""
    left = [program["root"]]
    while left:
        node = left.pop()
        yield node
        left.extend(node.get("body", ()))
        if "program" in node:
            left.append(node["program"]["root"])


def count(program: Program, *ops: str) -> int:
    """How many nodes are of these kinds."""
    return sum(node["op"] in ops for node in nodes(program))


def smaller(program: Program) -> Iterator[Program]:
    """The programs with one node less: left out, or replaced by what it holds. For shrinking what fails."""
    places = [(node["id"], index) for node in nodes(program) for index in range(len(node.get("body", ())))]
    for node_id, index in places:
        for keep_body in (False, True):
            copy = deepcopy(program)
            for node in nodes(copy):
                if node["id"] == node_id and index < len(node.get("body", ())):
                    inner = node["body"][index].get("body", []) if keep_body else []
                    node["body"][index : index + 1] = inner
                    break
            if copy != program:
                yield copy


def shrink(program: Program, fails: Callable[[Program], bool], *, tries: int = 500) -> Program:
    """The smallest program found that still fails."""
    progress = True
    while progress and tries > 0:
        progress = False
        for candidate in smaller(program):
            tries -= 1
            if fails(candidate):
                program, progress = candidate, True
                break
            if tries <= 0:
                break
    return program


def show(program: Program) -> str:
    """The program as an indented outline."""
    lines: list[str] = []

    def walk(node: Node, depth: int) -> None:
        details = {key: value for key, value in node.items() if key not in ("op", "id", "body", "program")}
        lines.append(f"{'  ' * depth}{node['op']} #{node['id']} {details or ''}".rstrip())
        for inner in [*node.get("body", ()), *([node["program"]["root"]] if "program" in node else ())]:
            walk(inner, depth + 1)

    walk(program["root"], 0)
    return "\n".join([f"seed {program['seed']}, signals {program['signals']}", *lines])


# ------------------------------------------------------------------ running them


@workflow(PROGRAM)
async def run_program(ctx: Context, program: dict[str, Any]) -> list[str]:
    """Interpret a program. The result tells what happened, in order."""
    runner = _Runner(ctx)
    try:
        await runner.run(program["root"])
    except ProgramError as error:
        runner.note(program["root"], f"failed: {error}")
    return runner.trace


class _Later:
    """An awaitable that makes its coroutine when it is awaited, so that a run left half way leaves none behind."""

    def __init__(self, function: Callable[[Node], Coroutine[Any, Any, Any]], node: Node) -> None:
        self.function = function
        self.node = node

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.function(self.node).__await__()


class _Runner:
    """One `_<op>` for each kind of node."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.trace: list[str] = []
        self.spawned: list[asyncio.Task[Any]] = []

    def note(self, node: Node, what: object) -> None:
        self.trace.append(f"{node['op']}#{node['id']} {what}")

    async def run(self, node: Node) -> Any:
        method: Callable[[Node], Coroutine[Any, Any, Any]] = getattr(self, f"_{node['op']}")
        try:
            value = await method(node)
        except BaseException as error:
            self.note(node, type(error).__name__)
            raise
        self.note(node, value)
        return value

    def tasks(self, node: Node) -> list[asyncio.Task[Any]]:
        return [asyncio.create_task(self.run(inner)) for inner in node["body"]]

    async def sequence(self, node: Node) -> int:
        for inner in node["body"]:
            await self.run(inner)
        return len(node["body"])

    # leaves

    def asked(self, node: Node) -> Awaitable[int]:
        task = Task(node["value"], node["failures"])
        if node["op"] == "remote":
            return self.ctx.remote(work_remotely, task)
        body: Any = work_async if node["async"] else work
        return self.ctx.step(node["name"], body, task, retries=_RETRY, returns=int)

    async def _step(self, node: Node) -> int:
        return await self.asked(node)

    _remote = _step

    async def _sleep(self, node: Node) -> None:
        await (asyncio.sleep if node["plain"] else self.ctx.sleep)(node["ms"] / 1000)

    async def _yield(self, node: Node) -> None:
        await asyncio.sleep(0)

    async def _draw(self, node: Node) -> str:
        return f"{self.ctx.random():.6f} {self.ctx.uuid()} {await self.ctx.side_effect(lambda: 4)}"

    async def _log(self, node: Node) -> None:
        self.ctx.log.info("here", node=node["id"])

    async def _patch(self, node: Node) -> bool:
        if not self.ctx.patched(f"patch-{node['id'] % 3}"):
            return False
        await self.ctx.step("patched", work, Task(node["id"]))
        return True

    async def _signal(self, node: Node) -> Any:
        options = {"default": "none"} if node["default"] else {}
        try:
            return await self.ctx.wait_for_signal(node["name"], timeout=node["ms"] / 1000, **options)
        except TimeoutError:
            return "timeout"

    async def _child(self, node: Node) -> int:
        return len(await self.ctx.child(run_program, node["program"]))

    async def _handle(self, node: Node) -> Any:
        handle = self.ctx.start_child(run_program, node["program"])
        await asyncio.sleep(0.001)
        if not node["wait"]:
            return handle.cancel()
        return len(await handle.result())

    # inner nodes

    async def _seq(self, node: Node) -> int:
        return await self.sequence(node)

    async def _gather(self, node: Node) -> Any:
        return len(await asyncio.gather(*(_Later(self.run, inner) for inner in node["body"])))

    async def _group(self, node: Node) -> Any:
        try:
            async with asyncio.TaskGroup() as group:
                for inner in node["body"]:
                    group.create_task(self.asked(inner) if inner["op"] in ("step", "remote") else self.run(inner))  # type: ignore[arg-type]
        except* (ProgramError, DurableError) as errors:
            raise ProgramError(", ".join(type(error).__name__ for error in errors.exceptions)) from None

    async def _wait(self, node: Node) -> Any:
        timeout = None if node["ms"] is None else node["ms"] / 1000
        done, pending = await asyncio.wait(self.tasks(node), timeout=timeout, return_when=node["until"])
        order = [task.get_name() for task in done] + [task.get_name() for task in pending]
        for task in pending:
            task.cancel()
        results = await asyncio.gather(*done, *pending, return_exceptions=True)
        return order, [type(result).__name__ for result in results]

    async def _timeout(self, node: Node) -> Any:
        try:
            async with asyncio.timeout(node["ms"] / 1000):
                return await self.sequence(node)
        except TimeoutError:
            return "timeout"

    async def _wait_for(self, node: Node) -> Any:
        try:
            return await asyncio.wait_for(_Later(self.sequence, node), node["ms"] / 1000)
        except TimeoutError:
            return "timeout"

    async def _cancel(self, node: Node) -> Any:
        task = asyncio.create_task(self.sequence(node))
        await asyncio.sleep(node["ms"] / 1000)
        task.cancel()
        return [type(result).__name__ for result in await asyncio.gather(task, return_exceptions=True)]

    async def _shield(self, node: Node) -> Any:
        return await asyncio.shield(asyncio.create_task(self.sequence(node)))

    async def _spawn(self, node: Node) -> None:
        self.spawned.append(asyncio.create_task(self.sequence(node)))

    async def _catch(self, node: Node) -> Any:
        try:
            return await self.sequence(node)
        except Exception as error:
            return type(error).__name__

    async def _swallow(self, node: Node) -> Any:
        try:
            return await self.sequence(node)
        except asyncio.CancelledError:
            return "swallowed"

    async def _clean_up(self, node: Node) -> Any:
        try:
            for inner in node["body"][:-1]:
                await self.run(inner)
        finally:
            await self.run(node["body"][-1])

    async def _fail_after(self, node: Node) -> None:
        await self.sequence(node)
        raise ProgramError(f"#{node['id']}")

    async def _ctx_gather(self, node: Node) -> Any:
        result = await self.ctx.gather(*(_Later(self.run, inner) for inner in node["body"]), mode=node["mode"])
        return [type(one).__name__ for one in result] if node["mode"] == "settled" else str(result)

    async def _completed(self, node: Node) -> Any:
        order = []
        for soon in asyncio.as_completed(self.tasks(node)):
            try:
                order.append(str(await soon))
            except (ProgramError, DurableError) as error:
                order.append(type(error).__name__)
        return order

    async def _stream(self, node: Node) -> int:
        taken = 0
        stream = self.items(node)
        if node["close"]:
            async with aclosing(stream):  # type: ignore[type-var]
                async for _ in stream:
                    taken += 1
                    if taken == node["take"]:
                        break
            return taken
        async for _ in stream:
            taken += 1
            if taken == node["take"]:
                break
        return taken

    async def items(self, node: Node) -> AsyncIterator[Any]:
        try:
            for inner in node["body"]:
                yield await self.run(inner)
        finally:
            self.note(node, "closing")
            await self.ctx.step("close", work, Task(node["id"]))

    async def _lock(self, node: Node) -> Any:
        lock = asyncio.Lock()

        async def locked(inner: Node) -> None:
            async with lock:
                await self.run(inner)

        return len(await asyncio.gather(*(_Later(locked, inner) for inner in node["body"])))

    async def _event(self, node: Node) -> Any:
        event = asyncio.Event()

        async def late(inner: Node) -> None:
            await event.wait()
            await self.run(inner)

        followers = [asyncio.create_task(late(inner)) for inner in node["body"][1:]]
        try:
            await self.run(node["body"][0])
        finally:
            event.set()
        return [type(one).__name__ for one in await asyncio.gather(*followers, return_exceptions=True)]

    async def _queue(self, node: Node) -> Any:
        queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)

        async def produce(inner: Node) -> None:
            await queue.put(await self.run(inner))

        producers = [asyncio.create_task(produce(inner)) for inner in node["body"]]
        got = []
        for _ in producers:
            try:
                async with asyncio.timeout(0.05):
                    got.append(str(await queue.get()))
            except TimeoutError:
                got.append("timeout")
        for producer in producers:
            producer.cancel()
        await asyncio.gather(*producers, return_exceptions=True)
        return got
