"""Runners that serve: the service calls an app's own web server. The runner is an ASGI application, alone or mounted in yours.

python examples/runner_serve.py
"""

import asyncio
import socket
import sys

import httpx2
import uvicorn

from durable import Context, workflow
from durable.client import Client
from durable.runners.serving import serve


@workflow("invoice", on="order.paid")
async def invoice(ctx: Context, order: dict[str, str]) -> str:
    number = await ctx.step("number", lambda: 1001)
    sent = await ctx.wait_for_event("mail.sent", match={"invoice": number}, timeout="1m")
    return f"invoice {number} for {order['id']}, mailed to {sent.data['to']}"


async def use(url: str) -> None:
    key = httpx2.post(f"{url}/api/apps", json={"name": "shop"}).raise_for_status().json()["signingKey"]  # of shop.dev
    place = socket.create_server(("127.0.0.1", 0))
    here = f"http://127.0.0.1:{place.getsockname()[1]}"  # an app of yours mounts it: app.mount("/durable", runner)
    runner = serve([invoice], app="shop.dev", key=key, runner="web", url=here, engine=url)
    server = uvicorn.Server(uvicorn.Config(runner, log_level="warning", lifespan="on"))
    serving = asyncio.create_task(server.serve([place]))
    async with Client(url, key=key) as client:
        while not (alive := await client.runners()):
            await asyncio.sleep(0.02)
        print("checked in:", [(one.runner, one.mode, one.key_matches) for one in alive])
        answer = await client.events.send("order.paid", {"id": "o-1"})
        await client.events.send("mail.sent", {"invoice": 1001, "to": "ann"})
        print((await client.runs.wait(answer.run_id or "")).result)
    server.should_exit = True
    await serving


async def main() -> None:
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "durable", "dev", "--store", "sqlite:///.durable/service.db", "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    while not (line := await service.stdout.readline()).startswith(b"API: "):
        assert line, "the service ended before it began"
    try:
        await use(line.decode().split()[1].rstrip(","))
    finally:
        service.terminate()
    await service.communicate()


if __name__ == "__main__":
    asyncio.run(main())
