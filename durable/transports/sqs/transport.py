"""Both ends on SQS. Nothing is deleted before what it brought is safe further on.

engine end   dispatch → tasks queue of the group; results and decisions queues → handler → deleted
worker end   tasks queue → handler → answer on the results or decisions queue → task deleted
dead letters what the workers received too often comes back to the engine end as a failed result (S11, S12)
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from random import uniform
from typing import Any, NoReturn
from uuid import uuid4

from durable.core.errors import (
    DefinitionError,
    EngineStopped,
    MessageRefused,
    PayloadError,
    TransportError,
)
from durable.protocol import names
from durable.protocol.codec import decode_answer, decode_any_task
from durable.protocol.messages import Answer, Heartbeat, StepResult, Task, sanitize
from durable.transports.answers import given_up
from durable.transports.interface import Capabilities, Concurrency, HeartbeatHandler, ResultHandler, TaskHandler
from durable.transports.sending import check_size, encoded
from durable.transports.serving import Cut, Server, Workbench
from durable.transports.sqs.batches import ENTRIES_MAX, Batches
from durable.transports.sqs.leases import HELD_MAX, Lease, Leases
from durable.transports.sqs.queues import Absent, Queue, Queues

log = logging.getLogger("durable.transports")

MESSAGE_MAX = 1 << 20
"""Bytes of a message with its attributes. Older regions and some look-alikes take 256 KiB."""
ATTRIBUTES_ROOM = 4096
"""Of it, what our attributes may need."""
REASON = "durable-reason"
"""The attribute that says why a message was put away."""
REASON_MAX = 500
PAUSE_FIRST, PAUSE_MAX = 0.2, 10.0
"""Seconds between two tries while SQS is away."""
STRANGERS_FIRST, STRANGERS_MAX = 0.5, 30.0
"""Seconds between two looks into a queue that had only messages of others."""
UNHEARD_MAX = 60
"""Seconds until an answer that could not be taken is tried again, at most."""
HEARING_MAX = 100
"""Answers given to the engine at once."""
FLIGHTS = 4
"""Calls of one kind under way to one queue."""
LAST_WORDS = 2.0
"""Seconds that giving back may take at the very end."""
_GROUP_ID = re.compile(r"[A-Za-z0-9!-/:-@[-`{-~]{1,128}")

_Room = Callable[[], Awaitable[int]]
"""Waits until a message may be taken, and says how many."""


class _Message:
    """One message received, and ours until its lease ends."""

    def __init__(self, queue: Queue, raw: Mapping[str, Any], lease: Lease) -> None:
        self.queue = queue
        self.lease = lease
        self.id = str(raw.get("MessageId", ""))
        self.body = str(raw.get("Body", "")).encode(errors="surrogatepass")  # what that lets through is no JSON
        self.receives = int(raw.get("Attributes", {}).get("ApproximateReceiveCount", 1))
        self._attributes: Mapping[str, Any] = raw.get("MessageAttributes") or {}

    def attribute(self, name: str) -> str | None:
        value = self._attributes.get(name)
        return None if value is None else str(value.get("StringValue", ""))


class SqsTransport:
    """One end on SQS, standard or FIFO. It cannot tell what is queued (`holds=False`), and only a control plane reaches a
    body under way (`cancels=False`)."""

    def __init__(
        self,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        prefix: str = names.DEFAULT_PREFIX,
        namespace: str | None = None,
        visibility: float = 30.0,
        max_receives: int = 3,
        timeout: float = 5.0,
        max_message: int = MESSAGE_MAX - ATTRIBUTES_ROOM,
        signed: bool = False,
        fifo: bool = False,
        create_queues: bool = True,
        queue_urls: Mapping[str, str] | None = None,
        results_url: str | None = None,
        decisions_url: str | None = None,
        dead_url: str | None = None,
        marker: str | None = None,
        wait: float = 20.0,
        held_max: float = HELD_MAX,
    ) -> None:
        """`region` and `endpoint_url`: else what the environment says, as ever with AWS, and SQS_ENDPOINT_URL.
        `queue_urls`, `results_url`, `decisions_url`, `dead_url`: queues that are there already, task queues by group; all
        others are found by name, or made. `marker`: the message attribute that tells ours in queues shared with others.
        `visibility`: seconds a message stays ours without a sign of life, `held_max`: with them. `wait`: seconds of a long
        poll. `max_receives`: how often a task is delivered before it comes back failed; for queues made here.
        `max_message`: bytes. `timeout`: seconds a call may take. `signed`: only results that echo their task's token are
        taken. Raises DefinitionError."""
        for what, value, low, high in (
            ("visibility", visibility, 1, 43_200),
            ("wait", wait, 1, 20),
            ("max_receives", max_receives, 1, 1000),
            ("max_message", max_message, 1024, MESSAGE_MAX - ATTRIBUTES_ROOM),
        ):
            if not low <= value <= high:
                raise DefinitionError(f"SQS takes a {what} from {low} to {high}, not {value!r}.")
        if marker == REASON:
            raise DefinitionError(f"The marker may not be {REASON}: that attribute says why a message was put away.")
        self._capabilities = Capabilities(
            name="sqs",
            shared=True,
            holds=False,
            broadcast=False,
            heartbeats=False,
            max_message=max_message,
            cancels=False,
            signed=signed,
        )
        self._fifo = fifo
        self._marker = marker
        self._visibility = math.ceil(visibility)  # SQS counts whole seconds
        self._held_max = held_max
        self._wait = math.ceil(wait)
        self._timeout = timeout
        self._queues = Queues(
            region=region,
            endpoint_url=endpoint_url,
            prefix=names.effective_prefix(prefix, namespace),
            fifo=fifo,
            create=create_queues,
            task_urls=queue_urls or {},
            results_url=results_url,
            decisions_url=decisions_url,
            dead_url=dead_url,
            visibility=self._visibility,
            max_receives=max_receives,
            read_timeout=wait + 10.0,
        )
        self._bench = Workbench(max_message=max_message)
        self._handler: ResultHandler | None = None
        self._open = False
        self._closing = False
        self._gave_back = False
        """While closing: some message is anybody's again."""
        self._consumers: set[asyncio.Task[None]] = set()
        self._hearers: list[asyncio.Task[None]] = []
        self._polls: set[asyncio.Task[list[_Message]]] = set()
        self._hearing: set[asyncio.Task[None]] = set()
        self._errands: set[asyncio.Task[None]] = set()
        """Messages being given back or put away."""
        self._left: dict[str, None] = {}
        """Ids of dead letters that are no tasks of ours, which were said once."""

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    # -- life

    async def start(self) -> None:
        """Find the queues and begin. Raises TransportError."""
        if self._open:
            return
        await self._queues.open()
        self._sends = Batches(self._bounded("send_message_batch"), at_once=1 if self._fifo else FLIGHTS)
        self._deletes = Batches(self._bounded("delete_message_batch"), at_once=FLIGHTS)
        self._changes = Batches(self._bounded("change_message_visibility_batch"), at_once=FLIGHTS)
        self._leases = Leases(self._change, visibility=self._visibility, held_max=self._held_max)
        queues = self._queues
        try:
            async with asyncio.timeout(self._timeout * 2):
                await queues.url(queues.results)
                hears_decisions = await self._has(queues.decisions, "workflows hosted by workers cannot be driven")
                hears_dead = await self._has(queues.dead, "what SQS gives up on is not heard of")
        except BaseException as error:
            try:
                self._refuse(error)
            finally:
                await queues.close()
        self._open, self._closing, self._gave_back = True, False, False
        if self._handler is not None:
            self._hearers = [self._consume(queues.results, self._hearing_room, self._hear_answer)]
            if hears_decisions:
                self._hearers.append(self._consume(queues.decisions, self._hearing_room, self._hear_answer))
            if hears_dead:
                self._hearers.append(self._consume(queues.dead, self._hearing_room, self._hear_dead))
        for server in self._bench.servers:
            self._begin(server)

    async def close(self, timeout: float = 10.0) -> None:
        """Take nothing more, let what is under way finish, give back the rest. A task that SQS hands to a poll which is cut
        off here comes again after its visibility."""
        if not self._open:
            self._bench.servers.clear()
            return
        self._closing = True
        for consumer in list(self._consumers):
            consumer.cancel()
        await asyncio.gather(*self._consumers, return_exceptions=True)
        await asyncio.gather(self._bench.drain(timeout), self._finish(self._hearing, timeout))
        await self._finish(self._errands, LAST_WORDS)
        if self._gave_back and self._polls:
            # What was given back may have come to one of our own polls: cut off, it would take that with it.
            await asyncio.wait(self._polls, timeout=LAST_WORDS)
        for poll in list(self._polls):
            poll.cancel()
        await asyncio.gather(*self._polls, return_exceptions=True)
        await self._finish(self._errands, LAST_WORDS)
        self._bench.servers.clear()
        self._open = False
        await self._leases.close()
        for batches in (self._sends, self._deletes, self._changes):
            await batches.close()
        await self._queues.close()

    async def _has(self, queue: Queue, otherwise: str) -> bool:
        try:
            await self._queues.url(queue)
        except Absent as error:
            log.warning("%s: %s", otherwise, error)
            return False
        return True

    @staticmethod
    async def _finish(tasks: set[asyncio.Task[None]], timeout: float) -> None:
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- engine end

    async def dispatch(self, task: Task) -> None:
        """Safe with SQS when this returns. With FIFO queues, the attempts of one step follow each other."""
        self._check_open(self._open and not self._closing)
        once = hashlib.sha256(f"{task.id}\n{task.attempt}".encode()).hexdigest()
        body = _body(task, self._capabilities.max_message)
        await self._send(self._queues.tasks(task.group), body, task.id, once)

    async def cancel(self, task_id: str) -> None:
        """Nothing: SQS has no way to take a task back. A control plane tells the workers."""

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """Not to be asked (`holds=False`). Raises TransportError."""
        raise TransportError("SQS cannot tell which tasks it holds.")

    def on_result(self, handler: ResultHandler) -> None:
        """Hear answers, and what SQS has given up on."""
        self._handler = handler

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        """Nothing is ever heard (`heartbeats=False`)."""

    # -- worker end

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        """Take tasks of these groups. A long poll for each group; with several, a task may have to wait here for room."""
        server = self._bench.add([sanitize(group) for group in groups], handler, concurrency)
        if self._open:
            self._begin(server)

    async def reply(self, answer: Answer) -> None:
        """Send an answer, and have it confirmed."""
        self._check_open(self._open)
        queue = self._queues.results if isinstance(answer, StepResult) else self._queues.decisions
        await self._send(queue, _body(answer, MESSAGE_MAX - ATTRIBUTES_ROOM), answer.id, uuid4().hex)

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Nothing: signs of life do not travel over SQS, a task's visibility tells whether its worker lives."""

    def _begin(self, server: Server) -> None:
        served: set[str] = set()
        for group in server.groups:
            queue = self._queues.tasks(group)
            if queue.url is None or queue.url not in served:
                served.add(queue.url or "")
                self._consume(queue, server.has_room, partial(self._take, server), shared=len(server.groups) > 1)

    async def _take(self, server: Server, message: _Message) -> bool:
        if not self._ours(message):
            self._errand(self._give_back(message))
            return False
        try:
            task = decode_any_task(message.body)
        except PayloadError as error:
            self._errand(self._put_away(message, str(error)))
            return True
        await server.has_room()
        if not message.lease.over:
            message.lease.on_over = partial(self._bench.cut, task, Cut.RELEASED)
            self._bench.begin(server, task, partial(self._done, message), partial(self._give_back, message))
        return True

    async def _done(self, message: _Message, answer: Answer | None) -> None:
        if answer is not None:
            await self.reply(answer)
        await self._delete(message)

    # -- messages that come

    def _consume(
        self, queue: Queue, room: _Room, take: Callable[[_Message], Awaitable[bool]], *, shared: bool = False
    ) -> asyncio.Task[None]:
        consuming = self._consuming(queue, room, take, ENTRIES_MAX if not shared else 1)
        consumer = asyncio.get_running_loop().create_task(consuming, name=f"poll {queue.name}")
        self._consumers.add(consumer)
        consumer.add_done_callback(self._consumers.discard)
        return consumer

    async def _consuming(
        self, queue: Queue, room: _Room, take: Callable[[_Message], Awaitable[bool]], least: int
    ) -> None:
        """Poll for ever. `take` says whether the message was for us. Of a room shared by several queues, one that fills what
        is asked for is asked for more; one that is quiet is asked for the `least`, since it may be full by the answer."""
        pause, strange, ask = PAUSE_FIRST, STRANGERS_FIRST, least
        while True:
            most = min(await room(), ENTRIES_MAX)
            try:
                messages = await self._poll(queue, min(most, ask))
            except Exception as error:
                said = logging.WARNING if pause == PAUSE_FIRST else logging.DEBUG
                log.log(
                    said, "queue %s cannot be read, which is tried again: %s", queue.name, self._queues.sentence(error)
                )
                if self._queues.absent(error):
                    self._queues.forget(queue)
                await asyncio.sleep(uniform(pause / 2, pause))
                pause = min(pause * 2, PAUSE_MAX)
                continue
            if pause != PAUSE_FIRST:
                log.warning("queue %s can be read again", queue.name)
                pause = PAUSE_FIRST
            ask = min(ask * 2, ENTRIES_MAX) if len(messages) == min(most, ask) else max(least, len(messages))
            ours = await self._hand_over(messages, take)
            if messages and not ours:
                await asyncio.sleep(strange)
                strange = min(strange * 2, STRANGERS_MAX)
            elif ours:
                strange = STRANGERS_FIRST

    async def _hand_over(self, messages: list[_Message], take: Callable[[_Message], Awaitable[bool]]) -> int:
        ours = 0
        while messages:
            try:
                ours += await take(messages[0])
            except asyncio.CancelledError:
                for message in messages:
                    self._errand(self._give_back(message))
                raise
            except Exception:
                log.exception("message %s is passed over, and comes again", messages[0].id)
                self._leases.end(messages[0].lease)
            del messages[0]
        return ours

    async def _poll(self, queue: Queue, most: int) -> list[_Message]:
        """One long poll. Whoever is cancelled meanwhile leaves it behind: what it brings is given back."""
        poll = asyncio.get_running_loop().create_task(self._receive(queue, most))
        self._polls.add(poll)
        poll.add_done_callback(self._polls.discard)
        try:
            return await asyncio.shield(poll)
        except asyncio.CancelledError:
            poll.add_done_callback(self._too_late)
            raise

    def _too_late(self, poll: asyncio.Task[list[_Message]]) -> None:
        if not poll.cancelled() and poll.exception() is None:
            for message in poll.result():
                self._errand(self._give_back(message))

    async def _receive(self, queue: Queue, most: int) -> list[_Message]:
        url = await self._queues.url(queue)
        answer = await self._queues.client.receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=most,
            WaitTimeSeconds=self._wait,
            VisibilityTimeout=self._visibility,
            AttributeNames=["ApproximateReceiveCount"],
            MessageAttributeNames=[REASON, *([self._marker] if self._marker else [])],
        )
        return [
            _Message(queue, raw, self._leases.take(url, raw["ReceiptHandle"])) for raw in answer.get("Messages") or ()
        ]

    def _ours(self, message: _Message) -> bool:
        return self._marker is None or message.attribute(self._marker) == "1"

    async def _hearing_room(self) -> int:
        while len(self._hearing) >= HEARING_MAX:
            await asyncio.wait(self._hearing, return_when=asyncio.FIRST_COMPLETED)
        return HEARING_MAX - len(self._hearing)

    async def _hear_answer(self, message: _Message) -> bool:
        if not self._ours(message):
            self._errand(self._give_back(message))
            return False
        try:
            answer = decode_answer(message.body)
        except PayloadError as error:
            self._errand(self._put_away(message, str(error)))
        else:
            self._hear(message, answer)
        return True

    async def _hear_dead(self, message: _Message) -> bool:
        """A task SQS has given up on. What was put away here, and what is not ours, stays for an operator."""
        why = message.attribute(REASON)
        if why is None and not self._ours(message):
            why = "it is not marked as ours"
        if why is None:
            try:
                task = decode_any_task(message.body)
            except PayloadError as error:
                why = str(error)
            else:
                self._hear(message, given_up(task, f"received {message.receives - 1} times without an answer"))
                return True
        self._leave(message, why)
        return False

    def _leave(self, message: _Message, why: str) -> None:
        self._leases.end(message.lease)
        if message.id not in self._left:
            known = message.attribute(REASON) is not None  # whoever put it away said so
            level = logging.DEBUG if known else logging.WARNING
            log.log(level, "message %s in %s is left there for an operator: %s", message.id, message.queue.name, why)
            self._left[message.id] = None
            if len(self._left) > 1000:
                del self._left[next(iter(self._left))]

    def _hear(self, message: _Message, answer: Answer) -> None:
        hearing = asyncio.get_running_loop().create_task(self._tell(message, answer), name=f"answer {answer.id}")
        self._hearing.add(hearing)
        hearing.add_done_callback(self._hearing.discard)

    async def _tell(self, message: _Message, answer: Answer) -> None:
        assert self._handler is not None
        try:
            await self._handler(answer)
        except MessageRefused as error:
            await self._put_away(message, str(error))
        except EngineStopped:
            for hearer in self._hearers:
                hearer.cancel()  # until it starts again
            await self._give_back(message)
        except asyncio.CancelledError:
            self._errand(self._give_back(message))
            raise
        except Exception as error:
            log.warning("the answer of %s was not taken and is delivered again: %r", answer.id, error)
            await self._give_back(message, min(2 ** min(message.receives - 1, 10) - 1, UNHEARD_MAX))
        else:
            await self._delete(message)

    # -- messages that go

    async def _delete(self, message: _Message) -> None:
        """It has done its work. If that cannot be said, it comes again, and counts once."""
        try:
            await self._deletes.put(message.lease.url, {"ReceiptHandle": message.lease.receipt})
        except Exception as error:
            log.warning("message %s could not be deleted and comes again: %s", message.id, self._queues.sentence(error))
        finally:
            self._leases.end(message.lease)

    async def _give_back(self, message: _Message, delay: int = 0) -> None:
        """To be delivered again, after `delay` seconds; where another may have it by now, that one goes on with it."""
        await self._leases.settle(message.lease)
        if message.lease.lost:
            return
        self._gave_back = self._gave_back or self._closing
        try:
            await self._change(message.lease.url, message.lease.receipt, delay)
        except Exception as error:
            log.debug("message %s comes again by itself only: %s", message.id, self._queues.sentence(error))

    async def _put_away(self, message: _Message, why: str) -> None:
        """Into the dead-letter queue, with the reason; it stays where it is if that cannot be."""
        body, room = message.body, MESSAGE_MAX - ATTRIBUTES_ROOM
        if len(body) > room:
            body, why = body[:room], f"(cut off from {len(body)} bytes) {why}"
        reason = re.sub(r"[^\x20-\x7e]", "?", why)[:REASON_MAX] or "no reason given"
        log.warning("message %s of %s is put away: %s", message.id, message.queue.name, reason)
        once = hashlib.sha256(message.id.encode()).hexdigest()
        try:
            await self._send(self._queues.dead, body.decode(errors="replace"), once, once, reason)
        except TransportError as error:
            log.warning("message %s could not be put away, and comes again: %s", message.id, error)
            self._leases.end(message.lease)
        else:
            await self._delete(message)

    async def _send(self, queue: Queue, body: str, group: str, once: str, reason: str | None = None) -> None:
        """`group`: on FIFO queues, what follows each other; `once`: what is the same message."""
        fields: dict[str, Any] = {"MessageBody": body}
        size = len(body.encode())
        said = ((REASON, reason), (self._marker, "1"))
        attributes = {key: {"DataType": "String", "StringValue": value} for key, value in said if key and value}
        if attributes:
            fields["MessageAttributes"] = attributes
            size += sum(len(key) + len("String") + len(value["StringValue"]) for key, value in attributes.items())
        if self._fifo:
            fits = _GROUP_ID.fullmatch(group) is not None
            fields["MessageGroupId"] = group if fits else hashlib.sha256(group.encode()).hexdigest()
            fields["MessageDeduplicationId"] = once
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    await self._sends.put(await self._queues.url(queue), fields, size=size)
                except Exception as error:
                    if not self._queues.absent(error):
                        raise
                    self._queues.forget(queue)  # somebody deleted it
                    await self._sends.put(await self._queues.url(queue), fields, size=size)
        except Exception as error:
            self._refuse(error)

    async def _change(self, url: str, receipt: str, seconds: int) -> None:
        await self._changes.put(url, {"ReceiptHandle": receipt, "VisibilityTimeout": seconds})

    def _bounded(self, method: str) -> Callable[..., Awaitable[dict[str, Any]]]:
        """A call that does not hang as long as a poll may."""

        async def call(**arguments: Any) -> dict[str, Any]:
            async with asyncio.timeout(self._timeout):
                answer: dict[str, Any] = await getattr(self._queues.client, method)(**arguments)
                return answer

        return call

    def _errand(self, errand: Any) -> None:
        task = asyncio.get_running_loop().create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    @staticmethod
    def _check_open(open: bool) -> None:
        if not open:
            raise TransportError("The SQS transport is not open: call start() first, and nothing after close().")

    def _refuse(self, error: BaseException) -> NoReturn:
        if isinstance(error, TransportError) or not isinstance(error, Exception):
            raise error
        raise TransportError(self._queues.sentence(error)) from error


def _body(message: Task | Answer, limit: int) -> str:
    """As SQS takes it: JSON may hold two characters that SQS does not, and only inside its strings."""
    text = encoded(message, carrier="SQS", limit=limit).decode()
    text = text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")
    check_size(message, len(text.encode()), carrier="SQS", limit=limit)
    return text
