"""The pool: who gets a task when members fail, hang and lie, and how a sick one comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from itertools import pairwise

import msgspec
import pytest

from durable.core.errors import AllTransportsFailed, DefinitionError, NonRetryable, TransportError, UnknownTransport
from durable.core.payload import describe
from durable.protocol.messages import Heartbeat, RemoteTask, StepResult
from durable.testing.suites.transport import ECHO, Results, answer, task
from durable.transports.event_emitter import EventEmitterTransport
from durable.transports.pool import TransportPool
from tests.transports.scripted import Scripted
from tests.transports.virtual_time import in_virtual_time


def virtually(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The test runs in virtual time."""

    @wraps(test)
    def run(*args: object) -> None:
        in_virtual_time(lambda: test(*args))

    return run


async def pool_of(**members: Scripted) -> TransportPool:
    pool = TransportPool(members)
    await pool.start()
    return pool


def pinned(run_id: str, transport: str | None) -> RemoteTask:
    return msgspec.structs.replace(task(run_id), transport=transport)


# -- who gets a task


async def test_N8_the_first_that_accepts_wins_and_is_stamped() -> None:
    """A task goes to the first member alone, bears its id, and the pool says which it was."""
    a, b = Scripted(), Scripted()
    pool = await pool_of(a=a, b=b)
    assert await pool.send(task("r")) == "a"
    assert [sent.transport for sent in a.asked] == ["a"]
    assert b.asked == []


async def test_N8_a_dispatch_error_goes_to_the_next_with_the_same_task() -> None:
    """The next member gets the same task under its own stamp; what a driver raises counts, whatever its class."""
    a, b, c = Scripted("fails"), Scripted("fails"), Scripted()
    b.error = ConnectionResetError("by peer")
    pool = await pool_of(a=a, b=b, c=c)
    sent = task("r", input={"n": 1})
    assert await pool.send(sent) == "c"
    assert c.tasks == [msgspec.structs.replace(sent, transport="c")]
    assert [len(a.asked), len(b.asked)] == [1, 1]


async def test_N8_all_failing_raises_with_every_cause() -> None:
    """The error names each member and its reason, in the order they were tried, and has them as causes."""
    a, b = Scripted("fails"), Scripted("fails")
    b.error = OSError("no route")
    pool = await pool_of(a=a, b=b)
    with pytest.raises(AllTransportsFailed, match=r"task r:0\. a: the line is dead; b: no route") as raised:
        await pool.dispatch(task("r"))
    assert raised.value.causes == {"a": a.error, "b": b.error}
    assert isinstance(raised.value.__cause__, ExceptionGroup)
    assert raised.value.__cause__.exceptions == (a.error, b.error)
    assert isinstance(raised.value, TransportError)
    assert describe(raised.value).retryable


async def test_N8_a_pinned_id_is_tried_first_then_the_rest_in_order() -> None:
    """A pin is a preference: it goes before the order of the pool, and does not lose a task when it fails."""
    a, b, c = Scripted(), Scripted(), Scripted()
    pool = await pool_of(a=a, b=b, c=c)
    assert await pool.send(pinned("r1", "c")) == "c"
    c.mood = "fails"
    assert await pool.send(pinned("r2", "c")) == "a"
    assert [sent.transport for sent in a.asked] == ["a"]


async def test_N8_a_pin_to_a_member_there_is_not_is_an_error_that_says_so() -> None:
    """Nothing is sent, the ids there are are named, and trying again is no use."""
    a, b = Scripted(), Scripted()
    pool = await pool_of(a=a, b=b)
    with pytest.raises(UnknownTransport, match="no transport 'kafka' here: the pool has 'a', 'b'") as raised:
        await pool.send(pinned("r", "kafka"))
    assert isinstance(raised.value, NonRetryable)
    assert not describe(raised.value).retryable
    assert a.asked == b.asked == []
    with pytest.raises(UnknownTransport):
        pool.member("kafka")


