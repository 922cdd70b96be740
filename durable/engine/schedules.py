"""Schedules: runs that start by the clock. A schedule is an item whose `due_at` is its next occurrence; whichever engine comes
first moves it on and starts its runs in one transaction (`Store.fire`), so an occurrence starts one run however many engines
look, and a crash leaves it either not fired or fired and moved on (S22, B30, B31).

    list due items ─→ plan: which moments count ─→ fire: item moved on + runs ═ one transaction ═→ nudge
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Raw, Struct

from durable.core import cron as recurrence
from durable.core.clock import SECOND
from durable.core.cron import Recurrence
from durable.core.definition import WorkflowDefinition
from durable.core.durations import Duration
from durable.core.errors import DefinitionError, DurableError, NotRegistered, RunError, ScheduleNotFound, StoreError
from durable.core.names import check_name
from durable.core.origin import Origin, meta_of
from durable.engine.executor import Executor
from durable.engine.scheduler import Scheduler
from durable.engine.start import Starter, StartRequest
from durable.protocol.states import Status
from durable.store.items import Fire, Item, ItemKey, ItemQuery, NewItem, Occurrence
from durable.store.records import Lane, Rule

log = logging.getLogger("durable.schedules")

KIND = "schedule"
CRON = "$cron"
"""The event that a workflow with a cron trigger gets; its schedules' ids begin so."""
CATCH_UP = ("last", "skip", "all")
OVERLAP = ("allow", "skip", "cancel", "queue")
ON_TIME = 30 * SECOND
"""An occurrence that is found this late is not a missed one."""
MAX_CATCH_UP = 1_000
LOOKED_AT = 10_000
"""Missed moments that are counted; beyond them "more than"."""
PAGE = 500
LOOK_POLLS = 5
"""Between two looks at what others have changed, in `poll_every`. Whoever changes a schedule here looks at once, and what is
known to come due is waited for; so a look costs a schedule made elsewhere some lateness, and an idle engine a statement."""


class Schedule(Struct, frozen=True, omit_defaults=True):
    """A schedule as it stands; what its item holds. Times µs."""

    id: str
    workflow: str
    when: Recurrence
    input: Raw = Raw(b"null")
    version: str | None = None
    """None: the latest there is at each occurrence."""
    catch_up: str = "last"
    """What becomes of occurrences nobody was there for: `skip` none is made up, `last` the last one is, `all` are, up to
    `catch_up_max`, the latest ones."""
    catch_up_max: int = 100
    overlap: str = "allow"
    """If the run before is unfinished: `allow` both, `skip` this one, `cancel` the one before, `queue` behind it."""
    priority: int | None = None
    tags: tuple[str, ...] = ()
    triggers: bool = False
    """It stands for a workflow's own cron trigger: each run gets the event `$cron`."""
    paused: bool = False
    next_at: int | None = None
    """None: paused, or never again."""
    last_at: int | None = None
    last_run: str | None = None
    fired: int = 0
    skipped: int = 0
    error: str | None = None
    """Why the last occurrence started no run."""


class Plan(Struct, frozen=True):
    """What a look at a due schedule comes to."""

    moments: list[int]
    """Occurrences that start runs, earliest first."""
    skipped: int
    next_at: int | None


def plan(schedule: Schedule, now: int) -> Plan:
    """Which of the moments since its next one count, by its catch-up policy."""
    first = schedule.next_at
    if first is None or first > now:
        return Plan([], 0, first)
    passed: list[int] = []
    for moment in schedule.when.previous(now):
        if moment < first or len(passed) >= LOOKED_AT:
            break
        passed.append(moment)
    if not passed:  # the recurrence has changed meanwhile, or its zone has
        passed = [first]
    if schedule.catch_up == "all":
        chosen = passed[: schedule.catch_up_max]
    elif schedule.catch_up == "last" or now - passed[0] <= ON_TIME:
        chosen = passed[:1]
    else:
        chosen = []
    return Plan(chosen[::-1], len(passed) - len(chosen), schedule.when.next(now))


