"""The transport the engine talks to: an ordered set of named members, the first that accepts a task wins.

A member that fails, or does not answer in time, is passed over for the next one and left alone for a while; then one task
tries it again. Nothing here knows whether a task was taken all the same: it may run on two members, and the engine counts
one result (S7, S15). Results and heartbeats are heard on every member.

    healthy ──error or silence──→ sick for cool_down ──→ one task probes ──accepted──→ healthy
                                       ↑                      │
                                       └──twice as long───────┘ error or silence
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import cast

import msgspec

from durable.control_plane.interface import ControlPlane
from durable.core.errors import AllTransportsFailed, DefinitionError, MessageRefused, TransportError, UnknownTransport
from durable.protocol.messages import Answer, Heartbeat, RemoteTask, StepResult, Task
from durable.protocol.token import proves, task_token
from durable.transports.interface import (
    Capabilities,
    Concurrency,
    HeartbeatHandler,
    ResultHandler,
    TaskHandler,
    Transport,
)

log = logging.getLogger("durable.transports")

DEFAULT = "default"
"""The id of the only member, where nobody named it."""


class _Member:
    """A transport, its name, and how it has been."""

    def __init__(self, id: str, transport: Transport) -> None:
        self.id = id
        self.transport = transport
        self.error: Exception | None = None
        """Why it is sick; None: it is well."""
        self.cool = 0.0
        """Seconds it is left alone for, this time."""
        self.until = 0.0
        """By the loop's clock."""
        self.probing = False
        """One task is trying it; the others do not wait to see."""
        self.closed = True
        """Not started, or not yet: there is nothing to try."""