async def test_a_pool_of_one_raises_what_its_member_raises() -> None:
    """Whoever has one transport reads its own error, and it is asked every time, sick or not."""
    only = Scripted("fails")
    pool = await pool_of(default=only)
    for _ in range(3):
        with pytest.raises(TransportError) as raised:
            await pool.dispatch(task("r"))
        assert raised.value is only.error
    only.mood = "well"
    assert await pool.send(task("r")) == "default"
    assert pool.sick == {}


@pytest.mark.parametrize("members", [{}, {"": Scripted()}, {1: Scripted()}])
def test_a_pool_must_be_named_well(members: dict[str, Scripted]) -> None:
    """No members, or names that are no names, are refused when the pool is made."""
    with pytest.raises(DefinitionError):
        TransportPool(members)


def test_one_transport_under_two_names_is_refused() -> None:
    """It would be heard twice."""
    twin = Scripted()
    with pytest.raises(DefinitionError, match="two names"):
        TransportPool({"a": twin, "b": twin})


# -- members that hang


@virtually
async def test_S15_a_member_that_hangs_is_given_up_after_the_bound() -> None:
    """The next one gets the task after `dispatch_timeout`, and the causes say that the first did not answer."""
    a, b = Scripted("hangs"), Scripted()
    pool = TransportPool({"a": a, "b": b}, dispatch_timeout=2.0)
    await pool.start()
    loop = asyncio.get_running_loop()
    assert await pool.send(task("r")) == "b"
    assert loop.time() == pytest.approx(2.0)
    b.mood = "fails"
    with pytest.raises(AllTransportsFailed, match=r"a: It did not answer within 2 s\."):
        await pool.send(task("r"))


@virtually
async def test_many_that_hang_at_once_cost_the_bound_once() -> None:
    """A burst on a hanging member waits together; whoever comes later goes to the next at once."""
    a, b = Scripted("hangs"), Scripted()
    pool = TransportPool({"a": a, "b": b}, dispatch_timeout=2.0, cool_down=10.0)
    await pool.start()
    assert await asyncio.gather(*(pool.send(task(f"r{n}")) for n in range(50))) == ["b"] * 50
    loop = asyncio.get_running_loop()
    assert loop.time() == pytest.approx(2.0)
    assert await pool.send(task("later")) == "b"
    assert loop.time() == pytest.approx(2.0)
    assert len(a.asked) == 50


@virtually
async def test_each_dispatch_has_the_whole_bound_from_its_own_start() -> None:
    """Those that began later run out later, one that is answered in time is not touched, and nobody stays cancelled."""
    slow, spare = Scripted("slow"), Scripted()
    pool = TransportPool({"slow": slow, "spare": spare}, dispatch_timeout=2.0, cool_down=0.0)
    await pool.start()
    loop, ends = asyncio.get_running_loop(), {}

    async def send(name: str, after: float, takes: float) -> str:
        await asyncio.sleep(after)
        slow.delays[f"{name}:0"] = takes
        member = await pool.send(task(name))
        ends[name] = round(loop.time() - after, 6)
        current = asyncio.current_task()
        assert current is not None
        assert current.cancelling() == 0
        return member

    went = await asyncio.gather(send("a", 0.0, 9.0), send("b", 0.5, 1.9), send("c", 1.0, 9.0), send("d", 7.0, 9.0))
    assert went == ["spare", "slow", "spare", "spare"]
    assert ends == {"a": 2.0, "b": 1.9, "c": 2.0, "d": 2.0}


@virtually
async def test_a_member_that_will_not_be_cancelled_is_believed() -> None:
    """It took longer than allowed, and says that it accepted the task: that counts, and the sender is not cancelled."""
    stubborn = Scripted("stubborn")
    pool = TransportPool({"a": stubborn, "b": Scripted()}, dispatch_timeout=2.0)
    await pool.start()
    assert await pool.send(task("r")) == "a"
    await asyncio.sleep(0)
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


