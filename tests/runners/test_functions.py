"""Apps that register functions over `/fn/sync`, and runners that serve: from the registration to the signed call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from durable.core.errors import DefinitionError, RunFailed, RunnerRefused
from durable.core.functions import Pass
from durable.protocol.signature import BadSignature, body_signature, check, fingerprint, sign
from durable.runners.serve import ServeLink
from durable.store.items import ItemQuery, NewItem
from tests.engine.conftest import once
from tests.engine.world import World, eventually
from tests.runners.apps import HttpApp, HttpServer, Memos, Step, op
from tests.runners.site import FieldRunner, Site
from tests.runners.test_operations import soon

WORKSPACE = "shop.dev"
KEY = "dk_shop.dev_s3cret"


async def provide(world: World, url: str | None = None, *given: str) -> None:
    """The workspace's item, as the service writes it; of several keys the last is the newest."""
    keys = [
        {"id": fingerprint(key), "secret": key, "role": "full", "createdAt": number, "endsAt": None}
        for number, key in enumerate(given or [KEY], 1)
    ]
    said = {"app": "shop", "environment": "dev", "keys": keys, "createdAt": 1, "appUrl": url}
    item = NewItem(WORKSPACE, "workspace", WORKSPACE, msgspec.json.encode(said))
    await (await world.store()).put_items([item])


def function(id: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "trigger": {"event": f"{id}.asked"}, "enabled": True, "hasOnFailure": False, "priority": 0} | more


async def test_synced_functions_start_by_events_and_are_called_signed(world: World) -> None:
    """A synced function starts with its event, on any engine; every call is signed with the workspace's key; it waits for
    the event that matches, and sends others once."""
    heard: list[Any] = []

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        paid = step.wait("paid", "order.paid", soon(60), {"order": event["data"]["order"]})
        late = step.wait("late", "never", soon(0.02))
        step.send("tell", {"name": "hears.asked", "data": {"n": 1}, "id": "one"}, {"name": "other", "data": None})
        return [paid["name"], paid["data"], late, event["name"]]

    async def hears(step: Step, event: dict[str, Any], failure: Any) -> Any:
        heard.append(event["data"])

    async with HttpApp({"order": order, "hears": hears}, key=KEY) as app:
        await provide(world, app.url)
        first, second = await world.engine(), await world.engine()
        async with Site(first) as one, Site(second) as two:
            body = msgspec.json.encode({"functions": [function("order"), function("hears")], "url": app.url})
            _, url = await one.functions.sync(WORKSPACE, body)
            assert url == app.url
            await eventually(lambda: "order" in two.functions.of(WORKSPACE))
            published = await second.engine.send_event("order.asked", {"order": 7}, workspace=WORKSPACE)
            run_id = published.admissions[0].run_id
            assert run_id is not None
            await eventually(lambda: app.asked)
            await first.engine.send_event("order.paid", {"order": 8}, workspace=WORKSPACE)
            await first.engine.send_event("order.paid", {"order": 7, "by": "ann"}, workspace=WORKSPACE)
            result = await first.engine.result(run_id, 10, workspace=WORKSPACE)
            assert result == ["order.paid", {"order": 7, "by": "ann"}, None, "order.asked"]
            await eventually(lambda: heard == [{"n": 1}])
            assert app.forged == 0
            assert len(app.asked[-1]["steps"].get("tell", {"data": {"ids": [1, 2]}})["data"]["ids"]) == 2
            await world.sound(run_id)


@pytest.mark.parametrize("signs", [None, "dk_shop.dev_another"])
async def test_an_answer_that_is_not_signed_by_the_app_is_refused(world: World, signs: str | None) -> None:
    """An answer without the workspace's signature, or with another's, is no answer: nothing of it counts, and the run fails
    for it when its retries are over."""

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        return "forged"

    async with HttpApp({"order": order}, key=KEY) as app:
        app.signs = signs
        await provide(world, app.url)
        engine = await world.engine()
        async with Site(engine) as site:
            await site.functions.sync(WORKSPACE, msgspec.json.encode({"functions": [function("order", retries=0)]}))
            handle = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
            with pytest.raises(RunFailed, match="not believed"):
                await handle.result(10)


