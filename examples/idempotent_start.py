"""Idempotent start: the same key and input find the run there is, so that a repeated request does nothing twice.

python examples/idempotent_start.py
"""

import asyncio
import uuid

from durable import Context, Durable, IdempotencyConflict

app = Durable("sqlite:///.durable/examples.db")


async def mail(to: str) -> str:
    print(f"  mail to {to}")
    return "sent"


@app.workflow
async def welcome(ctx: Context, to: str) -> str:
    return await ctx.step(mail, to)


async def main() -> None:
    key = f"welcome-{uuid.uuid4()}"
    async with app:
        first = await app.start(welcome, "ann@example.com", key=key)
        second = await app.start(welcome, "ann@example.com", key=key)
        print("the same run:", first.id == second.id)
        print("result:", await second.result(timeout=30))
        try:
            await app.start(welcome, "bob@example.com", key=key)
        except IdempotencyConflict as error:
            print(f"refused [{error.code}]: that key is of run {error.run_id == first.id and 'one'}")


if __name__ == "__main__":
    asyncio.run(main())