@virtually
async def test_a_cancelled_dispatch_is_no_failure_of_the_member() -> None:
    """Who stops waiting says nothing about the member, and leaves no probe behind."""
    a, b = Scripted("hangs"), Scripted()
    pool = TransportPool({"a": a, "b": b}, cool_down=1.0)
    await pool.start()
    sending = asyncio.create_task(pool.send(task("r")))
    await asyncio.sleep(0.1)
    sending.cancel()
    await asyncio.wait([sending])
    assert pool.sick == {}
    await pool.send(task("r"))  # now it is sick
    await asyncio.sleep(1.0)
    probing = asyncio.create_task(pool.send(task("r")))
    await asyncio.sleep(0.1)
    probing.cancel()
    await asyncio.wait([probing])
    a.mood = "well"
    assert await pool.send(task("r")) == "a"


# -- a sick member


@virtually
async def test_N8_a_sick_member_is_skipped_for_a_while_and_comes_back() -> None:
    """After a failure the others go first for `cool_down`; then one task tries it, and finds it well."""
    a, b = Scripted("fails"), Scripted()
    pool = TransportPool({"a": a, "b": b}, cool_down=1.0)
    await pool.start()
    await pool.send(task("r"))
    assert pool.sick == {"a": "the line is dead"}
    a.mood = "well"
    await asyncio.sleep(0.9)
    assert await pool.send(task("r")) == "b"
    assert len(a.asked) == 1
    await asyncio.sleep(0.1)
    assert await pool.send(task("r")) == "a"
    assert pool.sick == {}


@virtually
async def test_N8_a_probe_that_fails_doubles_the_cool_down_up_to_a_bound() -> None:
    """A member that stays sick is asked ever more rarely, and never less often than once in `cool_down_max`."""
    a, b = Scripted("fails"), Scripted()
    pool = TransportPool({"a": a, "b": b}, cool_down=1.0, cool_down_max=4.0)
    await pool.start()
    loop, asked = asyncio.get_running_loop(), []
    for _ in range(200):
        before = len(a.asked)
        assert await pool.send(task("r")) == "b"
        if len(a.asked) > before:
            asked.append(round(loop.time(), 1))
        await asyncio.sleep(0.1)
    pauses = [after - before for before, after in pairwise(asked)]
    assert pauses == pytest.approx([1, 2, 4, 4, 4, 4], abs=0.11)


@virtually
async def test_N8_one_task_probes_and_the_others_do_not_wait() -> None:
    """When the cool-down is over and the member hangs, one task finds out; its neighbours go elsewhere at once."""
    a, b = Scripted("hangs"), Scripted()
    pool = TransportPool({"a": a, "b": b}, cool_down=1.0, dispatch_timeout=2.0)
    await pool.start()
    await pool.send(task("r"))
    await asyncio.sleep(1.0)
    loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    probing = asyncio.create_task(pool.send(task("probe")))
    await asyncio.sleep(0)
    assert [await pool.send(task(f"r{n}")) for n in range(10)] == ["b"] * 10
    assert loop.time() == began
    assert await probing == "b"
    assert [sent.run_id for sent in a.asked] == ["r", "probe"]


@virtually
async def test_N8_with_all_others_failing_a_sick_member_is_tried_before_giving_up() -> None:
    """A cool-down never loses a task that the sick member would have taken; that it took one heals it."""
    a, b = Scripted("fails"), Scripted()
    pool = TransportPool({"a": a, "b": b}, cool_down=60.0)
    await pool.start()
    await pool.send(task("r"))
    a.mood, b.mood = "well", "fails"
    assert await pool.send(task("r")) == "a"
    assert list(pool.sick) == ["b"]


