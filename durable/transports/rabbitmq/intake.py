"""Tasks taken from RabbitMQ's queues: no more at once than there is room for, and what has to wait goes to others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING

from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from durable.core.errors import PayloadError
from durable.protocol import names
from durable.protocol.codec import decode_any_task
from durable.protocol.messages import Answer, Task
from durable.transports.interface import Concurrency
from durable.transports.rabbitmq.link import (
    CLOSE_SECONDS,
    OPEN_SECONDS,
    Line,
    acknowledge,
    all_of,
    lost_is_an_error,
    refuse,
)
from durable.transports.serving import ROOM_SECONDS, Server

if TYPE_CHECKING:
    from durable.transports.rabbitmq.transport import RabbitMqTransport

HELD_SECONDS = 1.0
"""How long a task may wait here for room while another worker might have some."""


class Delivery:
    """A message of a task, until it is settled."""

    def __init__(self, intake: Intake, message: AbstractIncomingMessage) -> None:
        self.intake = intake
        self.message = message
        self.since = time.monotonic()
        self._round = intake.round
        intake.unsettled += 1

    def settled(self) -> None:
        if self._round == self.intake.round:
            self.intake.unsettled -= 1


class Intake:
    """One group's queue at one `serve`: a consumer that is given at most `ahead` tasks which are not settled. The broker
    counts for each consumer, so another bound is another consumer: `round` numbers them."""

    def __init__(self, transport: RabbitMqTransport, serving: Serving, group: str, ahead: int) -> None:
        self._transport = transport
        self._serving = serving
        self.queue = names.tasks(transport.prefix, group)
        self.ahead = ahead
        self.round = 0
        self.unsettled = 0
        self._tag: str | None = None
        self._turn = asyncio.Lock()
        self.line = Line(transport.link_in, f"the channel of {self.queue}", self._set_up)

    async def tune(self, ahead: int) -> None:
        """From now on; 0: take nothing. What has been delivered stays."""
        async with self._turn:
            self.ahead = ahead
            channel = self.line.current
            if channel is not None:
                with contextlib.suppress(Exception), lost_is_an_error():
                    async with asyncio.timeout(OPEN_SECONDS if ahead else CLOSE_SECONDS):
                        await self._consume(channel)

    async def _set_up(self, channel: AbstractChannel) -> None:
        if self.round:
            self._transport.forget(self.queue)  # it may have been deleted, and the channel lost for that
        await self._transport.declared(self.queue)
        async with self._turn:
            self._tag = None
            await self._consume(channel)

    async def _consume(self, channel: AbstractChannel) -> None:
        queue = await channel.get_queue(self.queue, ensure=False)
        if self._tag is not None:
            tag, self._tag = self._tag, None
            await queue.cancel(tag)
        self.round += 1
        self.unsettled = 0
        if self.ahead:
            await channel.set_qos(prefetch_count=self.ahead)
            self._tag = await queue.consume(self._arrived)

    async def _arrived(self, message: AbstractIncomingMessage) -> None:
        self._serving.arrived(Delivery(self, message))


class Serving:
    """One `serve`: its queues, and what waits here for room. One group with a fixed bound is given as much as there is room
    for and nothing ever waits. Several groups share their bound, which the broker does not know of; then, and where the
    bound changes by itself, it is tuned: taken in while there is room, given back when it waits."""

    def __init__(self, transport: RabbitMqTransport, server: Server, concurrency: Concurrency) -> None:
        self._transport = transport
        self.server = server
        self._concurrency = concurrency
        self.waiting: deque[tuple[Delivery, Task]] = deque()
        self._look = asyncio.Event()
        ahead = self._ahead(server.room)
        self.intakes = [Intake(transport, self, group, ahead) for group in server.groups]
        self._tending: asyncio.Task[None] | None = None
        self.closing = False

    async def start(self) -> None:
        """Raises TransportError when a queue cannot be had."""
        self._tending = asyncio.get_running_loop().create_task(self._tend(), name="durable-amqp room")
        await all_of(intake.line.start() for intake in self.intakes)

    async def stop(self) -> None:
        """Take nothing more; give back what waits."""
        self.closing = True
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.wait({self._tending}, timeout=CLOSE_SECONDS)
        await all_of(intake.tune(0) for intake in self.intakes)
        await self._return_waiting()

    async def close(self) -> None:
        """Let go of the channels; what is not settled goes back."""
        await all_of(intake.line.close() for intake in self.intakes)

    def arrived(self, delivery: Delivery) -> None:
        """Begin it, or let it wait for room."""
        transport = self._transport
        if self.closing:
            transport.spawn(transport.give_back(delivery))
            return
        try:
            task = decode_any_task(delivery.message.body, limit=transport.capabilities.max_message)
        except PayloadError as error:
            transport.spawn(transport.put_away(delivery.message, delivery.intake.queue, str(error), delivery.settled))
            return
        if self.waiting or not self._begin(delivery, task):
            self.waiting.append((delivery, task))
            self._look.set()

    def _begin(self, delivery: Delivery, task: Task) -> bool:
        """False: there is no room. The same attempt while it is under way here is another delivery of the same work, after a
        channel was lost: it is settled with it."""
        transport = self._transport
        key = (task.id, task.attempt)
        if key in transport.under_way:
            transport.under_way[key].append(delivery)
            return True
        if not self.server.room:
            return False
        transport.under_way[key] = [delivery]

        async def done(answer: Answer | None) -> None:
            if answer is not None:
                await transport.answer(answer)
            for each in transport.under_way.pop(key, ()):
                each.settled()
                await acknowledge(each.message)

        async def back() -> None:
            if not self.closing:  # something is wrong with it: it comes again, and that is counted
                for each in transport.under_way.pop(key, ()):
                    each.settled()
                    await refuse(each.message)
            for n, each in enumerate(transport.under_way.pop(key, ())):
                if n:
                    each.settled()
                    await acknowledge(each.message)
                else:
                    await transport.give_back(each)

        transport.bench.begin(self.server, task, done, back)
        return True

    def _ahead(self, room: int) -> int:
        most = self._transport.prefetch
        return room if most is None else min(room, most)

    async def _tend(self) -> None:
        fixed = isinstance(self._concurrency, int)
        whole = self._ahead(self.server.room) if fixed else -1
        while True:
            if fixed and not self.waiting and all(intake.ahead == whole for intake in self.intakes):
                self._look.clear()
                await self._look.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROOM_SECONDS):
                    if self.waiting:
                        await self.server.has_room()
                    else:
                        await asyncio.sleep(ROOM_SECONDS)
            while self.waiting and self._begin(*self.waiting[0]):
                self.waiting.popleft()
            await self._tune(fixed)

    async def _tune(self, fixed: bool) -> None:
        room = self.server.room
        spare = any(intake.ahead > intake.unsettled for intake in self.intakes)
        if self.waiting and time.monotonic() - self.waiting[0][0].since > HELD_SECONDS:
            await self._ask_for(0)
            await self._return_waiting()
        elif not room:
            if spare and not fixed:  # the bound has fallen
                await self._ask_for(0)
        elif any(intake.ahead <= intake.unsettled for intake in self.intakes):
            await self._ask_for(self._ahead(room))

    async def _ask_for(self, ahead: int) -> None:
        await all_of(intake.tune(ahead) for intake in self.intakes if intake.ahead != ahead or ahead)

    async def _return_waiting(self) -> None:
        waiting = [delivery for delivery, _ in self.waiting]
        self.waiting.clear()
        await all_of(self._transport.give_back(delivery) for delivery in waiting)
