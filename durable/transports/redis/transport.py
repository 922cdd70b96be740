"""Our own fast lane over Redis: streams that push, answers that come home to the engine that asked.

docs/transports/redis.md says what it promises, protocol/redis-lane.md what another language's worker does.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Sequence

from durable.control_plane.interface import ControlHandler
from durable.control_plane.redis import RedisControlPlane
from durable.control_plane.redis_channel import RedisChannel
from durable.core.errors import PayloadError, TransportError
from durable.protocol import names
from durable.protocol.codec import decode_control, decode_heartbeat, encode
from durable.protocol.messages import Answer, ControlMessage, Heartbeat, Task
from durable.transports.cancels import cancel_of
from durable.transports.interface import (
    Capabilities,
    Concurrency,
    HeartbeatHandler,
    ResultHandler,
    TaskHandler,
)
from durable.transports.redis.answers import Answers
from durable.transports.redis.scripts import ANSWER, GROUP, LOADS
from durable.transports.redis.tasks import Tasks
from durable.transports.redis_link import RedisLink, Refused, ReplyError
from durable.transports.redis_settings import look
from durable.transports.sending import encoded
from durable.transports.serving import Server, Workbench

log = logging.getLogger("durable.transports")

DEAD_MOST = 1_000
"""What is put away, about; the oldest goes."""


class RedisTransport:
    """One end, or both, of the lane. Every process has an instance of its own."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = names.DEFAULT_PREFIX,
        namespace: str | None = None,
        lease: float = 15.0,
        max_deliveries: int = 3,
        heartbeat_interval: float = 5.0,
        max_message: int = 8 << 20,
        signed: bool = False,
        alive_for: float = 15.0,
    ) -> None:
        """`url`: `redis://…` or `rediss://…`, one server and no cluster. `prefix`, `namespace`: of all names; deployments on
        one server keep apart by them. `lease`: seconds a worker may be silent before its tasks are taken over.
        `max_deliveries`: workers that may be lost with one task. `alive_for`: seconds an engine may be silent before another
        takes over its answers. `max_message`: bytes. `signed`: refuse answers without their task's token. Raises
        DefinitionError."""
        self._prefix = names.effective_prefix(prefix, namespace)
        self._capabilities = Capabilities(
            name="redis",
            shared=True,
            holds=True,
            broadcast=True,
            heartbeats=True,
            max_message=max_message,
            signed=signed,
        )
        self._url = url
        self._lease, self._alive_for = lease, alive_for
        self._max_deliveries = max_deliveries
        self._held = names.lane_held(self._prefix)
        self._link = RedisLink(url, name="durable-lane", prepare=LOADS)
        self._control = names.control(self._prefix)
        self._plane = RedisControlPlane(url, channel=self._control)
        self._beats, self._cancels = names.heartbeat(self._prefix), names.lane_cancels(self._prefix)
        self._plane.also(self._cancels, self._heard_cancel)
        self._hints: RedisChannel | None = None
        """Where nothing but workers is here: they need not hear what engines tell each other, nor be their audience."""
        self._bench = Workbench(max_message=max_message, heartbeat_interval=heartbeat_interval, beat=self.heartbeat)
        self._on_result: ResultHandler | None = None
        self._on_heartbeat: HeartbeatHandler | None = None
        self._hears_beats = False
        self._answers: Answers | None = None
        self._tasks: Tasks | None = None
        self._instance = ""
        self._starts = 0
        self._turn = asyncio.Lock()
        self.durability = "It has not been started."
        """What its Redis may lose, as a sentence; known after `start`."""

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    async def start(self) -> None:
        """Connect, look at the server's settings, begin. Starts are counted; the last close counts. Raises TransportError."""
        async with self._turn:
            if not self._starts:
                self._instance = secrets.token_hex(8)
                try:
                    await self._open()
                except BaseException:
                    await self._shut(0.0)
                    raise
            self._starts += 1

    async def close(self, timeout: float = 10.0) -> None:
        """Take nothing more, let what is under way finish within `timeout` seconds and send its answers, give the rest back."""
        async with self._turn:
            if self._starts:
                self._starts -= 1
                if not self._starts:
                    await self._shut(timeout)

    async def _open(self) -> None:
        found = await look(self._link.one)
        self.durability = found.sentence
        if found.weak:
            log.warning("the Redis of transport %s: %s", self._capabilities.name, found.sentence)
        if self._on_heartbeat is not None and not self._hears_beats:
            self._plane.also(self._beats, self._heard_beat)
            self._hears_beats = True
        if self._on_result is None and self._bench.servers:
            await self._open_hints()
        else:
            await self._plane.start()
        if self._on_result is not None:
            self._answers = Answers(
                self._url,
                self._link,
                prefix=self._prefix,
                instance=self._instance,
                handler=self._on_result,
                alive_for=self._alive_for,
                max_message=self._capabilities.max_message,
                put_away=self._put_away,
            )
            await self._answers.start()
        for server in self._bench.servers:
            self._begin(server)

    async def _shut(self, timeout: float) -> None:
        if self._tasks is not None:
            await self._tasks.stop()
            await self._bench.drain(timeout)
            await self._tasks.close()
            self._tasks = None
        if self._answers is not None:
            await self._answers.close(timeout)
            self._answers = None
        if self._hints is not None:
            await self._hints.close()
            self._hints = None
        await self._plane.close()
        await self._link.close()
        self._bench.servers.clear()

    # -- engine end

    async def dispatch(self, task: Task) -> None:
        """Append it to its group's stream. All that are dispatched in one turn of the loop go out together."""
        self._check_open()
        data = encoded(task, carrier="Redis", limit=self._capabilities.max_message)
        # Held first: its answer may be taken before this returns.
        held, added = await self._link.call(
            ("HSET", self._held, task.id, task.attempt),
            ("XADD", names.lane_tasks(self._prefix, task.group), "*", "t", data, "r", self._instance),
        )
        for answer in (held, added):
            if isinstance(answer, ReplyError):
                await self._link.call(("HDEL", self._held, task.id))
                raise Refused(f"task {task.id}", answer)

    async def cancel(self, task_id: str) -> None:
        """Tell the workers. One that waits is run all the same, and its answer recorded as late."""
        self._check_open()
        self._say(self._cancels, encode(cancel_of(task_id, sender=self._instance)))

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Those that were dispatched and whose answer no engine has taken. Nothing, on a server that was emptied."""
        self._check_open()
        if not task_ids:
            return []
        attempts = await self._link.one("HMGET", self._held, *task_ids)
        return [task_id for task_id, attempt in zip(task_ids, attempts, strict=True) if attempt is not None]

    def on_result(self, handler: ResultHandler) -> None:
        """Hear answers, many at a time."""
        self._on_result = handler

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        """Hear heartbeats of all workers."""
        self._on_heartbeat = handler

    # -- worker end

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        """Take tasks of these groups, from `start` on. Priorities are not looked at: each stream is first in, first out."""
        server = self._bench.add(groups, handler, concurrency)
        if self._starts:
            if self._on_result is None and self._hints is None:
                await self._open_hints()
                await self._plane.fall_silent()
            self._begin(server)

    def _begin(self, server: Server) -> None:
        if self._tasks is None:
            self._tasks = Tasks(
                self._url,
                self._link,
                self._bench,
                prefix=self._prefix,
                instance=self._instance,
                lease=self._lease,
                max_deliveries=self._max_deliveries,
                max_message=self._capabilities.max_message,
                put_away=self._put_away,
            )
        self._tasks.serve(server)

    async def reply(self, answer: Answer) -> None:
        """Send an answer to whichever engine is there."""
        self._check_open()
        data = encoded(answer, carrier="Redis", limit=self._capabilities.max_message)
        keys = ["", names.lane_engines(self._prefix)]  # no task to acknowledge
        home = names.lane_results(self._prefix, ""), names.lane_unclaimed(self._prefix)
        await self._link.one(*ANSWER(keys, GROUP, "0-0", data, "", *home))

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Say that a task is being worked on."""
        self._say(self._beats, encode(beat))

    # -- control plane

    @property
    def audience(self) -> bool:
        """Whether another engine listens. Workers do not: they hear of nothing but cancels."""
        return self._plane.audience if self._hints is None else self._hints.others

    async def publish_control(self, message: ControlMessage) -> None:
        """Tell every instance on this transport but the sender."""
        if message.kind == "cancel" and message.run_id is not None:
            self._say(self._cancels, encode(message))
        if self._hints is None:
            await self._plane.publish_control(message)
            return
        try:
            self._say(self._control, encode(message))
        except PayloadError as error:
            log.warning("a control message of kind %s cannot be said; dropped: %s", message.kind, error)

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Hear what others say, and `LOOK_EVERYWHERE` after a gap; on an end that only serves: cancels. Returns the way to
        stop."""
        return self._plane.on_control(incarnation, handler)

    # -- what both ends need

    async def _open_hints(self) -> None:
        hints = RedisChannel(self._url, name=self._cancels, counted=self._control)
        hints.on(self._cancels, self._heard_cancel)
        try:
            await hints.start()
        except Exception as error:
            raise TransportError(f"Redis cannot be listened to: {error or type(error).__name__}") from error
        self._hints = hints

    def _say(self, name: str, data: bytes) -> None:
        if self._hints is not None:
            self._hints.publish(name, data)
        else:
            self._plane.say(name, data)

    def _heard_cancel(self, data: bytes | None) -> None:
        """Somebody wants bodies cancelled: those of one task, or of a whole run."""
        try:
            message = decode_control(data or b"")
        except PayloadError as error:
            if data is not None:
                log.debug("something that is no control message was heard: %s", error)
            return
        if self._hints is not None:
            self._plane.pass_on(message)
        self._bench.hear(message)

    def _heard_beat(self, data: bytes | None) -> None:
        if data is None or self._on_heartbeat is None:
            return
        try:
            beat = decode_heartbeat(data)
        except PayloadError as error:
            log.debug("something that is no heartbeat was heard: %s", error)
            return
        self._on_heartbeat(beat)

    async def _put_away(self, kind: str, data: bytes, why: str) -> None:
        """Where an operator finds it. Raises TransportError."""
        entry = ("kind", kind, "data", data, "why", why)
        await self._link.one("XADD", names.dead(self._prefix), "MAXLEN", "~", DEAD_MOST, "*", *entry)

    def _check_open(self) -> None:
        if not self._starts:
            raise TransportError("This transport is not open: call start() first, and nothing after close().")
