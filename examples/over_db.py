"""Steps over a database: the engine writes a task into a table, a worker in another process claims it, and so it goes back.
No broker. Here an SQLite file in a temporary folder; DURABLE_DB=postgresql://… puts engine and worker on your server.

    python examples/over_db.py
"""

import asyncio
import os
import sys
import tempfile

from durable import Context, Durable, current_step
from durable.core.errors import TransportError
from durable.transports.db import DbTransport


async def greet(name: str) -> str:
    return (
        f"hello {name}, attempt {current_step().attempt}, from the worker: {os.getpid() != int(os.environ['ENGINE'])}"
    )


async def greetings(ctx: Context, names: list[str]) -> list[str]:
    return list(await asyncio.gather(*(ctx.remote("greet", name, returns=str) for name in names)))


async def work(url: str) -> None:
    worker = Durable(transport=DbTransport(url, namespace="example"), role="worker")
    worker.step("greet")(greet)
    async with worker:
        await asyncio.Event().wait()  # until it is stopped


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = os.environ.get("DURABLE_DB") or f"sqlite:///{folder}/queue.db"
        app = Durable(f"sqlite:///{folder}/runs.db", transport=DbTransport(url, namespace="example"))
        app.workflow("greetings")(greetings)
        environment = os.environ | {"ENGINE": str(os.getpid())}
        worker = await asyncio.create_subprocess_exec(sys.executable, __file__, url, env=environment)
        try:
            async with app:
                run = await app.start("greetings", ["ann", "bob"])
                for line in await run.result(timeout=30):
                    print(line)
        except TransportError as error:
            sys.exit(f"There is no database at DURABLE_DB: {error}")
        finally:
            worker.kill()
            await worker.wait()


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1]) if len(sys.argv) > 1 else main())