class Schedules:
    """All schedules of an engine's workspaces: what one does with them, and the loop that fires them."""

    def __init__(
        self,
        executor: Executor,
        starter: Starter,
        scheduler: Scheduler,
        cancel: Callable[..., Awaitable[bool]],
    ) -> None:
        """`cancel`: the engine's."""
        self._executor = executor
        self._starter = starter
        self._scheduler = scheduler
        self._cancel = cancel
        self._store = executor.deps.store
        self._wake = asyncio.Event()
        self._next_due: int | None = None
        self._task: asyncio.Task[None] | None = None
        self._follow = True
        """Cron triggers of workflows may have changed."""
        self._seen: dict[str, dict[str, Schedule]] = {}
        """What they were by workspace, when their schedules were last seen to."""
        executor.deps.catalog.on_change.append(self._changed)
        self._strange: set[tuple[str, str]] = set()
        """Schedules of workflows nobody here knows: said once."""

    def start(self) -> None:
        """Begin firing."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="durable-schedules")

    async def stop(self) -> None:
        """Fire nothing more. What is under way is waited for."""
        task, self._task = self._task, None
        if task is not None:
            self._wake.set()
            await asyncio.wait({task})

    # ------------------------------------------------------------------ what one does with them

    async def ensure(
        self,
        id: str,
        workflow: Any,
        input: Any = None,
        *,
        cron: str | None = None,
        every: Duration | None = None,
        at: Any = None,
        timezone: str = "UTC",
        version: str | None = None,
        catch_up: str = "last",
        catch_up_max: int = 100,
        overlap: str = "allow",
        priority: int | None = None,
        tags: Sequence[str] = (),
        paused: bool | None = None,
        workspace: str | None = None,
    ) -> Schedule:
        """See that there is this schedule. The same again changes nothing; a changed one takes its next occurrence from now
        on. `paused` None: as it is, and a new one is not. One of `cron`, `every` and `at`. Raises DefinitionError, NotRegistered,
        PayloadError."""
        check_name(id, "schedule id")
        request = StartRequest(workflow=workflow, input=input, version=version, workspace=workspace)
        prepared = self._starter.prepare(request)  # says now what would fail at each occurrence
        meant = Schedule(
            id=id,
            workflow=prepared.workflow,
            when=_when(cron, every, at, timezone, self._executor.clock.now()),
            input=Raw(prepared.input),
            version=version,
            catch_up=_one_of(catch_up, CATCH_UP, "catch_up"),
            catch_up_max=_count(catch_up_max),
            overlap=_one_of(overlap, OVERLAP, "overlap"),
            priority=priority,
            tags=tuple(tags),
            paused=bool(paused),
        )
        return await self._see_to(ItemKey(prepared.workspace, KIND, id), meant, as_it_is=paused is None)

    async def _see_to(self, key: ItemKey, meant: Schedule, *, as_it_is: bool) -> Schedule:
        """`as_it_is`: one that is paused stays so."""
        while True:
            item = (await self._store.get_items([key]))[0]
            begun = meant
            if item is not None:
                old = read(item)
                if as_it_is:
                    begun = msgspec.structs.replace(begun, paused=old.paused)
                if _declared(old) == _declared(begun):
                    return old
                # What has become of it is still so: `overlap` asks how its last run stands.
                begun = msgspec.structs.replace(
                    begun, last_at=old.last_at, last_run=old.last_run, fired=old.fired, skipped=old.skipped
                )
            begun = self._begun(begun)
            if await self._write(key, begun, 0 if item is None else item.version):
                return begun

    async def get(self, id: str, *, workspace: str | None = None) -> Schedule:
        """Raises ScheduleNotFound."""
        return read(await self._item(self._key(id, workspace)))

    async def list(self, *, workspace: str | None = None) -> list[Schedule]:
        """All, by id."""
        found: list[Schedule] = []
        after: ItemKey | None = None
        while True:
            query = ItemQuery(KIND, self._meant(workspace), after=after, limit=PAGE)
            items = (await self._store.list_items(query)).items
            found += [schedule for item in items if (schedule := _readable(item)) is not None]
            if len(items) < PAGE:
                return found
            after = ItemKey(items[-1].workspace, KIND, items[-1].id)

    async def update(self, id: str, *, workspace: str | None = None, **changes: Any) -> Schedule:
        """Change some of what `ensure` takes, but for the workflow. Raises ScheduleNotFound, DefinitionError."""
        known = {"input", "cron", "every", "at", "timezone", "version", "catch_up", "catch_up_max", "overlap"}
        known |= {"priority", "tags", "paused"}
        if unknown := sorted(changes.keys() - known):
            raise DefinitionError(f"A schedule has no {unknown[0]!r}. It has {', '.join(sorted(known))}.")
        old = await self.get(id, workspace=workspace)
        given: dict[str, Any] = {
            "cron": old.when.cron,
            "every": None if old.when.every_us is None else old.when.every_us / SECOND,
            "at": old.when.at,
            "timezone": old.when.timezone,
            "version": old.version,
            "catch_up": old.catch_up,
            "catch_up_max": old.catch_up_max,
            "overlap": old.overlap,
            "priority": old.priority,
            "tags": old.tags,
            "paused": old.paused,
            "input": old.input,
        }
        if any(changes.get(name) is not None for name in ("cron", "every", "at")):
            given |= {"cron": None, "every": None, "at": None}
        given |= changes
        return await self.ensure(id, old.workflow, given.pop("input"), workspace=workspace, **given)

    async def pause(self, id: str, *, workspace: str | None = None) -> Schedule:
        """No occurrence comes due until `resume`. Raises ScheduleNotFound."""
        return await self._change(id, workspace, lambda old: msgspec.structs.replace(old, paused=True, next_at=None))

    async def resume(self, id: str, *, workspace: str | None = None) -> Schedule:
        """Go on from now: what would have come due while it was paused is not made up. Raises ScheduleNotFound."""
        return await self._change(
            id, workspace, lambda old: self._begun(msgspec.structs.replace(old, paused=False)) if old.paused else old
        )

    async def remove(self, id: str, *, workspace: str | None = None) -> None:
        """No more of it; its runs stay. Raises ScheduleNotFound."""
        if not await self._store.delete_items([self._key(id, workspace)]):
            raise _unknown(id)

    async def trigger(self, id: str, *, key: str | None = None, workspace: str | None = None) -> str:
        """Start a run of it now, beside its occurrences; the run's id. Raises ScheduleNotFound."""
        schedule = await self.get(id, workspace=workspace)
        request = self._request(schedule, self._meant(workspace), None)
        request.key = key
        run_id, _ = await self._starter.start(request)
        return run_id

    # ------------------------------------------------------------------ cron triggers of workflows

    def _changed(self) -> None:
        self._follow = True
        self._wake.set()

    async def _follow_triggers(self) -> None:
        """See that the cron triggers of the latest versions have their schedules, and that those of others are gone."""
        self._follow = False
        catalog = self._executor.deps.catalog
        try:
            for workspace in catalog.workspaces():
                registry = catalog.of(workspace)
                names = sorted({definition.name for definition in registry.workflows()})
                wanted = {one.id: one for name in names for one in _of_triggers(registry.latest(name))}
                if self._seen.get(workspace) == wanted:
                    continue
                for old in await self.list(workspace=workspace):
                    if old.triggers and old.workflow in names and old.id not in wanted:
                        await self._store.delete_items([self._key(old.id, workspace)])
                for one in wanted.values():
                    await self._see_to(ItemKey(workspace, KIND, one.id), one, as_it_is=True)
                self._seen[workspace] = wanted
        except BaseException:
            self._follow = True
            raise

    # ------------------------------------------------------------------ inside

    def _meant(self, workspace: str | None) -> str:
        return self._executor.settings.workspace if workspace is None else workspace

    def _key(self, id: str, workspace: str | None) -> ItemKey:
        return ItemKey(self._meant(workspace), KIND, id)

    def _begun(self, schedule: Schedule) -> Schedule:
        """With its next occurrence from now on; a moment that has passed comes due at once."""
        if schedule.paused:
            return msgspec.structs.replace(schedule, next_at=None)
        at = schedule.when.at
        return msgspec.structs.replace(
            schedule, next_at=at if at is not None else schedule.when.next(self._executor.clock.now())
        )

    async def _item(self, key: ItemKey) -> Item:
        item = (await self._store.get_items([key]))[0]
        if item is None:
            raise _unknown(key.id)
        return item

    async def _write(self, key: ItemKey, schedule: Schedule, expected: int) -> bool:
        new = NewItem(key.workspace, KIND, key.id, _encode(schedule), due_at=schedule.next_at, expected=expected)
        done = (await self._store.put_items([new]))[0].done
        if done:
            self._wake.set()
        return done

    async def _change(self, id: str, workspace: str | None, change: Any) -> Schedule:
        key = self._key(id, workspace)
        while True:
            item = await self._item(key)
            changed: Schedule = change(read(item))
            if changed == read(item) or await self._write(key, changed, item.version):
                return changed

    # ------------------------------------------------------------------ firing

    async def _run(self) -> None:
        while self._task is not None:
            self._wake.clear()
            try:
                if self._follow:
                    await self._follow_triggers()
                while await self._look():
                    pass
                polls = LOOK_POLLS
            except StoreError as error:
                self._next_due, polls = None, 1
                log.warning("cannot look for schedules, trying again: %s", error)
            except Exception:
                self._next_due, polls = None, 1
                log.exception("firing schedules went wrong, trying again")
            delay = self._executor.settings.poll_every * polls
            if self._next_due is not None:
                delay = min(delay, max(0.001, (self._next_due - self._executor.clock.now()) / SECOND))
            try:
                async with asyncio.timeout(delay):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _look(self) -> bool:
        """Fire what is due. True: look again at once."""
        page = await self._store.list_items(ItemQuery(KIND, due=True, limit=PAGE))
        self._next_due = page.next_due_at
        fires: list[Fire] = []
        for item in page.items:
            fire, cancel = await self._fire(item, page.now)
            if fire is not None:
                fires.append(fire)
            if cancel is not None:
                # First: who comes after a crash knows only of the run that is stored next.
                with suppress(RunError):  # it has ended meanwhile
                    await self._cancel(cancel, "the schedule's next run is due", workspace=item.workspace)
        if not fires:
            return False
        outcomes = await self._store.fire(fires)
        if any(outcome.started for outcome in outcomes):
            self._scheduler.nudge()
        return len(page.items) == PAGE

    async def _fire(self, item: Item, now: int) -> tuple[Fire | None, str | None]:
        """The schedule moved on, and the run before, if that is to be cancelled."""
        schedule = _readable(item)
        if schedule is None:
            return None, None
        try:
            self._executor.deps.catalog.of(item.workspace).latest(schedule.workflow)
        except NotRegistered:
            if (item.workspace, item.id) not in self._strange and now - (item.due_at or now) > ON_TIME:
                self._strange.add((item.workspace, item.id))
                log.warning("schedule %s is due, and nobody here has workflow %s", item.id, schedule.workflow)
            return None, None
        planned = plan(schedule, now)
        moments, skipped = planned.moments, planned.skipped
        unfinished = await self._unfinished(schedule) if moments and schedule.overlap in ("skip", "cancel") else False
        if moments and schedule.overlap in ("skip", "cancel"):
            skipped += len(moments) - 1
            moments = moments[-1:]
        if unfinished and schedule.overlap == "skip":
            skipped += len(moments)
            moments = []
        occurrences: list[Occurrence] = []
        failure: str | None = None
        for moment in moments:
            try:
                run = self._starter.prepare(self._request(schedule, item.workspace, moment))
            except DurableError as error:
                failure = str(error)
                log.error("schedule %s cannot start %s: %s", item.id, schedule.workflow, error)
                skipped += 1
                continue
            occurrences.append(Occurrence(moment, run))
        if skipped:
            log.warning("schedule %s of %s: %d occurrences were skipped", item.id, item.workspace, skipped)
        moved = msgspec.structs.replace(
            schedule,
            next_at=planned.next_at,
            last_at=occurrences[-1].at if occurrences else schedule.last_at,
            last_run=occurrences[-1].run.id if occurrences else schedule.last_run,
            fired=schedule.fired + len(occurrences),
            skipped=schedule.skipped + skipped,
            error=failure,
        )
        new = NewItem(item.workspace, KIND, item.id, _encode(moved), due_at=moved.next_at, expected=item.version)
        return Fire(new, tuple(occurrences)), schedule.last_run if unfinished and occurrences else None

    async def _unfinished(self, schedule: Schedule) -> bool:
        if schedule.last_run is None:
            return False
        record = (await self._store.get([schedule.last_run]))[0]
        return record is not None and record.status is Status.ACTIVE

    def _request(self, schedule: Schedule, workspace: str, moment: int | None) -> StartRequest:
        origin = Origin(trigger_kind="manual" if moment is None else "cron", schedule_id=schedule.id, occurrence=moment)
        lane = None
        if schedule.overlap == "queue":
            key = f"schedule:{workspace}/{schedule.id}"
            lane = Lane(key, (Rule(key, 1),))
        given = schedule.input
        if schedule.triggers:
            at = self._executor.clock.now() if moment is None else moment
            data = _encode({"schedule": schedule.id, "at": datetime.fromtimestamp(at / SECOND, UTC).isoformat()})
            definition = self._executor.deps.catalog.of(workspace).latest(schedule.workflow)
            given = Raw(definition.input_from(f"{schedule.id}@{at // 1_000}", CRON, at, data))
        return StartRequest(
            workflow=schedule.workflow,
            input=given,
            version=schedule.version,
            priority=schedule.priority,
            tags=schedule.tags,
            workspace=workspace,
            meta=meta_of(origin),
            lane=lane,
        )


