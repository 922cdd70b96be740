"""The private Postgres."""

from __future__ import annotations

import psycopg
import pytest

pytestmark = pytest.mark.service


def test_fresh_databases(postgres_url: str) -> None:
    """Each test has an empty database of its own, on a server that keeps its promises."""
    with psycopg.connect(postgres_url) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        kept = connection.execute("SELECT current_setting('fsync')").fetchone()
    assert (tables, kept) == ((0,), ("on",))
