"""Drives a runner as an engine would, without one: keeps memos, asks for passes until a run ends, in time of its own."""

from __future__ import annotations

import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

Ask = Callable[[dict[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]
"""Takes an invoke, gives status and body: over whatever link."""

START = 1_767_225_600_000
"""When runs begin, ms."""


class Ended(Exception):
    """A run that failed."""


class LittleEngine:
    """One run. `ours`: it tells order and times, as our engine does; else it speaks the plain dialect."""

    def __init__(
        self,
        ask: Ask,
        workflow: str,
        data: Any = None,
        *,
        ours: bool = True,
        run_id: str = "run-1",
        start: float = START,
    ) -> None:
        self.ask = ask
        self.workflow = workflow
        self.data = data
        self.ours = ours
        self.run_id = run_id
        self.start = self.now = start
        self.memos: dict[str, dict[str, Any]] = {}
        self.due: dict[str, tuple[float, dict[str, Any] | None]] = {}
        """When something comes of an operation, and what; None: it is to be run again."""
        self.attempts: dict[str, int] = {}
        self.order = 0
        self.seen: int | None = None
        self.patches: list[str] = []
        self.passes: list[tuple[int, dict[str, Any]]] = []
        self.logs: dict[tuple[str, int], str] = {}
        self.ops: list[dict[str, Any]] = []
        """Every operation that was new, in order of coming."""
        self.events: list[tuple[float, str, Any]] = []
        """What is sent, and when: (ms after the start, name, data)."""
        self.extra: dict[str, Any] = {}
        """Of ctx."""

    def invoke(self) -> dict[str, Any]:
        ctx: dict[str, Any] = {"runId": self.run_id, "attempt": 1, "app": "shop.dev", "workflow": self.workflow}
        if self.ours:
            ctx |= {"now": self.now, "startedAt": self.start, "attempts": self.attempts, "patches": self.patches}
            if self.seen is not None:
                ctx["seen"] = self.seen
        return {"event": {"name": "go", "data": self.data}, "steps": dict(self.memos), "ctx": ctx | self.extra}

    async def run(self, passes: int = 500) -> Any:
        """What the workflow returned. Raises Ended."""
        for _ in range(passes):
            told = self.order
            status, body = await self.ask(self.invoke())
            self.passes.append((status, body))
            self.seen = told
            for line in body.get("logs", []):
                self.logs.setdefault((line["scope"], line["index"]), line["message"])
            self.patches += body.get("patches", [])
            if status == 200:
                return body["data"]
            if status != 206:
                raise Ended(body["error"]["message"], body["error"])
            if not await self.take(body):
                self.advance()
        raise AssertionError("a run without end")

    async def take(self, body: dict[str, Any]) -> bool:
        """Whether something has been settled at once."""
        settled = False
        reported = {one["id"] for one in body["opcodes"]} | set(body.get("parked", ()))
        for hash in [hash for hash in self.due if hash not in reported and self.due[hash][1] is not None]:
            del self.due[hash], self.memos[hash]
        for one in body["opcodes"]:
            if one["id"] not in self.memos:
                self.ops.append(one)
                settled |= await getattr(self, f"on_{one['op']}")(one)
        return settled

    def advance(self) -> None:
        """To the next thing that happens."""
        assert self.due, f"nothing is under way: {self.passes[-1]}"
        hash = min(self.due, key=lambda hash: self.due[hash][0])
        at, memo = self.due.pop(hash)
        self.now = max(self.now, at)
        if memo is None:
            del self.memos[hash]
        else:
            self.settle(hash, memo)

    def settle(self, hash: str, memo: dict[str, Any]) -> bool:
        self.order += 1
        self.memos[hash] = memo | ({"order": self.order, "at": self.now} if self.ours else {})
        return True

    def park(self, hash: str, at: float, memo: dict[str, Any] | None) -> bool:
        self.memos[hash] = {"pending": True}
        self.due[hash] = (at, memo)
        return False

    # ------------------------------------------------------------------ operations

    async def on_StepRun(self, one: dict[str, Any]) -> bool:
        if "error" not in one:
            return self.settle(one["id"], {"data": one.get("data")})
        failed = self.attempts[one["id"]] = self.attempts.get(one["id"], 0) + 1
        rules = one["retry"]
        if one.get("retriable") is False or failed >= rules["maxAttempts"]:
            return self.settle(one["id"], {"error": one["error"]})
        return self.park(one["id"], self.now + max(rules["initialDelayMs"], one.get("retryAfterMs", 0)), None)

    async def on_Sleep(self, one: dict[str, Any]) -> bool:
        return self.park(one["id"], self.now + one["sleepMs"], {})

    async def on_SleepUntil(self, one: dict[str, Any]) -> bool:
        return self.park(one["id"], one["sleepUntilMs"], {})

    async def on_Emit(self, one: dict[str, Any]) -> bool:
        return self.settle(one["id"], {})

    async def on_RunWorkflow(self, one: dict[str, Any]) -> bool:
        child = LittleEngine(
            self.ask,
            one["childName"],
            one.get("childData"),
            ours=self.ours,
            run_id=f"{self.run_id}.child.{one['seq']}",
            start=self.now,
        )
        memo: dict[str, Any]
        try:
            memo = {"data": await child.run()}
        except Ended as error:
            memo = {"error": error.args[1]}
        return self.park(one["id"], child.now, memo)

    async def on_SendTask(self, one: dict[str, Any]) -> bool:
        """A worker that is slower than anything local and faster than any timer; no two tasks take the same."""
        child = self.run_id.partition(".")[2]
        latency = 0.1 + zlib.crc32(f"{one['seq']} {child}".encode()) % 9_973 * 1e-4
        task = one["input"]
        if task["failures"] >= 2:
            error = {"message": "no", "code": "error", "type": "ProgramError"}
            return self.park(one["id"], self.now + latency, {"error": error})
        return self.park(one["id"], self.now + latency, {"data": task["value"] * 7 + 3})

    async def on_WaitForEvent(self, one: dict[str, Any]) -> bool:
        until = self.now + one.get("timeoutMs", 10**12)
        for after, name, data in self.events:
            if name == one["eventName"] and self.now <= self.start + after <= until:
                return self.park(one["id"], self.start + after, {"data": data})
        return self.park(one["id"], until, {"data": None})

    async def on_WaitForSignal(self, one: dict[str, Any]) -> bool:
        for index, (after, name, data) in enumerate(self.events):
            if name == one["signalName"]:
                del self.events[index]
                return self.park(one["id"], max(self.now, self.start + after), {"data": data})
        return self.park(one["id"], self.now + 10**12, {"data": None})


def asking(handler: Any) -> Ask:
    """A handler of passes, asked as over a wire: everything is bytes on the way."""
    import msgspec

    from durable.protocol.runners import read_invoke

    async def ask(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        result = await handler(read_invoke(json.dumps(invoke).encode()))
        return result.status, json.loads(msgspec.json.encode(result.body))

    return ask
