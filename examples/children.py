"""Children: runs started by a run. Each has its own journal, and the parent is told what became of it.

python examples/children.py
"""

import asyncio

from durable import ChildFailed, Context, Durable, NonRetryable

app = Durable("sqlite:///.durable/examples.db")


async def press(page: int) -> str:
    if page == 3:
        raise NonRetryable("page 3 is torn")
    return f"page {page}"


@app.workflow
async def print_page(ctx: Context, page: int) -> str:
    return await ctx.step(press, page)


@app.workflow
async def print_book(ctx: Context, pages: int) -> list[str]:
    first = ctx.start_child(print_page, 1)  # started now, awaited below
    done = [await ctx.child(print_page, 2)]
    try:
        done.append(await ctx.child(print_page, 3))
    except ChildFailed as error:
        done.append(f"failed: {error.error.message}")
    return [await first.result(), *done]


async def main() -> None:
    async with app:
        run = await app.start(print_book, 3)
        print("\n".join(await run.result(timeout=30)))
        children = await app.find(parent=run.id)
        for child in reversed(children.runs):
            print(f"child {child.workflow}: {child.status}")


if __name__ == "__main__":
    asyncio.run(main())
