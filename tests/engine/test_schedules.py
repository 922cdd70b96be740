"""Runs that start by the clock: what comes due, over engines, crashes, gaps and unfinished runs before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from durable import Durable, workflow
from durable.core.clock import SECOND
from durable.core.cron import Recurrence, cron
from durable.core.ctx import Context
from durable.core.errors import DefinitionError, PayloadError, ScheduleNotFound, UnknownWorkflow
from durable.core.event import Event
from durable.core.origin import origin_of
from durable.engine.schedules import Schedule, plan
from durable.protocol.states import Status
from durable.store.items import ItemQuery
from durable.store.memory import MemoryStore
from durable.store.records import RunQuery

SECONDLY = "* * * * * *"
HOUR = 3_600 * SECOND


@workflow
async def tick(ctx: Context, n: int = 0) -> int:
    return n


@workflow
async def long(ctx: Context) -> None:
    await ctx.wait_for_signal("go on")


@asynccontextmanager
async def apps(store: MemoryStore, count: int = 1, *workflows: Any, **settings: Any) -> AsyncIterator[list[Durable]]:
    made = [Durable(store, workflows=workflows or [tick, long], poll_every=0.05, **settings) for _ in range(count)]
    for app in made:
        await app.open()
    try:
        yield made
    finally:
        for app in made:
            await app.close(0.1)


async def runs(app: Durable, workflow: str = "tick") -> list[Any]:
    return (await app.find(RunQuery(workflow=workflow, limit=200))).runs


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * SECOND


# -- what counts, as a function


def schedule(**changes: Any) -> Schedule:
    given: dict[str, Any] = {"when": cron("0 * * * *"), "next_at": at("2026-01-01T01:00:00Z")}
    return Schedule(id="s", workflow="tick", **given | changes)


@pytest.mark.parametrize(
    ("policy", "now", "moments", "skipped"),
    [
        ("last", "2026-01-01T00:30:00Z", [], 0),
        ("last", "2026-01-01T01:00:00Z", ["2026-01-01T01:00:00Z"], 0),
        ("skip", "2026-01-01T01:00:20Z", ["2026-01-01T01:00:00Z"], 0),
        ("skip", "2026-01-01T04:10:00Z", [], 4),
        ("skip", "2026-01-01T04:00:05Z", ["2026-01-01T04:00:00Z"], 3),
        ("last", "2026-01-01T04:10:00Z", ["2026-01-01T04:00:00Z"], 3),
        ("all", "2026-01-01T03:10:00Z", ["2026-01-01T01:00:00Z", "2026-01-01T02:00:00Z", "2026-01-01T03:00:00Z"], 0),
    ],
)
def test_B31_what_was_missed_follows_the_policy(policy: str, now: str, moments: list[str], skipped: int) -> None:
    """After a gap exactly what the catch-up policy says is started, and the rest is counted as skipped (B31, S22)."""
    planned = plan(schedule(catch_up=policy), at(now))
    assert planned.moments == [at(moment) for moment in moments]
    assert planned.skipped == skipped
    assert planned.next_at is not None
    assert planned.next_at > at(now)


def test_all_is_bounded() -> None:
    """`all` makes up the latest ones, as many as it may, and counts the others."""
    planned = plan(schedule(catch_up="all", catch_up_max=3), at("2026-01-02T00:30:00Z"))
    assert [moment // HOUR % 24 for moment in planned.moments] == [22, 23, 0]
    assert planned.skipped == 21


def test_a_year_of_missed_seconds_takes_no_time() -> None:
    """A schedule by the second that nobody looked at for a year is planned without walking through the year."""
    missed = schedule(when=cron(SECONDLY), catch_up="last", next_at=at("2025-01-01T00:00:00Z"))
    planned = plan(missed, at("2026-01-01T00:00:00Z"))
    assert planned.moments == [at("2026-01-01T00:00:00Z")]
    assert planned.skipped > 1_000


def test_a_recurrence_that_ends_has_no_next() -> None:
    """A single moment comes due once and leaves nothing behind."""
    planned = plan(schedule(when=Recurrence(at=at("2026-01-01T01:00:00Z"))), at("2026-01-01T05:00:00Z"))
    assert planned.moments == [at("2026-01-01T01:00:00Z")]
    assert planned.next_at is None


# -- on engines


async def test_S22_an_occurrence_starts_one_run_over_many_engines() -> None:
    """Four engines look at one schedule, and no occurrence starts two runs (S22, B30)."""
    store = MemoryStore()
    async with apps(store, 4) as made:
        await made[0].schedules.ensure("beat", "tick", 7, cron=SECONDLY)

        async def three() -> bool:
            return len(await runs(made[1])) >= 3

        for _ in range(400):
            if await three():
                break
            await asyncio.sleep(0.02)
        found = await runs(made[1])
        assert len(found) >= 3
        occurrences = [origin_of(run.meta).occurrence for run in found]
        assert len(set(occurrences)) == len(occurrences)
        assert all(occurrence is not None and occurrence % SECOND == 0 for occurrence in occurrences)
        assert {origin_of(run.meta).schedule_id for run in found} == {"beat"}
        assert {await made[0].run(run.id).result(10) for run in found} == {7}


async def test_ensure_is_idempotent() -> None:
    """The same schedule again changes nothing; another one in its place takes its next occurrence from now on."""
    store = MemoryStore()
    async with apps(store) as (app,):
        first = await app.schedules.ensure("nightly", "tick", 1, cron="0 3 * * *", timezone="Europe/Berlin")
        again = await app.schedules.ensure("nightly", tick, 1, cron="0 3 * * *", timezone="Europe/Berlin")
        assert again == first
        changed = await app.schedules.ensure("nightly", "tick", 1, cron="0 4 * * *", timezone="Europe/Berlin")
        assert changed.next_at != first.next_at
        assert [one.id for one in await app.schedules.list()] == ["nightly"]
        hourly = await app.schedules.ensure("hourly", "tick", every="1h")
        assert await app.schedules.ensure("hourly", "tick", every="1h") == hourly


async def test_pause_resume_update_remove_and_trigger() -> None:
    """A paused schedule has no next occurrence and a resumed one has; it can be changed, triggered by hand and removed."""
    async with apps(MemoryStore()) as (app,):
        made = app.schedules
        begun = await made.ensure("s", "tick", 3, cron="0 0 1 1 *")
        assert (await made.pause("s")).next_at is None
        assert (await made.pause("s")).paused
        assert (await made.resume("s")).next_at == begun.next_at
        assert (await made.update("s", cron="0 0 2 1 *")).next_at == (begun.next_at or 0) + 24 * HOUR
        assert (await made.update("s", input=4)).when == cron("0 0 2 1 *")
        run = await made.trigger("s")
        assert await app.run(run).result(10) == 4
        assert origin_of((await app.get(run)).meta).trigger_kind == "manual"
        await made.remove("s")
        for ask in (made.get, made.pause, made.resume, made.remove, made.trigger):
            with pytest.raises(ScheduleNotFound):
                await ask("s")


async def test_what_makes_no_sense_is_refused() -> None:
    """A schedule that could never start a run is refused when it is made, and nothing is stored."""
    async with apps(MemoryStore()) as (app,):
        made = app.schedules
        with pytest.raises(DefinitionError, match="one of"):
            await made.ensure("s", "tick")
        with pytest.raises(DefinitionError, match="one of"):
            await made.ensure("s", "tick", cron="0 0 * * *", every="1h")
        with pytest.raises(DefinitionError, match="no cron line"):
            await made.ensure("s", "tick", cron="0 0 30 2 *")
        with pytest.raises(UnknownWorkflow):
            await made.ensure("s", "tack", every="1h")
        with pytest.raises(PayloadError):
            await made.ensure("s", "tick", "no number", every="1h")
        with pytest.raises(DefinitionError, match="catch_up is one of"):
            await made.ensure("s", "tick", every="1h", catch_up="some")
        with pytest.raises(DefinitionError, match="overlap is one of"):
            await made.ensure("s", "tick", every="1h", overlap="maybe")
        with pytest.raises(DefinitionError):
            await made.ensure("s\x00", "tick", every="1h")
        assert await made.list() == []


async def test_overlap_skip_starts_none_while_one_is_unfinished() -> None:
    """With `skip` there is one run until it ends, and what came due meanwhile is counted."""
    async with apps(MemoryStore()) as (app,):
        await app.schedules.ensure("s", "long", cron=SECONDLY, overlap="skip")
        await seen(lambda: runs(app, "long"), lambda found: len(found) == 1)
        await seen(lambda: app.schedules.get("s"), lambda one: one.skipped >= 1)
        assert len(await runs(app, "long")) == 1


async def test_overlap_cancel_asks_the_one_before_to_stop() -> None:
    """With `cancel` the run before ends as cancelled when the next starts."""
    async with apps(MemoryStore()) as (app,):
        await app.schedules.ensure("s", "long", cron=SECONDLY, overlap="cancel")
        await seen(lambda: runs(app, "long"), lambda found: any(run.status is Status.CANCELLED for run in found))
        await app.schedules.pause("s")


async def test_overlap_queue_runs_one_at_a_time() -> None:
    """With `queue` every occurrence has its run, and only one of them begins before the one before has ended."""
    async with apps(MemoryStore()) as (app,):
        await app.schedules.ensure("s", "long", cron=SECONDLY, overlap="queue")
        found = await seen(lambda: runs(app, "long"), lambda found: len(found) >= 2)
        await app.schedules.pause("s")
        # Waiting for a signal frees the slot, so they follow each other; none is lost.
        for run in found:
            await app.run(run.id).signal("go on")
            await app.run(run.id).result(10)


async def test_a_schedule_of_a_workflow_nobody_has_waits() -> None:
    """An engine without the workflow leaves the schedule alone; one that has it fires it."""
    store = MemoryStore()
    async with apps(store) as (app,):
        await app.schedules.ensure("s", "tick", at=datetime.now(UTC) + timedelta(seconds=0.2))
    async with apps(store, 1, long) as (other,):
        await asyncio.sleep(0.5)
        assert await runs(other) == []
        async with apps(store) as (app,):
            await seen(lambda: runs(app), lambda found: len(found) == 1)
            assert (await app.schedules.get("s")).next_at is None


async def test_workspaces_have_their_own() -> None:
    """The same schedule id in two workspaces is two schedules, and neither sees the other's."""
    async with apps(MemoryStore()) as (app,):
        from durable.core.registry import Registry

        app.engine.deps.catalog.put("shop.dev", Registry([tick]))
        await app.schedules.ensure("s", "tick", 1, every="1h")
        await app.schedules.ensure("s", "tick", 2, every="1h", workspace="shop.dev")
        run = await app.schedules.trigger("s", workspace="shop.dev")
        assert await app.engine.result(run, 10, workspace="shop.dev") == 2
        await app.schedules.remove("s")
        assert [one.id for one in await app.schedules.list(workspace="shop.dev")] == ["s"]


