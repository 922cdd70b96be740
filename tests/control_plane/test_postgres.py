"""The control plane on Postgres, beyond what every control plane owes: sizes, gaps, and who may share one."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any

import pytest

from durable.control_plane.interface import LOOK_EVERYWHERE
from durable.control_plane.postgres import PostgresControlPlane, fitting
from durable.core.errors import DefinitionError, TransportError
from durable.protocol.codec import decode_control, encode
from durable.protocol.messages import ControlMessage
from durable.testing.facts import eventually
from durable.testing.suites.control_plane import Heard, cancel
from tests.store.backends import Backends

FULL = 7_999


def progress(bulk: str) -> ControlMessage:
    event = {"type": "step.progress", "runId": "r1", "seq": 3, "at": 5, "event": {"message": bulk}}
    return ControlMessage(sender="a", kind="event", event=event)


def padded(size: int, letter: str) -> ControlMessage:
    """An event that is exactly so many bytes on the wire."""
    room = size - len(encode(progress("")))
    return progress(letter * (room // len(letter.encode())) + "." * (room % len(letter.encode())))


@pytest.mark.parametrize("letter", ["a", "é", "🦆"])
async def test_long_events_lose_their_bulk_and_stay_true(postgres_url: str, letter: str) -> None:
    """7,999 bytes travel as they are; from 8,000 on the event keeps what it is, whose and when. Counted in bytes."""
    a, b = PostgresControlPlane(postgres_url), PostgresControlPlane(postgres_url)
    heard = Heard()
    await a.start()
    await b.start()
    b.on_control("b", heard)
    whole, first_cut, second_cut = (padded(FULL + more, letter) for more in (0, 1, 2))
    for message in (whole, first_cut, second_cut, cancel("a", "fence")):
        await a.publish_control(message)
    await eventually(lambda: "fence" in heard.runs(), "all has come")
    slim = {"type": "step.progress", "runId": "r1", "seq": 3, "at": 5}
    assert [message.event for message in heard[:-1]] == [whole.event, slim]  # the two that were cut are one now
    await a.close()
    await b.close()


def test_what_fits_is_left_alone() -> None:
    """Byte for byte as the codec writes it; a slim event is a message like any other."""
    for size in (FULL - 1, FULL):
        message = padded(size, "a")
        assert fitting(message) == encode(message).decode()
    text = fitting(padded(FULL + 1, "a"))
    assert text is not None
    assert decode_control(text.encode()).kind == "event"


@pytest.mark.parametrize(
    "message",
    [
        cancel("a", "r" * 8_000),
        ControlMessage(sender="a", kind="event", event={"type": "t" * 8_000, "runId": "r"}),
        cancel("a", "\ud800"),
    ],
    ids=["id", "type", "surrogate"],
)
async def test_what_cannot_be_said_is_dropped_and_logged_once(
    postgres_url: str, message: ControlMessage, caplog: pytest.LogCaptureFixture
) -> None:
    """It harms no other message, and the caller hears nothing of it."""
    a, b = PostgresControlPlane(postgres_url), PostgresControlPlane(postgres_url)
    heard = Heard()
    await a.start()
    await b.start()
    b.on_control("b", heard)
    for said in (message, message, cancel("a", "r")):
        await a.publish_control(said)
    await eventually(lambda: heard.runs() == ["r"], "the other one came")
    assert len([r for r in caplog.records if "dropped" in r.getMessage()]) == 1
    await a.close()
    await b.close()


async def test_what_is_no_control_message_is_passed_over(postgres_url: str) -> None:
    """A stranger's text, a kind of a later version, an empty notification."""
    plane = PostgresControlPlane(postgres_url)
    heard = Heard()
    await plane.start()
    plane.on_control("a", heard)
    async with Backends(postgres_url) as others:
        for payload in (
            "",
            "hello",
            "{}",
            '{"from": "x", "kind": "of a later version"}',
            '{"from": 1, "kind": "cancel"}',
        ):
            await others.notify("durable_control", payload)
        await others.notify("durable_control", '{"from": "x", "kind": "cancel", "runId": "r", "later": 1}')
    await eventually(lambda: heard.runs() == ["r"], "the one that is was heard")
    await plane.close()