def read(item: Item) -> Schedule:
    """The schedule an item holds. Raises msgspec.DecodeError."""
    return _decode(item.data)


def _readable(item: Item) -> Schedule | None:
    try:
        return read(item)
    except msgspec.DecodeError as error:
        log.error("schedule %s of %s cannot be read: %s", item.id, item.workspace, error)
        return None


_decode = msgspec.json.Decoder(Schedule).decode
_encode = msgspec.json.Encoder().encode


def _of_triggers(definition: WorkflowDefinition) -> list[Schedule]:
    """The schedules that a workflow's cron triggers ask for."""
    lines = [trigger for trigger in definition.triggers if trigger.cron is not None]
    return [
        Schedule(
            id=f"{CRON}:{definition.name}" + (f":{number}" if number else ""),
            workflow=definition.name,
            when=recurrence.cron(trigger.cron or "", trigger.timezone),
            catch_up=trigger.catch_up,
            triggers=True,
        )
        for number, trigger in enumerate(lines)
    ]


def _declared(schedule: Schedule) -> Schedule:
    """What its author has said of it, without what has become of it."""
    when = schedule.when
    if when.every_us is not None:
        when = msgspec.structs.replace(when, anchor=0)
    return msgspec.structs.replace(
        schedule,
        when=when,
        input=Raw(bytes(schedule.input)),
        next_at=None,
        last_at=None,
        last_run=None,
        fired=0,
        skipped=0,
        error=None,
    )


def _when(cron: str | None, every: Duration | None, at: Any, timezone: str, now: int) -> Recurrence:
    if sum(given is not None for given in (cron, every, at)) != 1:
        raise DefinitionError("Give a schedule one of `cron`, `every` and `at`.")
    if cron is not None:
        return recurrence.cron(cron, timezone)
    if every is not None:
        found = recurrence.interval(every, 0)
        return msgspec.structs.replace(found, anchor=now + (found.every_us or 0))
    return recurrence.once(at)


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise DefinitionError(f"{what} is one of {', '.join(known)}, not {value!r}.")
    return value


def _count(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CATCH_UP:
        raise DefinitionError(f"catch_up_max is a number from 1 to {MAX_CATCH_UP}, not {value!r}.")
    return value


def _unknown(id: str) -> ScheduleNotFound:
    return ScheduleNotFound(f"There is no schedule {id!r} here. Is it another workspace's?")
