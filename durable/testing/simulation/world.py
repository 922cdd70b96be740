"""One seed: engines, workers, clients and a nemesis; faults everywhere, then everything heals, then all must settle."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from random import Random
from typing import Any

import msgspec
from msgspec import Struct, field

from durable.core.clock import SECOND, Clock
from durable.core.definition import workflow_of
from durable.core.errors import (
    DurableError,
    IdempotencyConflict,
    NotRegistered,
    RunFinished,
    RunNotFound,
    StoreUnavailable,
)
from durable.core.hosted import TURNS
from durable.core.ids import SeededIds
from durable.core.journal import LOG, REMOTE, Entry
from durable.core.registry import Registry
from durable.core.retention import retention_of
from durable.engine.deps import Deps, Settings
from durable.engine.engine import WorkflowEngine
from durable.protocol.messages import Answer, ControlMessage, RemoteTask, Task
from durable.protocol.states import REOPENABLE, TERMINAL, Activity
from durable.store.admission import EventQuery, EventRecord
from durable.store.interface import Store
from durable.store.memory import MemoryStore
from durable.store.records import RunRecord
from durable.store.sqlite import SqliteStore
from durable.testing.simulation import witness as witnesses
from durable.testing.simulation.broker import Broker, Bus, Worker
from durable.testing.simulation.faults import FORGETS, LOSSES, MOVES, Faults, Swarm, Tripwire
from durable.testing.simulation.loop import Deadlock, Livelock, Node, SimLoop
from durable.testing.simulation.programs import CODE, STEPS, WORKFLOWS, Plan, bad_code, served
from durable.testing.simulation.server import StoreServer, at_once
from durable.testing.simulation.witness import Body, Witness
from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.interface import Transport
from durable.transports.pool import TransportPool
from durable.worker.handler import StepHandler, groups_of
from durable.worker.lines import Teller
from durable.worker.turns import TurnHandler, turn_groups

EPOCH = 1_700_000_000 * SECOND
"""When the store's clock begins, µs."""
PATIENCE = 300.0
"""Seconds of virtual time after healing by which everything must have settled."""
CORE = ("sim.program",)
"""What an engine serves that does not serve everything: children are asked for by this name alone."""
CRASHES = ("crash", "crash_before", "crash_after", "crash_recovery")


class Call(Struct):
    """A line of the clients' history. `outcome`: ok, fail (certainly not), or info (nobody knows)."""

    plan: int
    what: str
    began: float
    ended: float = 0.0
    outcome: str = "info"
    run_id: str = ""
    detail: str = ""


class Stored(Struct):
    """A run as it stands at the end."""

    run: RunRecord
    journal: list[Any]
    inbox: list[Any]


class Evidence(Struct):
    """All that the checker looks at."""

    swarm: Swarm
    plans: dict[int, Plan]
    runs: dict[str, Stored]
    bodies: list[Body]
    history: list[Call]
    log: list[Any]
    """What the store server wrote down (`server.Wrote`)."""
    leftovers: list[str]
    """Rows of finished runs that should be gone."""
    complaints: list[str]
    """Errors nobody expected, told by the loop and the product's loggers."""
    streams: dict[str, list[Any]] = {}
    """What those who watched a run were shown."""
    stuck: str = ""
    """Why the simulation could not go on, if so."""
    healed_at: float = 0.0
    ended_at: float = 0.0
    sleeps: dict[tuple[str, int], float] = {}
    """How long hosted code asked to sleep, by run and ordinal."""
    workflows: Mapping[str, Any] = field(default_factory=lambda: WORKFLOWS)
    """What ran, by name: the rules replay it."""
    events: dict[str, EventRecord] = {}
    """All that the store has accepted, by id."""


class Report(Struct):
    """What became of a seed."""

    seed: int
    evidence: Evidence
    faults: Counter[str]
    commands: Counter[str]
    steps: int
    trace_hash: str