async def test_after_a_gap_listeners_are_told_to_look_everywhere(postgres_url: str) -> None:
    """What was said while the link was down is lost; that it was down is not."""
    plane = PostgresControlPlane(postgres_url)
    heard = Heard()
    await plane.start()
    plane.on_control("a", heard)
    async with Backends(postgres_url) as others:
        await eventually(lambda: plane.deaf is None, "it hears")
        await others.terminate()
        await eventually(lambda: heard == [LOOK_EVERYWHERE], "they were told")
        await plane.publish_control(cancel("b", "r"))
        await eventually(lambda: heard.runs() == [None, "r"], "and hear again")
    await plane.close()


async def test_engines_that_share_an_instance_share_two_connections(postgres_url: str) -> None:
    """Each starts and closes it, at the same time too; the last close counts, and it may be started again."""
    plane = PostgresControlPlane(postgres_url)
    async with Backends(postgres_url) as others:
        await asyncio.gather(plane.start(), plane.start())
        await eventually(lambda: plane.deaf is None, "it hears")
        assert len(await others.pids()) == 2
        await plane.close()
        heard = Heard()
        plane.on_control("a", heard)
        await plane.publish_control(cancel("b", "still there"))
        await eventually(lambda: heard.runs() == ["still there"], "it was heard")
        await plane.close()
        await others.none()
        await plane.start()
        await eventually(lambda: plane.deaf is None, "it hears again")
        await plane.close()
        await others.none()


async def test_other_names_are_other_planes(postgres_url: str) -> None:
    """Two deployments on one database keep apart by the name."""
    mine, same, other = (PostgresControlPlane(postgres_url, name=f"durable_{word}") for word in ("a", "a", "b"))
    heard, stray = Heard(), Heard()
    for plane in (mine, same, other):
        await plane.start()
    same.on_control("same", heard)
    other.on_control("other", stray)
    await mine.publish_control(cancel("mine", "r"))
    await eventually(lambda: heard.runs() == ["r"], "it was heard")
    await other.publish_control(cancel("x", "fence"))
    await eventually(lambda: stray.runs() == ["fence"], "and there it was not")
    for plane in (mine, same, other):
        await plane.close()


async def test_a_database_that_is_not_there_is_a_sentence() -> None:
    """TransportError says what to do, and tells no password."""
    plane = PostgresControlPlane("postgresql://me:secret@127.0.0.1:1/nothing")
    with pytest.raises(TransportError, match="cannot listen on its database") as raised:
        await plane.start()
    assert "secret" not in str(raised.value)
    await plane.close()
    await plane.publish_control(cancel("a", "nobody"))


@pytest.mark.parametrize(
    "arguments", [{"url": "postgresql://h/d?nonsense=1"}, {"url": "postgresql:///d", "name": "control"}]
)
def test_what_cannot_be_is_refused_at_once(arguments: dict[str, Any]) -> None:
    """A bad URL or name is an error where it is written, not a log line at night."""
    with pytest.raises(DefinitionError, match="cannot be"):
        PostgresControlPlane(**arguments)


@pytest.mark.parametrize("url", ["postgresql://u:secret%zz@h/d", "postgresql://u:secret words@h/d"])
def test_a_password_that_breaks_the_url_is_in_no_message(url: str) -> None:
    """The driver quotes what it stumbles over; what is said and printed about a bad URL has none of it."""
    with pytest.raises(DefinitionError, match="cannot be") as raised:
        PostgresControlPlane(url)
    assert "secret" not in "".join(traceback.format_exception(raised.value)).replace(url, "")
