"""The service: one process with engine and HTTP API, `durable dev examples/service.py`, and a program elsewhere that uses it.

python examples/service.py
"""

import asyncio
import sys

from durable import Context, Durable
from durable.client import Client, NotFound

app = Durable("sqlite:///.durable/examples.db")


@app.workflow(on="order.placed")
async def checkout(ctx: Context, order: dict[str, str]) -> str:
    packed = await ctx.wait_for_event("order.packed", match={"id": order["id"]}, timeout="3d")
    ctx.log("packed", depot=packed.data["depot"])
    return f"{order['id']} leaves from {packed.data['depot']}"


async def use(url: str) -> None:
    async with Client(url) as client:  # from this machine `durable dev` asks for no key
        answer = await client.events.send("order.placed", {"id": "o-1"}, id="order-1")
        again = await client.events.send("order.placed", {"id": "o-1"}, id="order-1")
        print("sent again, the same run:", again.run_id == answer.run_id)
        assert answer.run_id is not None
        await client.events.send("order.packed", {"id": "o-1", "depot": "Graz"})
        async for frame in client.runs.watch(answer.run_id):  # from its beginning until it ends, over reconnects
            print(" ", frame.kind, frame.status or frame.message)
        print("result:", (await client.runs.get(answer.run_id)).result)
        try:
            await client.runs.get("o-1")
        except NotFound as error:
            print(f"refused [{error.code}]")


async def main() -> None:
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "durable", "dev", __file__, "--port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert service.stdout is not None
    while not (line := await service.stdout.readline()).startswith(b"API: "):
        assert line, "the service ended before it began"
    await use(line.decode().split()[1].rstrip(","))
    service.terminate()  # it drains: what is under way is finished or handed over
    said = await service.stdout.read()
    print("the service:", said.decode().splitlines()[-1])
    await service.wait()


if __name__ == "__main__":
    asyncio.run(main())