class StoreTime:
    """The store's clock: the simulation's own time."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop

    def now(self) -> int:
        return EPOCH + int(self._loop.time() * SECOND)

    def monotonic(self) -> float:
        return self._loop.time()


class NodeClock:
    """A machine's clock: wrong by minutes, and a little fast or slow."""

    def __init__(self, loop: SimLoop, offset: float, rate: float) -> None:
        self._loop = loop
        self.offset = offset
        self._rate = rate

    def now(self) -> int:
        return EPOCH + int((self._loop.time() * self._rate + self.offset) * SECOND)

    def monotonic(self) -> float:
        return 1000.0 + self._loop.time() * self._rate


class Process:
    """An engine's process."""

    def __init__(self, slot: int, node: Node, engine: WorkflowEngine, clock: NodeClock) -> None:
        self.slot = slot
        self.node = node
        self.engine = engine
        self.clock = clock
        self.ready = False
        self.leaving = False

    @property
    def usable(self) -> bool:
        return self.ready and not self.node.dead


def _sqlite(clock: Clock) -> Store:
    store = SqliteStore(":memory:", inline=True, allow_weak_durability=True, clock=clock)
    at_once(store.open())
    return store


STORES: dict[str, Callable[[Clock], Store]] = {"memory": MemoryStore, "sqlite": _sqlite}
"""What may stand behind the server: a seed names one."""

Engines = Callable[[Deps], WorkflowEngine]