async def test_a_workflow_with_a_cron_trigger_has_its_schedule() -> None:
    """A workflow that names a cron is started by it with the event `$cron`; without it, the schedule is gone (E4)."""
    heard: list[Event[Any]] = []

    @workflow("beats", cron=SECONDLY)
    async def beats(ctx: Context, event: Event) -> str:  # type: ignore[type-arg]
        heard.append(event)
        return str(event.data["at"])

    store = MemoryStore()
    async with apps(store, 2, beats) as made:
        found = await seen(lambda: runs(made[0], "beats"), lambda found: len(found) >= 2)
        assert {event.name for event in heard} == {"$cron"}
        occurrence = origin_of(found[0].meta).occurrence
        assert datetime.fromisoformat(await made[0].run(found[0].id).result(10)).timestamp() * SECOND == occurrence
        assert [one.id for one in await made[0].schedules.list()] == ["$cron:beats"]

    @workflow("beats", "2")
    async def silent(ctx: Context) -> None: ...

    async with apps(store, 1, beats, silent) as (app,):
        await seen(app.schedules.list, lambda found: found == [])


async def test_a_moment_or_a_delay_starts_one_run() -> None:
    """`schedule` starts a run once, at a moment or after a delay, and answers with its handle."""
    async with apps(MemoryStore()) as (app,):
        late = await app.schedule(tick, 1, at=datetime.now(UTC) + timedelta(hours=1))
        soon = await app.schedule(tick, 2, delay=0.05)
        assert (await late.get()).activity == "scheduled"
        assert await soon.result(10) == 2
        with pytest.raises(DefinitionError, match="not both"):
            await app.schedule(tick, 2)