@virtually
async def test_a_pinned_member_that_is_sick_goes_last_too() -> None:
    """Pinned tasks do not all run into the same silence; when it is well, the pin counts again."""
    a, b = Scripted(), Scripted("hangs")
    pool = TransportPool({"a": a, "b": b}, cool_down=1.0)
    await pool.start()
    assert await pool.send(pinned("r", "b")) == "a"
    assert await pool.send(pinned("r", "b")) == "a"
    assert len(b.asked) == 1
    b.mood = "well"
    await asyncio.sleep(1.0)
    assert await pool.send(pinned("r", "b")) == "b"


async def test_a_task_that_is_too_large_does_not_make_a_member_sick() -> None:
    """The task is to blame: a member with a larger limit takes it, and the small one goes on with the others."""
    a, b = Scripted("fails", max_message=500), Scripted()
    pool = await pool_of(a=a, b=b)
    assert await pool.send(task("big", input="x" * 500)) == "b"
    assert pool.sick == {}
    assert pool.capabilities.max_message == 1 << 20


# -- members that lie, and what is heard


async def test_S15_results_and_heartbeats_are_heard_on_every_member() -> None:
    """Whoever took the task, each member's results and beats come to the one handler: late, twice, or from a member that
    said it had not taken it."""
    a, b = Scripted("ambiguous"), Scripted()
    pool = TransportPool({"a": a, "b": b})
    results, beats = Results(), []
    pool.on_result(results.take)
    pool.on_heartbeat(beats.append)
    await pool.start()
    assert await pool.send(task("r")) == "b"
    assert [len(a.tasks), len(b.tasks)] == [1, 1], "both have it now"
    await b.answers(b.tasks[0], "b")
    await b.answers(b.tasks[0], "b")
    await a.answers(a.tasks[0], "late")
    assert [bytes(result.output) for result in results.heard] == [b'"b"', b'"b"', b'"late"']  # type: ignore[arg-type]
    assert len(results) == 1
    for member in (a, b):
        assert member.hears is not None
        member.hears(Heartbeat(run_id="r", seq=0, step_id="r:0", group=ECHO))
    assert len(beats) == 2


async def test_a_result_the_engine_cannot_take_is_not_acknowledged_to_the_member() -> None:
    """What the engine's handler raises reaches the member that brought the result, which keeps it."""
    a, b = Scripted(), Scripted()
    pool = TransportPool({"a": a, "b": b})

    async def take(result: StepResult) -> None:
        raise ConnectionError("the store is away")

    pool.on_result(take)
    await pool.start()
    await pool.send(task("r"))
    with pytest.raises(ConnectionError):
        await a.answers(a.tasks[0])
    assert list(await pool.holding(["r:0"])) == ["r:0"]


async def test_N8_a_worker_answers_where_the_task_came_from() -> None:
    """Served over two members, a task of the second is answered and beaten for over the second, also by hand."""
    a, b = Scripted(), Scripted()
    pool = await pool_of(a=a, b=b)
    by_hand: list[RemoteTask] = []

    async def handle(task: RemoteTask) -> StepResult:
        await pool.heartbeat(Heartbeat(run_id=task.run_id, seq=task.seq, step_id=task.step_id, group=task.group))
        if by_hand:
            await pool.reply(answer(task, "by hand"))
        return answer(task)

    await pool.serve([ECHO], handle, concurrency=3)
    assert [a.concurrency, b.concurrency] == [3, 3]
    await b.works(task("r1"))
    assert ([r.step_id for r in b.replies], [x.step_id for x in b.beats]) == (["r1:0"], ["r1:0"])
    await a.works(task("r2"))
    assert [r.step_id for r in a.replies] == ["r2:0"]
    by_hand.append(task("r3"))
    await b.works(task("r3"))
    assert [r.step_id for r in b.replies] == ["r1:0", "r3:0", "r3:0"]
    assert len(a.replies) == 1


