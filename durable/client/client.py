"""`Client`: the service's REST routes and streams as methods, by what they are about.

Answers that are lost are asked for again where that is harmless: reads, and writes that carry an id of the caller's (events get
one here if they have none). A watch goes on where it was cut, by the last seq it has seen.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from types import GenericAlias
from typing import Any, Literal, TypeAlias, TypeVar, cast
from urllib.parse import quote

import httpx2
import msgspec
from msgspec import UNSET

from durable.client.errors import ServiceError, Unavailable, error_of
from durable.client.shapes import (
    App,
    Approval,
    Bucket,
    Bulk,
    Changed,
    Event,
    EventAnswer,
    Frame,
    Limit,
    LogLine,
    NewRun,
    Run,
    Runner,
    Schedule,
    Stats,
    Step,
    Workflow,
)
from durable.client.sse import Block, blocks
from durable.core.durations import Duration, seconds

T = TypeVar("T")
Many: TypeAlias = list
"""For classes that have a method of that name."""

TRIES = 5
"""Of a call that may be repeated."""
FIRST_DELAY = 0.2
STREAM_TRIES = 12
"""Connections in a row that bring nothing, over about 45 s: a service that starts anew is waited for."""
LONGEST_DELAY = 5.0
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

    async def apps(self) -> list[App]:
        """The apps this key sees."""
        return await self.get("/apps", list[App])

    async def runners(self, app: str | None = None) -> list[Runner]:
        """Who runs functions, and is alive."""
        return await self.get("/runners", list[Runner], self.about(app))

    async def flow_state(self, app: str | None = None) -> list[Limit]:
        """Limits, their use and what queues behind them."""
        return await self.get("/flow-state", list[Limit], self.about(app))

    async def health(self) -> dict[str, Any]:
        """That the service lives."""
        return await self.get("/healthz", dict[str, Any])

    async def ready(self) -> dict[str, Any]:
        """Whether the service takes work. Raises Unavailable while it does not."""
        return await self.get("/readyz", dict[str, Any], tries=1)

    # -- for the parts below

    def about(self, app: str | None, **more: Any) -> dict[str, Any]:
        """The parameters of a question about a workspace. Only such questions name an app; of a run, its id says it."""
        return {"app": app or self._app, **more}

    async def get(self, path: str, shape: type[T], params: Mapping[str, Any] | None = None, *, tries: int = TRIES) -> T:
        """A read. Raises ServiceError."""
        return (await self.call("GET", path, shape, params=params, tries=tries))[0]

    async def post(
        self,
        path: str,
        shape: type[T],
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        again: bool = False,
    ) -> T:
        """A write; `again`: it may be made again when the answer was lost. Raises ServiceError."""
        body = {} if body is None else body
        return (await self.call("POST", path, shape, params=params, body=body, tries=TRIES if again else 1))[0]

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
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if content is None else {"content-type": "application/json"}
        for attempt in range(1, tries + 1):
            try:
                response = await self._http.request(
                    method, path, params=_query(params), content=content, headers=headers
                )
                if response.status_code < 300:
                    return _read(response.content, shape), response.headers.get("x-next-cursor")
                error = error_of(response.status_code, _json(response.content))
            except httpx2.HTTPError as lost:
                error = self._lost(lost)
            if not isinstance(error, Unavailable) or attempt == tries:
                raise error
            await asyncio.sleep(FIRST_DELAY * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    async def pages(
        self, path: str, shape: type[T], params: Mapping[str, Any], cursor: str = "cursor"
    ) -> AsyncIterator[T]:
        """All there are, page by page. `cursor`: what the parameter is called."""
        after: Any = params.get(cursor)
        while True:
            many = cast("type[list[T]]", GenericAlias(list, shape))
            found, after = await self.call("GET", path, many, params={**params, cursor: after}, tries=TRIES)
            for one in found:
                yield one
            if not after:
                return

    @property
    def app(self) -> str | None:
        return self._app

    async def stream(
        self, path: str, shape: type[T], params: Mapping[str, Any] | None = None, *, ends: bool = False
    ) -> AsyncGenerator[T, None]:
        """What a stream tells, opened again behind the last that came as often as it is cut. `ends`: it has an end of its
        own, and says so; one that closes otherwise was cut. Raises ServiceError."""
        last: str | None = None
        failures = 0
        while True:
            try:
                async with aclosing(self._blocks(path, params, last)) as source:
                    async for block in source:
                        if block.data:
                            failures = 0
                            last = block.id or last
                            yield _read(block.data, shape)
                        elif block.comment == "alive":
                            failures = 0
                        elif block.comment == "ended" and ends:
                            return
                why = "it closed before its end"
            except (httpx2.HTTPError, Unavailable, ValueError) as lost:
                why = str(lost) or type(lost).__name__
            last = last or ""
            failures += 1
            if failures > STREAM_TRIES:
                raise Unavailable(f"The stream was cut {failures} times in a row: {why}. Is the service up?")
            await asyncio.sleep(min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failures - 1)) if failures > 1 else 0)

    async def _blocks(
        self, path: str, params: Mapping[str, Any] | None, last: str | None
    ) -> AsyncGenerator[Block, None]:
        """What one connection brings. `last`: the id of the last event of the connection before."""
        headers = {"accept": "text/event-stream"} | ({"last-event-id": last} if last else {})
        timeout = httpx2.Timeout(30.0, read=QUIET_SECONDS)
        async with self._http.stream("GET", path, params=_query(params), headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                raise error_of(response.status_code, _json(await response.aread()))
            async with aclosing(blocks(response.aiter_bytes())) as source:
                async for block in source:
                    yield block

    def _lost(self, why: Exception) -> Unavailable:
        return Unavailable(f"No answer from {self._http.base_url}: {why or type(why).__name__}. Is the service up?")


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
        tags: Sequence[str] | None = None,
    ) -> EventAnswer:
        """Send one; `id`: the same again changes nothing, and answers the same. Raises ServiceError."""
        # An id of our own makes it harmless to send it again when the answer was lost.
        body = _given(
            name=name,
            data={} if data is None else data,
            dedupeId=id or str(uuid.uuid4()),
            app=app or self._client.app,
            runner=runner,
            targetApp=target_app,
            session=session,
            tags=tags,
        )
        return await self._client.post("/events", EventAnswer, body, again=True)

    async def get(self, id: str, *, app: str | None = None) -> Event:
        """Raises NotFound."""
        return await self._client.get(f"/events/{_part(id)}", Event, self._client.about(app))

    def list(
        self,
        *,
        app: str | None = None,
        name: str | None = None,
        since: datetime | str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> AsyncIterator[Event]:
        """All that match, newest first, page by page. `limit`: of a page."""
        params = self._client.about(app, name=name, since=since, limit=limit, cursor=cursor)
        return self._client.pages("/events", Event, params)

    def watch(self, after: int | None = None, *, app: str | None = None) -> AsyncGenerator[Event, None]:
        """Events as they are accepted, after a number; without one, from now on."""
        return self._client.stream("/events/stream", Event, self._client.about(app, **{"from": after}))


class Runs(_Part):
    """What has been started."""

    async def get(self, id: str) -> Run:
        """Raises NotFound."""
        return await self._client.get(f"/runs/{_part(id)}", Run)

    def list(
        self,
        *,
        app: str | None = None,
        workflow: str | None = None,
        status: str | None = None,
        since: datetime | str | None = None,
        q: str | None = None,
        tag: str | None = None,
        dir: Literal["asc", "desc"] = "desc",
        limit: int | None = None,
        cursor: str | None = None,
    ) -> AsyncIterator[Run]:
        """All that match, newest first, page by page. `since`: a moment, or an age like 24h; `q`: part of an id, a name or a
        key; `limit`: of a page."""
        params = self._client.about(
            app, workflow=workflow, status=status, since=since, q=q, tag=tag, dir=dir, limit=limit, cursor=cursor
        )
        return self._client.pages("/runs", Run, params)

    async def stats(
        self, *, app: str | None = None, workflow: str | None = None, since: datetime | str = "24h"
    ) -> Stats:
        """How many runs there were since then, how they ended and how long they took."""
        return await self._client.get("/runs/stats", Stats, self._client.about(app, workflow=workflow, since=since))

    async def timeseries(
        self,
        *,
        app: str | None = None,
        workflow: str | None = None,
        since: datetime | str = "24h",
        buckets: int = 60,
    ) -> Many[Bucket]:
        """The same over time, in so many equal stretches."""
        params = self._client.about(app, workflow=workflow, since=since, buckets=buckets)
        return await self._client.get("/runs/timeseries", Many[Bucket], params)

    async def steps(self, id: str) -> Many[Step]:
        """A run's steps in order. Raises NotFound."""
        return await self._client.get(f"/runs/{_part(id)}/steps", Many[Step])

    def logs(self, id: str, after: int = 0, limit: int | None = None) -> AsyncIterator[LogLine]:
        """A run's lines behind a seq, oldest first, page by page. `limit`: of a page. Raises NotFound."""
        return self._client.pages(f"/runs/{_part(id)}/logs", LogLine, {"from": after, "limit": limit}, "from")

    def watch(self, id: str, after: int = 0) -> AsyncGenerator[Frame, None]:
        """What has happened to a run behind `after`, and what happens, until it ends; nothing twice and nothing left out,
        also where the connection is cut or the service starts anew. Raises NotFound."""
        return self._client.stream(f"/runs/{_part(id)}/stream", Frame, {"from": after}, ends=True)

    def watch_all(self, *, app: str | None = None) -> AsyncGenerator[Frame, None]:
        """Whenever a run's status changes, from now on; a `resync` frame after a cut."""
        return self._client.stream("/runs/stream", Frame, self._client.about(app))

    async def wait(self, id: str) -> Run:
        """The run once it has ended. Raises NotFound."""
        found = await self.get(id)
        while not found.ended:
            async for _ in self.watch(id, found.seq):
                pass
            found = await self.get(id)
        return found

    async def cancel(self, id: str, reason: str = "") -> bool:
        """Ask it to stop. False: it had been asked before. Raises Conflict if it has ended."""
        return await self._change(id, "cancel", reason=reason)

    async def pause(self, id: str, *, by: str = "", reason: str = "") -> bool:
        """Begin nothing more of it until `resume`."""
        return await self._change(id, "pause", by=by, reason=reason)

    async def resume(self, id: str, *, by: str = "", timers: Literal["run", "hold"] = "run") -> bool:
        """Go on. `timers`: `run`: what became due meanwhile is due at once; `hold`: all is later by the pause's length."""
        return await self._change(id, "resume", by=by, timers=timers)

    async def signal(self, id: str, name: str, payload: Any = None, *, signal_id: str | None = None) -> bool:
        """Send it a signal: kept, and used once, even if nothing waits yet. False: one of this id came before."""
        return await self._change(id, "signal", name=name, payload=payload, id=signal_id or str(uuid.uuid4()))

    async def requeue(self, id: str) -> bool:
        """Reopen a dead or failed run, or have a blocked one looked at again. Raises Conflict."""
        return (await self._client.post(f"/runs/{_part(id)}/requeue", Changed)).changed

    async def replay(self, id: str, input: Any = UNSET, *, key: str | None = None) -> NewRun:
        """A new run of the same, with the same input or another. `key`: the same again finds the same new run."""
        return await self._again(id, "replay", key, input=input)

    async def retry_from_step(self, id: str, step: str, input: Any = UNSET, *, key: str | None = None) -> NewRun:
        """A new run that takes over what came before the step."""
        return await self._again(id, "retry-from-step", key, step=step, input=input)

    async def fork(
        self,
        id: str,
        *,
        step: str | None = None,
        result: Any = UNSET,
        input: Any = UNSET,
        from_step: str | None = None,
        key: str | None = None,
    ) -> NewRun:
        """A new run with another result of one `step`; or with another input, keeping the results before `from_step`."""
        edits = {"step": UNSET if step is None else step, "fromStep": UNSET if from_step is None else from_step}
        return await self._again(id, "fork", key, **edits, result=result, input=input)

    async def bulk_replay(
        self,
        *,
        app: str | None = None,
        workflow: str | None = None,
        status: Literal["succeeded", "failed", "cancelled"] | None = None,
        since: datetime | str | None = None,
        tag: str | None = None,
        dry_run: bool = False,
        limit: int = 100,
        cursor: str | None = None,
        key: str | None = None,
    ) -> Bulk:
        """New runs of all finished ones that match. `key`: the same again makes no second run of any."""
        body = _given(
            app=app or self._client.app,
            workflow=workflow,
            status=status,
            since=since.isoformat() if isinstance(since, datetime) else since,
            tag=tag,
            dryRun=dry_run,
            limit=limit,
            cursor=cursor,
            key=key or str(uuid.uuid4()),
        )
        return await self._client.post("/runs/bulk-replay", Bulk, body, again=True)

    async def _change(self, run_id: str, verb: str, **body: Any) -> bool:
        answer = await self._client.post(f"/runs/{_part(run_id)}/{verb}", Changed, body, again=True)
        return answer.changed

    async def _again(self, run_id: str, verb: str, key: str | None, **body: Any) -> NewRun:
        body = {name: value for name, value in body.items() if value is not UNSET}
        body["idempotencyKey"] = key or str(uuid.uuid4())
        return await self._client.post(f"/runs/{_part(run_id)}/{verb}", NewRun, body, again=True)


