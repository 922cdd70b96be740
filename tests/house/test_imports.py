"""`import durable` stays light: what only some need is imported by those who use it."""

from __future__ import annotations

import subprocess
import sys

from tests.house.sources import ROOT

HEAVY = {
    *("click", "rich", "dependency_injector", "starlette", "uvicorn", "pydantic", "pytest", "hypothesis", "sqlite3"),
    *("redis", "bullmq", "psycopg", "asyncpg", "aiobotocore", "boto3", "opentelemetry.sdk", "cryptography"),
    *("durable.server", "durable.cli", "durable.dashboard", "durable.testing", "durable.client"),
    *("durable.store.sqlite", "durable.store.postgres", "durable.store.redis"),
}


def test_import_durable_is_light() -> None:
    """Importing the package loads no web server, no driver, no command line and no test tool."""
    program = "import sys, durable; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & HEAVY == set()