@pytest.mark.parametrize("holds", ["dk_shop.dev_old", "dk_shop.dev_new"])
async def test_while_a_key_is_replaced_the_app_may_hold_either(world: World, holds: str) -> None:
    """Between a rotation and the app's next start the app knows only the older key: it is called with that, and loses
    nothing."""

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        return await step.run("one", lambda: 1)

    async with HttpApp({"order": order}, key=holds) as app:
        await provide(world, app.url, "dk_shop.dev_old", "dk_shop.dev_new")
        engine = await world.engine()
        async with Site(engine) as site:
            await site.functions.sync(WORKSPACE, msgspec.json.encode({"functions": [function("order", retries=0)]}))
            handle = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
            assert await handle.result(10) == 1


async def test_a_version_that_is_named_is_told_whatever_it_is(world: World) -> None:
    """An app that names its version 1 is asked for `order@1`; one that names none, for `order`."""

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        return "named"

    async def plain(step: Step, event: dict[str, Any], failure: Any) -> Any:
        return "plain"

    async with HttpApp({"order@1": order, "plain": plain}, key=KEY) as app:
        await provide(world, app.url)
        engine = await world.engine()
        async with Site(engine) as site:
            functions = [function("order", version="1"), function("plain")]
            await site.functions.sync(WORKSPACE, msgspec.json.encode({"functions": functions}))
            for name, said in (("order", "named"), ("plain", "plain")):
                handle = await engine.engine.start_run(name, {}, workspace=WORKSPACE)
                assert await handle.result(10) == said


async def test_a_run_goes_on_with_the_version_it_began_with(world: World) -> None:
    """A function that is synced anew under another version: new runs get that, those under way keep theirs, and what is no
    longer synced is started by nothing."""

    async def old(step: Step, event: dict[str, Any], failure: Any) -> Any:
        step.wait("go", "go", soon(60))
        return "old"

    async def new(step: Step, event: dict[str, Any], failure: Any) -> Any:
        return "new"

    async with HttpApp({"order@2024": old, "order@2025": new}, key=KEY) as app:
        await provide(world, app.url)
        engine = await world.engine()
        async with Site(engine) as site:

            async def sync(*functions: dict[str, Any]) -> None:
                await site.functions.sync(WORKSPACE, msgspec.json.encode({"functions": list(functions)}))

            await sync(function("order", version="2024"))
            before = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
            await eventually(lambda: app.asked)
            await sync(function("order", version="2025"))
            after = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
            assert await after.result(10) == "new"
            await engine.engine.send_event("go", None, workspace=WORKSPACE)
            assert await before.result(10) == "old"
            await sync()
            published = await engine.engine.send_event("order.asked", {}, workspace=WORKSPACE)
            assert published.admissions == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"retries": 21},
        {"trigger": {"event": "x", "if": "event.__class__"}},
        {"concurrency": {"limit": 0}},
        {"batch": {"maxSize": 2, "timeoutMs": 10}, "throttle": {"limit": 1, "periodMs": 10}},
        {"timeoutMs": -1},
        {"id": "a*"},
    ],
)
@once
async def test_one_bad_function_refuses_the_whole_sync(world: World, wrong: dict[str, Any]) -> None:
    """A30, A35: nothing of a sync counts that has something in it that makes no sense."""
    engine = await world.engine()
    async with Site(engine) as site:
        body = msgspec.json.encode({"functions": [function("good"), function("bad") | wrong]})
        with pytest.raises(DefinitionError):
            await site.functions.sync(WORKSPACE, body)
        assert site.functions.of(WORKSPACE) == {}


class Served(HttpServer):
    """A runner that serves, as somebody wrote it against another engine. It signs its answers as apps do; `signs` has it do
    otherwise."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.signs: Callable[[str, int, bytes], str | None] = lambda nonce, status, said: body_signature(KEY, said)
        super().__init__(Starlette(routes=[Route("/invoke", self._invoke, methods=["POST"])]))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/invoke"

    def registration(self, **more: Any) -> bytes:
        said = {
            "app": "shop",
            "url": self.url,
            "runtime": "node 22",
            "sdkName": "field",
            "version": "1",
            "framework": "none",
            "region": "eu",
            "keyFingerprint": fingerprint(KEY),
            "protocolVersion": 1,
            "minProtocolVersion": 1,
            "maxProtocolVersion": 1,
            "workflows": [{"name": "order", "triggers": [{"event": "order.asked"}], "retry": {"maxAttempts": 1}}],
        }
        return msgspec.json.encode(said | more)

    async def _invoke(self, request: Request) -> Response:
        body = await request.body()
        given = request.headers.getlist("x-durable-signature")
        try:
            nonce = check(given, [KEY], "POST", "/invoke", body, now=time.time()).nonce
        except BadSignature:
            return Response(status_code=401)
        invoke = msgspec.json.decode(body)
        self.asked.append(invoke)
        status, answer = self.answer(invoke)
        said = msgspec.json.encode(answer)
        signed = self.signs(nonce, status, said)
        return Response(said, status, headers={} if signed is None else {"x-durable-signature": signed})


def again(nonce: str, status: int | str, said: bytes, *, key: str = KEY, path: str = "/invoke", off: int = 0) -> str:
    """An answer's signature of ours."""
    return sign(key, str(status), path, said, ts=int(time.time()) + off, nonce=nonce)


