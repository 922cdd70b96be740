"""Serve: a runner that the engine calls. A plain ASGI application, and a WSGI one, to stand alone or in an app of yours.

    runner = serve(app, app="shop.dev", key=KEY, url="https://shop.example/durable", engine="https://durable.example")

    FastAPI(lifespan=runner.lifespan).mount("/durable", runner)
    DispatcherMiddleware(flask.wsgi_app, {"/durable": runner.wsgi})

`POST <url>/invoke` asks for a pass, `GET <url>` tells what is served. With a key, both are signed, and so are the answers
(protocol/signature.py). The runner checks in with the engine when it starts, and every 30 s as long as it runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from durable.core.clock import SECOND
from durable.core.errors import DefinitionError, DurableError, ErrorData
from durable.core.payload import describe
from durable.protocol.runners import MAX_FRAME, REGISTER_SECONDS
from durable.protocol.signature import HEADER, BadSignature, Nonces, check, sign
from durable.runners.runner import Malformed, Runner

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger("durable.runner")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

ATTEMPT_SECONDS = 10.0
"""How long one check-in may take."""
RETRY_SECONDS = 2.0
"""Until the next check-in after one that failed; doubled each time, up to the usual distance."""
BODY_SECONDS = 60.0
"""How long a request's body may take to come."""
_encode = msgspec.json.Encoder().encode


class RegistrationRefused(DurableError):
    """The engine does not take this runner: its key, its app or a workflow of it is wrong."""

    code = "registration_refused"


def serve(things: Any, *, app: str, url: str | None = None, engine: str | None = None, **options: Any) -> Serving:
    """A runner for the engine to call. `url`: where the engine reaches it, without `/invoke`. `engine`: the engine's base URL;
    without either it does not check in. `options`: as of `Runner`.

    Raises DefinitionError.
    """
    return Serving(things, app=app, url=url, engine=engine, **options)


