"""Heartbeats, and the advisory lock that says "I live": one connection for both, used from threads.

The server frees the lock when the connection ends, so a killed engine is seen at once and not when its lease is over. A
thread waits on the socket between beats, so a connection that the server has closed is replaced at once too, and the lock
is free for no longer than a claimer takes to be sure. It is only a hint: the lease and the epoch decide.

The driver waits for an answer for as long as the socket lives, and over a half-open link that is for ever; so every question
has a bound, and breaking it still leaves time to beat over a new connection before the lease is over.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psycopg

from durable.core.errors import DurableError, StoreError, StoreRestored
from durable.store.postgres.connection import Address, Row, close_quietly, translate
from durable.store.records import Beat

log = logging.getLogger("durable.store.postgres")

RETRY_S = 0.1
PATIENCE_SHARE = 1 / 3
"""Of the lease: how long a question may go unanswered."""
LEAST_PATIENCE_S = 1.0


class Heart:
    """One connection for the heartbeats of all engines that use this store object."""

    def __init__(
        self, address: Address, schema: str, *, presence: bool, on_silence: Callable[[float], None] = lambda _: None
    ) -> None:
        """`on_silence`: one connection was silent for so many seconds, and a new one is answered. Called from any thread."""
        self._on_silence = on_silence
        self._address = address
        self._schema = schema
        self._presence = presence
        self._mutex = threading.Lock()
        self._connection: psycopg.Connection[Row] | None = None
        self._held: set[str] = set()
        self._locked: set[str] = set()
        """Whose lock this connection holds."""
        self._incarnations: frozenset[str] = frozenset()
        self._watcher: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        self._closed = False
        self._beats: dict[str, int] = {}
        """How many heartbeats of each engine the store has confirmed."""
        self._restored: StoreRestored | None = None
        self._patience = LEAST_PATIENCE_S
        self._silent = 0.0
        """For how long the last connection had been silent when it was cut; 0: it was not."""

    @property
    def incarnations(self) -> frozenset[str]:
        """The engines that beat here."""
        return self._incarnations

    def beat(self, incarnation: str, lease_us: int) -> Beat:
        """From any thread. Raises StoreError; StoreRestored, from then on for ever, when the store has gone back (S40)."""
        with self._mutex:
            if self._closed:
                raise StoreError(f"{self._address} is not open; await store.open() first")
            if self._restored is not None:
                raise self._restored
            if incarnation not in self._held:
                self._hold(incarnation)
            self._patience = max(LEAST_PATIENCE_S, lease_us / 1_000_000 * PATIENCE_SHARE)
            try:
                fresh = self._connection is None
                connection = self._connect()
                with self._bounded(connection):
                    if not fresh and self._presence:
                        self._lock(connection, incarnation)
                        if incarnation not in self._locked:
                            self._nudge()  # to try again
                    row = connection.execute(
                        f"SELECT now_us, alive, beats FROM {self._schema}.beat(%s, %s, %s)",
                        [incarnation, lease_us, incarnation in self._locked],
                    ).fetchone()
            except psycopg.Error as error:
                self._drop()
                raise translate(error, str(self._address)) from error
            assert row is not None
            if self._silent:
                # A new connection is answered and the old one was not: it was the link and not the server.
                silent, self._silent = self._silent, 0.0
                self._on_silence(silent)
            if not row[1]:
                self._hold(incarnation, False)
                return Beat(row[0], False)
            self._count(incarnation, row[2])
            return Beat(row[0], True)

    def _count(self, incarnation: str, beats: int) -> None:
        """What the store has confirmed it may not forget: it has been set back, or its standby had not got that far."""
        known = self._beats.get(incarnation, 0)
        if beats <= known:
            self._restored = StoreRestored(
                f"{self._address} has gone back in time: it knows {beats - 1} heartbeats of this engine, and had confirmed"
                f" {known}. A backup was restored, or a standby took over that lagged; work done since is missing there. This"
                " process does nothing more. Start it anew to go on with what the database has"
            )
            raise self._restored
        self._beats[incarnation] = beats

    def forget(self, incarnation: str) -> None:
        """It has left: its lock goes. Waits for the server, so not on a loop's thread."""
        with self._mutex:
            if incarnation not in self._held:
                return
            self._hold(incarnation, False)
            self._beats.pop(incarnation, None)
            self._locked.discard(incarnation)
            if self._connection is not None and self._presence:
                try:
                    with self._bounded(self._connection):
                        self._connection.execute(
                            f"SELECT pg_advisory_unlock({self._schema}.presence_key(%s))", [incarnation]
                        )
                except psycopg.Error:
                    self._drop()

    def close(self) -> None:
        with self._mutex:
            self._closed = True
            self._drop()
            self._nudge()
        if self._watcher is not None:
            self._watcher.join()

    # ------------------------------------------------------------------ the connection

    def _connect(self) -> psycopg.Connection[Row]:
        if self._connection is None:
            self._connection = connection = self._address.connect_now()
            self._locked = set()
            if self._presence:
                with self._bounded(connection):
                    for incarnation in self._held:
                        self._lock(connection, incarnation)
                self._watch()
        return self._connection

    @contextmanager
    def _bounded(self, connection: psycopg.Connection[Row]) -> Iterator[None]:
        """Cut the connection if it is not done in time: whoever waits on it hears of that at once."""
        # A handle of ours: by then the driver's number may be another socket's.
        link = socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM)

        def cut() -> None:
            log.warning(
                "%s has not answered a heartbeat for %.1f s; trying another connection", self._address, patience
            )
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            self._silent = patience

        patience = self._patience
        timer = threading.Timer(patience, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            link.close()

    def _lock(self, connection: psycopg.Connection[Row], incarnation: str) -> None:
        """Try, once. Others only ever try a shared lock for an instant, but a connection of ours that ends, or hangs, keeps
        it for as long as the server has not given it up: it is tried again, and until then heartbeats do not promise it."""
        if incarnation in self._locked:
            return
        row = connection.execute(
            f"SELECT pg_try_advisory_lock({self._schema}.presence_key(%s))", [incarnation]
        ).fetchone()
        if row is not None and row[0]:
            self._locked.add(incarnation)
            # Who found it free meanwhile must begin to count anew, not at our next heartbeat only.
            connection.execute(
                f"UPDATE {self._schema}.engines SET missed_at = NULL WHERE incarnation = %s AND missed_at IS NOT NULL",
                [incarnation],
            )

    def _hold(self, incarnation: str, here: bool = True) -> None:
        (self._held.add if here else self._held.discard)(incarnation)
        self._incarnations = frozenset(self._held)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._locked = set()
        close_quietly(connection)
        self._nudge()  # nothing is heard on a closed socket

    def _nudge(self) -> None:
        if self._wake is not None:
            with suppress(OSError):
                os.write(self._wake[1], b".")

    # ------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        if self._watcher is None:
            self._wake = os.pipe()
            self._watcher = threading.Thread(target=self._run, name="durable-heart", daemon=True)
            self._watcher.start()
        else:
            self._nudge()  # a new socket to wait on

    def _run(self) -> None:
        assert self._wake is not None
        heard, told = self._wake
        try:
            while not self._closed:
                try:
                    self._wait_and_look(heard)
                except OSError as error:  # no descriptor left, most likely; the beats go on meanwhile
                    log.warning("cannot watch the heartbeat's connection, trying again: %s", error)
                    time.sleep(1.0)
        finally:
            self._wake = None
            os.close(heard)
            os.close(told)

    def _wait_and_look(self, heard: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(heard, selectors.EVENT_READ)
            with self._mutex:
                connection = self._connection
                if connection is not None:
                    selector.register(connection.fileno(), selectors.EVENT_READ)
                waiting = connection is None or bool(self._held - self._locked)
            ready = [key.fileobj for key, _ in selector.select(RETRY_S if waiting else None)]
        if heard in ready:
            os.read(heard, 1024)
        self._look(connection)

    def _look(self, seen: psycopg.Connection[Row] | None) -> None:
        """Something came on the socket, or there is none. Replace a connection that has ended."""
        with self._mutex:
            if self._closed or self._connection is not seen:
                return
            if seen is not None:
                try:
                    seen.pgconn.consume_input()
                    for incarnation in self._held - self._locked:
                        with self._bounded(seen):
                            self._lock(seen, incarnation)
                    return
                except psycopg.Error:
                    self._drop()
            try:
                self._connect()
            except (psycopg.Error, DurableError):
                self._drop()