NOT_BELIEVED: dict[str, Callable[[str, int, bytes], str | None]] = {
    "none": lambda nonce, status, said: None,
    "empty": lambda nonce, status, said: "",
    "two": lambda nonce, status, said: f"{body_signature(KEY, said)}, {body_signature(KEY, said)}",
    "another key": lambda nonce, status, said: body_signature("another", said),
    "another body": lambda nonce, status, said: body_signature(KEY, said + b" "),
    "v1, another key": lambda nonce, status, said: again(nonce, status, said, key="another"),
    "v1, another status": lambda nonce, status, said: again(nonce, 206, said),
    "v1, a request": lambda nonce, status, said: again(nonce, "POST", said),
    "v1, another path": lambda nonce, status, said: again(nonce, status, said, path="/"),
    "v1, another request's": lambda nonce, status, said: again("n0nce-of-another-one", status, said),
    "v1, an old one": lambda nonce, status, said: again(nonce, status, said, off=-400),
}


@pytest.mark.parametrize("signs", NOT_BELIEVED.values(), ids=NOT_BELIEVED)
@once
async def test_an_answer_of_a_runner_that_is_not_its_own_is_refused(
    world: World, signs: Callable[[str, int, bytes], str | None]
) -> None:
    """A01, A02, A05: whatever is wrong with the signature of a serving runner's answer, nothing of the answer counts."""
    await provide(world)
    engine = await world.engine()
    async with Site(engine) as site, Served(lambda _: (200, {"data": "forged", "logs": []})) as runner:
        await site.functions.check_in(WORKSPACE, runner.registration(heartbeatMs=30_000))
        (live,) = await site.functions.directory.live(WORKSPACE)
        link = ServeLink(
            site.functions.outgoing, site.functions.workspaces, runner.url, signs=bool(live.key_fingerprint)
        )
        runner.signs = signs
        call = Pass(WORKSPACE, "shop", "order", "1", "order", "r", "runner", b"{}")
        with pytest.raises(RunnerRefused, match="not believed"):
            await link.invoke(call, timeout=5)
        runner.signs = again
        assert (await link.invoke(call, timeout=5)).status == 200


async def test_a_runner_that_has_no_key_need_not_sign_and_may_not_sign_wrongly(world: World) -> None:
    """A runner of another make that registers without a key is believed unsigned; a wrong signature is refused of it, too."""
    await provide(world)
    engine = await world.engine()
    async with Site(engine) as site, Served(lambda _: (200, {"data": "plain", "logs": []})) as runner:
        runner.signs = lambda nonce, status, said: None
        await site.functions.check_in(WORKSPACE, runner.registration(heartbeatMs=30_000, keyFingerprint=None))
        handle = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
        assert await handle.result(10) == "plain"
        runner.signs = lambda nonce, status, said: body_signature("another", said)
        handle = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
        with pytest.raises(RunFailed, match="not believed"):
            await handle.result(10)


async def test_a_runner_that_serves_is_called_signed_and_ages_out(world: World) -> None:
    """It registers with its URL, is called with a signature of ours, is listed with what it says of itself, and is asked no
    more once it has been silent for three intervals."""

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if "a" not in memos:
            return 206, {"opcodes": [op("StepRun", "a", data="x")], "logs": []}
        return 200, {"data": memos.data("a"), "logs": []}

    await provide(world)
    engine = await world.engine()
    async with Site(engine) as site, Served(order) as runner:
        info = await site.functions.check_in(WORKSPACE, runner.registration(heartbeatMs=200, runner="one"))
        assert info.key_matches is True
        handle = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
        assert await handle.result(10) == "x"
        assert len(runner.asked) == 2
        (listed,) = await site.functions.directory.live(WORKSPACE)
        assert (listed.runner, listed.region, listed.mode) == ("one", "eu", "serve")
        store = await world.store()
        for _ in range(200):
            if not (await store.list_items(ItemQuery("runner", WORKSPACE))).items:
                break
            await asyncio.sleep(0.02)
        late = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
        await world.until_journal(late.id, lambda lines: any("invoke" in line for line in lines))
        await site.functions.check_in(WORKSPACE, runner.registration(heartbeatMs=30_000))
        assert await late.result(10) == "x"