class World:
    """A simulation of one seed. `base` and `engines` make the store and an engine: a test of the tests hands in
    broken ones."""

    def __init__(
        self,
        swarm: Swarm,
        *,
        base: Callable[[Clock], Store] | None = None,
        engines: Engines = WorkflowEngine,
        trace: Callable[[str], None] | None = None,
        tripwire: Tripwire | None = None,
        plans: dict[int, Plan] | None = None,
    ) -> None:
        self.swarm = swarm
        self.loop = SimLoop(swarm.seed, order=swarm.order)  # type: ignore[abstract]
        self.faults = Faults(swarm)
        self.tripwire = tripwire or Tripwire()
        self.time = StoreTime(self.loop)
        self.base: Store = (base or STORES[swarm.store])(self.time)
        self.server = StoreServer(self.loop, self.base, self.faults, self.tripwire)
        self.bus = Bus(self.loop, self.faults)
        self.broker = Broker(self.loop, self.faults, self.tripwire, holds=swarm.holds, seed=swarm.seed)
        self.spare = Broker(self.loop, self.faults, self.tripwire, holds=swarm.holds, seed=f"{swarm.seed}/spare")
        self.witness = Witness(self.loop, self.server.seqs)
        self.clients = Node("clients")
        self.slots: list[Process | None] = [None] * (swarm.engines + swarm.door)
        self.worker_slots: list[Node | None] = [None] * swarm.workers
        self.history: list[Call] = []
        self.complaints: list[str] = []
        self.streams: dict[str, list[Any]] = {}
        self.healed_at = 0.0
        self._engines = engines
        self._trace = trace
        self._digest = hashlib.sha256()
        self._births = 0
        self._nodes = [self.loop.world, self.clients]
        self._random = Random(f"world/{swarm.seed}")
        self._grave: list[object] = []
        lossy = bool(swarm.kinds & LOSSES) and swarm.shared and not swarm.asks
        self._forgets = bool(swarm.kinds & FORGETS.keys()) and (swarm.asks or lossy)
        self.workflows = served(
            turn_timeout=swarm.turn_timeout, step_timeout=8.0 if lossy else None, programs_too=swarm.hosts_programs
        )
        self.eventful = swarm.events and swarm.retention is None  # a wait looks back only at events that are still kept
        span = 0.8 * swarm.safety
        drawn: dict[str, Any] = {
            "span": span,
            "lossy": lossy,
            "more": swarm.more,
            "hosts": swarm.hosting,
            "talks": swarm.talks,
            "events": self.eventful,
        }
        self.plans = plans or {n: Plan(swarm.seed, n, **drawn) for n in swarm.runs}
        self._open_plans = len(self.plans)
        self._closed: set[int] = set()
        """Plans whose runs have ended for good: nobody will reopen them."""
        self.server.trace = self._told

    # ------------------------------------------------------------------ one seed

    def run(self) -> Report:
        """From the first start to the last check's evidence."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", RuntimeWarning)
            warnings.showwarning = self._warned  # type: ignore[assignment]
            return self._run()

    def _run(self) -> Report:
        logs = _Complaints(self)
        logger = logging.getLogger("durable")
        propagate, level = logger.propagate, logger.level
        logger.addHandler(logs)
        logger.propagate = self._trace is not None
        logger.setLevel(logging.INFO if self._trace is not None else logging.ERROR)
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        collecting = gc.isenabled()
        gc.disable()
        witnesses.install(self.witness)
        stuck = ""
        try:
            self.loop.run(self._main)
        except (Deadlock, Livelock) as error:
            stuck = f"{type(error).__name__}: {error}"
        finally:
            witnesses.install(None)
            report = self._report(stuck)
            logger.removeHandler(logs)
            logger.setLevel(logging.CRITICAL + 1)
            self._bury()
            logger.propagate = propagate
            logger.setLevel(level)
            if collecting:
                gc.enable()
            sys.unraisablehook = hook
        return report

    def _warned(self, message: Warning | str, *rest: Any) -> None:
        if not self.loop.node.dead:
            self.complaints.append(f"{self.loop.node.name}: {message}")

    def _bury(self) -> None:
        """Let go of everything that is left, now: destructors must not run in the midst of another seed."""
        warnings.showwarning = lambda *_, **__: None
        at_once(self.base.close())
        self.loop.close()
        for node in self._nodes:
            node.grave.clear()
            node.held.clear()
        self.tripwire.tripped = [(number, when, Node(node.name)) for number, when, node in self.tripwire.tripped]
        vars(self).clear()
        gc.collect()

    async def _main(self) -> None:
        swarm, loop = self.swarm, self.loop
        for slot in range(len(self.slots)):
            self._boot(slot)
        if swarm.shared:
            for slot in range(swarm.workers):
                self._boot_worker(slot)
        loop.spawn(loop.world, self._supervise())
        for plan in self.plans.values():
            loop.spawn(self.clients, self._client(plan))
        for move in swarm.moves:
            loop.spawn(loop.world, self._move(move))
        if self._forgets:
            loop.spawn(loop.world, self._forgetting())
        await asyncio.sleep(swarm.safety)
        self._heal()
        deadline = loop.time() + PATIENCE + 10 * swarm.lease
        while loop.time() < deadline:
            await asyncio.sleep(0.5)
            if self._settled():
                break
        # Stragglers: late deliveries, zombies' last requests.
        await asyncio.sleep(min(6.0, 2.0 + swarm.lease))

    def _heal(self) -> None:
        """Everything works from now on. Some engines never come back: a core is enough."""
        self.healed_at = self.loop.time()
        self.faults.healed = True
        self.server.cut.clear()
        self.tripwire.armed.clear()
        for process in self.slots:
            if process is not None and process.node.paused:
                self.loop.resume(process.node)
        for node in self.worker_slots:
            if node is not None and node.paused:
                self.loop.resume(node)

    def _settled(self) -> bool:
        if self._open_plans:
            return False
        # A start that came after its key's run had been deleted made a run that no client knows.
        done = {tag for run, *_ in self.server.pruned.values() for tag in run.tags}
        runs = self._all_runs()
        forgotten = {run.id for run in runs if done & {*run.tags}}
        return all(run.status in TERMINAL or run.id.partition(".")[0] in forgotten for run in runs)

    def _all_runs(self) -> list[RunRecord]:
        return self.server.runs()

    # ------------------------------------------------------------------ processes

    def _boot(self, slot: int) -> None:
        """A new incarnation in this slot."""
        swarm = self.swarm
        self._births += 1
        name = f"e{slot}.{self._births}"
        node = Node(name)
        self._nodes.append(node)
        draw = Random(f"node/{swarm.seed}/{name}")
        clock = NodeClock(self.loop, draw.uniform(-600, 600), 1 + draw.uniform(-swarm.drift, swarm.drift))
        ids = SeededIds(f"{swarm.seed}/{name}")
        store = self.server.connect(node)
        members: dict[str, Transport] = {
            "default": self.broker.end(node) if swarm.shared else EventEmitterTransport(heartbeat_interval=1.0)
        }
        if swarm.shared and swarm.pooled:
            members["spare"] = self.spare.end(node)
        transport = members["default"]
        settings = Settings(
            lease=swarm.lease,
            poll_every=swarm.poll_every,
            tick=swarm.tick,
            hot_for=swarm.hot_for,
            hot_limit=swarm.hot_limit,
            cold=swarm.cold,
            max_running=swarm.max_running,
            cancel_grace=swarm.cancel_grace,
            max_recovery_attempts=6,
            execute=slot < swarm.engines,
            threads=False,
            retention=retention_of(swarm.retention),
            retention_every=1.0,
            ask_every=swarm.ask_every,
            dispatch_patience=1.0 if swarm.seed % 2 else 0.0,
        )
        serves = [workflow for name, workflow in self.workflows.items() if slot or not swarm.partial or name in CORE]
        registry = Registry([*serves, *STEPS])
        engine = self._engines(
            Deps(
                store=store,
                registry=registry,
                transport=TransportPool(members, dispatch_timeout=swarm.dispatch_timeout),
                control_plane=self.bus.plane(node),
                clock=clock,
                ids=ids,
                settings=settings,
            )
        )
        process = Process(slot, node, engine, clock)
        self._grave.append(process)
        self.slots[slot] = process
        self.loop.spawn(node, self._live(process, transport, registry, clock))

    async def _live(self, process: Process, transport: Transport, registry: Registry, clock: NodeClock) -> None:
        """In the engine's process."""
        while True:
            try:
                await process.engine.start()
                break
            except StoreUnavailable:
                await asyncio.sleep(0.1)
        if not self.swarm.shared:
            code = Registry(CODE)
            await transport.serve(groups_of(registry), self._steps(process.node, registry, clock))
            await transport.serve(turn_groups(code), TurnHandler(code, clock, threads=0))
        process.ready = True

    def _boot_worker(self, slot: int) -> None:
        self._births += 1
        node = Node(f"w{slot}.{self._births}")
        self._nodes.append(node)
        draw = Random(f"node/{self.swarm.seed}/{node.name}")
        clock = NodeClock(self.loop, draw.uniform(-600, 600), 1.0)
        step = self._steps(node, Registry(STEPS), clock)
        turn = TurnHandler(Registry(CODE), clock, threads=0)

        async def take(task: Task) -> Answer:
            return await (step if isinstance(task, RemoteTask) else turn)(task)

        worker = Worker(node, take)
        self.broker.workers.append(worker)
        self.spare.workers.append(worker)
        self.worker_slots[slot] = node

    def _steps(self, node: Node, registry: Registry, clock: NodeClock) -> StepHandler:
        """A worker's handler, which tells lines live over the control plane."""
        plane = self.bus.plane(node)

        async def tell(event: dict[str, Any]) -> None:
            await plane.publish_control(ControlMessage(sender=f"worker {node.name}", kind="event", event=event))

        return StepHandler(registry, clock, threads=0, teller=Teller(tell, lambda: plane.audience))

    async def _supervise(self) -> None:
        """Processes that are gone come back, as somebody new."""
        while True:
            await asyncio.sleep(0.05 + 0.5 * self._random.random())
            for slot, process in enumerate(self.slots):
                if process is not None and process.node.dead:
                    self._grave.append(process)
                    self.slots[slot] = None
                    delay = self._random.random() * 2 * self.swarm.lease
                    self.loop.post(self.loop.world, delay, self._boot, slot)
            for slot, node in enumerate(self.worker_slots):
                if self.swarm.shared and node is not None and node.dead:
                    self.worker_slots[slot] = None
                    self.loop.post(self.loop.world, self._random.random() * 3, self._boot_worker, slot)

    # ------------------------------------------------------------------ the nemesis

    async def _move(self, number: int) -> None:
        swarm, loop = self.swarm, self.loop
        draw = Random(f"move/{swarm.seed}/{number}")
        kinds = sorted(kind for kind in MOVES if kind in swarm.kinds)
        if not swarm.shared:
            kinds = [kind for kind in kinds if not kind.startswith("worker")]
        kind = draw.choice(kinds or ["crash"])
        await asyncio.sleep(swarm.safety * draw.random())
        if self.faults.healed:
            return
        if kind.startswith("worker"):
            nodes = [node for node in self.worker_slots if node is not None and not node.dead]
            if nodes:
                await self._upset_worker(kind, draw.choice(nodes), draw)
            return
        living = [process for process in self.slots if process is not None and process.usable]
        if living:
            await getattr(self, "_move_" + kind)(draw.choice(living), draw)
            loop.node = loop.world

    async def _forgetting(self) -> None:
        """Now and then a broker forgets everything."""
        draw = Random(f"forgetting/{self.swarm.seed}")
        while True:
            await asyncio.sleep(draw.uniform(0.5, 1.0) * self.swarm.safety / 3)
            if self.faults.healed:
                return
            self._happened("broker_forgets", self.loop.world)
            (self.spare if self.swarm.pooled and draw.random() < 0.3 else self.broker).forget()

    def _happened(self, kind: str, node: Node) -> None:
        self.faults.tally[kind] += 1
        self._told(f"{self.loop.time():9.4f} {node.name:<9} {kind.upper()}")

    async def _upset_worker(self, kind: str, node: Node, draw: Random) -> None:
        self._happened(kind, node)
        if kind == "worker_crash":
            self.loop.crash(node)
        else:
            self.loop.pause(node)
            await asyncio.sleep(draw.uniform(1.0, 8.0))
            self.loop.resume(node)

    async def _move_crash(self, process: Process, draw: Random) -> None:
        self._happened("crash", process.node)
        self.loop.crash(process.node)

    async def _move_crash_before(self, process: Process, draw: Random) -> None:
        await self._arm(process, "before", "crash_before")

    async def _move_crash_after(self, process: Process, draw: Random) -> None:
        await self._arm(process, "after", "crash_after")

    async def _arm(self, process: Process, when: str, kind: str) -> None:
        self.tripwire.armed[process.node] = when
        while not self.faults.healed and not process.node.dead:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if any(node is process.node for _, _, node in self.tripwire.tripped):
            self._happened(kind, process.node)

    async def _move_crash_recovery(self, process: Process, draw: Random) -> None:
        self.loop.crash(process.node)
        self._happened("crash", process.node)
        others = [other for other in self.slots if other is not None and other.usable]
        if others:
            await self._arm(draw.choice(others), "claim", "crash_recovery")

    async def _move_pause(self, process: Process, draw: Random) -> None:
        self._happened("pause", process.node)
        self.loop.pause(process.node)
        await asyncio.sleep(self.swarm.lease * draw.uniform(0.5, 4.0))
        if process.node.paused:
            self.loop.resume(process.node)

    async def _move_partition(self, process: Process, draw: Random) -> None:
        self._happened("partition", process.node)
        self.server.cut[process.node] = self.loop.time() + self.swarm.lease * draw.uniform(0.5, 4.0)

    async def _move_restart(self, process: Process, draw: Random) -> None:
        self._happened("restart", process.node)
        process.ready = False
        task = self.loop.spawn(process.node, process.engine.drain(draw.choice((0.0, 0.5, 3.0))))
        for _ in range(300):
            if task.done() or process.node.dead:
                break
            await asyncio.sleep(0.1)
        if task.done() and not task.cancelled() and task.exception() is not None:
            self.complaints.append(f"drain raised {task.exception()!r}")
        self.loop.crash(process.node)

    async def _move_clock_jump(self, process: Process, draw: Random) -> None:
        self._happened("clock_jump", process.node)
        process.clock.offset = draw.uniform(-600, 600)

    # ------------------------------------------------------------------ clients

    async def _ask(
        self,
        plan: Plan,
        what: str,
        act: Callable[[WorkflowEngine], Awaitable[Any]],
        *,
        timeout: float = 5.0,
        detail: str = "",
    ) -> Call:
        """One request to any engine. What becomes of it is in the history."""
        call = Call(plan.number, what, self.loop.time(), detail=detail)
        self.history.append(call)
        usable = [process for process in self.slots if process is not None and process.usable]
        if not usable:
            await asyncio.sleep(0.2)
            call.outcome, call.ended = "fail", self.loop.time()
            return call
        process = self._random.choice(usable)
        reply: asyncio.Future[tuple[str, Any]] = self.loop.create_future()

        async def there() -> None:
            try:
                answer: tuple[str, Any] = ("ok", await act(process.engine))
            except (RunNotFound, RunFinished, IdempotencyConflict, NotRegistered) as error:
                answer = ("fail", error)
            except (DurableError, TimeoutError, asyncio.CancelledError) as error:
                answer = ("info", error)
            self.loop.post(self.clients, self.faults.latency(), _give, reply, answer)

        self.loop.post(process.node, self.faults.latency(), self._spawn_there, process.node, there)
        try:
            async with asyncio.timeout(timeout):
                outcome, value = await reply
        except TimeoutError:
            outcome, value = "info", "no answer"
        call.outcome, call.ended = outcome, self.loop.time()
        if outcome != "ok":
            call.detail += f" {value!r}"
        elif isinstance(value, str):
            call.run_id = value
        elif value is not None:
            call.detail += f" {value!r}"
        return call

    def _spawn_there(self, node: Node, there: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.loop.spawn(node, there())

    async def _client(self, plan: Plan) -> None:
        await asyncio.sleep(plan.at)
        try:
            run_id = await self._start(plan)
            if run_id is not None:
                await self._attend(plan, run_id)
        finally:
            self._open_plans -= 1

    async def _start(self, plan: Plan) -> str | None:
        """The run's id; None if there is certainly none."""
        at = self.time.now() + SECOND if plan.later else None

        async def act(engine: WorkflowEngine) -> str:
            handle = await engine.start_run(
                self.workflows[plan.workflow],
                plan.input,
                key=plan.key,
                at=at,
                tags=(f"plan-{plan.number}",),
                priority=plan.priority,
            )
            return handle.id

        while True:
            if plan.doubled:
                calls = list(await asyncio.gather(*[self._ask(plan, "start", act) for _ in range(2)]))
            else:
                calls = [await self._ask(plan, "start", act)]
            for call in calls:
                if call.outcome == "ok":
                    return call.run_id
            if plan.key is None and any(call.outcome == "info" for call in calls):
                # Nobody knows, and nobody may try again: look after everything is well again.
                await self._all_arrived()
                found = [run.id for run in self._all_runs() if f"plan-{plan.number}" in run.tags]
                return found[0] if found else None
            await asyncio.sleep(0.3)

    async def _attend(self, plan: Plan, run_id: str) -> None:
        draw = Random(f"client/{self.swarm.seed}/{plan.number}")
        work: list[Coroutine[Any, Any, None]] = []
        for index, name in enumerate(plan.signals + plan.extra):
            delay = draw.random() * 4.0 if plan.delays is None else plan.delays[index]
            work.append(self._signal(plan, run_id, name, f"{name}{index}", delay, draw.random() < 0.3))
        chance = Random(f"client, events/{self.swarm.seed}/{plan.number}")
        for name, number in plan.events:
            work.append(self._publish(plan, name, number, chance.random() * 3.0, chance.random() < 0.3))
        if plan.cancel_at is not None:
            work.append(self._cancel(plan, run_id))
        if plan.watches:
            work.append(self._watch(plan, run_id))
        work.append(self._attend_end(plan, run_id, draw.random() * 2.0))
        await asyncio.gather(*work)

    async def _signal(self, plan: Plan, run_id: str, name: str, id: str, delay: float, doubled: bool) -> None:
        await asyncio.sleep(delay)

        async def act(engine: WorkflowEngine) -> None:
            await engine.signal(run_id, name, f"payload of {id}", id=id)

        while True:
            again = [self._ask(plan, "signal", act, detail=id) for _ in range(2 if doubled else 1)]
            for call in await asyncio.gather(*again):
                call.run_id = run_id
                if call.outcome == "ok" or (call.outcome == "fail" and plan.number in self._closed):
                    return
            await asyncio.sleep(0.5)

    async def _publish(self, plan: Plan, name: str, number: int, delay: float, doubled: bool) -> None:
        await asyncio.sleep(delay)
        key = f"{plan.number}/{name}/{number}"

        async def act(engine: WorkflowEngine) -> str:
            return (await engine.send_event(name, {"plan": plan.number, "n": number}, id=key)).event_id

        while True:
            again = [self._ask(plan, "publish", act, detail=key) for _ in range(2 if doubled else 1)]
            if any(call.outcome == "ok" for call in await asyncio.gather(*again)):
                return
            await asyncio.sleep(0.5)

    async def _cancel(self, plan: Plan, run_id: str) -> None:
        assert plan.cancel_at is not None
        await asyncio.sleep(max(0.0, plan.cancel_at - self.loop.time()))

        async def act(engine: WorkflowEngine) -> None:
            await engine.cancel(run_id, "changed my mind")

        for _ in range(20):
            call = await self._ask(plan, "cancel", act)
            call.run_id = run_id
            if call.outcome != "info":
                return
            await asyncio.sleep(0.3)

    async def _attend_end(self, plan: Plan, run_id: str, delay: float) -> None:
        try:
            await self._wait(plan, run_id, delay)
        finally:
            self._closed.add(plan.number)

    async def _wait(self, plan: Plan, run_id: str, delay: float) -> None:
        """Wait for its end, and have it requeued once if it went wrong."""
        left = 1 if plan.requeues else 0

        async def act(engine: WorkflowEngine) -> str:
            final = await engine.wait(run_id, 20.0)
            return msgspec.json.encode([final.status, msgspec.Raw(final.output or b"null")]).decode()

        async def requeue(engine: WorkflowEngine) -> None:
            await engine.requeue(run_id)

        while not self._overdue():
            if plan.waits:
                call = await self._ask(plan, "wait", act, timeout=25.0)
                call.detail, call.run_id = call.run_id, run_id
                if call.outcome != "ok":
                    await asyncio.sleep(0.3)
                    continue
            record = at_once(self.base.get([run_id]))[0]
            if record is None and run_id in self.server.pruned:
                return
            if plan.blocks and record is not None and record.activity is Activity.BLOCKED and not bad_code():
                call = await self._ask(plan, "requeue", requeue)
                call.run_id = run_id
            if record is None or record.status not in TERMINAL:
                await asyncio.sleep(0.5)
                continue
            if record.status not in REOPENABLE or not left or self.faults.healed:
                return
            left -= 1
            await asyncio.sleep(delay)
            call = await self._ask(plan, "requeue", requeue)
            call.run_id = run_id
            # One that nobody answered may still arrive.
            await asyncio.sleep(1.0)
            if call.outcome == "info":
                await self._all_arrived()

    async def _watch(self, plan: Plan, run_id: str) -> None:
        """Follow the journal, through whichever engine answers, each time from where it broke off."""
        seen = self.streams.setdefault(run_id, [])

        async def act(engine: WorkflowEngine) -> str:
            async with asyncio.timeout(8.0):
                async for entry in engine.watch(run_id, after=seen[-1].seq if seen else 0):
                    mine = seen[-1].seq if seen else 0
                    if entry.seq <= mine:
                        break  # another request of ours, given up and still running, was faster
                    seen.append(entry)
            return "over"

        while not self._overdue():
            await self._ask(plan, "watch", act, timeout=9.0)
            await asyncio.sleep(0.5)
            if plan.number in self._closed:
                call = await self._ask(plan, "watch", act, timeout=9.0)
                if call.outcome == "ok" or run_id in self.server.pruned:
                    return

    async def _all_arrived(self) -> None:
        """Wait until nothing that was held up can arrive any more."""
        while not self.faults.healed or self.loop.time() < max(self.healed_at + 6.0, self.server.latest + 1.0):  # noqa: ASYNC110
            await asyncio.sleep(0.5)

    def _overdue(self) -> bool:
        return self.faults.healed and self.loop.time() > self.healed_at + PATIENCE

    # ------------------------------------------------------------------ evidence

    def _told(self, line: str) -> None:
        self._digest.update(line.encode())
        if self._trace is not None:
            self._trace(line)

    def _report(self, stuck: str) -> Report:
        runs = {run_id: Stored(*copies) for run_id, copies in self.server.pruned.items()}
        commands: Counter[str] = Counter()
        for record in reversed(self._all_runs()):
            journal = at_once(self.base.page(record.id, 0, 1_000_000))
            inbox = at_once(self.base.inbox([(record.id, 0)]))[0]
            runs[record.id] = Stored(record, journal, inbox)
        runs = dict(sorted(runs.items(), key=lambda item: item[1].run.created_at))
        for stored in runs.values():
            for entry in stored.journal:
                commands[f"{entry.kind} {entry.status}"] += 1
                self._digest.update(repr(entry).encode())
        for node, context in self.loop.unhandled:
            if not node.dead:
                self.complaints.append(f"{node.name}: {context.get('message')}: {context.get('exception')!r}")
        for plan in self.plans.values():
            _count_ops(plan.ops, commands)
        evidence = Evidence(
            swarm=self.swarm,
            plans=self.plans,
            runs=runs,
            bodies=self.witness.bodies,
            history=self.history,
            log=self.server.log,
            leftovers=_leftovers(self.base, runs),
            complaints=self.complaints,
            streams=self.streams,
            stuck=stuck,
            healed_at=self.healed_at,
            ended_at=self.loop.time(),
            sleeps=self.witness.sleeps,
            workflows=self.workflows,
            events=_events(self.base) if self.eventful else {},
        )
        commands.update(self.broker.counts + self.spare.counts)
        if commands.pop("asked in vain", 0):
            self.complaints.append("a broker that cannot tell what it holds was asked")
        _count_hosted(evidence, self.broker.decided | self.spare.decided, commands)
        return Report(self.swarm.seed, evidence, self.faults.tally, commands, self.loop.steps, self._digest.hexdigest())


class _Complaints(logging.Handler):
    """The product's own logs: an exception it did not expect is a finding."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is None or self._world.loop.node.dead:
            return
        error = record.exc_info[1]
        if error is not None and not isinstance(error, StoreUnavailable):
            where = _place(error)
            self._world.complaints.append(f"{self._world.loop.node.name}: {record.getMessage()}: {error!r} at {where}")


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    last = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        last = f"{code.co_filename.rpartition('durable/')[2]}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return last


def _events(base: Store) -> dict[str, EventRecord]:
    return {event.id: event for event in at_once(base.events(EventQuery(limit=100_000)))}


def _leftovers(base: Store, runs: dict[str, Stored]) -> list[str]:
    tables = getattr(base, "_tables", None)
    if tables is None or not isinstance(base, MemoryStore):
        return []
    found = [f"waiter of {run_id}" for run_id in tables.waiters if runs[run_id].run.status in TERMINAL]
    found += [f"slot of {run_id}" for run_id in tables.slots if runs[run_id].run.status in TERMINAL]
    for owner, owned in tables.owned.items():
        found += [f"ownership of {run_id} by {owner}" for run_id in owned if runs[run_id].run.status in TERMINAL]
    return found


def _count_hosted(evidence: Evidence, decided: set[str], commands: Counter[str]) -> None:
    """Turns, decisions and lines: how much of each there was."""
    for stored in evidence.runs.values():
        hosted = workflow_of(evidence.workflows[stored.run.workflow]).hosting is not None
        if hosted:
            commands[f"hosted {stored.run.status.value}"] += 1
        lines: list[Entry] = []
        for entry in stored.journal:
            if entry.kind == LOG and entry.key is not None and entry.attempt:
                lines.append(entry)
            elif entry.kind == REMOTE and (entry.ordinal or 0) >= TURNS:
                if entry.status == "dispatched":
                    commands["hosted turn" if entry.attempt == 1 else "hosted turn again"] += 1
                elif entry.status == "completed":
                    commands["hosted decision"] += 1
                    decided.discard(msgspec.json.decode(entry.payload or b"{}")["taskId"])
            elif entry.kind == REMOTE and entry.status in ("completed", "failed", "retrying"):
                late = sum(one.at == entry.at for one in lines if (one.key, one.attempt) == (entry.key, entry.attempt))
                commands["line with result"] += late
        commands["line live"] += len(lines)
    commands["line live"] -= commands["line with result"]
    commands["hosted decision passed over"] += len(decided)


def _count_ops(op: Any, commands: Counter[str]) -> None:
    if isinstance(op, dict):
        if "op" in op:
            commands[f"op {op['op']}"] += 1
        for value in op.values():
            _count_ops(value, commands)
    elif isinstance(op, list):
        for value in op:
            _count_ops(value, commands)


def _give(reply: asyncio.Future[tuple[str, Any]], answer: tuple[str, Any]) -> None:
    if not reply.done():
        reply.set_result(answer)
