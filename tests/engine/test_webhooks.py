"""Webhooks: a wait with a URL, and calls to other people's URLs as steps, over real HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec import Struct

from durable import Context, RunFailed, workflow
from durable.core.errors import ForkRefused, PayloadTooLarge, RunFinished, RunNotFound
from durable.core.retry import RetryPolicy
from durable.core.webhooks import Delivered, Hook, hook_of, token_of
from durable.runners.outgoing import Calls, Outgoing
from tests.engine.world import World

KEY = "a-secret-of-the-engines"
SOON = RetryPolicy(max_attempts=4, backoff="fixed", initial_delay=0.05, jitter=0.0)


class Receiver:
    """An HTTP server that answers what it is told to, and keeps what it got."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[tuple[int, bytes, dict[str, str]]] = []
        """Given in turn; then 200 with `{"ok": true}`."""
        self.url = ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.got.append((headers, body))
        status, data, more = self.answers.pop(0) if self.answers else (200, b'{"ok":true}', {})
        lines = [f"HTTP/1.1 {status} x", f"content-length: {len(data)}", "connection: close"]
        lines += [f"{name}: {value}" for name, value in more.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await writer.drain()
        writer.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    found = Receiver()
    server = await asyncio.start_server(found, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    yield found
    server.close()


@pytest.fixture
async def outgoing() -> AsyncIterator[Outgoing]:
    made = Outgoing(Calls(loopback=True))
    yield made
    await made.close()


class Paid(Struct):
    cents: int


@workflow(name="pays")
async def pays(ctx: Context) -> Any:
    hook = await ctx.webhook("paid", type=Paid)
    await ctx.step("tell", str, hook.url)
    paid = await hook.received
    await ctx.wait_for_signal("end")
    return [hook.url, paid.cents]


async def address(world: World, run_id: str) -> str:
    """The token a run has given away."""
    await world.until_journal(run_id, lambda lines: "step tell completed" in lines)
    entry = next(e for e in await world.journal(run_id) if e.key == "webhook:paid" and e.status == "completed")
    url: str = json.loads(entry.payload or b"")
    assert url.startswith("https://here.example/api/hooks/")
    return url.rpartition("/")[2]


async def test_a_wait_with_a_url_takes_the_first_post(world: World) -> None:
    """What is posted first settles the wait, typed; others are recorded and settle nothing; the URL is as it was given away,
    though the engine that goes on is told to be elsewhere."""
    settings = {"public_url": "https://here.example/api/", "webhook_key": KEY}
    app = await world.engine(pays, **settings)
    handle = await app.start(pays)
    token = await address(world, handle.id)
    assert await app.engine.deliver_webhook(token, b'{"cents": 7}')
    assert not await app.engine.deliver_webhook(token, b'{"cents": 9}')
    assert not await app.engine.deliver_webhook(token, b'{"cents": 9}')
    await world.until_journal(handle.id, lambda lines: sum("received" in line for line in lines) == 2)
    await world.crash(app)
    app = await world.engine(pays, **settings | {"public_url": "https://elsewhere.example"})
    await app.run(handle.id).signal("end")
    assert await app.run(handle.id).result(5) == [f"https://here.example/api/hooks/{token}", 7]
    assert not await app.engine.deliver_webhook(token, b"1")
    await world.sound(handle.id)


async def test_a_post_too_late_or_with_a_wrong_token_is_refused(world: World) -> None:
    """A run that has ended without it says so; a token that was not made with this secret finds nothing, changed in any place;
    what is too large is refused, and what is no JSON is a text."""
    app = await world.engine(pays, public_url="https://here.example/api", webhook_key=KEY)
    handle = await app.start(pays)
    token = await address(world, handle.id)
    for place in (0, len(token) // 2, len(token) - 1):
        other = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        with pytest.raises(RunNotFound):
            await app.engine.deliver_webhook(other, b"1")
    with pytest.raises(RunNotFound):
        await app.engine.deliver_webhook("", b"1")
    with pytest.raises(PayloadTooLarge):
        await app.engine.deliver_webhook(token, b'"' + b"x" * (1 << 20) + b'"')
    await handle.cancel()
    await world.until(handle.id, lambda r: r.status == "cancelled")
    with pytest.raises(RunFinished):
        await app.engine.deliver_webhook(token, b"plain text")


def test_a_token_says_which_wait_and_nothing_else_makes_one() -> None:
    """What goes in comes out, with the same secret only, and is safe in a URL."""
    hook = Hook("shop.prod", "run/1?é", "webhook:paid:1")
    token = token_of(KEY, hook)
    assert hook_of(KEY, token) == hook
    assert set(token) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
    with pytest.raises(RunNotFound):
        hook_of("another", token)


async def test_without_a_secret_or_an_address_the_step_says_what_to_set(world: World) -> None:
    """The run fails at once, with the setting's name."""
    app = await world.engine(pays)
    with pytest.raises(RunFailed, match="public_url"):
        await (await app.start(pays)).result(5)
    other = await world.engine(pays, public_url="https://here.example")
    handle = await other.start(pays)
    with pytest.raises(RunFailed, match=r"public_url|webhook_key"):
        await handle.result(5)


@workflow(name="calls")
async def calls(ctx: Context, url: str) -> Delivered:
    return await ctx.call_webhook(url, {"order": 7}, headers={"x-shop": "s1"}, retries=SOON)


async def test_a_call_is_signed_and_tried_again_under_one_id(
    world: World, receiver: Receiver, outgoing: Outgoing
) -> None:
    """A receiver that is busy gets the same body under the same id until it takes it; it can check who calls; what it answered
    is the step's result."""
    receiver.answers = [(503, b"", {}), (429, b"", {"retry-after": "0"})]
    app = await world.engine(calls, caller=outgoing, webhook_key=KEY)
    handle = await app.start(calls, receiver.url)
    done = await handle.result(5)
    assert (done.status, done.body, done.data) == (200, {"ok": True}, {"order": 7})
    assert len(receiver.got) == 3
    assert {headers["x-durable-delivery"] for headers, _ in receiver.got} == {f"{handle.id}:0"}
    assert [headers["x-durable-attempt"] for headers, _ in receiver.got] == ["1", "2", "3"]
    for headers, body in receiver.got:
        assert body == b'{"order":7}'
        assert headers["x-shop"] == "s1"
        assert headers["x-durable-signature"] == hmac.new(KEY.encode(), body, hashlib.sha256).hexdigest()
    assert (await world.statuses(handle.id, "step")).count("retrying") == 2


async def test_a_final_no_fails_the_call_at_once(world: World, receiver: Receiver, outgoing: Outgoing) -> None:
    """400s and redirects are not tried again, nor are answers beyond the limit and addresses that are not called; requeued,
    the call is made again."""
    app = await world.engine(calls, caller=outgoing)
    for answer in ((404, b"", {}), (302, b"", {"location": receiver.url}), (200, b"x" * (1 << 20) + b"y", {})):
        receiver.got.clear()
        receiver.answers = [answer]
        handle = await app.start(calls, receiver.url)
        with pytest.raises(RunFailed):
            await handle.result(5)
        assert len(receiver.got) == 1
    with pytest.raises(RunFailed, match="metadata"):
        await (await app.start(calls, "http://169.254.169.254/latest")).result(5)
    [failure, *_], _ = await app.engine.failures(2)
    assert "metadata" in failure.error.message
    await app.requeue(handle.id)
    assert (await handle.result(5)).status == 200


async def test_a_call_that_was_made_can_be_made_again(world: World, receiver: Receiver, outgoing: Outgoing) -> None:
    """Redelivered: the same body under the same id, and the run is not touched; a step that made no call is refused."""
    app = await world.engine(calls, pays, caller=outgoing, public_url="https://here.example/api", webhook_key=KEY)
    handle = await app.start(calls, receiver.url)
    await handle.result(5)
    journal = await world.journal(handle.id)
    receiver.answers = [(202, b"thanks", {})]
    again = await app.engine.redeliver(handle.id, "call_webhook")
    assert (again.status, again.body) == (202, "thanks")
    assert receiver.got[0][1] == receiver.got[1][1]
    assert receiver.got[0][0]["x-durable-delivery"] == receiver.got[1][0]["x-durable-delivery"]
    assert await world.journal(handle.id) == journal
    other = await app.start(pays)
    await address(world, other.id)
    with pytest.raises(ForkRefused, match="made no call"):
        await app.engine.redeliver(other.id, "tell")
