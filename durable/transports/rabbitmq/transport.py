"""The transport over RabbitMQ: a queue for each routing token, one for all answers, and a broadcast for hints.

    engine ──task──→ <prefix>-tasks-<token> ──→ worker ──answer──→ <prefix>-results ──→ any engine
                          │ delivered too often
                          └──→ <prefix>-given-up ──→ any engine: the step has failed, its retries decide
    what nobody may read ──→ <prefix>-dead, for an operator: nothing takes from it
    hints ──→ exchanges <prefix>-control and <prefix>-heartbeat ──→ a queue of each end's own

A message is acknowledged when what follows from it is safe: a task when the broker has confirmed its answer, an answer when
the engine has taken it in. Whatever was not is delivered again. Two connections: a broker short of memory stops those that
publish, and who takes messages must go on, or it stays short.

What an end gives back is published anew and then acknowledged, rather than refused: the broker counts refusals like deaths,
and a task that met three closing workers is not poisoned.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Literal

from aio_pika import DeliveryMode, ExchangeType, Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.exceptions import DeliveryError, PublishError

from durable.control_plane.interface import LOOK_EVERYWHERE, ControlHandler
from durable.control_plane.listeners import Listeners
from durable.core.errors import DefinitionError, EngineStopped, MessageRefused, PayloadError, TransportError
from durable.protocol import names
from durable.protocol.codec import decode_answer, decode_any_task, decode_control, decode_heartbeat, encode
from durable.protocol.messages import Answer, ControlMessage, Heartbeat, RemoteTask, Task, sanitize
from durable.transports.answers import given_up
from durable.transports.interface import (
    Capabilities,
    Concurrency,
    HeartbeatHandler,
    ResultHandler,
    TaskHandler,
)
from durable.transports.rabbitmq.intake import Delivery, Serving
from durable.transports.rabbitmq.link import (
    OPEN_SECONDS,
    Line,
    Link,
    acknowledge,
    all_of,
    explained,
    lost_is_an_error,
    refuse,
)
from durable.transports.serving import Server, Workbench

log = logging.getLogger("durable.transports")

RESULTS_AHEAD = 64
"""Answers an engine takes in at once."""
GIVEN_UP_AHEAD = 8
HINT_SECONDS = 1.0
"""For a hint to leave; then it is dropped."""
AGAIN_MIN, AGAIN_MAX = 0.05, 5.0
"""Seconds before something that failed is tried again, twice as long each time."""
DELETED_SECONDS = 0.5
"""Between finding that a queue is gone and making it again."""
NAME_BYTES = 255
REASON_BYTES = 500
CANCEL = "step.cancel"
"""The type of the event by which one task is cancelled."""
REASON, QUEUE, RETURNS = "x-durable-reason", "x-durable-queue", "x-durable-returns"
"""Headers: why a message lies in the dead queue and where it came from; how often an answer was not taken."""


class RabbitMqTransport:
    """Both ends, and a control plane. One instance may serve one engine or worker; engines of one process that use it as
    their control plane may share it: each starts and closes it, and the last close counts."""

    def __init__(
        self,
        url: str = "amqp://guest:guest@localhost/",
        *,
        prefix: str = names.DEFAULT_PREFIX,
        namespace: str | None = None,
        queue_type: Literal["quorum", "classic"] = "quorum",
        prefetch: int | None = None,
        delivery_limit: int | None = 3,
        max_message: int = 16 << 20,
        dispatch_timeout: float = 4.0,
        heartbeat_interval: float = 5.0,
        signed: bool = False,
        declare: bool = True,
    ) -> None:
        """`queue_type`: quorum queues survive a node and count deliveries; classic ones, for brokers without, do neither.
        `prefetch`: tasks that may be here at once for each group; None: as many as there is room for. `delivery_limit`: a
        task delivered more often without an answer is given up, and its step's retries decide; None: never. Tasks that
        closing workers give back do not count. `max_message`: bytes. `dispatch_timeout`, `heartbeat_interval`: seconds.
        `declare=False`: somebody else makes the queues and exchanges. Raises DefinitionError."""
        self.prefix = names.effective_prefix(prefix, namespace)
        if queue_type not in ("quorum", "classic"):
            raise DefinitionError(f"queue_type is 'quorum' or 'classic', not {queue_type!r}.")
        if prefetch is not None and prefetch < 1:
            raise DefinitionError(
                f"prefetch is 1 or more, not {prefetch}. Leave it out for as many as there is room for."
            )
        self._url = url
        self._queue_type = queue_type
        self.prefetch = prefetch
        self._delivery_limit = delivery_limit
        self._timeout = dispatch_timeout
        self._declare = declare
        self._capabilities = Capabilities(
            name="rabbitmq",
            shared=True,
            holds=False,
            broadcast=True,
            heartbeats=True,
            max_message=max_message,
            signed=signed,
        )
        self.bench = Workbench(max_message=max_message, heartbeat_interval=heartbeat_interval, beat=self.heartbeat)
        self.under_way: dict[tuple[str, int], list[Delivery]] = {}
        """The deliveries of each attempt that is worked on here."""
        self._arranged: list[tuple[Server, Concurrency]] = []
        self._servings: list[Serving] = []
        self._listeners = Listeners()
        self._take: ResultHandler | None = None
        self._beaten: HeartbeatHandler | None = None
        self._me = secrets.token_hex(8)
        self._starts = 0
        self._turn = asyncio.Lock()
        self._open = False
        self._closing = False
        self._spawned: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    # -- life

    async def start(self) -> None:
        """Connect, and make the queues that this end needs. Raises TransportError; later losses are mended in the
        background."""
        async with self._turn:
            if not self._starts:
                await self._begin()
            self._starts += 1

    async def _begin(self) -> None:
        self.link_out, self.link_in = Link(self._url, "publisher"), Link(self._url, "consumer")
        self._declared: dict[str, asyncio.Task[None]] = {}
        self._heard_before = self._heard_results = False
        self._hearing: list[tuple[str, str]] | None = []
        self._publisher = Line(self.link_out, "the publishing channel", _as_it_is, confirms=True)
        self._hinter = Line(self.link_out, "the channel of hints", self._set_up_hints)
        self._ear = Line(self.link_in, "the hearing channel", self._set_up_ear)
        self._results = Line(self.link_in, "the channel of results", self._set_up_results)
        self._closing, self._open = False, True
        try:
            async with asyncio.timeout(2 * self._timeout):
                await all_of(link.start() for link in (self.link_out, self.link_in))
                lines = [self._publisher, self._hinter, self._ear]
                await all_of(line.start() for line in (lines if self._take is None else [*lines, self._results]))
                for server, concurrency in self._arranged:
                    await self._begin_serving(server, concurrency)
        except BaseException as error:
            await self._end(0)
            if isinstance(error, Exception):
                raise explained(error, self._url) from error
            raise

    async def close(self, timeout: float = 10.0) -> None:
        """Take no new task, let those under way finish and be answered within `timeout` seconds; give back the rest."""
        async with self._turn:
            if not self._starts:
                return
            self._starts -= 1
            if not self._starts:
                await self._end(timeout)
                self._arranged.clear()
                self.bench.servers.clear()
                self._listeners.clear()

    async def _end(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        await all_of(serving.stop() for serving in self._servings)
        await self.bench.drain(timeout)
        self._closing = True
        await self._deafen()
        if self._spawned:
            await asyncio.wait(self._spawned, timeout=max(0.1, deadline - time.monotonic()))
        self._open = False
        for task in list(self._spawned):
            task.cancel()
        await all_of(serving.close() for serving in self._servings)
        await all_of(line.close() for line in (self._publisher, self._hinter, self._ear, self._results))
        for declaring in self._declared.values():
            declaring.cancel()
        await all_of(link.close() for link in (self.link_out, self.link_in))
        self._servings = []
        self.under_way.clear()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it beside, and know of it when closing."""
        task = asyncio.get_running_loop().create_task(work, name="durable-amqp message")
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)

    # -- engine end

    async def dispatch(self, task: Task) -> None:
        """Returns when the broker has confirmed that it keeps the task. Priorities are not kept: quorum queues have none."""
        await self._publish(names.tasks(self.prefix, task.group), self._encoded(task), task.id)

    async def cancel(self, task_id: str) -> None:
        """Tell every worker end."""
        run_id = task_id.partition(":wf:")[0] if ":wf:" in task_id else task_id.rpartition(":")[0]
        event = {"type": CANCEL, "runId": run_id, "stepId": task_id, "at": time.time_ns() // 1_000_000}
        await self.publish_control(ControlMessage(sender=self._me, kind="event", event=event))

    async def holding(self, task_ids: Sequence[str]) -> Collection[str]:
        """A queue cannot be looked into without taking from it."""
        raise TransportError("RabbitMQ cannot say which tasks it holds.")

    def on_result(self, handler: ResultHandler) -> None:
        """Hear answers, from `start` on."""
        self._take = handler

    def on_heartbeat(self, handler: HeartbeatHandler) -> None:
        """Hear the beats of every worker, from `start` on."""
        self._beaten = handler

    # -- worker end

    async def serve(self, groups: Collection[str], handler: TaskHandler, *, concurrency: Concurrency = 16) -> None:
        """Each group is a consumer of its own. Raises TransportError when a queue cannot be had."""
        server = self.bench.add([sanitize(group) for group in groups], handler, concurrency)
        async with self._turn:
            self._arranged.append((server, concurrency))
            if self._starts:
                try:
                    await self._begin_serving(server, concurrency)
                except TransportError:
                    self._arranged.remove((server, concurrency))
                    raise

    async def _begin_serving(self, server: Server, concurrency: Concurrency) -> None:
        serving = Serving(self, server, concurrency)
        self._servings.append(serving)
        try:
            async with asyncio.timeout(self._timeout):
                await serving.start()
        except TimeoutError:
            log.warning("RabbitMQ does not answer; %s are served when it does", ", ".join(server.groups))
        except TransportError:
            self._servings.remove(serving)
            await serving.stop()
            await serving.close()
            raise

    async def reply(self, answer: Answer) -> None:
        """Returns when the broker has confirmed that it keeps the answer."""
        await self._publish(names.results(self.prefix), self._encoded(answer), answer.id)

    async def heartbeat(self, beat: Heartbeat) -> None:
        """Tell every engine."""
        await self._hint(names.heartbeat(self.prefix), beat)

    async def answer(self, answer: Answer) -> None:
        """Reply for as long as it takes: an answer is worth more than the message it is for, whose channel may be long
        gone. Raises TransportError when this end closes, PayloadError for what cannot be sent."""
        body = self._encoded(answer)
        pause = AGAIN_MIN
        while True:
            try:
                await self._publish(names.results(self.prefix), body, answer.id)
                return
            except TransportError as error:
                if self._closing:
                    raise
                log.warning("The answer of %s has not left yet and is sent again: %s", answer.id, error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, AGAIN_MAX)

    async def give_back(self, delivery: Delivery) -> None:
        """Let another have it, which is not counted."""
        try:
            await self._return(delivery.message, delivery.intake.queue, {})
        finally:
            delivery.settled()

    # -- control plane

    @property
    def audience(self) -> bool:
        """The broker does not say who listens."""
        return True

    async def publish_control(self, message: ControlMessage) -> None:
        """Tell every instance. Before `start`, after `close` and while the broker is away a message is dropped."""
        await self._hint(names.control(self.prefix), message)

    def on_control(self, incarnation: str, handler: ControlHandler) -> Callable[[], None]:
        """Hear what others say, and `LOOK_EVERYWHERE` after a gap. Returns the way to stop."""
        return self._listeners.add(incarnation, handler)

    async def _hint(self, exchange: str, message: ControlMessage | Heartbeat) -> None:
        """Say it to whoever listens, or drop it."""
        if not self._open or self._hinter.current is None:
            return
        try:
            body = encode(message)
            async with asyncio.timeout(HINT_SECONDS):
                await self.link_out.unblocked()
                there = await self._hinter.current.get_exchange(exchange, ensure=False)
                with lost_is_an_error():
                    await there.publish(Message(body, content_type="application/json"), "", mandatory=False)
        except Exception as error:
            log.debug("a hint to %s was dropped: %r", exchange, error)

    async def _set_up_hints(self, channel: AbstractChannel) -> None:
        """Whoever speaks needs the exchanges, also where nobody listens."""
        if self._declare:
            for exchange in (names.control(self.prefix), names.heartbeat(self.prefix)):
                await channel.declare_exchange(exchange, ExchangeType.FANOUT, durable=True)

    async def _set_up_ear(self, channel: AbstractChannel) -> None:
        await self._set_up_hints(channel)
        queue = await channel.declare_queue(exclusive=True, auto_delete=True)
        await queue.bind(names.control(self.prefix))
        if self._beaten is not None:
            await queue.bind(names.heartbeat(self.prefix))
        await queue.consume(self._heard, no_ack=True)
        if self._heard_before:
            self._listeners.tell(LOOK_EVERYWHERE)
        self._heard_before = True

    async def _heard(self, message: AbstractIncomingMessage) -> None:
        try:
            if message.exchange == names.heartbeat(self.prefix):
                beat = decode_heartbeat(message.body)
                if self._beaten is not None:
                    self._beaten(beat)
                return
            said = decode_control(message.body)
        except PayloadError as error:
            log.debug("something that is no hint was heard on %s: %s", message.exchange, error)
            return
        except Exception:
            log.exception("A heartbeat handler raised")
            return
        event = said.event or {}
        if said.kind == "event" and event.get("type") == CANCEL:
            self.bench.cancel(str(event.get("stepId")))
            return  # nothing an engine need know of
        if said.kind == "cancel" and said.run_id is not None:
            self.bench.cancel_run(said.run_id)
        self._listeners.tell(said)

    # -- answers

    async def _set_up_results(self, channel: AbstractChannel) -> None:
        if self._hearing is None:
            return
        self._hearing = []
        if self._heard_results:
            for name in (names.results(self.prefix), names.given_up(self.prefix)):
                self.forget(name)
        self._heard_results = True
        await self.declared(names.dead(self.prefix))  # where an operator looks
        results, lost = names.results(self.prefix), names.given_up(self.prefix)
        for name, ahead, handle in ((results, RESULTS_AHEAD, self._answered), (lost, GIVEN_UP_AHEAD, self._given_up)):
            await self.declared(name)
            await channel.set_qos(prefetch_count=ahead)
            queue = await channel.get_queue(name, ensure=False)
            self._hearing.append((name, await queue.consume(handle)))

    async def _deafen(self) -> None:
        """Take no more answers."""
        tags, self._hearing = self._hearing, None
        channel = self._results.current
        for name, tag in tags or ():
            if channel is not None:
                with contextlib.suppress(Exception), lost_is_an_error():
                    async with asyncio.timeout(HINT_SECONDS):
                        await (await channel.get_queue(name, ensure=False)).cancel(tag)

    async def _answered(self, message: AbstractIncomingMessage) -> None:
        self.spawn(self._take_in(message))

    async def _take_in(self, message: AbstractIncomingMessage) -> None:
        queue = names.results(self.prefix)
        try:
            answer = decode_answer(message.body, limit=self._capabilities.max_message)
            await self._tell(answer)
        except (PayloadError, MessageRefused) as error:
            await self.put_away(message, queue, str(error))
        except EngineStopped:
            await self._deafen()
            await self._return(message, queue, {})
        except Exception as error:
            # Another engine may be able to, but not so soon that they play at ball with it.
            returns = message.headers.get(RETURNS)
            times = returns if isinstance(returns, int) and 0 <= returns < 100 else 0
            log.warning("An answer was not taken and is delivered again: %r", error)
            await asyncio.sleep(min(AGAIN_MIN * 2**times, AGAIN_MAX))
            await self._return(message, queue, {RETURNS: times + 1})
        else:
            await acknowledge(message)

    async def _given_up(self, message: AbstractIncomingMessage) -> None:
        self.spawn(self._take_in_given_up(message))

    async def _take_in_given_up(self, message: AbstractIncomingMessage) -> None:
        """It stays here until it was taken: elsewhere it would count as delivered once more."""
        queue = names.given_up(self.prefix)
        pause = AGAIN_MIN
        while not self._closing:
            try:
                await self._tell(self._lost_answer(message))
            except (PayloadError, MessageRefused) as error:
                await self.put_away(message, queue, str(error))
                return
            except EngineStopped:
                await self._deafen()
                await refuse(message)
                return
            except Exception as error:
                log.warning("The end of a task that was given up was not taken and is told again: %r", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, AGAIN_MAX)
            else:
                await acknowledge(message)
                return

    def _lost_answer(self, message: AbstractIncomingMessage) -> Answer:
        """What follows from a message that the broker has given up on. Raises PayloadError: nothing does."""
        limit = self._capabilities.max_message
        origin = str(message.headers.get("x-first-death-queue", ""))
        reason = str(message.headers.get("x-first-death-reason", ""))
        if origin == names.results(self.prefix):
            return decode_answer(message.body, limit=limit)
        if not origin.startswith(names.tasks(self.prefix, "")):
            raise PayloadError("It is not from a queue of tasks or results.")
        task = decode_any_task(message.body, limit=limit)
        if not isinstance(task, RemoteTask):
            raise PayloadError(f"A turn that was given up ({reason}): its run gets another when its time is over.")
        if reason == "delivery_limit":
            reason = (
                f"delivered {(self._delivery_limit or 0) + 1} times and never answered: workers die of it or are killed"
            )
        return given_up(task, reason)

    async def _tell(self, answer: Answer) -> None:
        assert self._take is not None
        await self._take(answer)

    # -- messages

    def _encoded(self, message: Task | Answer) -> bytes:
        limit = self._capabilities.max_message
        try:
            body = encode(message, limit=limit)
        except PayloadError as error:
            raise TransportError(f"{message.id} cannot be sent: {error}") from error
        if len(body) > limit:
            raise TransportError(
                f"The message of {message.id} has {len(body)} bytes and RabbitMQ carries {limit}: send a reference to the data "
                "instead, or raise max_message."
            )
        return body

    async def _publish(self, queue: str, body: bytes, about: str, headers: Mapping[str, Any] | None = None) -> None:
        """Into one queue, confirmed. Raises TransportError, after `dispatch_timeout` at last."""
        if not self._open:
            raise TransportError("This RabbitMQ transport is not open: call start() first, and nothing after close().")
        if len(queue.encode()) > NAME_BYTES:
            raise TransportError(
                f"A queue's name has at most {NAME_BYTES} bytes; {queue[:80]}… has more. Use shorter names."
            )
        message = Message(
            body,
            content_type="application/json",
            delivery_mode=DeliveryMode.PERSISTENT,
            message_id=secrets.token_hex(16),  # of this message: returns are told apart by it
            correlation_id=about if len(about.encode()) <= NAME_BYTES else None,
            headers=dict(headers or {}),
        )
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    await self._publish_once(queue, message)
                except PublishError:
                    # Deleted since. If it were made anew at once, the broker might forget to tell those who consumed it.
                    self.forget(queue)
                    await asyncio.sleep(DELETED_SECONDS)
                    await self._publish_once(queue, message)
        except PublishError as error:
            raise TransportError(f"RabbitMQ has no queue {queue}: declare it, or leave declare=True.") from error
        except DeliveryError as error:
            raise TransportError(
                f"RabbitMQ would not keep a message for {queue}: is the queue full, or its leader away?"
            ) from error
        except Exception as error:
            known = self.link_out.error or self._publisher.error if isinstance(error, TimeoutError) else None
            raise known or explained(error, self._url) from error

    async def _publish_once(self, queue: str, message: Message) -> None:
        await self.declared(queue)
        await self.link_out.unblocked()
        channel = await self._publisher.channel()
        with lost_is_an_error():
            await channel.default_exchange.publish(message, queue, mandatory=True)

    async def _return(self, message: AbstractIncomingMessage, queue: str, headers: Mapping[str, Any]) -> None:
        """Deliver a message again, to anybody."""
        try:
            await self._publish(queue, message.body, message.correlation_id or "", headers)
        except TransportError as error:
            log.debug("a message of %s is refused instead of given back: %s", queue, error)
            await refuse(message)
        else:
            await acknowledge(message)

    async def put_away(
        self,
        message: AbstractIncomingMessage,
        queue: str,
        reason: str,
        settled: Callable[[], None] = lambda: None,
    ) -> None:
        """Into the dead queue, with what was wrong and where it came from."""
        log.warning("A message of %s was put away into %s: %s", queue, names.dead(self.prefix), reason)
        short = reason.encode(errors="replace")[:REASON_BYTES].decode(errors="ignore")
        pause = AGAIN_MIN
        while not self._closing:
            try:
                await self._publish(
                    names.dead(self.prefix),
                    message.body,
                    message.correlation_id or "",
                    {REASON: short, QUEUE: queue},
                )
            except TransportError as error:
                log.warning("It could not be put away yet: %s", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, AGAIN_MAX)
            else:
                settled()
                await acknowledge(message)
                return

    async def declared(self, queue: str) -> None:
        """Have a queue; asked of the broker once for each connection. Raises what the broker says."""
        if not self._declare:
            return
        declaring = self._declared.get(queue)
        if declaring is None:
            declaring = asyncio.get_running_loop().create_task(self._declare_queue(queue), name=f"declare {queue}")
            self._declared[queue] = declaring

            def forget_failure(done: asyncio.Task[None]) -> None:
                failed = done.cancelled() or done.exception() is not None
                if failed and self._declared.get(queue) is done:
                    self.forget(queue)

            declaring.add_done_callback(forget_failure)
        if not declaring.done():
            await asyncio.shield(declaring)

    def forget(self, queue: str) -> None:
        """Declare it anew when it is next asked for."""
        self._declared.pop(queue, None)

    async def _declare_queue(self, queue: str) -> None:
        arguments: dict[str, Any] = {"x-queue-type": self._queue_type}
        lost = names.given_up(self.prefix)
        if queue not in (names.dead(self.prefix), lost):
            await self.declared(lost)
            arguments |= {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": lost}
            if self._queue_type == "quorum":
                # At least once, where the broker can: then what was given up is not lost on its way either.
                arguments |= {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
                if self._delivery_limit is not None and queue != names.results(self.prefix):
                    arguments["x-delivery-limit"] = self._delivery_limit
        # On a channel of its own, which a refusal closes.
        connection = await self.link_in.connection()
        with lost_is_an_error():
            async with asyncio.timeout(OPEN_SECONDS):
                channel = await connection.channel()
                await channel.declare_queue(queue, durable=True, arguments=arguments)
                await channel.close()


async def _as_it_is(channel: AbstractChannel) -> None:
    """A channel that needs nothing."""
