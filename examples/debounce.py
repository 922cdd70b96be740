"""Debounce: one run once no more events have come for a while, with the last of them.

python examples/debounce.py
"""

import asyncio

from durable import Context, Debounce, Durable

app = Durable("sqlite:///.durable/examples.db")


@app.workflow(on="doc.edited", debounce=Debounce("700ms", key="event.data.doc", max_wait="10s"))
async def index(ctx: Context, edit: dict[str, str]) -> str:
    return f"{edit['doc']}: {edit['text']}"


async def main() -> None:
    async with app:
        runs: dict[str, str] = {}
        for doc, text in (("a", "D"), ("a", "Du"), ("b", "B"), ("a", "Durable")):
            answer = await app.send_event("doc.edited", {"doc": doc, "text": text})
            [one] = answer.admissions
            print(f"{doc} {text!r}: {one.verdict}, a new run: {one.new}")
            runs[doc] = one.run_id or ""
        for doc in runs:
            print("indexed", await app.run(runs[doc]).result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
