"""Steps: recorded work. What is recorded is never done again; what fails is tried again, and the tries are counted.

python examples/steps_and_retries.py
"""

import asyncio

from durable import Context, Durable, NonRetryable, RetryPolicy, StepFailed, current_step

app = Durable("sqlite:///.durable/examples.db")
SOON = RetryPolicy(max_attempts=4, initial_delay=0.05)


async def fetch_rate(currency: str) -> float:
    """Fails twice, as services do, and then answers."""
    attempt = current_step().attempt
    print(f"  fetch_rate({currency}), attempt {attempt}")
    if attempt < 3:
        raise ConnectionError("the rate service did not answer")
    return 1.08


def render(amount: float) -> str:
    """A plain function is a step too: it gets a thread of its own."""
    return f"{amount:.2f} USD"


async def book(amount: float) -> None:
    raise NonRetryable(f"account closed, cannot book {amount}")


@app.workflow
async def invoice(ctx: Context, euros: float) -> str:
    rate = await ctx.step(fetch_rate, "EUR", retries=SOON)
    text = await ctx.step(render, euros * rate)
    try:
        await ctx.step("book", book, euros, retries=SOON)
    except StepFailed as error:
        return f"{text} (not booked: {error.error.message})"
    return text


async def main() -> None:
    async with app:
        run = await app.start(invoice, 100.0)
        print("result:", await run.result(timeout=30))
        async for entry in run.watch():
            print(f"  journal {entry.seq}: {entry.kind} {entry.status} {entry.key or ''}")


if __name__ == "__main__":
    asyncio.run(main())