async def seen(look: Any, fact: Any) -> Any:
    """What `look` gives once `fact` holds of it."""
    last: list[Any] = [None]

    async def watch() -> None:
        while True:
            last[0] = await look()
            if fact(last[0]):
                return
            await asyncio.sleep(0.02)

    await asyncio.wait_for(watch(), 15)
    return last[0]


async def test_a_schedule_that_cannot_be_read_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Garbage in one schedule's item is logged, and the others fire."""
    from durable.store.items import NewItem

    store = MemoryStore()
    async with apps(store) as (app,):
        await store.put_items([NewItem("default", "schedule", "a", b"garbage", due_at=1)])
        await app.schedules.ensure("b", "tick", at=datetime.now(UTC) + timedelta(seconds=0.1))
        await seen(lambda: runs(app), lambda found: len(found) == 1)
        assert "cannot be read" in caplog.text
        assert (await store.list_items(ItemQuery("schedule", due=True))).items


async def test_B37_queues_of_two_workspaces_are_two() -> None:
    """Schedules of one id in two workspaces, both with `overlap="queue"`, do not wait for each other (B37)."""
    from durable.core.registry import Registry

    here, go_on = asyncio.Semaphore(0), asyncio.Event()

    @workflow
    async def busy(ctx: Context) -> None:
        async def body() -> None:
            here.release()
            await go_on.wait()

        await ctx.step("body", body)

    async with apps(MemoryStore(), 1, busy) as (app,):
        app.engine.deps.catalog.put("shop.dev", Registry([busy]))
        for workspace in ("default", "shop.dev"):
            await app.schedules.ensure("s", "busy", every="1h", overlap="queue", workspace=workspace)
            await app.schedules.trigger("s", workspace=workspace)
        try:
            async with asyncio.timeout(10):
                await here.acquire()
                await here.acquire()
        finally:
            go_on.set()