class Workflows(_Part):
    """What can be started."""

    async def list(self, *, app: str | None = None) -> Many[Workflow]:
        """All that are registered."""
        return await self._client.get("/workflows", Many[Workflow], self._client.about(app))

    async def trigger(
        self,
        app: str,
        name: str,
        input: Any = None,
        *,
        id: str | None = None,
        version: str | None = None,
        runner: str | None = None,
        tags: Sequence[str] | None = None,
    ) -> NewRun:
        """Start a run; the same `id` again finds it. Raises NotFound for a workflow nobody has registered."""
        body = {"input": input, **_given(dedupeId=id or str(uuid.uuid4()), version=version, runner=runner, tags=tags)}
        return await self._client.post(f"/workflows/{_part(app)}/{_part(name)}/trigger", NewRun, body, again=True)


class Schedules(_Part):
    """Runs that start by the clock."""

    async def list(self, *, app: str | None = None) -> Many[Schedule]:
        """All, by id."""
        return await self._client.get("/schedules", Many[Schedule], self._client.about(app))

    async def get(self, id: str, *, app: str | None = None) -> Schedule:
        """Raises NotFound."""
        return await self._client.get(f"/schedules/{_part(id)}", Schedule, self._client.about(app))

    async def ensure(
        self,
        id: str,
        workflow: str,
        input: Any = None,
        *,
        cron: str | None = None,
        timezone: str | None = None,
        every: Duration | None = None,
        at: datetime | None = None,
        version: str | None = None,
        catch_up: Literal["last", "skip", "all"] | None = None,
        catch_up_max: int | None = None,
        overlap: Literal["allow", "skip", "cancel", "queue"] | None = None,
        priority: int | None = None,
        tags: Sequence[str] | None = None,
        paused: bool | None = None,
        app: str | None = None,
    ) -> Schedule:
        """See that there is this schedule, by one of `cron` (with `timezone`), `every` and `at`. `paused` None: as it is. Raises
        Refused."""
        body = _given(
            workflow=workflow,
            cron=cron,
            timezone=timezone,
            everySeconds=None if every is None else seconds(every),
            at=at,
            version=version,
            catchUp=catch_up,
            catchUpMax=catch_up_max,
            overlap=overlap,
            priority=priority,
            tags=tags,
            paused=paused,
        )
        path = f"/schedules/{_part(id)}"
        about = self._client.about(app)
        return (
            await self._client.call("PUT", path, Schedule, params=about, body={**body, "input": input}, tries=TRIES)
        )[0]

    async def pause(self, id: str, *, app: str | None = None) -> Schedule:
        """Let nothing come due."""
        return await self._client.post(
            f"/schedules/{_part(id)}/pause", Schedule, params=self._client.about(app), again=True
        )

    async def resume(self, id: str, *, app: str | None = None) -> Schedule:
        """Go on from now."""
        return await self._client.post(
            f"/schedules/{_part(id)}/resume", Schedule, params=self._client.about(app), again=True
        )

    async def trigger(self, id: str, *, app: str | None = None) -> NewRun:
        """Start a run of it now, beside its occurrences."""
        return await self._client.post(f"/schedules/{_part(id)}/trigger", NewRun, params=self._client.about(app))

    async def remove(self, id: str, *, app: str | None = None) -> None:
        """No more of it; its runs stay. Raises NotFound."""
        await self._client.call("DELETE", f"/schedules/{_part(id)}", dict[str, Any], params=self._client.about(app))


class Approvals(_Part):
    """What waits for a person."""

    async def list(self, *, app: str | None = None) -> Many[Approval]:
        """All that wait."""
        return await self._client.get("/approvals", Many[Approval], self._client.about(app))

    async def decide(self, id: str, approved: bool, *, by: str | None = None, args: Any = UNSET) -> None:
        """Say yes or no, with other `args` than were asked for if need be; the first word counts. Raises Conflict if another
        has been said, NotFound."""
        body = _given(status="approved" if approved else "denied", decidedBy=by)
        if args is not UNSET:
            body["args"] = args
        await self._client.post(f"/approvals/{_part(id)}/decision", Changed, body)


def _given(**values: Any) -> dict[str, Any]:
    """Without those that were not given."""
    return {name: value for name, value in values.items() if value is not None}


def _query(params: Mapping[str, Any] | None) -> dict[str, str]:
    given = _given(**(params or {}))
    return {name: value.isoformat() if isinstance(value, datetime) else str(value) for name, value in given.items()}


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
