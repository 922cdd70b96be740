"""What tests do to connections: count them, kill them, stand between them and their server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from durable.testing.facts import PATIENCE, PAUSE

MINE = "database = (SELECT oid FROM pg_database WHERE datname = current_database())"
"""Of locks: those in this database. Tests beside this one have theirs on the same server."""
OTHERS = "datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"

CHANNELS = "query ~ 'LISTEN|pg_notify'"
"""Connections that last listened, or said something."""


class Backends:
    """All who are connected to one database, seen from a connection of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._conn: psycopg.AsyncConnection[Any] | None = None

    async def __aenter__(self) -> Backends:
        self._conn = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._conn is not None:
            await self._conn.close()

    async def _ask(self, query: str) -> list[Any]:
        assert self._conn is not None
        return await (await self._conn.execute(query)).fetchall()  # type: ignore[arg-type]

    async def pids(self) -> set[int]:
        return {pid for (pid,) in await self._ask(f"SELECT pid FROM pg_stat_activity WHERE {OTHERS}")}

    async def terminate(self, which: str = "true") -> set[int]:
        """Kill every other backend of which the condition holds, and return when they are gone. Their pids."""
        rows = await self._ask(
            f"SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OTHERS} AND ({which})"
        )
        killed = {pid for pid, _ in rows}
        await self._until_gone(killed)
        return killed

    async def notify(self, name: str, payload: str) -> None:
        assert self._conn is not None
        await self._conn.execute("SELECT pg_notify(%s, %s)", (name, payload))

    async def none(self) -> None:
        """Until nobody else is connected."""
        await self._until_gone(None)

    async def _until_gone(self, pids: set[int] | None) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        while left := await self.pids() if pids is None else pids & await self.pids():
            if loop.time() > deadline:
                raise AssertionError(f"still connected: {left}")
            await asyncio.sleep(PAUSE)


class Proxy:
    """A link to a server that may be cut, refused, or frozen: open on both ends, and nothing comes through."""

    def __init__(self, url: str) -> None:
        self._target = conninfo_to_dict(url)
        self._links: list[tuple[asyncio.Task[None], list[asyncio.StreamWriter]]] = []
        self._frozen: set[asyncio.StreamWriter] = set()
        self.refusing = False
        self.mute = False
        """New links are accepted, and hear nothing."""
        self.accepted = 0
        self.url = ""

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = make_conninfo("", **{**self._target, "host": "127.0.0.1", "port": port, "sslmode": "disable"})
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self.cut()

    def freeze(self) -> None:
        """The links there are carry nothing any more; new ones do."""
        for _, writers in self._links:
            self._frozen.update(writers)

    def freeze_answers(self) -> None:
        """What is asked over the links there are arrives; what is answered does not."""
        for _, writers in self._links:
            self._frozen.add(writers[0])

    async def cut(self) -> None:
        links, self._links = self._links, []
        for task, _ in links:
            task.cancel()
        await asyncio.gather(*(task for task, _ in links), return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.refusing:
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        writers = [writer]
        self._links.append((task, writers))
        try:
            if self.mute:
                await reader.read()
                return
            there, there_writer = await self._reach()
            writers.append(there_writer)
            await asyncio.gather(self._carry(reader, there_writer), self._carry(there, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in writers:
                each.close()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = str(self._target.get("host") or "localhost"), int(self._target.get("port") or 5432)
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if writer not in self._frozen:
                writer.write(data)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
        writer.close()
