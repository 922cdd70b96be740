"""`SyncClient`: the same client for code without an event loop. One loop on a thread of its own does the work; what is
called here waits for it. Every method of `Client` and its parts is here under the same name: a coroutine's result is
returned, an asynchronous iterator is a plain one."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

from durable.client.client import Client, _Part


class _Loop:
    """An event loop on a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="durable-client", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        end = object()

        async def following() -> Any:
            return await anext(items, end)

        try:
            while (item := self.wait(following())) is not end:
                yield item
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                self.wait(close())

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Face:
    """A client, or a part of one, whose methods wait."""

    def __init__(self, loop: _Loop, target: Any) -> None:
        self._loop = loop
        self._target = target

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if isinstance(found, _Part):
            return _Face(self._loop, found)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            wait, iterate = self._loop.wait, self._loop.iterate  # before anything is begun: it may be closed
            answer = found(*args, **options)
            if inspect.iscoroutine(answer):
                return wait(answer)
            return iterate(answer) if hasattr(answer, "__anext__") else answer

        call.__name__, call.__doc__ = name, found.__doc__
        return call


class SyncClient(_Face):
    """As `Client`, without `await`. Not for several threads' streams at once: make one for each.

    with SyncClient("http://localhost:3030") as client:
        answer = client.events.send("order/created", {"id": "o-1"})
        print(client.runs.wait(answer.run_id).status)
    """

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(_Loop(), Client(url, **options))

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections and the thread. Idempotent."""
        loop, self._loop = self._loop, _Closed()  # type: ignore[assignment]
        if isinstance(loop, _Loop):
            loop.wait(self._target.close())
            loop.close()


class _Closed:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("This client is closed; make another.")
