"""What every control plane owes. Subclass `ControlPlaneSuite`, say how two engines' ends are built, run pytest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from durable.control_plane.interface import ControlPlane
from durable.protocol.messages import ControlMessage
from durable.testing.facts import eventually


class Heard(list[ControlMessage]):
    """A handler that remembers."""

    def __call__(self, message: ControlMessage) -> None:
        self.append(message)

    def runs(self) -> list[str | None]:
        return [message.run_id for message in self]


def cancel(sender: str, run_id: str) -> ControlMessage:
    return ControlMessage(sender=sender, kind="cancel", run_id=run_id)


class ControlPlaneSuite:
    """The contract, test by test."""

    async def build(self) -> Callable[[], ControlPlane]:
        """A maker of ends that hear each other and nobody else's."""
        raise NotImplementedError

    @asynccontextmanager
    async def planes(self, count: int = 2) -> AsyncIterator[list[ControlPlane]]:
        """Started ends, closed at last."""
        make = await self.build()
        async with AsyncExitStack() as stack:
            ends = [make() for _ in range(count)]
            for end in ends:
                await end.start()
                stack.push_async_callback(end.close)
            yield ends

    async def test_a_message_reaches_every_other_instance(self) -> None:
        """What one engine publishes, every other engine hears, field by field."""
        async with self.planes(3) as (a, b, c):
            heard_b, heard_c = Heard(), Heard()
            b.on_control("b", heard_b)
            c.on_control("c", heard_c)
            messages = [
                ControlMessage(sender="a", kind="event", event={"type": "run.started", "runId": "r1", "at": 1}),
                cancel("a", "r1"),
                ControlMessage(sender="a", kind="enqueued", run_id="r1"),
            ]
            for message in messages:
                await a.publish_control(message)
            await eventually(lambda: heard_b == messages and heard_c == messages, "both heard all three, in order")

    async def test_own_echo_is_dropped(self) -> None:
        """An instance never hears what it said itself."""
        async with self.planes() as (a, b):
            heard_a, heard_b = Heard(), Heard()
            a.on_control("a", heard_a)
            b.on_control("b", heard_b)
            await a.publish_control(cancel("a", "mine"))
            await b.publish_control(cancel("b", "yours"))
            await eventually(lambda: heard_a.runs() == ["yours"] and heard_b.runs() == ["mine"], "each heard the other")

    async def test_two_instances_on_one_end_hear_each_other(self) -> None:
        """The echo is told by the incarnation, not by the connection."""
        async with self.planes(1) as (plane,):
            heard_a, heard_b = Heard(), Heard()
            plane.on_control("a", heard_a)
            plane.on_control("b", heard_b)
            await plane.publish_control(cancel("a", "r"))
            await eventually(lambda: heard_b.runs() == ["r"], "b heard a")
            assert heard_a == []

    async def test_stop_listening(self) -> None:
        """After the returned function was called, that handler hears no more; the others do."""
        async with self.planes() as (a, b):
            stopped, still = Heard(), Heard()
            stop = b.on_control("b", stopped)
            b.on_control("b", still)
            await a.publish_control(cancel("a", "before"))
            await eventually(lambda: stopped.runs() == still.runs() == ["before"], "both heard the first")
            stop()
            stop()
            await a.publish_control(cancel("a", "after"))
            await eventually(lambda: still.runs() == ["before", "after"], "the other one goes on")
            assert stopped.runs() == ["before"]

    async def test_a_raising_handler_harms_nobody(self) -> None:
        """A handler that raises neither stops the others nor reaches the sender."""

        def broken(message: ControlMessage) -> None:
            raise RuntimeError("a bug in a handler")

        async with self.planes() as (a, b):
            heard = Heard()
            b.on_control("b", broken)
            b.on_control("b", heard)
            await a.publish_control(cancel("a", "one"))
            await a.publish_control(cancel("a", "two"))
            await eventually(lambda: heard.runs() == ["one", "two"], "the other handler heard both")

    async def test_a_dead_peer_is_survived(self) -> None:
        """When one instance goes away, the others still hear each other, and publishing to it raises nothing."""
        async with self.planes(3) as (a, b, c):
            heard_b, heard_c = Heard(), Heard()
            b.on_control("b", heard_b)
            c.on_control("c", heard_c)
            await b.close()
            await a.publish_control(cancel("a", "r"))
            await eventually(lambda: heard_c.runs() == ["r"], "c heard a")
            assert heard_b == []

    async def test_close_is_idempotent_and_publishing_after_it_is_harmless(self) -> None:
        """A closed end takes a second close, and drops what it is asked to say."""
        async with self.planes() as (a, b):
            heard = Heard()
            b.on_control("b", heard)
            await a.close()
            await a.close()
            await a.publish_control(cancel("a", "nobody hears this"))
            await b.publish_control(cancel("x", "fence"))
            await eventually(lambda: heard.runs() == ["fence"], "only what was said through an open end")