async def test_a_live_heartbeat_evicts_stale_siblings(world: World) -> None:
    """A runner that came back under another URL and its old name puts the silent one out of the list."""
    await provide(world)
    engine = await world.engine()
    async with Site(engine) as site, Served(None) as old, Served(None) as new:
        await site.functions.check_in(WORKSPACE, old.registration(runner="one", heartbeatMs=100))
        await asyncio.sleep(0.2)
        await site.functions.check_in(WORKSPACE, new.registration(runner="one", heartbeatMs=100))
        assert [one.url for one in await site.functions.directory.live(WORKSPACE)] == [new.url]


@once
async def test_a_registration_of_another_app_is_refused(world: World) -> None:
    """A10: the credential says the workspace, and a body that names another is refused."""
    engine = await world.engine()
    async with Site(engine) as site, Served(None) as runner:
        with pytest.raises(Exception, match="another app"):
            await site.functions.check_in("other.prod", runner.registration())
        with pytest.raises(Exception, match="metadata"):
            await site.functions.check_in(WORKSPACE, runner.registration(url="http://169.254.169.254/invoke"))


async def test_webhooks_are_calls_made_once_and_guarded(world: World) -> None:
    """A webhook is a step of the engine's: called with the step's idempotency key; an address that is not called fails that
    step alone, and its answer is in no error."""
    called: list[tuple[str, Any]] = []

    async def hook(request: Request) -> Response:
        called.append((request.headers["idempotency-key"], msgspec.json.decode(await request.body())))
        return Response(b'{"ok":true}')

    def order(invoke: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        memos = Memos(invoke)
        if not memos.known("good"):
            good = op("Webhook", "good", webhookUrl=f"http://127.0.0.1:{server.port}/hook", data={"n": 1})
            bad = op("Webhook", "bad", webhookUrl="http://169.254.169.254/", data=None, retry={"maxAttempts": 1})
            return 206, {"opcodes": [good, bad], "logs": []}
        if "good" not in memos or "bad" not in memos:
            return 206, {"opcodes": [], "logs": []}
        return 200, {"data": [memos.data("good"), memos.error("bad")["code"]], "logs": []}

    engine = await world.engine()
    async with (
        HttpServer(Starlette(routes=[Route("/hook", hook, methods=["POST"])])) as server,
        Site(engine) as site,
        FieldRunner(site.base, {"order": order}),
    ):
        await eventually(lambda: site.functions.directory.sessions)
        handle = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
        assert await handle.result(10) == [{"status": 200, "body": {"ok": True}}, "call_refused"]
        assert called == [(f"{handle.id}:0", {"n": 1})]


async def test_a_failed_function_goes_on_where_it_failed_when_it_is_requeued(world: World) -> None:
    """A requeue keeps what was done, and gives the step that failed its attempts anew."""
    tries: list[int] = []
    made: list[int] = []
    broken = True

    async def order(step: Step, event: dict[str, Any], failure: Any) -> Any:
        await step.run("one", lambda: made.append(1))

        def charge() -> int:
            tries.append(1)
            if broken:
                raise ValueError("no money")
            return 5

        return await step.run("charge", charge)

    async with HttpApp({"order": order}, key=KEY) as app:
        await provide(world, app.url)
        engine = await world.engine()
        async with Site(engine) as site:
            await site.functions.sync(WORKSPACE, msgspec.json.encode({"functions": [function("order", retries=0)]}))
            handle = await engine.engine.start_run("order", {}, workspace=WORKSPACE)
            with pytest.raises(RunFailed, match="no money"):
                await handle.result(10)
            broken = False
            await engine.engine.requeue(handle.id, workspace=WORKSPACE)
            await world.until(handle.id, lambda record: record.status == "completed", "it ended")
            assert made == [1]
            assert len(tries) == 2
