"""One workflow, three ways: its step inside this process, in a Python worker over BullMQ, and in a TypeScript worker over
BullMQ. The workflow does not change; only who serves the step does.

    python examples/one_workflow_three_ways.py      with REDIS_URL, or a Redis on this machine

and the TypeScript worker built: npm ci && npm run build, in workers/typescript.
"""

import asyncio
import os
from pathlib import Path

from durable import Context, Durable, durable_step, workflow
from durable.core.errors import TransportError
from durable.transports.bullmq import BullMQTransport

URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
NODE = os.environ.get("NODE", "node")
TYPESCRIPT = Path(os.environ.get("TYPESCRIPT_DIST", Path(__file__).parents[1] / "workers" / "typescript" / "dist"))
STORE = "sqlite:///.durable/three_ways.db"


def bullmq() -> BullMQTransport:
    return BullMQTransport(URL, prefix="durable-example")


@workflow
async def gallery(ctx: Context, names: list[str]) -> list[str]:
    return await asyncio.gather(*(ctx.remote("images.thumbnail", name, returns=str) for name in names))


@durable_step("images.thumbnail")
async def thumbnail(name: str) -> str:
    return f"{name}, 160 px wide, by Python"


async def show(way: str, app: Durable) -> None:
    run = await app.start(gallery, ["a.png", "b.png"])
    print(f"{way}: {'; '.join(await run.result(timeout=30))}")


async def main() -> None:
    async with Durable(STORE, workflows=[gallery], steps=[thumbnail]) as app:
        await show("inside", app)
    async with Durable(STORE, workflows=[gallery], transport=bullmq()) as app:
        async with Durable(transport=bullmq(), role="worker", steps=[thumbnail]):
            await show("Python over BullMQ", app)
        script = TYPESCRIPT / "examples" / "thumbnail.js"
        if not script.is_file():
            raise FileNotFoundError(f"There is no {script}.")
        worker = await asyncio.create_subprocess_exec(NODE, str(script), env=os.environ | {"REDIS_URL": URL})
        await show("TypeScript over BullMQ", app)
        worker.terminate()
        await worker.wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (TransportError, FileNotFoundError) as error:
        print(f"{error} Start a Redis or name one as REDIS_URL, and build the worker in workers/typescript.")
