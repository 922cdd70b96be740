"""Values keep their type: what a step returns comes back as its annotation says, live and after a replay alike.

python examples/typed_values.py
"""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from uuid import UUID

from durable import Context, Durable, DurableError

app = Durable("sqlite:///.durable/examples.db")


class Size(Enum):
    SMALL = "s"
    LARGE = "l"


@dataclass
class Shirt:
    id: UUID
    size: Size
    price: Decimal
    made: datetime
    label: bytes


async def sew(size: Size) -> Shirt:
    return Shirt(UUID(int=7), size, Decimal("19.90"), datetime(2026, 1, 2, tzinfo=UTC), b"\x00\xff")


@app.workflow
async def tailor(ctx: Context, size: Size) -> Shirt:
    shirt = await ctx.step(sew, size)
    shirt.price *= 2  # Decimal arithmetic, not text
    return shirt


async def main() -> None:
    async with app:
        shirt = await (await app.start(tailor, Size.LARGE)).result(timeout=30)
        print(f"{type(shirt).__name__}: {shirt.size} {shirt.price!r} {shirt.made:%Y-%m-%d} {shirt.label!r}")
        try:
            await app.start(tailor, "extra large")  # type: ignore[arg-type]
        except DurableError as error:
            print(f"refused [{error.code}]: {error}")


if __name__ == "__main__":
    asyncio.run(main())
