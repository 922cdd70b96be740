"""Logs: lines in the run's journal, written once however often the workflow replays, in order with all that happened.

python examples/logs.py
"""

import asyncio

import msgspec

from durable import Context, Durable, current_step

# cold: the run leaves memory at every wait and is replayed when it goes on, as after a crash.
app = Durable("sqlite:///.durable/examples.db", cold=True)


async def import_rows(table: str) -> int:
    current_step().log("halfway", table=table, rows=500)
    return 1000


@app.workflow
async def import_all(ctx: Context, tables: list[str]) -> int:
    total = 0
    for table in tables:
        ctx.log(f"importing {table}")
        total += await ctx.step(import_rows, table)
        await ctx.sleep(0.05)
    ctx.log("done", level="warn" if total > 1500 else "info", total=total)
    return total


async def main() -> None:
    async with app:
        run = await app.start(import_all, ["users", "orders"])
        async for entry in run.watch():
            if entry.kind == "log":
                line = msgspec.json.decode(entry.payload or b"{}")
                print(f"{line['level']:<5} {entry.key or 'workflow'}: {line['message']} {line['fields']}")
        print("rows:", await run.result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
