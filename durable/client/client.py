"""`Client`: the service's REST routes and streams as methods, by what they are about.

Answers that are lost are asked for again where that is harmless: reads, and writes that carry an id of the caller's (events get
one here if they have none). A watch goes on where it was cut, by the last seq it has seen.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

import httpx2
import msgspec
from msgspec import UNSET

from durable.client.errors import ServiceError, Unavailable, error_of
from durable.client.shapes import TERMINAL, Approval, Event, EventAnswer, Frame, LogLine, Run, Schedule, Step

T = TypeVar("T")
Many: TypeAlias = list
"""For classes that have a method of that name."""

TRIES = 5
"""Of a call that may be repeated."""
FIRST_DELAY = 0.2
QUIET_SECONDS = 60.0
"""A stream that says nothing for so long, not even that it lives, is opened anew."""


class Client:
    """A service, as one key sees it. `url`: where it is, like http://localhost:3030. `key`: of the workspace; in development
    on one's own machine none is needed. `app`: whose default workspace is meant then. `timeout`: seconds for an answer."""

    def __init__(self, url: str, *, key: str | None = None, app: str | None = None, timeout: float = 30.0) -> None:
        headers = {"accept": "application/json"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        self._app = app
        self._http = httpx2.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, timeout=timeout, follow_redirects=False
        )
        self.events = Events(self)
        self.runs = Runs(self)
        self.workflows = Workflows(self)
        self.schedules = Schedules(self)
        self.approvals = Approvals(self)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections. Idempotent."""
        await self._http.aclose()

    async def apps(self) -> list[Any]:
        """The apps this key sees."""
        return await self.get("/apps", list[Any])

    async def runners(self) -> list[Any]:
        """Who runs functions, and whether they are alive."""
        return await self.get("/runners", list[Any], params=self.here())

    async def flow_state(self, **filters: Any) -> list[Any]:
        """Limits, their use and what queues behind them."""
        return await self.get("/flow-state", list[Any], params=self.here(filters))

    async def health(self) -> dict[str, Any]:
        """That the service lives."""
        return await self.get("/healthz", dict[str, Any])

    async def ready(self) -> dict[str, Any]:
        """Whether the service takes work. Raises Unavailable while it does not."""
        return await self.get("/readyz", dict[str, Any], tries=1)

    # -- for the parts below

    async def get(self, path: str, shape: type[T], *, params: Mapping[str, Any] | None = None, tries: int = TRIES) -> T:
        """A read. Raises ServiceError."""
        return (await self.call("GET", path, shape, params=params, tries=tries))[0]

    async def post(self, path: str, shape: type[T], body: Any = None, *, again: bool = False) -> T:
        """A write; `again`: it may be made again when the answer was lost. Raises ServiceError."""
        return (await self.call("POST", path, shape, body={} if body is None else body, tries=TRIES if again else 1))[0]

    async def call(
        self,
        method: str,
        path: str,
        shape: type[T],
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        tries: int = 1,
    ) -> tuple[T, str | None]:
        """The answer, and where the next page begins. Raises ServiceError."""
        query = self.query(params)
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if content is None else {"content-type": "application/json"}
        for attempt in range(1, tries + 1):
            try:
                response = await self._http.request(method, path, params=query, content=content, headers=headers)
                if response.status_code < 300:
                    return _read(response.content, shape), response.headers.get("x-next-cursor")
                error = error_of(response.status_code, _json(response.content))
            except httpx2.HTTPError as lost:
                error = Unavailable(
                    f"No answer from {self._http.base_url}: {lost or type(lost).__name__}. Is the service up?"
                )
            if not isinstance(error, Unavailable) or attempt == tries:
                raise error
            await asyncio.sleep(FIRST_DELAY * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def query(self, params: Mapping[str, Any] | None) -> dict[str, str]:
        given = {name: value for name, value in (params or {}).items() if value is not None}
        return {name: value.isoformat() if hasattr(value, "isoformat") else str(value) for name, value in given.items()}

    def here(self, filters: Mapping[str, Any] = {}) -> dict[str, Any]:
        """These filters, for a route about a workspace: with the app, unless they name one."""
        return {"app": self._app, **filters}

    @property
    def app(self) -> str | None:
        return self._app

    async def stream(
        self, path: str, after: int = 0, *, params: Mapping[str, Any] | None = None
    ) -> AsyncIterator[Frame]:
        """Frames of a stream from behind `after` until it ends, opened again as often as it is cut. Raises ServiceError."""
        failures = 0
        while True:
            try:
                headers = {"last-event-id": str(after)} if after else {}
                timeout = httpx2.Timeout(30.0, read=QUIET_SECONDS)
                async with self._http.sse(path, params=self.query(params), headers=headers, timeout=timeout) as source:
                    response = source.response
                    if response.status_code != 200:
                        raise error_of(response.status_code, _json(await response.aread()))
                    async for event in source:
                        frame = _read(event.data.encode(), Frame)
                        failures = 0
                        after = max(after, frame.seq)
                        yield frame
                return
            except (httpx2.HTTPError, Unavailable) as lost:
                failures += 1
                if failures > TRIES:
                    raise Unavailable(f"The stream was cut {failures} times in a row: {lost}.") from lost
                await asyncio.sleep(min(5.0, FIRST_DELAY * 2 ** (failures - 1)))


class _Part:
    def __init__(self, client: Client) -> None:
        self._client = client


class Events(_Part):
    """Named facts that start functions and end waits."""

    async def send(
        self,
        name: str,
        data: Any = None,
        *,
        id: str | None = None,
        app: str | None = None,
        runner: str | None = None,
        target_app: str | None = None,
        session: str | None = None,
        tags: Any = None,
    ) -> EventAnswer:
        """Send one; `id`: the same again changes nothing, and answers the same. Raises ServiceError."""
        # An id of our own makes it harmless to send it again when the answer was lost.
        body = {"name": name, "data": {} if data is None else data, "dedupeId": id or str(uuid.uuid4())}
        more = {
            "app": app or self._client.app,
            "runner": runner,
            "targetApp": target_app,
            "session": session,
            "tags": tags,
        }
        body |= {key: value for key, value in more.items() if value is not None}
        return await self._client.post("/events", EventAnswer, body, again=True)

    async def get(self, id: str) -> Event:
        """Raises NotFound."""
        return await self._client.get(f"/events/{_part(id)}", Event, params=self._client.here())

    async def list(self, **filters: Any) -> Many[Event]:
        """The latest, newest first."""
        return await self._client.get("/events", Many[Event], params=self._client.here(filters))


class Runs(_Part):
    """What has been started."""

    async def get(self, id: str) -> Run:
        """Raises NotFound."""
        return await self._client.get(f"/runs/{_part(id)}", Run)

    async def list(self, **filters: Any) -> AsyncIterator[Run]:
        """All that match, page by page: app, workflow, status, since, q, sort, dir, limit (of a page)."""
        cursor: str | None = None
        while True:
            runs, cursor = await self._client.call(
                "GET", "/runs", Many[Run], params=self._client.here({**filters, "cursor": cursor}), tries=TRIES
            )
            for run in runs:
                yield run
            if not cursor or not runs:
                return

    async def steps(self, id: str) -> Many[Step]:
        """A run's steps in order. Raises NotFound."""
        return await self._client.get(f"/runs/{_part(id)}/steps", Many[Step])

    async def logs(self, id: str, after: int = 0, limit: int | None = None) -> Many[LogLine]:
        """A run's lines behind a seq. Raises NotFound."""
        return await self._client.get(f"/runs/{_part(id)}/logs", Many[LogLine], params={"from": after, "limit": limit})

    def watch(self, id: str, after: int = 0) -> AsyncIterator[Frame]:
        """What has happened to a run behind `after`, and what happens, until it ends; nothing twice and nothing left out,
        also where the connection is cut. Raises NotFound."""
        return self._client.stream(f"/runs/{_part(id)}/stream", after, params={"from": after})

    def watch_all(self, **filters: Any) -> AsyncIterator[Frame]:
        """What happens to all runs from now on."""
        return self._client.stream("/runs/stream", params=self._client.here(filters))

    async def wait(self, id: str) -> Run:
        """The run once it has ended. Raises NotFound."""
        async for frame in self.watch(id):
            if frame.kind == "run_status" and frame.status in TERMINAL:
                break
        return await self.get(id)

    async def cancel(self, id: str) -> Any:
        """Ask it to stop."""
        return await self._client.post(f"/runs/{_part(id)}/cancel", dict[str, Any], again=True)

    async def pause(self, id: str) -> Any:
        """Begin nothing more of it until `resume`."""
        return await self._client.post(f"/runs/{_part(id)}/pause", dict[str, Any], again=True)

    async def resume(self, id: str) -> Any:
        """Go on."""
        return await self._client.post(f"/runs/{_part(id)}/resume", dict[str, Any], again=True)

    async def replay(self, id: str, input: Any = None) -> Any:
        """A new run of the same, with the same input or another."""
        return await self._client.post(
            f"/runs/{_part(id)}/replay", dict[str, Any], {} if input is None else {"input": input}
        )

    async def retry_from_step(self, id: str, step: str) -> Any:
        """A new run that takes over what came before the step."""
        return await self._client.post(f"/runs/{_part(id)}/retry-from-step", dict[str, Any], {"step": step})

    async def fork(
        self, id: str, *, step: str | None = None, result: Any = UNSET, input: Any = UNSET, from_step: str | None = None
    ) -> Any:
        """A new run with another result of `step`; or with another input, from `from_step` on if that is said."""
        given = {"step": step, "result": result, "input": input, "fromStep": from_step}
        edits = {name: value for name, value in given.items() if value is not UNSET}
        return await self._client.post(f"/runs/{_part(id)}/fork", dict[str, Any], edits)

    async def signal(self, id: str, name: str, payload: Any = None, *, message_id: str | None = None) -> Any:
        """Send it a signal; the same `message_id` again changes nothing."""
        body = {"name": name, "payload": payload, "id": message_id or str(uuid.uuid4())}
        return await self._client.post(f"/runs/{_part(id)}/signal", dict[str, Any], body, again=True)


