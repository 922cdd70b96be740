"""Tables and functions, version by version. A migration only ever adds, so that engines of two versions run side by side;
each file is one transaction, run by whoever comes first, while the others wait for a bounded time."""

from __future__ import annotations

import re
from importlib import resources

import psycopg

from durable.core.errors import StoreError, StoreTooNew, StoreUnavailable
from durable.store.postgres.connection import Connection, ask, translate

LOCK_TIMEOUT_S = 10


def known() -> list[tuple[int, str]]:
    """(version, SQL) of every migration this program has, in order."""
    files = [
        entry for entry in resources.files(__package__).joinpath("migrations").iterdir() if entry.name.endswith(".sql")
    ]
    return sorted((int(entry.name.split("_")[0]), entry.read_text()) for entry in files)


def check_schema(name: str) -> str:
    """Raises StoreError for a name that would need quoting; words of SQL, which the server knows, `migrate` refuses."""
    if not re.fullmatch(r"(?!pg_)[a-z_][a-z0-9_]{0,50}", name):
        raise StoreError(
            f"{name!r} cannot be a schema's name here: use at most 51 small letters, digits and underscores,"
            " not beginning with pg_ or a digit"
        )
    return name


async def migrate(
    connection: Connection, schema: str, place: str, migrations: list[tuple[int, str]] | None = None
) -> None:
    """Bring the schema to this program's version. Raises StoreTooNew, StoreUnavailable when another holds the lock."""
    steps = known() if migrations is None else migrations
    newest = steps[-1][0]
    found = await _version(connection, schema, place, newest)
    if found is not None and found >= newest:
        return
    try:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
            await connection.execute("SET LOCAL statement_timeout = 0")
            # Freed with the transaction, and with the connection of a process that dies.
            await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 1))", [f"durable:{schema}"])
            found = await _version(connection, schema, place, newest)
            if found is not None and found >= newest:
                return
            if found is None:
                [[quoted]] = await ask(connection, "SELECT quote_ident(%s)", [schema])
                if quoted != schema or schema.startswith("pg_"):
                    raise StoreError(f"{schema!r} is a word of PostgreSQL's own; give another schema=")
                if not await ask(connection, "SELECT FROM pg_catalog.pg_namespace WHERE nspname = %s", [schema]):
                    # Asked only where it is needed: an administrator may have made the schema for a user who may not.
                    await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
                await connection.execute(f"CREATE TABLE {schema}.meta (name text PRIMARY KEY, value text NOT NULL)")
                await connection.execute(
                    f"INSERT INTO {schema}.meta VALUES ('schema_version', '0'), ('min_engine_version', '1'),"
                    " ('store_id', gen_random_uuid()::text)"
                )
            for version, text in steps:
                if version > (found or 0):
                    await connection.execute(text.replace("@schema@", schema), prepare=False)
            await connection.execute(
                f"UPDATE {schema}.meta SET value = %s WHERE name = 'schema_version'", [str(newest)]
            )
    except psycopg.errors.LockNotAvailable:
        raise StoreUnavailable(
            f"{place}: another process has been changing the tables for more than {LOCK_TIMEOUT_S} s; try again, or look"
            " for it in pg_stat_activity"
        ) from None
    except psycopg.Error as error:
        raise translate(error, place) from error


async def _version(connection: Connection, schema: str, place: str, newest: int) -> int | None:
    """The version found; None: nothing there yet. Raises StoreTooNew."""
    # Not to_regclass: it may answer from a cache that waiting for an advisory lock does not refresh.
    there = "SELECT EXISTS (SELECT FROM pg_catalog.pg_tables WHERE schemaname = %s AND tablename = 'meta')"
    [[exists]] = await ask(connection, there, [schema])
    if not exists:
        return None
    try:
        meta: dict[str, str] = dict(await ask(connection, f"SELECT name, value FROM {schema}.meta"))
        found, needed = int(meta["schema_version"]), int(meta["min_engine_version"])
    except (psycopg.errors.UndefinedColumn, KeyError, ValueError):
        raise StoreError(
            f"{place}: schema {schema!r} has a table `meta` that is not ours; give another schema="
        ) from None
    if needed > newest:
        raise StoreTooNew(
            f"{place}: schema {schema!r} asks for programs that know its version {needed}, and this one knows {newest}:"
            " upgrade durable here"
        )
    return found  # a newer one has additions that this program does not look at