async def test_a_changed_schedule_knows_its_last_run() -> None:
    """What has become of a schedule outlives a change of it, so that `overlap` holds over the change."""
    async with apps(MemoryStore()) as (app,):
        await app.schedules.ensure("s", "long", cron=SECONDLY, overlap="skip")
        await seen(lambda: app.schedules.get("s"), lambda one: one.fired == 1)
        await app.schedules.ensure("s", "long", cron=SECONDLY, overlap="skip", tags=["changed"])
        await seen(lambda: app.schedules.get("s"), lambda one: one.skipped >= 2)
        assert (await app.schedules.get("s")).fired == 1
        assert len(await runs(app, "long")) == 1


async def test_a_paused_schedule_stays_so_over_a_restart() -> None:
    """Who declares a schedule again, as applications do when they begin, or a workflow's own cron, does not undo a pause; who
    says `paused=False` does."""

    @workflow("beats", cron="0 0 1 1 *")
    async def beats(ctx: Context, event: Event) -> None: ...  # type: ignore[type-arg]

    store = MemoryStore()
    async with apps(store, 1, beats, tick) as (app,):
        await seen(app.schedules.list, lambda found: len(found) == 1)
        await app.schedules.ensure("s", "tick", cron=SECONDLY, paused=True)
        await app.schedules.pause("$cron:beats")
    async with apps(store, 1, beats, tick) as (app,):
        await app.schedules.ensure("s", "tick", cron=SECONDLY)
        await app.schedules.ensure("t", "tick", cron=SECONDLY)
        await seen(lambda: app.schedules.get("t"), lambda one: one.fired >= 1)  # the triggers have been seen to before
        assert (await app.schedules.get("s")).paused
        assert (await app.schedules.get("$cron:beats")).paused
        assert not (await app.schedules.ensure("s", "tick", cron=SECONDLY, paused=False)).paused


class Watched(MemoryStore):
    """Looks, when a schedule moves on, at how its runs before stand."""

    alone: bool = True

    async def fire(self, fires: Any) -> Any:
        started = {occurrence.run.id for fire in fires for occurrence in fire.occurrences}
        if started:
            before = (await self.find(RunQuery(workflow="long", statuses=(Status.ACTIVE,)))).runs
            for run in before:
                self.alone = self.alone and run.inbox_last > 0
        return await super().fire(fires)


async def test_S22_the_run_before_is_asked_to_stop_before_the_next_is_there() -> None:
    """With `overlap="cancel"` an engine that dies between the two leaves no run that nobody asks to stop (S22)."""
    store = Watched()
    async with apps(store) as (app,):
        await app.schedules.ensure("s", "long", cron=SECONDLY, overlap="cancel")
        await seen(lambda: app.schedules.get("s"), lambda one: one.fired >= 2)
        assert store.alone


class Counted(MemoryStore):
    """How often it is asked."""

    looks = claims = 0

    async def list_items(self, query: ItemQuery) -> Any:
        self.looks += query.due
        return await super().list_items(query)

    async def claim(self, request: Any) -> Any:
        self.claims += 1
        return await super().claim(request)


async def test_an_engine_without_schedules_seldom_asks_for_them() -> None:
    """An idle engine looks for due schedules far less often than for due runs; one that is made here fires at its time all the
    same."""
    store = Counted()
    async with apps(store) as (app,):
        await seen(lambda: asyncio.sleep(0, store.claims), lambda claims: claims >= 25)
        assert store.looks <= store.claims // 2
        await app.schedules.ensure("s", "tick", at=datetime.now(UTC) + timedelta(seconds=0.1))
        await seen(lambda: runs(app), lambda found: len(found) == 1)
