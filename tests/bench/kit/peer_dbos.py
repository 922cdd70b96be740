"""The workloads on DBOS Transact: `python -m tests.bench.kit.peer_dbos URL '{"pool": 20, "mode": "async"}'`.

Both ways its documentation shows: async workflows on the event loop, and plain ones in its threads. Nothing is traced, no
admin server is started, logging is at ERROR; the rest are its defaults.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from importlib.metadata import version
from typing import Any

import psycopg
from dbos import DBOS, DBOSClient

from tests.bench.kit.child import VALUE, gaps, serve, throughput

OPTIONS = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
LEDGER = OPTIONS.get("ledger", os.devnull)
STAMPS: list[float] = []
RESUMED: asyncio.Queue[float] = asyncio.Queue()


@DBOS.step()
async def answer(number: int) -> dict[str, Any]:
    return VALUE


@DBOS.step()
def plain_answer(number: int) -> dict[str, Any]:
    return VALUE


@DBOS.step()
async def stamp(number: int) -> dict[str, Any]:
    STAMPS.append(time.perf_counter())
    return VALUE


@DBOS.step()
def plain_stamp(number: int) -> dict[str, Any]:
    STAMPS.append(time.perf_counter())
    return VALUE


@DBOS.workflow()
async def five_steps(number: int) -> int:
    for _ in range(5):
        await answer(number)
    return number


@DBOS.workflow()
def plain_five_steps(number: int) -> int:
    for _ in range(5):
        plain_answer(number)
    return number


@DBOS.workflow()
async def many_steps(count: int) -> int:
    for number in range(count):
        await stamp(number)
    return count


@DBOS.workflow()
def plain_many_steps(count: int) -> int:
    for number in range(count):
        plain_stamp(number)
    return count


@DBOS.workflow()
async def signalled(count: int) -> int:
    for _ in range(count):
        await DBOS.recv_async("go", 60)
        RESUMED.put_nowait(time.monotonic())
    return count


@DBOS.step()
async def slow(number: int, seconds: float) -> dict[str, Any]:
    ledger = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(ledger, f"{DBOS.workflow_id} {number} {os.getpid()}\n".encode())
    os.close(ledger)
    await asyncio.sleep(seconds)
    return VALUE


@DBOS.workflow()
async def slow_steps(steps: int, seconds: float) -> int:
    for number in range(steps):
        await slow(number, seconds)
    return steps


async def w1(seconds: float, at_once: int) -> dict[str, Any]:
    async def one() -> None:
        handle = await DBOS.start_workflow_async(five_steps, 1)
        await handle.get_result()

    if OPTIONS.get("mode") != "threads":
        return await throughput(one, seconds, at_once)

    done, lock, begun = 0, threading.Lock(), time.perf_counter()

    def loop() -> None:
        nonlocal done
        while time.perf_counter() - begun < seconds:
            DBOS.start_workflow(plain_five_steps, 1).get_result()
            with lock:
                done += 1

    threads = [threading.Thread(target=loop) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    took = time.perf_counter() - begun
    return {"workflows": done, "seconds": took, "rate": done / took}


async def w2(steps: int) -> dict[str, Any]:
    STAMPS.clear()
    if OPTIONS.get("mode") == "threads":
        handle = await asyncio.to_thread(DBOS.start_workflow, plain_many_steps, steps)
        await asyncio.to_thread(handle.get_result)
    else:
        await (await DBOS.start_workflow_async(many_steps, steps)).get_result()
    return {"ms": gaps(STAMPS)}


async def signals(count: int, pause: float) -> dict[str, Any]:
    """Sender and receiver in this process."""
    handle, took = await DBOS.start_workflow_async(signalled, count), []
    for _ in range(count):
        await asyncio.sleep(pause)
        begun = time.monotonic()
        await DBOS.send_async(handle.workflow_id, "go", "go")
        took.append((await RESUMED.get() - begun) * 1e3)
    await handle.get_result()
    return {"ms": took}


async def receive(count: int) -> dict[str, Any]:
    handle = await DBOS.start_workflow_async(signalled, count)
    return {"id": handle.workflow_id}


async def resumed(number: int) -> dict[str, Any]:
    return {"at": await RESUMED.get()}


CLIENT: list[DBOSClient] = []


async def send(id: str) -> dict[str, Any]:
    """From a process that runs no workflows, as its documentation shows: through a client."""
    if not CLIENT:
        CLIENT.append(await asyncio.to_thread(lambda: DBOSClient(system_database_url=sys.argv[1])))
    begun = time.monotonic()
    await CLIENT[0].send_async(id, "go", "go")
    return {"at": begun}


async def load(count: int, steps: int, seconds: float) -> dict[str, Any]:
    handles = await asyncio.gather(*(DBOS.start_workflow_async(slow_steps, steps, seconds) for _ in range(count)))
    return {"ids": [handle.workflow_id for handle in handles]}


async def await_all(ids: list[str]) -> dict[str, Any]:
    """All of them have succeeded: looked up, since waiting for each by its handle would be a query a second for each."""
    async with await psycopg.AsyncConnection.connect(sys.argv[1], autocommit=True) as connection:
        done = "SELECT count(*) FROM dbos.workflow_status WHERE workflow_uuid = ANY(%s) AND status = 'SUCCESS'"
        while (await (await connection.execute(done, [ids])).fetchone() or (0,))[0] < len(ids):
            await asyncio.sleep(0.05)
    return {}


async def main() -> None:
    config: dict[str, Any] = {
        "name": "bench",
        "system_database_url": sys.argv[1],
        "application_version": "1",
        "run_admin_server": False,
        "log_level": "ERROR",
    }
    if "pool" in OPTIONS:
        config["sys_db_pool_size"] = OPTIONS["pool"]
    if OPTIONS.get("role") != "client":
        DBOS(config=config)
        DBOS.launch()
    verbs = [w1, w2, signals, receive, resumed, send, load, await_all]
    await serve({verb.__name__: verb for verb in verbs}, {"name": "dbos", "version": version("dbos")})
    os._exit(0)  # its threads are not ours to wait for


if __name__ == "__main__":
    asyncio.run(main())