class Workflows(_Part):
    """What can be started."""

    async def list(self) -> Many[Any]:
        """All that are registered."""
        return await self._client.get("/workflows", Many[Any], params=self._client.here())

    async def trigger(
        self,
        app: str,
        name: str,
        input: Any = None,
        *,
        id: str | None = None,
        runner: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> str:
        """Start a run and get its id; the same `id` again finds it. Raises ServiceError."""
        body: dict[str, Any] = {"input": input, "dedupeId": id or str(uuid.uuid4())}
        body |= {key: value for key, value in {"runner": runner, "tags": tags}.items() if value is not None}
        path = f"/workflows/{_part(app)}/{_part(name)}/trigger"
        return str((await self._client.post(path, dict[str, Any], body, again=True))["runId"])


class Schedules(_Part):
    """Runs that start by the clock."""

    async def list(self) -> Many[Schedule]:
        """All, by id."""
        return await self._client.get("/schedules", Many[Schedule], params=self._client.here())

    async def get(self, id: str) -> Schedule:
        """Raises NotFound."""
        return await self._ask("GET", id, Schedule, tries=TRIES)

    async def ensure(
        self,
        id: str,
        workflow: str,
        input: Any = None,
        *,
        cron: str | None = None,
        timezone: str | None = None,
        every: float | None = None,
        at: datetime | None = None,
        catch_up: str | None = None,
        overlap: str | None = None,
        **more: Any,
    ) -> Schedule:
        """See that there is this schedule: by a cron line, `every` so many seconds, or once. `more`: priority, tags, version,
        paused. Raises ServiceError."""
        given = {
            "cron": cron,
            "timezone": timezone,
            "everySeconds": every,
            "at": at,
            "catchUp": catch_up,
            "overlap": overlap,
        }
        body = {"workflow": workflow, "input": input, **more}
        body |= {name: value for name, value in given.items() if value is not None}
        return await self._ask("PUT", id, Schedule, body=body, tries=TRIES)

    async def pause(self, id: str) -> Schedule:
        """Let nothing come due."""
        return await self._ask("POST", id, Schedule, "/pause", body={}, tries=TRIES)

    async def resume(self, id: str) -> Schedule:
        """Go on from now."""
        return await self._ask("POST", id, Schedule, "/resume", body={}, tries=TRIES)

    async def trigger(self, id: str) -> Any:
        """Start a run of it now."""
        return await self._ask("POST", id, dict[str, Any], "/trigger", body={})

    async def remove(self, id: str) -> None:
        """No more of it."""
        await self._ask("DELETE", id, dict[str, Any])

    async def _ask(
        self, method: str, id: str, shape: type[T], action: str = "", *, body: Any = None, tries: int = 1
    ) -> T:
        path = f"/schedules/{_part(id)}{action}"
        return (await self._client.call(method, path, shape, params=self._client.here(), body=body, tries=tries))[0]


class Approvals(_Part):
    """What waits for a person."""

    async def list(self) -> Many[Approval]:
        """All that wait."""
        return await self._client.get("/approvals", Many[Approval], params=self._client.here())

    async def decide(self, id: str, approved: bool, *, by: str | None = None, args: Any = None) -> Any:
        """Say yes or no; the first word counts."""
        body = {"status": "approved" if approved else "denied"}
        body |= {key: value for key, value in {"decidedBy": by, "args": args}.items() if value is not None}
        return await self._client.post(f"/approvals/{_part(id)}/decision", dict[str, Any], body)


def _part(value: str) -> str:
    """One segment of a path, whatever is in it."""
    return quote(value, safe="")


def _read(data: bytes, shape: type[T]) -> T:
    try:
        return msgspec.json.decode(data or b"{}", type=shape)
    except msgspec.DecodeError as error:
        raise ServiceError(f"The service's answer is not what was expected: {error}.") from error


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        return None