class _Bound:
    """How long any dispatch may take. One timer for all of them: each has the same time, so the first to begin is the first
    to run out. A timer of its own for each would cost more than all else here together."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until: dict[asyncio.Task[object], float] = {}
        self._out: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def keep(self, call: Awaitable[None]) -> None:
        """Wait for it. Raises TransportError when it has taken too long; it is cancelled then."""
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        self._until[task] = task.get_loop().time() + self.seconds
        if self._timer is None:
            self._arm(task.get_loop(), self._until[task])
        try:
            await call
        except asyncio.CancelledError:
            if task in self._out and task.cancelling() - 1 <= cancelling:
                raise TransportError(f"It did not answer within {self.seconds:g} s.") from None
            raise
        finally:
            self._until.pop(task, None)
            if task in self._out:
                self._out.remove(task)
                task.uncancel()

    def close(self) -> None:
        if self._timer is not None and not self._until:
            self._timer.cancel()
            self._timer = None

    def _arm(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        self._timer = loop.call_at(when, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for task, until in list(self._until.items()):
            if until > loop.time():
                self._arm(loop, until)
                return
            del self._until[task]
            self._out.add(task)
            task.cancel()


class TransportPool:
    """Transports by id, in order of preference. Itself a transport: the engine and the worker see one."""

    def __init__(
        self,
        members: Mapping[str, Transport],
        *,
        dispatch_timeout: float = 5.0,
        cool_down: float = 1.0,
        cool_down_max: float = 30.0,
        task_key: str | None = None,
    ) -> None:
        """Durations are seconds. `task_key`: with it tasks carry a token, and results with a wrong one are refused. Raises
        DefinitionError for a pool of nothing, or one transport under two names."""
        if not members:
            raise DefinitionError("A pool needs at least one transport. Leave `transports` out for the in-process one.")
        if not all(isinstance(id, str) and id for id in members):
            raise DefinitionError(f"Transports are named by texts that are not empty, not by {list(members)!r}.")
        if len({id(transport) for transport in members.values()}) < len(members):
            raise DefinitionError("One transport stands in the pool under two names; build one for each name.")
        signed = [id for id, transport in members.items() if transport.capabilities.signed]
        if signed and task_key is None:
            raise DefinitionError(
                f"Transport {signed[0]} takes signed results only, and there is no key to sign with: give task_key=, the same "
                "for all engines."
            )
        self._task_key = task_key
        self.members: Mapping[str, Transport] = MappingProxyType(dict(members))
        self.cool_down = cool_down
        self.cool_down_max = cool_down_max
        self._members = [_Member(id, transport) for id, transport in members.items()]
        self._by_id = {member.id: member for member in self._members}
        self._capabilities = _together(list(members.values()))
        self._bound = _Bound(dispatch_timeout)
        self._origin: dict[str, _Member] = {}
        """Task id → where a task that is being worked on here came from."""
        self._opening: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        """What holds of a task whoever of them took it; ask the member once it is known."""
        return self._capabilities

    @property
    def sick(self) -> dict[str, str]:
        """Members that are left alone for now, and why."""
        return {member.id: str(member.error) for member in self._members if member.error is not None}

    def __contains__(self, id: object) -> bool:
        return id in self._by_id

    def member(self, id: str | None) -> Transport:
        """The one of this id; the pool itself where it is not known who took a task. Raises UnknownTransport."""
        if id is None:
            return self
        found = self._by_id.get(id)
        if found is None:
            raise self._unknown(id)
        return found.transport

    @property
    def control_plane(self) -> ControlPlane | None:
        """The first member, if it can broadcast."""
        first = self._members[0].transport
        return cast(ControlPlane, first) if first.capabilities.broadcast else None

    # -- life

    async def start(self) -> None:
        """Connect them all. One is enough: the others are tried again and again, in the background."""
        outcomes = await asyncio.gather(*(self._start(member) for member in self._members))
        failed = {member.id: error for member, error in zip(self._members, outcomes, strict=True) if error is not None}
        if len(failed) == len(self._members):
            raise self._failure("No transport could be started", failed)
        for member in self._members:
            if member.closed:
                task = asyncio.get_running_loop().create_task(self._reopen(member), name=f"durable-open-{member.id}")
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)

    async def close(self, timeout: float = 10.0) -> None:
        """Drain them all, at the same time."""
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        closing = (member.transport.close(timeout) for member in self._members)
        outcomes = await asyncio.gather(*closing, return_exceptions=True)
        for member, outcome in zip(self._members, outcomes, strict=True):
            member.closed = True
            if isinstance(outcome, Exception):
                log.warning("transport %s could not be closed cleanly: %r", member.id, outcome)
        self._bound.close()

    async def _start(self, member: _Member) -> Exception | None:
        try:
            await member.transport.start()
        except Exception as error:
            self._failed(member, error)
            return error
        member.closed = False
        member.error = None
        return None

    async def _reopen(self, member: _Member) -> None:
        while member.closed:
            await asyncio.sleep(member.cool)
            if await self._start(member) is None:
                log.warning("transport %s is there now", member.id)

    # -- engine end

    async def dispatch(self, task: Task) -> None:
        """Have some member accept the task. Raises AllTransportsFailed, UnknownTransport."""
        await self.send(task)

    async def send(self, task: Task, *, avoid: str | None = None) -> str:
        """Have some member accept the task, and say which: the one `task.transport` names first, then the rest in order,
        the sick ones last of all. It goes out stamped with the id of the member. `avoid`: the member that let an earlier
        attempt down goes after the well ones, unless the task names it."""
        if task.transport is not None and task.transport not in self._by_id:
            raise self._unknown(task.transport)
        if self._task_key is not None and isinstance(task, RemoteTask):
            task = msgspec.structs.replace(task, token=task_token(self._task_key, task))
        causes: dict[str, Exception] = {}
        for member in self._order(task.transport, avoid):
            error = await self._try(member, task)
            if error is None:
                return member.id
            causes[member.id] = error
        raise self._failure(f"No transport took task {task.id}", causes)

    def fits(self, task: Task) -> bool:
        """Whether any member carries a task of this size: then whoever refuses it now may take it later."""
        return not all(_too_large(task, member.transport) for member in self._members)

    def _order(self, pinned: str | None, avoid: str | None = None) -> Iterator[_Member]:
        """Looked up as the dispatch goes on, since members fall sick and recover meanwhile."""
        members = self._members
        if pinned is not None and members[0].id != pinned:
            members = sorted(members, key=lambda member: member.id != pinned)
        elif avoid is not None and pinned is None:
            members = sorted(members, key=lambda member: member.id == avoid)
        last = []
        for member in members:
            if member.error is None or self._due(member):
                yield member
            else:
                last.append(member)
        yield from last

    def _due(self, member: _Member) -> bool:
        return not member.probing and not member.closed and asyncio.get_running_loop().time() >= member.until

    async def _try(self, member: _Member, task: Task) -> Exception | None:
        """None: accepted."""
        if member.closed and member.error is not None:
            return member.error
        probe = member.error is not None and self._due(member)
        if probe:
            member.probing = True
        if task.transport != member.id:
            task = msgspec.structs.replace(task, transport=member.id)
        try:
            await self._bound.keep(member.transport.dispatch(task))
        except Exception as error:
            if not _too_large(task, member.transport):
                self._failed(member, error, probe=probe)
            return error
        finally:
            if probe:
                member.probing = False
        if member.error is not None:
            log.warning("transport %s is well again", member.id)
            member.error = None
        return None

    def _failed(self, member: _Member, error: Exception, *, probe: bool = False) -> None:
        """It falls sick, or stays so for longer. Of many tasks that fail at the same time, one counts."""
        now = asyncio.get_running_loop().time()
        if member.error is None:
            member.cool = self.cool_down
            if len(self._members) > 1:
                log.warning("transport %s is sick, others go first for %g s: %s", member.id, member.cool, error)
            elif not member.closed:  # else `start` raises it, and that says it all
                log.warning("transport %s is sick: %s", member.id, error)
        elif probe or member.closed:
            member.cool = min(member.cool * 2, self.cool_down_max)
        else:
            return
        member.error = error
        member.until = now + member.cool

    async def cancel(self, task_id: str) -> None:
        """Tell every member; where it is known who took the task, tell `member(id)` instead."""
        await self._each("cancel a task", lambda transport: transport.cancel(task_id))

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Which of these any member holds, of those that can tell. Raises the first error there is: a member that does
        not answer may hold them all."""
        held: set[str] = set()
        for member in self._members:
            if member.transport.capabilities.holds:
                held.update(await member.transport.holding(task_ids))
        return held

    def on_result(self, handler: ResultHandler) -> None:
        """Hear results, whichever member brings them. What does not prove that it answers a task of ours is refused."""
        for member in self._members:
            member.transport.on_result(handler if self._task_key is None else self._proved(member, handler))

    def _proved(self, member: _Member, handler: ResultHandler) -> ResultHandler:
        """A token that is there must be right; where the member demands one, it must be there."""
        key, demanded = self._task_key, member.transport.capabilities.signed
        assert key is not None

        async def hear(answer: Answer) -> None:
            if isinstance(answer, StepResult) and (demanded or answer.token is not None) and not proves(key, answer):
                log.warning("a result of %s over transport %s is refused: its token is not ours", answer.id, member.id)
                raise MessageRefused(f"The result of {answer.id} does not echo the token of its task.")
            await handler(answer)

        return hear

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        """Hear heartbeats, whichever member brings them."""
        for member in self._members:
            member.transport.on_heartbeat(handler)

    # -- worker end

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        """Serve on every member, at most `concurrency` tasks on each. A task is answered where it came from."""
        for member in self._members:
            hear = handler if len(self._members) == 1 else self._remembering(member, handler)
            await member.transport.serve(groups, hear, concurrency=concurrency)

    def _remembering(self, member: _Member, handler: TaskHandler) -> TaskHandler:
        async def handle(task: Task) -> Answer:
            self._origin[task.id] = member
            try:
                return await handler(task)
            finally:
                if self._origin.get(task.id) is member:
                    del self._origin[task.id]

        return handle

    async def reply(self, answer: Answer) -> None:
        """Send an answer where its task came from; where that is not known, over the first that takes it: engines hear
        them all. Raises TransportError."""
        await self._back(answer.id, lambda transport: transport.reply(answer))

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Say that a task is being worked on, where it came from."""
        await self._back(beat.step_id or "", lambda transport: transport.heartbeat(beat))

    async def _back(self, task_id: str, say: Callable[[Transport], Awaitable[None]]) -> None:
        origin = self._origin.get(task_id)
        if origin is not None:
            await say(origin.transport)
            return
        causes: dict[str, Exception] = {}
        for member in self._members:
            try:
                await say(member.transport)
            except Exception as error:
                causes[member.id] = error
            else:
                return
        raise self._failure(f"No transport took what was to be said of {task_id or 'a run'}", causes)

    async def _each(self, what: str, do: Callable[[Transport], Awaitable[None]]) -> None:
        for member in self._members:
            try:
                await do(member.transport)
            except Exception as error:
                log.warning("transport %s could not %s: %s", member.id, what, error)

    # -- what is said when nothing works

    def _failure(self, what: str, causes: dict[str, Exception]) -> Exception:
        """Of one, its own error; of several, each by its name."""
        errors = list(causes.values())
        if len(self._members) == 1 and isinstance(errors[0], TransportError):
            return errors[0]
        told = "; ".join(f"{id}: {str(error) or type(error).__name__}" for id, error in causes.items())
        failure = AllTransportsFailed(f"{what}. {told}", causes)
        failure.__cause__ = errors[0] if len(errors) == 1 else ExceptionGroup(what, errors)
        return failure

    def _unknown(self, id: str) -> UnknownTransport:
        return UnknownTransport(
            f"There is no transport {id!r} here: the pool has {', '.join(map(repr, self._by_id))}. "
            "Add it to `transports`, or pin the step to one of these."
        )


def _together(transports: Sequence[Transport]) -> Capabilities:
    each = [transport.capabilities for transport in transports]
    if len(each) == 1:
        return each[0]
    return Capabilities(
        name="pool",
        shared=all(one.shared for one in each),
        holds=all(one.holds for one in each),
        broadcast=False,
        heartbeats=all(one.heartbeats for one in each),
        max_message=max(one.max_message for one in each),
    )


def _too_large(task: Task, transport: Transport) -> bool:
    """Then the task is to blame, and the transport is well. Asked only after a refusal: it takes a whole encoding."""
    return len(msgspec.json.encode(task)) > transport.capabilities.max_message
