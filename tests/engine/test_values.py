"""Values keep their type, and the live one is the replayed one (D11)."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, TypedDict
from uuid import UUID

import msgspec
import pydantic
import pytest

from durable import Context, durable_step, workflow
from tests.engine.world import World, eventually


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclass
class Line:
    sku: str
    price: Decimal


@dataclass
class Order:
    id: UUID
    lines: list[Line]
    at: datetime


class Point(msgspec.Struct):
    x: int
    y: float


class Model(pydantic.BaseModel):
    name: str
    when: date


class Shape(TypedDict):
    kind: Literal["circle"]
    size: int


class Pair(NamedTuple):
    left: int
    right: str


VALUES: list[tuple[Any, Any]] = [
    (int, 2**63 - 1),
    (int, -(2**53) - 1),
    (float, 0.1),
    (float, -0.0),
    (str, "ünï ☃ \U0001f600 \x7f"),
    (bool, True),
    (bytes, b"\x00\xff binary"),
    (Decimal, Decimal("10.10")),
    (UUID, UUID(int=7)),
    (datetime, datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC)),
    (datetime, datetime(2024, 2, 29, 12, 30, tzinfo=timezone(timedelta(hours=5, minutes=30)))),
    (date, date(2024, 2, 29)),
    (time, time(1, 2, 3)),
    (timedelta, timedelta(days=2, microseconds=5)),
    (Colour, Colour.RED),
    (Level, Level.HIGH),
    (Order, Order(UUID(int=1), [Line("a", Decimal("1.10"))], datetime(2024, 1, 1, tzinfo=UTC))),
    (Point, Point(1, 2.5)),
    (Model, Model(name="m", when=date(2024, 1, 1))),
    (Shape, {"kind": "circle", "size": 3}),
    (Pair, Pair(1, "r")),
    (tuple[int, str], (1, "a")),
    (set[int], {1, 2, 3}),
    (frozenset[str], frozenset({"a"})),
    (dict[int, str], {1: "one"}),
    (list[Line | None], [Line("s", Decimal(3)), None]),
    (dict[str, list[Any]], {"a": [], "b": [{}, [[]], 1234567890123456]}),
    (type(None), None),
]


@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=lambda v: str(v)[:24])
async def test_D11_the_live_value_is_the_replayed_one(world: World, annotation: Any, value: Any) -> None:
    """A step's result, a remote step's, a child's and the run's own come back as their annotation says, the first time
    and on every replay."""
    seen: list[list[Any]] = []
    made = _typed(annotation, value, seen)
    app = await world.engine(*made)
    handle = await app.start(made[0], value)
    await eventually(lambda: seen)
    await world.waits(handle.id)
    await world.crash(app)
    app = await world.engine(*made)
    await app.run(handle.id).signal("go")
    result = await app.engine.result(handle.id, 5, type=annotation)
    assert len(seen) >= 2, "it was replayed"
    for values in [*seen, [result]]:
        for one in values:
            assert one == value
            assert type(one) is type(value)


def _typed(annotation: Any, value: Any, seen: list[list[Any]]) -> list[Any]:
    """Workflow, child and steps whose annotations are these."""

    async def body() -> Any:
        return value

    async def remote(thing: Any) -> Any:
        return thing

    async def child(ctx: Context, thing: Any) -> Any:
        return thing

    async def main(ctx: Context, thing: Any) -> Any:
        values = [
            thing,
            await ctx.step("local", body),
            await ctx.remote(remote_step, thing),
            await ctx.child(child_workflow, thing),
        ]
        seen.append(values)
        await ctx.wait_for_signal("go")
        return values[1]

    def annotate(function: Callable[..., Any]) -> None:
        for name in function.__annotations__:
            if name in ("thing", "return"):
                function.__annotations__[name] = annotation

    for function in (body, remote, child, main):
        annotate(function)
    remote_step = durable_step("remote")(remote)
    child_workflow = workflow(name="child")(child)
    return [workflow(name="main")(main), child_workflow, remote_step]


async def test_D11_without_an_annotation_a_value_is_plain_json_live_too(world: World) -> None:
    """An unannotated result is not the live object the first time and plain JSON later: it is plain JSON both times."""
    seen: list[Any] = []

    @workflow(name="plain")
    async def plain(ctx: Context) -> None:
        async def body():  # type: ignore[no-untyped-def]
            return {"t": (1, 2), "d": Decimal("1.5"), "when": date(2024, 1, 1)}

        seen.append(await ctx.step("body", body))
        await ctx.wait_for_signal("go")

    app = await world.engine(plain)
    handle = await app.start(plain)
    await world.waits(handle.id)
    await handle.signal("go")
    await handle.result(5)
    assert all(value == {"t": [1, 2], "d": "1.5", "when": "2024-01-01"} for value in seen)


async def test_D11_a_result_is_a_copy_live_as_replayed(world: World) -> None:
    """Changing what a step handed back does not reach into the step's own object, nor the other way round."""
    kept: list[int] = [1]

    @workflow(name="copies")
    async def copies(ctx: Context) -> list[int]:
        async def body() -> list[int]:
            return kept

        value: list[int] = await ctx.step("body", body)
        kept.append(2)
        return value

    app = await world.engine(copies)
    assert await app.start_and_wait(copies, timeout=5) == [1]


async def test_a_type_nobody_can_read_back_is_refused_when_it_is_asked_for(world: World) -> None:
    """An annotation that JSON cannot carry is an error at the call, not a surprise on the first replay."""
    from durable.core.errors import DurableError

    class Opaque:
        pass

    @workflow(name="opaque")
    async def opaque(ctx: Context) -> str:
        async def body() -> Any:
            return None

        try:
            await ctx.step("body", body, returns=Opaque)
        except DurableError as error:
            return str(error)
        return ""

    app = await world.engine(opaque)
    assert "Opaque" in await app.start_and_wait(opaque, timeout=5)


def test_paths_are_text() -> None:
    """A path is no JSON value; it is refused with its type's name."""
    from durable.core.errors import PayloadError
    from durable.core.payload import encode

    with pytest.raises(PayloadError, match="PurePosixPath"):
        encode(PurePosixPath("/tmp"), what="the value")
