"""An app in another language, with its functions behind a URL, and a service beside it: what the tests of all languages do."""

from __future__ import annotations

import hashlib
import hmac
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec

from tests.server.world import ADMIN, Running, running, until
from tests.servers.process import ServerProcess, free_port

APP = "shop.dev"


class Language:
    """How its test app is served and called: commands that read the same environment everywhere."""

    def __init__(self, serve: Sequence[str], call: Sequence[str], path: str = "/", **environment: str) -> None:
        self.serve = list(serve)
        """`{port}` stands for the port."""
        self.call = list(call)
        self.path = path
        self.environment = environment


class Site:
    """A service on SQLite, an app that is synced with it, and the app's client."""

    def __init__(self, service: Running, language: Language, folder: Path) -> None:
        self.service = service
        self.language = language
        self.diary = folder / "diary"
        self.diary.touch()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}{language.path}"
        self.key = ""

    def begin(self) -> ServerProcess:
        """Provision, serve and sync, all by the app's own means."""
        made = self.client("provision", self.url, ADMIN)
        assert made["appId"] == APP
        self.key = made["signingKey"]
        app = self.serve(self.key)
        self.client("sync")
        return app

    def serve(self, *keys: str) -> ServerProcess:
        """The app's process, with these keys."""
        command = [part.format(port=self.port) for part in self.language.serve]
        app = ServerProcess(command, self.port, env=self._environment(PORT=str(self.port), KEYS=",".join(keys)))
        app.start()
        return app

    def client(self, method: str, *given: Any, **environment: str) -> Any:
        """What the app's client is answered; `{refused, code}` where the service refuses."""
        done = subprocess.run(
            [*self.language.call, method, msgspec.json.encode(given).decode()],
            env=self._environment(**environment),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return msgspec.json.decode(done.stdout)

    def _environment(self, **more: str) -> dict[str, str]:
        told = {"DURABLE_URL": self.service.url, "APP_ID": APP, "KEYS": self.key, "DIARY": str(self.diary)}
        return {**os.environ, **self.language.environment, **told, **more}

    def send(self, name: str, data: Any = None, id: str | None = None) -> str:
        """An event; the id of the one run it has started."""
        answer = self.client("send", name, data or {}, *([] if id is None else [id]))
        [run_id] = answer["runIds"]
        return str(run_id)

    def run(self, run_id: str) -> dict[str, Any]:
        """As the service shows it now."""
        with self.service.client(self.key) as client:
            found: dict[str, Any] = client.get(f"/runs/{run_id}").raise_for_status().json()
            return found

    def ended(self, run_id: str) -> dict[str, Any]:
        """The run, once it has ended."""
        until(lambda: self.run(run_id)["status"] in ("succeeded", "failed", "cancelled"), f"run {run_id} ended")
        return self.run(run_id)

    def reached(self, run_id: str, word: str) -> None:
        """Wait until it is there."""
        until(lambda: self.run(run_id)["status"] == word, f"run {run_id} is {word}")

    def said(self, line: str) -> int:
        """How often the diary has it."""
        return self.diary.read_text().splitlines().count(line)

    def post(self, body: bytes, signature: str | None) -> httpx2.Response:
        """To the app, past the service."""
        headers = {} if signature is None else {"x-durable-signature": signature}
        return httpx2.post(self.url, content=body, headers=headers, timeout=20)


def sign(key: str, body: bytes) -> str:
    return hmac.new(key.encode(), body, hashlib.sha256).hexdigest()


@contextmanager
def site(language: Language, folder: Path) -> Iterator[Site]:
    """Everything up, and down again."""
    with running(f"sqlite:///{folder / 'service.db'}", production=False) as service:
        found = Site(service, language, folder)
        app = found.begin()
        try:
            yield found
        finally:
            app.close()


class FunctionsSuite:
    """What every SDK has to do. A module of a language has a class of it, and a fixture `shop` that gives the Site."""

    def test_a_function_runs_step_by_step(self, shop: Site) -> None:
        """Steps, a sleep, a wait for the event that matches and events sent: each once, and the result is the run's."""
        run_id = shop.send("order/created", {"id": "o-1"})
        shop.reached(run_id, "waiting")
        shop.client("send", "order/packed", {"id": "another", "box": 1})
        shop.client("send", "order/packed", {"id": "o-1", "box": 7})
        run = shop.ended(run_id)
        assert run["result"] == {"receipt": "r-o-1", "box": 7, "by": "order/packed", "key": True}
        assert shop.said("charge o-1") == 1
        until(lambda: shop.said("told o-1") and shop.said("told o-1 again"), "both events started a run each")
        told = shop.client("runs", {"functionId": "told"})["runs"]
        assert len(told) == 2
        shown = shop.client("run", run_id)
        assert shown["run"]["status"] == "succeeded"
        assert "charge" in [step["name"] for step in shown["steps"]]

    def test_a_wait_ends_without_an_event(self, shop: Site) -> None:
        """A wait whose time is over gives null."""
        assert shop.ended(shop.send("late/go"))["result"] == {"found": None}

    def test_a_step_is_tried_again(self, shop: Site) -> None:
        """A step that fails is tried as often as its function says, and the rest does not run twice."""
        assert shop.ended(shop.send("flaky/go"))["result"] == 2
        assert shop.said("try") == 2

    def test_a_failed_function_is_told_of_it(self, shop: Site) -> None:
        """A failure that is final is not tried again, no catch of the function hides it, the failure handler hears of it once
        and may use steps, and the run has failed with it."""
        run = shop.ended(shop.send("declined/go"))
        assert (run["status"], run["error"]["message"], run["error"]["code"]) == (
            "failed",
            "card declined",
            "card_declined",
        )
        assert (shop.said("pay"), shop.said("swallowed")) == (1, 0)
        assert shop.said("sorry: card declined, card_declined, pay, 5") == 1

    def test_two_versions_side_by_side(self, shop: Site) -> None:
        """A run goes on with the version it began with while new ones begin with the other."""
        shop.client("sync", VERSIONS="1")
        before = shop.send("versioned/go")
        shop.reached(before, "waiting")
        shop.client("sync", VERSIONS="1,2")
        after = shop.send("versioned/go")
        shop.reached(after, "waiting")
        shop.client("send", "versioned/on")
        assert (shop.ended(before)["result"], shop.ended(after)["result"]) == ("by 1", "by 2")

    def test_wrong_signatures_are_refused_both_ways(self, shop: Site) -> None:
        """The app answers only what is signed with a key of its own and signs what it answers; the service takes nothing
        that another key has signed."""
        call = msgspec.json.encode({"runId": "r", "functionId": "late", "event": {}, "steps": {}})
        for signature in (None, "0" * 64, sign("another", call), sign(shop.key, call + b" ")):
            assert shop.post(call, signature).status_code == 401
        answer = shop.post(call, sign(shop.key, call))
        assert answer.status_code == 200
        assert answer.json()["op"] == "wait"
        assert answer.headers["x-durable-signature"] == sign(shop.key, answer.content)
        assert shop.client("send", "late/go", {}, KEYS="another")["refused"] == 401

    def test_an_app_with_another_key_is_not_believed(self, shop: Site) -> None:
        """A process at the app's URL that has not the key gets nothing done: it refuses the call, and the run fails."""
        stranger = Site(shop.service, shop.language, shop.diary.parent)
        stranger.key = shop.key
        process = stranger.serve("another")
        try:
            shop.client("sync", stranger.url)
            run = shop.ended(shop.send("flaky/go"))
            assert run["status"] == "failed"
            assert "signature" in run["error"]["message"]
            assert shop.said("try") == 0
        finally:
            process.close()

    def test_the_same_event_again_is_the_same(self, shop: Site) -> None:
        """An event that is sent again with its id is answered the same and starts nothing; so does each of many in one call."""
        first = shop.client("send", "late/go", {}, "event-1")
        assert shop.client("send", "late/go", {}, "event-1") == first
        many = [{"name": "late/go", "id": f"m-{n}", "data": {"n": n}} for n in range(3)]
        sent = shop.client("sendMany", many)
        answers = sent["events"] if isinstance(sent, dict) else sent
        runs = [run_id for one in answers for run_id in one["runIds"]]
        assert len(set(runs)) == 3
        assert shop.client("sendMany", many) == sent
        assert len(shop.client("runs", {"functionId": "late"})["runs"]) == 4
        assert shop.client("sendMany", [])["refused"] == 400

    def test_a_run_is_cancelled(self, shop: Site) -> None:
        """A cancelled run ends, and its app is asked no more."""
        run_id = shop.send("order/created", {"id": "o-2"})
        shop.reached(run_id, "waiting")
        shop.client("cancel", run_id)
        assert shop.ended(run_id)["status"] == "cancelled"
        shop.client("send", "order/packed", {"id": "o-2", "box": 7})
        assert shop.said("told o-2") == 0

    def test_a_run_is_run_again(self, shop: Site) -> None:
        """A rerun from a step keeps what came before it; the same idempotency key finds the same run."""
        run_id = shop.send("order/created", {"id": "o-3"})
        shop.reached(run_id, "waiting")
        shop.client("send", "order/packed", {"id": "o-3", "box": 7})
        shop.ended(run_id)
        options = [{"stepId": "seal", "idempotencyKey": "k"}] if self.named else ["seal", "k"]
        again = shop.client("rerun", run_id, *options)
        assert "runId" in again, again
        assert shop.client("rerun", run_id, *options) == again
        assert shop.ended(again["runId"])["result"]["box"] == 7
        assert (shop.said("charge o-3"), shop.said("seal o-3")) == (1, 2)

    def test_the_manifest_is_for_the_service_alone(self, shop: Site) -> None:
        """A signed and timely question gets what the app has; any other gets nothing."""
        now = str(shop.service.call(lambda: shop.service.app.engine.clock.now()) // 1_000)
        for time, key in ((now, "another"), (str(int(now) - 400_000), shop.key)):
            headers = {"x-durable-timestamp": time, "x-durable-signature": sign(key, time.encode())}
            assert httpx2.get(shop.url, headers=headers).status_code == 401
        headers = {"x-durable-timestamp": now, "x-durable-signature": sign(shop.key, now.encode())}
        answer = httpx2.get(shop.url, headers=headers)
        assert answer.headers["x-durable-signature"] == sign(shop.key, answer.content)
        assert "order" in [one["id"] for one in answer.json()["functions"]]

    named = False
    """Whether options of the language's client are an object."""
