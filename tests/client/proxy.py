"""Something between a client and a service that cuts connections: after so many bytes, whatever they are a part of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Self


class Cutter:
    """A proxy on a loopback port. `after()`: how many bytes of an answer get through; None: all of them. `kindly()`: whether
    the connection is then closed in order, or reset."""

    def __init__(self, port: int, after: Callable[[], int | None], kindly: Callable[[], bool] = lambda: True) -> None:
        self._port = port
        self._after = after
        self._kindly = kindly
        self.cuts = 0
        self.connections = 0
        self.url = ""
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, near: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        far, service = await asyncio.open_connection("127.0.0.1", self._port)
        asking = asyncio.ensure_future(_copy(near, service))
        try:
            await self._answer(far, client)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            asking.cancel()
            await asyncio.wait({asking})
            for writer in (client, service):
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
            self._open.discard(task)

    async def _answer(self, far: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        left = self._after()
        while data := await far.read(65536):
            part = data if left is None else data[:left]
            client.write(part)
            await client.drain()
            if left is not None:
                left -= len(part)
                if left <= 0:
                    self.cuts += 1
                    if not self._kindly():
                        client.transport.abort()
                    return


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, asyncio.CancelledError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
