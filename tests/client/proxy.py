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

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    async def _serve(self, near: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.connections += 1
        far, service = await asyncio.open_connection("127.0.0.1", self._port)
        asking = asyncio.ensure_future(_copy(near, service))
        left = self._after()
        with suppress(OSError):
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
                        break
        asking.cancel()
        for writer in (client, service):
            with suppress(OSError):
                writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, asyncio.CancelledError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
