"""Runners that connect: an app's workflows run in its own processes, which dial the service. Nobody has to reach them.

python examples/runner_connect.py
"""

import asyncio
import sys

from durable import Context, workflow
from durable.client import Client
from durable.runners.connecting import connect


@workflow("resize", on="picture.uploaded")
async def resize(ctx: Context, picture: dict[str, str]) -> str:
    size = await ctx.step("measure", lambda: len(picture["name"]))
    await ctx.sleep("50ms")  # between two passes the runner keeps nothing; any other may go on
    return f"{picture['name']}: {size * 10} px"


async def use(client: Client, url: str) -> None:
    # A runner has the workflows' code, no engine and no store. In production it has the key of its app, too.
    async with connect([resize], url, app="photos.dev", runner="left") as left:
        async with connect([resize], url, app="photos.dev", runner="right"):
            while len(alive := await client.runners()) < 2:
                await asyncio.sleep(0.02)
            print("alive:", [(one.runner, one.mode, one.workflows) for one in alive])
            pinned = await client.events.send("picture.uploaded", {"name": "cat"}, runner="right")
            run = await client.runs.wait(pinned.run_id or "")
            print(run.result, "- by", run.executed_by)
        print("right has gone; connected is", "left" if left.connected else "nobody")
        answer = await client.events.send("picture.uploaded", {"name": "horse"})
        print((await client.runs.wait(answer.run_id or "")).result)


async def main() -> None:
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "durable", "dev", "--store", "sqlite:///.durable/service.db", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert service.stdout is not None
    while not (line := await service.stdout.readline()).startswith(b"API: "):
        assert line, "the service ended before it began"
    try:
        url = line.decode().split()[1].rstrip(",")
        async with Client(url, app="photos") as client:
            await use(client, url)
    finally:
        service.terminate()
        await service.communicate()


if __name__ == "__main__":
    asyncio.run(main())
