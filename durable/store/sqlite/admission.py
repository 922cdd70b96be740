"""What becomes of the runs that events ask for. All that the policies look at is read first, for all events of a call; then
they are decided one after the other, in memory; then what was decided is written, a few statements for all.

Runs are taken for new: whether an id or an idempotency key is known shows when they are inserted. Where one is, all is
rolled back and done again `eagerly`, each run inserted as it is decided on.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from durable.protocol.states import Activity
from durable.store.admission import Admission, Batch, Debounce, Rate, Trigger, Verdict
from durable.store.records import Message, NewRun, StartStatus
from durable.store.sqlite import inbox, lanes, runs
from durable.store.sqlite.statements import Row, execute_values, fetch_packed, listed

RATE = "rate"
_WINDOW, _SINGLETON = "window", "singleton"

_Gate = tuple[str, str]
"""(kind, key)."""


class _Run:
    """A run that a later event may join, or find in its way."""

    __slots__ = (
        "active",
        "activity",
        "begun",
        "fresh",
        "hash",
        "id",
        "input",
        "meta",
        "moved",
        "new",
        "owner",
        "size",
        "tail",
        "wake_at",
        "workspace",
    )  # fmt: skip

    def __init__(
        self,
        run_id: str,
        workspace: str,
        *,
        new: NewRun | None = None,
        active: bool = True,
        begun: bool = False,
        scheduled: bool = False,
        owner: str | None = None,
        wake_at: int = 0,
        input: bytes = b"",
    ) -> None:
        self.id = run_id
        self.workspace = workspace
        self.new = new
        """Not inserted yet."""
        self.active = active
        self.begun = begun
        self.activity = Activity.SCHEDULED if scheduled else Activity.QUEUED
        self.owner = owner
        self.wake_at = wake_at
        self.input = input
        self.size = len(input)
        self.tail: list[bytes] = []
        """Members to be appended to the input."""
        self.hash: str | None = None
        self.meta: bytes | None = None
        self.fresh = False
        """Its input was replaced, with hash and meta."""
        self.moved = False

    def joinable(self, now: int) -> bool:
        """It has not begun, and is not due."""
        return self.active and not self.begun and self.activity is Activity.SCHEDULED and self.wake_at > now

    def move(self, wake_at: int, now: int) -> None:
        self.wake_at = wake_at
        self.moved = True
        if wake_at <= now:
            self.activity = Activity.QUEUED

    def replaced(self, by: NewRun) -> None:
        self.input, self.tail, self.size = by.input, [], len(by.input)
        self.hash, self.meta, self.fresh = by.input_hash, by.meta, True

    def whole_input(self) -> bytes:
        if not self.tail:
            return self.input
        return b"".join([self.input[:-2], *(b"," + member for member in self.tail), b"]}"])


class _Window:
    __slots__ = ("members", "opened_at", "run_id")

    def __init__(self, run_id: str, opened_at: int, members: int) -> None:
        self.run_id = run_id
        self.opened_at = opened_at
        self.members = members


class Desk:
    """Decides on the triggers of one call."""

    def __init__(
        self, cx: sqlite3.Connection, triggers: Sequence[Trigger], now: int, max_payload: int, *, eager: bool
    ) -> None:
        self._cx = cx
        self._now = now
        self._max_payload = max_payload
        self._eager = eager
        self._runs: dict[str, _Run] = {}
        self._windows: dict[str, _Window] = {}
        self._singletons: dict[str, str] = {}
        self._changed: dict[_Gate, None] = {}
        self._to_start: list[_Run] = []
        self._cancels: list[Message] = []
        self._ticks: list[tuple[str, int, str]] = []
        self._rates = lanes.ticks(cx, RATE, list({one.rate.key for one in triggers if one.rate is not None}))
        gates = {(_SINGLETON, one.singleton.key) for one in triggers if one.singleton is not None}
        gates |= {(_WINDOW, policy.key) for one in triggers if (policy := one.debounce or one.batch) is not None}
        if gates:
            self._read_gates(gates)

    def _read_gates(self, gates: Iterable[_Gate]) -> None:
        rows = fetch_packed(
            self._cx,
            "json_each(?) w CROSS JOIN gates g ON g.kind = json_extract(w.value, '$[0]')"
            " AND g.key = json_extract(w.value, '$[1]') CROSS JOIN runs ON runs.id = g.run_id",
            [listed(list(gates))],
            "g.kind, g.key, g.opened_at, g.members, runs.id, runs.workspace, runs.status = 'active',"
            " runs.started_at IS NOT NULL, runs.activity = 'scheduled', runs.owner, runs.wake_at",
            [f"CASE WHEN g.kind = '{_WINDOW}' AND runs.started_at IS NULL THEN {runs.INPUT} END"],
        )
        for kind, key, opened_at, members, run_id, workspace, active, begun, scheduled, owner, wake_at, data in rows:
            if kind == _WINDOW:
                self._windows[key] = _Window(run_id, opened_at, members)
            else:
                self._singletons[key] = run_id
            if kind == _WINDOW or run_id not in self._runs:
                self._runs[run_id] = _Run(
                    run_id,
                    workspace,
                    active=bool(active),
                    begun=bool(begun),
                    scheduled=bool(scheduled),
                    owner=owner,
                    wake_at=wake_at or 0,
                    input=data or b"",
                )

    # ------------------------------------------------------------------ deciding

    def admit(self, trigger: Trigger) -> Admission:
        new = trigger.run
        if trigger.rate is not None and not self._lets_in(trigger.rate):
            return Admission(new.workflow, Verdict.DROPPED)
        policy = trigger.debounce or trigger.batch
        window = None if policy is None else self._window(policy)
        cancelled = None
        if trigger.singleton is not None:
            other = self._runs.get(self._singletons.get(trigger.singleton.key, ""))
            # The run that this event would join is not in its way.
            if other is not None and other.active and (window is None or window.run_id != other.id):
                if trigger.singleton.mode == "skip":
                    return Admission(new.workflow, Verdict.SKIPPED, other.id)
                self._ask_to_stop(other, new)
                cancelled = other.id
        verdict = Verdict.STARTED
        if trigger.debounce is not None:
            verdict = Verdict.DEBOUNCED
            run_id, fresh = self._debounce(new, trigger.debounce, window)
        elif trigger.batch is not None:
            verdict = Verdict.BATCHED
            run_id, fresh = self._batch(new, trigger.batch, window)
        else:
            run_id, fresh = self._begin(new)
            if trigger.rate is not None and fresh:
                self._ticks.append((trigger.rate.key, trigger.rate.period_us, run_id))
                self._rates.setdefault(trigger.rate.key, []).append(self._now)
        if trigger.singleton is not None:
            self._singletons[trigger.singleton.key] = run_id
            self._changed[_SINGLETON, trigger.singleton.key] = None
            self._know(run_id)
        return Admission(new.workflow, verdict, run_id, fresh, cancelled)

    def _lets_in(self, rate: Rate) -> bool:
        since = self._now - rate.period_us
        return sum(at > since for at in self._rates.get(rate.key, ())) < rate.limit

    def _window(self, policy: Debounce | Batch) -> _Window | None:
        window = self._windows.get(policy.key)
        run = None if window is None else self._runs.get(window.run_id)
        return window if run is not None and run.joinable(self._now) else None

    def _ask_to_stop(self, other: _Run, new: NewRun) -> None:
        reason = msgspec.json.encode({"reason": f"run {new.id} takes its place"})
        message_id = f"singleton:{new.id}"
        self._cancels.append(Message(other.id, message_id, "cancel", payload=reason, workspace=other.workspace))
        if other.owner is None and other.wake_at > self._now:
            other.wake_at = self._now  # as the message does it

    def _debounce(self, new: NewRun, rule: Debounce, window: _Window | None) -> tuple[str, bool]:
        opened_at = self._now if window is None else window.opened_at
        until = self._now + rule.period_us
        if rule.max_wait_us is not None:
            until = min(until, opened_at + rule.max_wait_us)
        if window is None:
            return self._open_window(new, rule.key, until)
        run = self._runs[window.run_id]
        run.replaced(new)
        run.move(until, self._now)
        return run.id, False

    def _batch(self, new: NewRun, rule: Batch, window: _Window | None) -> tuple[str, bool]:
        if window is not None:
            run = self._runs[window.run_id]
            size = run.size + 1 + len(rule.member)
            if size <= self._max_payload:
                run.tail.append(rule.member)
                run.size = size
                window.members += 1
                self._changed[_WINDOW, rule.key] = None
                if window.members >= rule.max_size:
                    run.move(self._now, self._now)
                return run.id, False
            run.move(self._now, self._now)
        until = self._now if rule.max_size <= 1 else self._now + rule.timeout_us
        return self._open_window(new, rule.key, until)

    def _open_window(self, new: NewRun, key: str, until: int) -> tuple[str, bool]:
        new = replace(new, owner=None, wake_at=until)
        run_id, fresh = self._begin(new)
        if fresh:
            self._windows[key] = _Window(run_id, self._now, 1)
            self._changed[_WINDOW, key] = None
        return run_id, fresh

    def _begin(self, new: NewRun) -> tuple[str, bool]:
        """The run that the event is in, and whether it is new."""
        if self._eager:
            [outcome] = runs.start(self._cx, [new], self._now)
            if outcome.status is not StartStatus.STARTED:
                return outcome.run_id, False
        wake_at = self._now if new.wake_at is None else new.wake_at
        run = self._runs[new.id] = _Run(
            new.id,
            new.workspace,
            new=None if self._eager else new,
            begun=new.owner is not None,
            scheduled=new.owner is None and wake_at > self._now,
            owner=new.owner,
            wake_at=wake_at,
            input=new.input,
        )
        if not self._eager:
            self._to_start.append(run)
        return new.id, True

    def _know(self, run_id: str) -> None:
        """Of a run that was there before, whatever a later event may ask."""
        if run_id in self._runs:
            return
        [found] = runs.get(self._cx, [run_id])
        if found is not None:
            self._runs[run_id] = _Run(
                run_id,
                found.workspace,
                active=found.status == "active",
                begun=found.started_at is not None,
                scheduled=found.activity is Activity.SCHEDULED,
                owner=found.owner,
                wake_at=found.wake_at or 0,
                input=found.input,
            )

    # ------------------------------------------------------------------ writing

    def write(self) -> None:
        """Raises runs.SomeExist."""
        if self._to_start:
            runs.insert(self._cx, [_as_decided(run) for run in self._to_start], self._now)
        changed = [run for run in self._runs.values() if run.new is None and (run.fresh or run.tail or run.moved)]
        if changed:
            self._change(changed)
        if self._changed:
            execute_values(self._cx, _gates_text, [self._gate(*gate) for gate in self._changed])
        lanes.add_ticks(self._cx, RATE, self._ticks, self._now)
        inbox.send(self._cx, self._cancels, self._now)

    def _gate(self, kind: str, key: str) -> Row:
        if kind == _SINGLETON:
            return kind, key, self._singletons[key], self._now, 1
        window = self._windows[key]
        return kind, key, window.run_id, window.opened_at, window.members

    def _change(self, changed: Sequence[_Run]) -> None:
        given = [run for run in changed if run.fresh or run.tail]
        inputs = {run.id: run.whole_input() for run in given}
        if given:
            execute_values(
                self._cx,
                _inputs_text,
                [
                    (run.id, runs.inline(inputs[run.id]), run.fresh, run.hash, run.meta and run.meta.decode())
                    for run in given
                ],
                self._now,
            )
            ids = listed(list(inputs))
            self._cx.execute("DELETE FROM big_inputs WHERE run_id IN (SELECT value FROM json_each(?))", [ids])
            runs.insert_big(self._cx, [one for one in inputs.items() if runs.inline(one[1]) is None])
        moved = [(run.id, run.wake_at) for run in changed if run.moved]
        if moved:
            execute_values(self._cx, _moved_text, moved, self._now, self._now)


def _as_decided(run: _Run) -> NewRun:
    new = run.new
    assert new is not None
    if run.moved:
        new = replace(new, wake_at=run.wake_at)
    if run.tail:
        new = replace(new, input=run.whole_input())
    if run.fresh:
        new = replace(new, input=run.whole_input(), input_hash=run.hash or "", meta=run.meta)
    return new


def _gates_text(values: str) -> str:
    return f"""
        INSERT INTO gates (kind, key, run_id, opened_at, members)
        SELECT * FROM ({values}) WHERE column1 IS NOT NULL
        ON CONFLICT (kind, key) DO UPDATE SET
          run_id = excluded.run_id, opened_at = excluded.opened_at, members = excluded.members"""


def _inputs_text(values: str) -> str:
    return f"""
        WITH v(id, input, replaced, input_hash, meta) AS ({values})
        UPDATE runs SET
          input = v.input,
          input_hash = CASE WHEN v.replaced THEN v.input_hash ELSE runs.input_hash END,
          meta = CASE WHEN v.replaced THEN v.meta ELSE runs.meta END,
          updated_at = ?
        FROM v WHERE runs.id = v.id"""


def _moved_text(values: str) -> str:
    return f"""
        WITH v(id, wake_at) AS ({values})
        UPDATE runs SET
          wake_at = v.wake_at, activity = CASE WHEN v.wake_at <= ? THEN 'queued' ELSE activity END, updated_at = ?
        FROM v WHERE runs.id = v.id"""
