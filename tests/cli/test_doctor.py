"""`durable doctor` says what is wrong and what to do, and touches nothing it need not."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path

import pytest

from durable import Durable
from tests.cli.world import World


def path_of(world: World) -> Path:
    return Path(world.url.removeprefix("sqlite:///"))


def test_trouble_is_named_with_its_remedy(world: World) -> None:
    """Blocked and dead runs are listed with their errors and what to do; the exit code is 1."""
    result = world.run("doctor")
    assert result.exit_code == 1
    assert world["blocked"] in result.stdout
    assert world["dead"] in result.stdout
    assert "durable runs requeue" in result.stdout
    assert "things to do" in result.stdout


def test_a_healthy_store_is_all_well(tmp_path: Path) -> None:
    """With nothing to do it says so, with the engine that is alive and for how long, and exits 0."""
    world = World(f"sqlite:///{tmp_path}/fine.db")

    async def look() -> None:
        async with Durable(world.url) as app:
            found = await asyncio.to_thread(world.json, "doctor")
            assert found["ok"]
            [engine] = [row["found"] for row in found["findings"] if row["check"] == "engine"]
            assert app.engine.incarnation[:8] in engine
            assert "alive" in engine

    asyncio.run(look())
    assert "All is well." in world.run("doctor").stdout


def test_work_without_an_engine_is_told(tmp_path: Path) -> None:
    """Runs that are due while no engine is alive need action: start one."""
    world = World(f"sqlite:///{tmp_path}/idle.db")

    async def start() -> None:
        async with Durable(world.url, worker=False) as app:

            @app.workflow
            async def lonely(ctx: object) -> None: ...

            await app.start("lonely")

    asyncio.run(start())
    result = world.run("doctor")
    assert result.exit_code == 1
    assert "no engine is alive" in result.stdout
    assert "durable dev" in result.stdout


def test_no_store_yet_is_no_fault(tmp_path: Path) -> None:
    """Before the first start there is nothing to examine, nothing wrong, and nothing is made."""
    result = World(f"sqlite:///{tmp_path}/new.db").run("doctor")
    assert result.exit_code == 0
    assert "the first engine or start makes it" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_restored_backup_wants_a_word(tmp_path: Path) -> None:
    """An older copy is refused with the remedy; --accept-restore accepts it, once and for all."""
    world = World(f"sqlite:///{tmp_path}/runs.db")

    async def open_once() -> None:
        async with Durable(world.url, worker=False):
            pass

    asyncio.run(open_once())
    shutil.copy(path_of(world), tmp_path / "backup.db")
    for _ in range(3):
        asyncio.run(open_once())
    for log in tmp_path.glob("runs.db-*"):
        log.unlink()
    shutil.copy(tmp_path / "backup.db", path_of(world))
    refused = world.run("doctor")
    assert refused.exit_code == 1
    assert "durable doctor --accept-restore" in refused.stdout
    assert "--accept-restore" in world.run("runs", "list").stderr
    assert world.run("doctor", "--accept-restore").exit_code == 0
    assert world.run("doctor").exit_code == 0


def test_a_store_from_the_future_is_told(tmp_path: Path) -> None:
    """Tables of a newer version: upgrade, says the sentence."""
    world = World(f"sqlite:///{tmp_path}/runs.db")

    async def make() -> None:
        async with Durable(world.url, worker=False):
            pass

    asyncio.run(make())
    with sqlite3.connect(path_of(world)) as db:
        db.execute("UPDATE meta SET value = '999' WHERE name = 'schema_version'")
    db.close()
    result = world.run("doctor")
    assert result.exit_code == 1
    assert "upgrade durable" in result.stdout


@pytest.mark.parametrize("content", [b"no database at all, really not" * 50, b""])
def test_a_file_of_another_kind_is_told(tmp_path: Path, content: bytes) -> None:
    """A file that is no store is named as that, and stays as it is."""
    (tmp_path / "x.db").write_bytes(content)
    result = World(f"sqlite:///{tmp_path}/x.db").run("doctor")
    assert result.exit_code == 1
    assert (tmp_path / "x.db").read_bytes() == content
