"""Waits for events and events of a run's own, in the machine alone: what is asked, what each event settles, and that a replay
says the same."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from durable import Context, WaitTimeout, workflow
from durable.core.commands import Abandon, Completed, Failed, SendEvent, Settled, WaitEvent
from durable.core.errors import DefinitionError, NonDeterminism, PayloadError
from durable.core.event import fact_of
from durable.core.journal import EVENT, RUN, WAIT
from durable.core.payload import encode
from tests.core.driver import START, Driver, told


def come(driver: Driver, name: str, data: Any, *, at: int | None = None, id: str | None = None) -> list[Any]:
    """An event comes."""
    number = len(driver.journal)
    event_id = id or f"e{number}"
    when = driver.machine.now if at is None else at
    fact = fact_of(event_id, name, when, number, encode(data, what="data"))
    return driver.deliver(EVENT, "received", key=f"event:{event_id}", name=name, payload=fact)


def output(driver: Driver) -> Any:
    outcome = driver.machine.outcome
    assert isinstance(outcome, Completed), outcome
    return outcome.output


def open_all(driver: Driver, issued: list[Any]) -> None:
    """Journal what an engine writes of waits."""
    for item in issued:
        if isinstance(item, WaitEvent):
            driver.append(WAIT, "opened", **strip(driver.of(item)))


def strip(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "kind"}


@workflow(name="one")
async def one(ctx: Context) -> Any:
    event = await ctx.wait_for_event("tick", match={"n": 1}, timeout=10)
    return [event.id, event.name, event.data, event.ts]


def test_a_wait_asks_and_an_event_settles_it() -> None:
    """The command says name, condition and deadline; what does not match passes; the settled wait is told of once."""
    driver = Driver(one)
    [command] = driver.begin()
    assert isinstance(command, WaitEvent)
    assert (command.key, command.name, command.since) == ("event:tick", "tick", None)
    assert command.condition == b'{"match":{"n":1}}'
    assert command.deadline == START + 10_000_000
    open_all(driver, [command])
    assert come(driver, "tick", {"n": 2}) == []
    assert come(driver, "tock", {"n": 1}) == []
    assert driver.machine.events_waited() == [command]
    [settled] = come(driver, "tick", {"n": 1}, id="mine")
    assert settled == Settled(command)
    assert output(driver) == b'["mine","tick",{"n":1},%d]' % (START // 1_000)
    assert driver.machine.next_timer() is None
    machine, news = driver.replayed()
    assert news == []
    assert machine.outcome == driver.machine.outcome


def test_the_timeout_settles_it_too() -> None:
    """WaitTimeout that says what did not come; the wait is told of as settled, and a replay says the same."""
    driver = Driver(one)
    issued = driver.begin()
    open_all(driver, issued)
    assert driver.fire() == [Settled(issued[0])]
    outcome = driver.machine.outcome
    assert isinstance(outcome, Failed)
    assert b"No event 'tick'" in outcome.error
    machine, news = driver.replayed()
    assert (news, machine.outcome) == ([], outcome)


def test_an_event_after_the_deadline_is_not_for_the_wait() -> None:
    """By when it was accepted, though the timer has not been delivered yet (S19)."""
    driver = Driver(one)
    open_all(driver, driver.begin())
    assert come(driver, "tick", {"n": 1}, at=START + 10_000_001) == []
    assert come(driver, "tick", {"n": 1}, at=START + 10_000_000) != []


def test_what_no_wait_takes_is_kept_for_those_to_come() -> None:
    """An event that came while nothing asked for it: the next wait that does takes it at once, the oldest first, and asks
    nothing of the engine; `early=False` passes it over."""

    @workflow(name="kept")
    async def kept(ctx: Context) -> Any:
        await ctx.wait_for_signal("go")
        found = [(await ctx.wait_for_event("tick", where="event.data >= 2")).data for _ in range(2)]
        fresh = await ctx.wait_for_event("tick", early=False)
        return [*found, fresh.data]

    driver = Driver(kept)
    driver.begin()
    for number in (1, 2, 3, 4):
        assert come(driver, "tick", number, at=START - 10 + number) == []
    [command] = driver.signal("go")
    assert isinstance(command, WaitEvent)
    assert command.key == "event:tick:2"
    assert command.since == driver.machine.now
    open_all(driver, [command])
    come(driver, "tick", 9)
    assert output(driver) == b"[2,3,9]"
    assert driver.replayed()[0].outcome == driver.machine.outcome


def test_one_event_settles_every_open_wait_that_asks_for_it() -> None:
    """All of them in one turn, in the order of asking; each once."""

    @workflow(name="all")
    async def all_of_them(ctx: Context) -> Any:
        waits = [ctx.wait_for_event("tick") for _ in range(3)]
        return [event.data for event in await asyncio.gather(*waits)]

    driver = Driver(all_of_them)
    issued = driver.begin()
    open_all(driver, issued)
    assert come(driver, "tick", 5) == [Settled(command) for command in issued]
    assert output(driver) == b"[5,5,5]"


def test_B15_a_wait_that_is_cancelled_is_abandoned() -> None:
    """The loser of a race: one note, no timer, and what comes then is not its business."""

    @workflow(name="race")
    async def race(ctx: Context) -> Any:
        await ctx.gather(ctx.wait_for_event("tick", timeout=5), ctx.step("s", lambda: 1), mode="first")
        return (await ctx.wait_for_event("tick")).data

    driver = Driver(race)
    issued = driver.begin()
    open_all(driver, issued)
    abandon, again = driver.answer("s", 1)
    assert isinstance(abandon, Abandon)
    assert abandon.command is issued[0]
    assert driver.machine.next_timer() is None
    driver.append(WAIT, "cancelled", **strip(driver.of(abandon.command)))
    open_all(driver, [again])
    come(driver, "tick", 7)
    assert output(driver) == b"7"
    assert driver.replayed()[0].outcome == driver.machine.outcome


def test_a_replay_knows_which_waits_are_open() -> None:
    """One that the journal shows is not asked again; one that it does not show is news."""

    @workflow(name="two")
    async def two(ctx: Context) -> Any:
        return await asyncio.gather(ctx.wait_for_event("a"), ctx.wait_for_event("b"))

    driver = Driver(two)
    a, b = driver.begin()
    open_all(driver, [a])
    machine, news = driver.replayed()
    assert [told(item) for item in news] == [told(b)]
    assert [entry.status for entry in machine.trace("event:a")] == ["opened"]
    assert [command.key for command in machine.events_waited()] == ["event:a", "event:b"]


def test_a_changed_condition_is_seen_before_anything_comes_of_it() -> None:
    """The journal says what the wait asked for; code that asks for something else is stopped at that entry."""
    driver = Driver(one)
    open_all(driver, driver.begin())

    @workflow(name="one")
    async def other(ctx: Context) -> Any:
        return await ctx.wait_for_event("tick", match={"n": 2}, timeout=10)

    changed = Driver(other)
    changed.journal = driver.journal
    with pytest.raises(NonDeterminism, match="wait 'event:tick'"):
        changed.replayed()


def test_a_requeue_keeps_what_has_come() -> None:
    """Cut before the wait: the event that came behind the cut is still there, and the new wait takes it."""

    @workflow(name="cut")
    async def cut(ctx: Context) -> Any:
        await ctx.step("s", lambda: 1)
        return (await ctx.wait_for_event("tick")).data

    driver = Driver(cut)
    driver.begin()
    come(driver, "tick", "kept")
    step = strip(driver.of(driver.machine.outstanding["s"]))
    seq = driver.append("step", "failed", payload=b'{"message":"x"}', attempt=1, **step).seq
    come(driver, "tick", "later")
    driver.append(RUN, "failed")
    driver.append(RUN, "requeued", payload=b'{"from":%d}' % seq)
    driver.machine.drop()
    driver.machine, news = driver.replayed()
    assert [item.key for item in news] == ["s"]
    assert driver.machine.events_had == {"event:e1", "event:e3"}
    driver.answer("s", 1)
    assert output(driver) == b'"kept"'


def test_events_behind_the_end_are_let_be() -> None:
    """What came as the run ended does not disagree with the code."""
    driver = Driver(one)
    open_all(driver, driver.begin())
    come(driver, "tick", {"n": 1})
    come(driver, "tick", {"n": 1})
    assert driver.replayed()[0].outcome == driver.machine.outcome


def test_D3_an_event_is_asked_for_once_and_answered_with_its_id() -> None:
    """Its id is the run's and the ordinal's, so that doing it again is the same event."""

    @workflow(name="sends")
    async def sends(ctx: Context) -> list[str]:
        first = await ctx.send_event("a", {"n": 1})
        return [first, await ctx.emit("a", None, id="mine")]

    driver = Driver(sends, run_id="r")
    [first] = driver.begin()
    assert isinstance(first, SendEvent)
    assert (first.event_id, first.dedupe_id, first.data, first.key) == ("r.event.0", None, b'{"n":1}', "emit:a")
    [second] = driver.answer("emit:a", "r.event.0")
    assert (second.event_id, second.dedupe_id, second.key) == ("r.event.1", "mine", "emit:a:1")
    driver.answer("emit:a:1", "another")
    assert output(driver) == b'["r.event.0","another"]'
    assert driver.replayed()[0].outcome == driver.machine.outcome


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda ctx: ctx.wait_for_event(""), DefinitionError),
        (lambda ctx: ctx.wait_for_event("*"), DefinitionError),
        (lambda ctx: ctx.wait_for_event("a", match={"a": 1}, where="true"), DefinitionError),
        (lambda ctx: ctx.wait_for_event("a", where="event.data ="), DefinitionError),
        (lambda ctx: ctx.wait_for_event("a", timeout=-1), DefinitionError),
        (lambda ctx: ctx.wait_for_event("a", early="yesterday"), DefinitionError),
        (lambda ctx: ctx.wait_for_event("a", match={"a": object()}), PayloadError),
        (lambda ctx: ctx.send_event("a\n"), DefinitionError),
        (lambda ctx: ctx.send_event("a", object()), PayloadError),
        (lambda ctx: ctx.send_event("a", id=""), DefinitionError),
    ],
)
def test_a_wrong_call_is_refused_where_it_stands(call: Any, error: type[Exception]) -> None:
    """At the call, with a typed error, and no ordinal is used up."""

    @workflow(name="wrong")
    async def wrong(ctx: Context) -> str:
        with pytest.raises(error):
            call(ctx)
        return await ctx.send_event("fine")

    driver = Driver(wrong, run_id="r")
    [command] = driver.begin()
    assert command.event_id == "r.event.0"


def test_data_that_does_not_fit_its_type_is_an_error_at_the_wait() -> None:
    """The wait raises PayloadError that names the event; the run may catch it."""

    @workflow(name="typed")
    async def typed(ctx: Context) -> Any:
        try:
            await ctx.wait_for_event("tick", type=int)
        except PayloadError as error:
            return str(error)

    driver = Driver(typed)
    open_all(driver, driver.begin())
    come(driver, "tick", "text")
    assert b"event:tick" in output(driver)


def test_a_timeout_of_nothing_still_looks() -> None:
    """`timeout=0`: a timer there is, so that what was accepted before is looked at first."""

    @workflow(name="now")
    async def now(ctx: Context) -> Any:
        try:
            return (await ctx.wait_for_event("tick", timeout=0)).data
        except WaitTimeout:
            return "nothing"

    driver = Driver(now)
    open_all(driver, driver.begin())
    assert driver.machine.next_timer() is not None
    come(driver, "tick", "there", at=START - 5)
    assert output(driver) == b'"there"'