class Serving:
    """The ASGI application. Entered, or by its lifespan, it makes what it needs and checks in."""

    def __init__(
        self, things: Any, *, app: str, url: str | None = None, engine: str | None = None, **options: Any
    ) -> None:
        if engine is not None and url is None:
            raise DefinitionError(
                "To check in with an engine a runner needs the URL it is reached at: url='https://…'."
            )
        for name, given in {"url": url, "engine": engine}.items():
            if given is not None and urlsplit(given).scheme not in ("http", "https"):
                raise DefinitionError(f"{name} is an http or https URL, not {given!r}.")
        self.runner = Runner(things, app=app, **options)
        self.url = None if url is None else url.rstrip("/")
        self.engine = None if engine is None else engine.rstrip("/")
        self.registered = False
        """Whether the last check-in was taken."""
        self._nonces = Nonces()
        self._beat: asyncio.Task[None] | None = None
        self._users = 0
        self._closing = False

    # ------------------------------------------------------------------ life

    async def __aenter__(self) -> Serving:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self.close()

    @asynccontextmanager
    async def lifespan(self, _: Any = None) -> AsyncIterator[dict[str, Any]]:
        """For Starlette and FastAPI, which do not start what is mounted in them: `FastAPI(lifespan=runner.lifespan)`."""
        async with self:
            yield {"durable_runner": self}

    async def start(self) -> None:
        """Make what there is to make, and begin to check in. An engine that is away is tried again; it holds nobody up."""
        self._users += 1
        if self._users > 1:
            return
        self._closing = False
        await self.runner.prepare()
        if self.runner.key is None:
            log.warning("runner %s serves without a key: whoever reaches it can have its steps run", self.runner.name)
        if self.engine is not None:
            self._beat = asyncio.get_running_loop().create_task(self._check_in(), name="durable-runner-register")

    async def close(self, timeout: float | None = None) -> None:
        """Check in no more, let passes under way finish within `timeout` seconds, let go. Idempotent."""
        if self._users == 0:
            return
        self._users -= 1
        if self._users:
            return
        self._closing = True
        beat, self._beat = self._beat, None
        if beat is not None:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
        await self.runner.drain(timeout)
        await self.runner.release()
        self.registered = False

    # ------------------------------------------------------------------ checking in

    async def register(self) -> dict[str, Any]:
        """Check in now. What the engine answered. Raises RegistrationRefused, or DurableError where it cannot be reached."""
        import httpx2

        if self.engine is None:
            raise DefinitionError(
                "This runner does not know its engine: serve(..., engine='https://…', url='https://…')."
            )
        async with httpx2.AsyncClient(timeout=ATTEMPT_SECONDS, follow_redirects=False) as client:
            try:
                return await self._register(client)
            except httpx2.HTTPError as error:
                raise DurableError(f"The engine at {self.engine} cannot be reached: {error!r}") from error

    async def _register(self, client: httpx2.AsyncClient) -> dict[str, Any]:
        target = f"{self.engine}/register"
        body = _encode(self.runner.registration(url=f"{self.url}/invoke"))
        headers = {"content-type": "application/json"}
        if self.runner.key is not None:
            headers["authorization"] = f"Bearer {self.runner.key}"
        async with client.stream("POST", target, content=body, headers=headers) as answer:
            said = await _bounded(answer.aiter_bytes())
        if answer.status_code >= 300:
            self.registered = False
            message = f"The engine at {self.engine} answered {answer.status_code} to this runner: {said[:500]!r}"
            raise (RegistrationRefused if answer.status_code < 500 else DurableError)(message)
        self.registered = True
        try:
            found = msgspec.json.decode(said)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return {}
        return found if isinstance(found, dict) else {}

    async def _check_in(self) -> None:
        pause, told = RETRY_SECONDS, ""
        import httpx2

        async with httpx2.AsyncClient(timeout=ATTEMPT_SECONDS, follow_redirects=False) as client:
            while True:
                try:
                    await self._register(client)
                except (DurableError, httpx2.HTTPError, OSError) as error:
                    self.registered = False
                    trouble = str(error) or repr(error)
                    if trouble != told:
                        log.warning("runner %s is not registered: %s", self.runner.name, trouble)
                    told = trouble
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, REGISTER_SECONDS)
                else:
                    if told:
                        log.info("runner %s is registered with %s", self.runner.name, self.engine)
                    pause, told = RETRY_SECONDS, ""
                    await asyncio.sleep(REGISTER_SECONDS)

    # ------------------------------------------------------------------ ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.start()
                except Exception as error:
                    log.exception("the runner did not start")
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        raw = scope.get("raw_path") or scope["path"].encode()
        query = scope.get("query_string") or b""
        path = (raw + (b"?" + query if query else b"")).decode("latin-1")
        place = scope["path"].removeprefix(scope.get("root_path", ""))
        body = await _request_body(given, receive)
        work = asyncio.ensure_future(self._respond(scope["method"], path, place, given, body))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return  # nobody waits for it: the pass is asked for again, perhaps elsewhere
            status, headers, said = work.result()
        finally:
            work.cancel()
            gone.cancel()
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode()) for name, value in headers],
            }
        )
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else said})

    async def _respond(
        self, method: str, path: str, place: str, given: list[tuple[str, str]], body: bytes | HTTPStatus
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the answer. `path` as it was sent; `place`: what of it is below this application."""
        nonce: str | None = None
        status: int
        try:
            if isinstance(body, HTTPStatus):
                status, said = body, _problem(_TROUBLES[body], "payload_too_large")
            else:
                nonce = self._admit(method, path, given, body)
                status, said = await self._route(method, place, body)
        except BadSignature as error:
            log.info("a request to the runner was refused: %s", error)
            status, said = HTTPStatus.UNAUTHORIZED, _problem("Sign it: see protocol/runners.md.", BadSignature.code)
        except Malformed as error:
            status, said = HTTPStatus.UNPROCESSABLE_ENTITY, _problem(str(error), error.code)
        except Exception as error:
            log.exception("a request to the runner broke")
            status, said = HTTPStatus.INTERNAL_SERVER_ERROR, _encode({"error": describe(error), "logs": []})
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(said))),
            ("cache-control", "no-store"),
        ]
        if nonce is not None:
            headers.append((HEADER, self._signed(str(int(status)), path, said, nonce)))
        return int(status), headers, said

    async def _route(self, method: str, place: str, body: bytes) -> tuple[int, bytes]:
        place = place.rstrip("/")
        if place == "/invoke":
            if method != "POST":
                return HTTPStatus.METHOD_NOT_ALLOWED, _problem("An invoke is a POST.", "method_not_allowed")
            if self._closing:
                return HTTPStatus.SERVICE_UNAVAILABLE, _problem("This runner is on its way out.", "draining")
            if self.runner.under_way >= self.runner.concurrency:
                message = f"This runner has {self.runner.concurrency} passes under way, as many as it may."
                return HTTPStatus.SERVICE_UNAVAILABLE, _problem(message, "busy")
            return await self.runner.answer(body)
        if place == "":
            if method not in ("GET", "HEAD"):
                return HTTPStatus.METHOD_NOT_ALLOWED, _problem("The manifest is a GET.", "method_not_allowed")
            return HTTPStatus.OK, _encode(self.runner.registration())
        return HTTPStatus.NOT_FOUND, _problem("There is /invoke, and the manifest above it.", "not_found")

    def _admit(self, method: str, path: str, given: list[tuple[str, str]], body: bytes) -> str | None:
        """The request's nonce, to sign the answer with; None without a key. Raises BadSignature."""
        if self.runner.key is None:
            return None
        values = [value for name, value in given if name.lower() == HEADER]
        now = self._now()
        nonce = check(values, [self.runner.key], method, path, body, now=now).nonce
        self._nonces.use(nonce, now)
        return nonce

    def _signed(self, method: str, path: str, body: bytes, nonce: str) -> str:
        assert self.runner.key is not None
        return sign(self.runner.key, method, path, body, ts=int(self._now()), nonce=nonce)

    def _now(self) -> float:
        return self.runner.clock.now() / SECOND

    # ------------------------------------------------------------------ WSGI

    @cached_property
    def wsgi(self) -> Wsgi:
        """The same for Flask and other WSGI apps. It runs on a thread of its own, from the first request or `start` on."""
        return Wsgi(self)


class Wsgi:
    """A WSGI application over the runner, whose event loop has a thread of its own."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Check in from now on, not from the first request on. After a fork, in the process that serves. Idempotent."""
        self._running()

    def register(self) -> dict[str, Any]:
        """Check in now. Raises as `Serving.register`."""
        return asyncio.run_coroutine_threadsafe(self._serving.register(), self._running()).result()

    def close(self, timeout: float | None = None) -> None:
        """Drain, and end the thread. Idempotent."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._serving.close(timeout), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = [
            (name[5:].replace("_", "-").lower(), str(value)) for name, value in environ.items() if name[:5] == "HTTP_"
        ]
        path, place = _paths(environ)
        body = _input_of(environ)
        work = self._serving._respond(environ["REQUEST_METHOD"], path, place, given, body)
        status, headers, said = asyncio.run_coroutine_threadsafe(work, self._running()).result()
        start_response(f"{status} {_phrase(status)}", headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else said]

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=loop.run_forever, name="durable-runner", daemon=True)
                thread.start()
                try:
                    asyncio.run_coroutine_threadsafe(self._serving.start(), loop).result()
                except BaseException:
                    loop.call_soon_threadsafe(loop.stop)
                    thread.join()
                    loop.close()
                    raise
                self._loop, self._thread = loop, thread
            return self._loop


# ------------------------------------------------------------------ bodies, bounded

_TROUBLES = {
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: f"An invoke has at most {MAX_FRAME:,} bytes.",
    HTTPStatus.REQUEST_TIMEOUT: f"The body did not come within {BODY_SECONDS:g} s.",
}


async def _request_body(headers: list[tuple[str, str]], receive: Receive) -> bytes | HTTPStatus:
    """The body, or with what status it is refused."""
    said = next((value for name, value in headers if name.lower() == "content-length"), "")
    if said.isascii() and said.isdigit() and int(said) > MAX_FRAME:
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return HTTPStatus.REQUEST_TIMEOUT
                body += message.get("body", b"")
                if len(body) > MAX_FRAME:
                    return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        return HTTPStatus.REQUEST_TIMEOUT


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _input_of(environ: dict[str, Any]) -> bytes | HTTPStatus:
    said = environ.get("CONTENT_LENGTH") or ""
    if said.isascii() and said.isdigit():
        if int(said) > MAX_FRAME:
            environ["wsgi.input"].read(
                min(int(said), 4 * MAX_FRAME)
            )  # a server that closes on unread bytes resets the answer
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return bytes(environ["wsgi.input"].read(int(said)))
    if not environ.get("wsgi.input_terminated"):
        return b""
    body = bytes(environ["wsgi.input"].read(MAX_FRAME + 1))
    return body if len(body) <= MAX_FRAME else HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def _paths(environ: dict[str, Any]) -> tuple[str, str]:
    """The path as it was sent, and what of it is below this application. A server that keeps the former says it; else it is
    put together again."""
    from urllib.parse import quote

    place = environ.get("PATH_INFO", "")
    sent = environ.get("RAW_URI") or environ.get("REQUEST_URI")
    if not sent:
        sent = quote(environ.get("SCRIPT_NAME", "") + place, safe="/:@!$&'()*+,;=~-._", encoding="latin-1")
        query = environ.get("QUERY_STRING", "")
        sent += f"?{query}" if query else ""
    elif "://" in sent:
        parts = urlsplit(sent)
        sent = parts.path + (f"?{parts.query}" if parts.query else "")
    return sent, place


async def _bounded(chunks: AsyncIterator[bytes]) -> bytes:
    said = bytearray()
    async for chunk in chunks:
        said += chunk
        if len(said) > MAX_FRAME:
            raise DurableError(f"The engine's answer is over {MAX_FRAME:,} bytes.")
    return bytes(said)


def _problem(message: str, code: str) -> bytes:
    return _encode({"error": ErrorData(message=message, code=code)})


def _phrase(status: int) -> str:
    with suppress(ValueError):
        return HTTPStatus(status).phrase
    return ""