async def test_a_reply_to_a_task_of_unknown_origin_goes_to_whoever_takes_it() -> None:
    """Engines hear every member, so any will do; none is an error, and the task is delivered again."""
    a, b = Scripted("fails"), Scripted()
    pool = await pool_of(a=a, b=b)
    await pool.reply(answer(task("r")))
    assert [r.step_id for r in b.replies] == ["r:0"]
    b.mood = "fails"
    with pytest.raises(TransportError, match="a: the line is dead; b: the line is dead"):
        await pool.reply(answer(task("r")))


async def test_holding_and_cancel_go_to_the_member_that_accepted_or_to_all() -> None:
    """`member(id)` is the one; the pool itself asks and tells them all, and a failing one harms nobody's cancel."""
    a, b = Scripted(), Scripted("fails")
    pool = await pool_of(a=a, b=b)
    accepted = await pool.send(task("r"))
    assert list(await pool.member(accepted).holding(["r:0", "x:0"])) == ["r:0"]
    assert pool.member(None) is pool
    with pytest.raises(TransportError):
        await pool.holding(["r:0"])  # the one that does not answer may hold it
    b.mood = "well"
    assert set(await pool.holding(["r:0", "x:0"])) == {"r:0"}
    a.mood = "fails"
    await pool.cancel("r:0")
    assert b.cancelled == ["r:0"]


# -- as a whole


def test_capabilities_hold_whoever_took_the_task() -> None:
    """The pool claims only what all members do, and carries what the largest carries; of one it is that one's."""
    local = Scripted(shared=False, holds=True, max_message=10)
    remote = Scripted(shared=True, holds=False, max_message=20)
    together = TransportPool({"a": remote, "b": local}).capabilities
    assert (together.shared, together.holds, together.max_message) == (False, False, 20)
    assert TransportPool({"a": local}).capabilities == local.capabilities


def test_N9_the_first_member_is_the_control_plane_if_it_can_broadcast() -> None:
    """Only the first: a spare that could is not asked."""
    emitter = EventEmitterTransport()
    assert TransportPool({"a": emitter, "b": Scripted()}).control_plane is emitter
    assert TransportPool({"a": Scripted(), "b": emitter}).control_plane is None


@virtually
async def test_a_member_that_cannot_start_is_opened_later() -> None:
    """One transport is enough to begin; the other is tried in the background, is not asked meanwhile, and then serves."""
    a, b = Scripted(), Scripted()
    a.start_error = TransportError("connection refused")
    pool = TransportPool({"a": a, "b": b}, cool_down=1.0)
    await pool.start()
    assert await pool.send(task("r")) == "b"
    assert a.asked == []
    b.mood = "fails"
    with pytest.raises(AllTransportsFailed, match="b: the line is dead; a: connection refused"):
        await pool.send(task("r"))
    a.start_error = None
    await asyncio.sleep(1.1)
    assert await pool.send(task("r")) == "a"
    await pool.close()
    assert [a.closes, b.closes] == [1, 1]


@virtually
async def test_closing_ends_the_attempts_to_open() -> None:
    """A pool that is closed while a member is still down leaves no task behind."""
    a, b = Scripted(), Scripted()
    a.start_error = TransportError("connection refused")
    pool = TransportPool({"a": a, "b": b})
    await pool.start()
    await pool.close()
    starts = a.starts
    await asyncio.sleep(100)
    assert a.starts == starts
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_pool_of_which_none_starts_does_not_start() -> None:
    """The error has every reason; of a pool of one it is the member's own."""
    a, b = Scripted(), Scripted()
    a.start_error, b.start_error = TransportError("refused"), TransportError("no such host")
    with pytest.raises(AllTransportsFailed, match=r"could be started\. a: refused; b: no such host"):
        await TransportPool({"a": a, "b": b}).start()
    with pytest.raises(TransportError) as raised:
        await TransportPool({"default": a}).start()
    assert raised.value is a.start_error
