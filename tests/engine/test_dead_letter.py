"""Dead letters: a run that is dead is told of once, by the very commit that buries it."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Context, Durable, RunDead, workflow
from durable.core.dead_letter import DeadLetter, dead_letter
from durable.core.errors import NotRegistered
from durable.protocol.states import Status
from durable.store.records import RunQuery
from tests.engine.world import Gate, World, eventually


class Killer:
    """A step in which its engine dies, until it is mended."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.mended = False

    async def __call__(self, number: int) -> int:
        if not self.mended:
            await self.gate()
        return number


def poison(killer: Killer, **options: Any) -> Any:
    @workflow("poison", **options)
    async def run(ctx: Context, number: int) -> int:
        answer: int = await ctx.step("kill", killer, number, returns=int)
        return answer

    return run


async def die(world: World, make: Any, killer: Killer, deaths: int) -> Durable:
    """Crash an engine inside the step as often as asked; the next engine is up when this returns."""
    app: Durable = await make()
    for death in range(1, deaths + 1):
        reached = killer.gate.came
        await killer.gate.reached(max(reached, death))
        await world.crash(app)
        app = await make()
    return app


async def test_a_dead_run_is_told_to_its_workflow_once(world: World) -> None:
    """The workflow's own dead-letter workflow gets the letter, with the input, the error and the number of attempts."""
    killer, letters = Killer(), []

    @workflow("undertaker")
    async def undertaker(ctx: Context, letter: DeadLetter) -> str:
        return await ctx.step("note", note, letter)

    async def note(letter: DeadLetter) -> str:
        letters.append(letter)
        return letter.run_id

    flow = poison(killer, dead_letter_workflow="undertaker")

    async def make() -> Durable:
        return await world.engine(flow, undertaker, max_recovery_attempts=1)

    app = await make()
    run = await app.start(flow, 7)
    await killer.gate.reached(1)
    await world.crash(app)
    app = await make()
    await killer.gate.reached(2)
    await world.crash(app)
    app = await make()
    with pytest.raises(RunDead):
        await app.run(run.id).result(10)
    page = await app.find(RunQuery(workflow="undertaker"))
    assert len(page.runs) == 1
    assert await app.run(page.runs[0].id).result(10) == run.id
    assert [(letter.run_id, letter.workflow, letter.input, letter.recovery_attempts) for letter in letters] == [
        (run.id, "poison", 7, 2)
    ]
    assert letters[0].error.code == "run_dead"
    await world.sound(run.id, page.runs[0].id)


async def test_handlers_are_told_once_and_retried(world: World) -> None:
    """`on_dead` and `@dead_letter` are steps: one that fails is tried again, the others are not disturbed by it."""
    killer, heard = Killer(), []

    async def first(letter: DeadLetter) -> None:
        heard.append(("first", letter.run_id))

    @dead_letter("second", retries=1)
    async def second(letter: DeadLetter) -> None:
        heard.append(("second", letter.run_id))
        if len(heard) < 3:
            raise OSError("not yet")

    flow = poison(killer)

    async def make() -> Durable:
        app = await world.engine(flow, first_step, second, max_recovery_attempts=0)
        return app

    first_step = dead_letter("first")(first)
    app = await make()
    run = await app.start(flow, 7)
    await killer.gate.reached(1)
    await world.crash(app)
    app = await make()
    with pytest.raises(RunDead):
        await app.run(run.id).result(10)
    await eventually(lambda: len(heard) >= 3, "the second has been told again")
    assert sorted(heard) == [("first", run.id), ("second", run.id), ("second", run.id)]
    (told,) = (await app.find(RunQuery(workflow="__dead_letter"))).runs
    await app.run(told.id).result(10)


async def test_S32_requeued_and_dead_again_is_told_again(world: World) -> None:
    """A requeue gives a fresh budget; a second death is a second letter; a mended run completes."""
    killer, heard = Killer(), []

    @dead_letter("hear")
    async def hear(letter: DeadLetter) -> None:
        heard.append(letter.run_id)

    flow = poison(killer)

    async def make() -> Durable:
        return await world.engine(flow, hear, max_recovery_attempts=1)

    app = await make()
    run = await app.start(flow, 7)
    for round in (1, 2):
        for death in (1, 2):
            await killer.gate.reached(2 * (round - 1) + death)
            await world.crash(app)
            app = await make()
        await world.until(run.id, lambda r: r.status is Status.DEAD, "it is dead")
        await eventually(lambda count=round: len(heard) == count, "it is told of")  # type: ignore[misc]
        if round == 2:
            killer.mended = True
        await app.requeue(run.id)
    assert await app.run(run.id).result(10) == 7
    assert heard == [run.id, run.id]
    await world.sound(run.id)


async def test_there_is_no_letter_about_a_letter(world: World) -> None:
    """A dead-letter workflow that is poison itself ends dead, and nothing more is started."""
    killer = Killer()

    @workflow("undertaker")
    async def undertaker(ctx: Context, letter: DeadLetter) -> int:
        answer: int = await ctx.step("kill", killer, 1, returns=int)
        return answer

    flow = poison(killer)

    async def make() -> Durable:
        return await world.engine(flow, undertaker, max_recovery_attempts=0, dead_letter_workflow="undertaker")

    app = await make()
    run = await app.start(flow, 7)
    await killer.gate.reached(1)
    await world.crash(app)
    app = await make()
    await world.until(run.id, lambda r: r.status is Status.DEAD, "it is dead")
    await killer.gate.reached(2)
    await world.crash(app)
    app = await make()
    (letter,) = (await app.find(RunQuery(workflow="undertaker"))).runs
    await world.until(letter.id, lambda r: r.status is Status.DEAD, "the letter's run is dead")
    assert len((await app.find(RunQuery())).runs) == 2


async def test_an_unknown_dead_letter_workflow_is_refused_at_start(world: World) -> None:
    """An engine does not start claiming before it knows where its dead go."""
    with pytest.raises(NotRegistered, match="nowhere"):
        await world.engine(poison(Killer()), dead_letter_workflow="nowhere")
