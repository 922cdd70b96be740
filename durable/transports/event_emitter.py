"""The in-process transport, and the default: engine end, worker end and control plane on one page.

Tasks wait on a shelf in memory and run as asyncio tasks of this process, so they live and die with it. Every end of one
shelf (an instance and its `peer`s) may dispatch, serve and hear; a result goes to any one end that takes it. No thread
and no clock but the loop's: under a loop with virtual time the order of everything is fixed.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable, Collection, Sequence

from msgspec import Raw

from durable.control_plane.interface import ControlHandler
from durable.control_plane.local import LocalControlPlane
from durable.core.errors import EngineStopped, MessageRefused, TransportError
from durable.protocol.messages import Answer, ControlMessage, Heartbeat, Task, sanitize
from durable.transports.answers import crashed, no_handler, too_large
from durable.transports.interface import Capabilities, Concurrency, HeartbeatHandler, ResultHandler, TaskHandler
from durable.transports.serving import REFUSAL_MAX, ROOM_SECONDS, beat_of

log = logging.getLogger("durable.transports")

REDELIVERY_FIRST = 0.05
REDELIVERY_MAX = 5.0
"""Seconds between two attempts to hand over a result nobody could make durable."""


class _Held:
    """A task from `dispatch` until its result was taken."""

    def __init__(self, task: Task, number: int) -> None:
        self.task = task
        self.order = (-(task.priority or 0), number)
        self.work: asyncio.Task[None] | None = None
        self.server: _Server | None = None
        self.dropped = False
        """Cancelled by the engine: nobody waits for a result."""
        self.gone = False
        """Taken back while it waited; its place in the heap is passed over."""

    def __lt__(self, other: _Held) -> bool:
        return self.order < other.order


class _Server:
    """One `serve`: a set of names with its own bound."""

    def __init__(
        self, end: EventEmitterTransport, groups: Collection[str], handler: TaskHandler, concurrency: Concurrency
    ) -> None:
        self.end = end
        self.groups = tuple(dict.fromkeys(sanitize(group) for group in groups))
        self.handler = handler
        self.concurrency = concurrency
        self.under_way = 0

    @property
    def free(self) -> int:
        bound = self.concurrency if isinstance(self.concurrency, int) else self.concurrency()
        return bound - self.under_way


class _Shelf:
    """What the ends share."""

    def __init__(self) -> None:
        self.number = 0
        self.held: dict[str, dict[int, _Held]] = {}
        """By step id, then attempt."""
        self.waiting: dict[str, list[_Held]] = {}
        """Heaps by step name. A name in here has been served once; with no server now, its tasks wait for the next."""
        self.servers: list[_Server] = []
        self.ends: list[EventEmitterTransport] = []
        self.listeners: list[tuple[EventEmitterTransport, ResultHandler]] = []
        self.heartbeat_listeners: list[tuple[EventEmitterTransport, HeartbeatHandler]] = []
        self.turn = 0

    def put(self, held: _Held) -> None:
        """Start it where there is room, or let it wait."""
        group = self.group_of(held.task)
        candidates = [s for s in self.servers if group in s.groups and s.end._starts and s.free > 0]
        if candidates:
            # The freest, and of equals the first: two engines of one process share the load.
            server = max(candidates, key=lambda s: s.free)
            server.end._begin(server, held)
        else:
            heapq.heappush(self.waiting.setdefault(group, []), held)

    def refill(self, server: _Server) -> None:
        """Give a server with room what has waited longest among its names, higher priority first."""
        while server.free > 0 and server in self.servers and server.end._starts:
            heaps = [heap for group in server.groups if (heap := self.waiting[group])]
            if not heaps:
                return
            held = heapq.heappop(min(heaps, key=lambda heap: heap[0].order))
            if not held.gone:
                server.end._begin(server, held)

    def group_of(self, task: Task) -> str:
        """Where it waits: its partition's group if that has been served, else its plain name's. In one process partitions
        keep nobody apart."""
        own = sanitize(task.name)
        return task.group if task.group.startswith(own + "@") and task.group in self.waiting else own

    def holds(self, held: _Held) -> bool:
        return self.held.get(held.task.id, {}).get(held.task.attempt) is held

    def hold(self, held: _Held) -> None:
        self.held.setdefault(held.task.id, {})[held.task.attempt] = held

    def forget(self, held: _Held) -> None:
        if self.holds(held):
            attempts = self.held[held.task.id]
            del attempts[held.task.attempt]
            if not attempts:
                del self.held[held.task.id]

    def take_back(self, held: _Held) -> None:
        """Of a task that waits."""
        held.gone = True
        self.forget(held)


class EventEmitterTransport:
    """One end of an in-process transport. A `peer` is another, with a life of its own. Applications that are given one
    instance take an `end` each."""

    def __init__(
        self, *, name: str = "event-emitter", heartbeat_interval: float = 5.0, max_message: int = 64 * 1024 * 1024
    ) -> None:
        self._capabilities = Capabilities(
            name=name, shared=False, holds=True, broadcast=True, heartbeats=True, max_message=max_message
        )
        self._heartbeat_interval = heartbeat_interval
        self._shelf = _Shelf()
        self._control = LocalControlPlane()
        self._starts = 0
        self._taken = False
        self._giving_back = False
        """What is cancelled now has been cancelled by `close`."""
        self._under_way: dict[_Held, None] = {}
        self._beat_timer: asyncio.TimerHandle | None = None
        self._replies: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def peer(self) -> EventEmitterTransport:
        """Another end of the same transport: closing it leaves the others at work."""
        other = EventEmitterTransport(
            name=self._capabilities.name,
            heartbeat_interval=self._heartbeat_interval,
            max_message=self._capabilities.max_message,
        )
        other._shelf = self._shelf
        other._control = self._control.peer()
        return other

    def end(self) -> EventEmitterTransport:
        """An end for one engine or worker, whose handlers leave with it: this instance for the first, a `peer` for each
        that comes while the first has it."""
        if self._taken or self._starts:
            return self.peer()
        self._taken = True
        return self

    async def start(self) -> None:
        """Open this end. Engines that share one instance each start and close it; the last close counts."""
        self._starts += 1
        await self._control.start()
        if self not in self._shelf.ends:
            self._shelf.ends.append(self)
            for server in [server for server in self._shelf.servers if server.end is self]:
                self._shelf.refill(server)

    async def close(self, timeout: float = 10.0) -> None:
        """Take no new task, let those under way finish and be heard, cancel the rest. What was cancelled here waits for
        another end, where there is one."""
        if not self._starts:
            return
        self._starts -= 1
        if self._starts:
            await self._control.close()
            return
        self._shelf.servers = [server for server in self._shelf.servers if server.end is not self]
        self._giving_back = True
        await self._drain(timeout)
        self._giving_back = self._taken = False
        if self._beat_timer:
            self._beat_timer.cancel()
            self._beat_timer = None
        shelf = self._shelf
        shelf.ends.remove(self)
        shelf.listeners = [pair for pair in shelf.listeners if pair[0] is not self]
        shelf.heartbeat_listeners = [pair for pair in shelf.heartbeat_listeners if pair[0] is not self]
        if not shelf.ends:
            shelf.held.clear()
            shelf.waiting.clear()
        await self._control.close()

    # -- engine end

    async def dispatch(self, task: Task) -> None:
        """Take a task, whatever its partition. The same attempt while it is held is the same task, unless it was cancelled
        since; a newer one takes the place of one that still waits."""
        self._open()
        size, limit = len(bytes(task.input)), self._capabilities.max_message
        if size > limit:
            raise TransportError(
                f"The input of {task.id} has {size} bytes and {self._capabilities.name} carries {limit}: "
                "send a reference to the data instead, or raise max_message."
            )
        shelf = self._shelf
        attempts = shelf.held.get(task.id, {})
        same = attempts.get(task.attempt)
        if same and not same.dropped:
            return
        for other in list(attempts.values()):
            if not other.work and other.task.attempt < task.attempt:
                shelf.take_back(other)
        shelf.number += 1
        held = _Held(task, shelf.number)
        shelf.hold(held)
        if shelf.group_of(task) in shelf.waiting:
            shelf.put(held)
        else:
            self._follow(held)  # with no server it answers that there is no handler

    async def cancel(self, task_id: str) -> None:
        """Cancel every attempt held. No result follows, unless the handler insists on returning one."""
        for held in list(self._shelf.held.get(task_id, {}).values()):
            if not held.work:
                self._shelf.take_back(held)
            elif held.server:
                held.dropped = True
                held.work.cancel()

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Queued, under way, or finished and not yet taken by an engine."""
        return [task_id for task_id in task_ids if task_id in self._shelf.held]

    def on_result(self, handler: ResultHandler) -> None:
        """Hear results. Several may: each result goes to one of them, in turn, and to the next if that one raises."""
        self._shelf.listeners.append((self, handler))

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        """Hear heartbeats. Every handler hears every beat."""
        self._shelf.heartbeat_listeners.append((self, handler))

    # -- worker end

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        """Take tasks of these groups, from `start` on. Each call has its own bound; calls for the same group share tasks."""
        server = _Server(self, groups, handler, concurrency)
        for group in server.groups:
            self._shelf.waiting.setdefault(group, [])
        self._shelf.servers.append(server)
        self._shelf.refill(server)
        if not isinstance(concurrency, int):
            self._ask_again(server)

    def _ask_again(self, server: _Server) -> None:
        """A bound that changes by itself is asked now and then, for as long as the server is there."""
        if server in self._shelf.servers:
            self._shelf.refill(server)
            asyncio.get_running_loop().call_later(ROOM_SECONDS, self._ask_again, server)

    async def reply(self, answer: Answer) -> None:
        """Hand an answer to an engine, soon."""
        self._open()
        reply = asyncio.get_running_loop().create_task(self._deliver(answer), name=f"reply {answer.id}")
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Tell every engine of this process."""
        self._tell_heartbeat(beat)

    # -- control plane

    @property
    def audience(self) -> bool:
        """Whether more than one engine of this process listens."""
        return self._control.audience

    async def publish_control(self, message: ControlMessage) -> None:
        """Tell every instance on this transport but the sender."""
        await self._control.publish_control(message)

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Hear what others say. Returns the way to stop."""
        return self._control.on_control(incarnation, handler)

    # -- the life of one task

    def _begin(self, server: _Server, held: _Held) -> None:
        server.under_way += 1
        held.server = server
        self._follow(held)
        self._arm_heartbeat()

    def _follow(self, held: _Held) -> None:
        self._under_way[held] = None
        held.work = asyncio.get_running_loop().create_task(self._live(held), name=f"step {held.task.id}")
        held.work.add_done_callback(lambda _: self._end(held))

    async def _live(self, held: _Held) -> None:
        """Work, free the slot, hand over the result. Held until it was taken."""
        result = await self._work(held, held.server) if held.server else no_handler(held.task)
        self._leave_server(held)
        await self._deliver(result)
        self._shelf.forget(held)

    async def _work(self, held: _Held, server: _Server) -> Answer:
        try:
            result = await server.handler(held.task)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if held.dropped or (task and task.cancelling()):
                raise
            return crashed(held.task, error)  # the handler cancelled itself: a failure like any other
        except Exception as error:
            log.warning("The handler of %s raised; the step is answered as failed", held.task.name, exc_info=error)
            return crashed(held.task, error)
        size = len(bytes(result.output)) if isinstance(result.output, Raw) else 0
        limit = self._capabilities.max_message
        return too_large(held.task, size, limit) if size > limit else result

    def _end(self, held: _Held) -> None:
        """However it ended: a slot is free; a task cancelled by `close` goes back on the shelf."""
        del self._under_way[held]
        work = held.work
        broken = work is not None and (work.cancelled() or work.exception() is not None)
        if broken and not held.dropped and not self._giving_back:
            # Not our doing: most likely the loop is being torn down, and whatever begins now begins to be killed. A loop
            # that goes on comes to it.
            asyncio.get_running_loop().call_later(REDELIVERY_FIRST, self._return, held)
        else:
            self._return(held)

    def _return(self, held: _Held) -> None:
        self._leave_server(held)
        if self._shelf.holds(held) and not held.dropped:
            held.work = None
            self._shelf.put(held)
        else:
            self._shelf.forget(held)

    def _leave_server(self, held: _Held) -> None:
        server, held.server = held.server, None
        if server:
            server.under_way -= 1
            self._shelf.refill(server)

    async def _deliver(self, result: Answer) -> None:
        """Until one handler took it, or this end closes and nobody is left to take it. A round in which all raised is
        repeated, ever more slowly."""
        delay = REDELIVERY_FIRST
        while not await self._offer(result) and (self._starts or self._shelf.listeners):
            await asyncio.sleep(delay)
            delay = min(delay * 2, REDELIVERY_MAX)

    async def _offer(self, result: Answer) -> bool:
        shelf = self._shelf
        shelf.turn += 1
        first = shelf.turn % max(1, len(shelf.listeners))
        for listener in shelf.listeners[first:] + shelf.listeners[:first]:
            try:
                await listener[1](result)
            except EngineStopped:
                if listener in shelf.listeners:
                    shelf.listeners.remove(listener)  # it hears again when it starts again
            except MessageRefused as error:
                log.warning("The result of %s was refused: %s", result.id, error)
                return True
            except Exception as error:
                log.warning("The result of %s was not taken and is delivered again: %r", result.id, error)
            else:
                return True
        return False

    async def _drain(self, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while (tasks := self._tasks()) and (left := deadline - loop.time()) > 0:
            await asyncio.wait(tasks, timeout=left)
        for task in tasks:
            task.cancel()
        if tasks:
            _, refusing = await asyncio.wait(tasks, timeout=REFUSAL_MAX)
            for task in refusing:
                log.error("%s went on after it was cancelled; it is left behind", task.get_name())

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [held.work for held in self._under_way if held.work] + list(self._replies)

    # -- signs of life

    def _arm_heartbeat(self) -> None:
        if self._beat_timer is None:
            self._beat_timer = asyncio.get_running_loop().call_later(self._heartbeat_interval, self._beat)

    def _beat(self) -> None:
        """One timer for all tasks of this end; it rests while there are none."""
        self._beat_timer = None
        working = [held.task for held in self._under_way if held.server]
        for task in working:
            self._tell_heartbeat(beat_of(task))
        if working:
            self._arm_heartbeat()

    def _tell_heartbeat(self, beat: Heartbeat) -> None:
        for _, handler in self._shelf.heartbeat_listeners:
            try:
                handler(beat)
            except Exception:
                log.exception("A heartbeat handler raised on %s", beat.step_id)

    def _open(self) -> None:
        if not self._starts:
            raise TransportError(
                f"{self._capabilities.name} is not open: call start() first, and nothing after close()."
            )
