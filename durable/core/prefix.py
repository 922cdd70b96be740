"""How much of a run's journal another run may begin with, and what of it has to be said anew. Pure; the verbs are in
engine/rerun.py.

A copy is cut at a step's command: what was answered before the step began is kept, the step itself and all that was answered
later is asked again, and so is what was asked before and answered after. Any such stretch is a journal the run once had, so the
same code replays it; what is rewritten is what belongs to one run only:

- fingerprints are left out: arguments may hold the run's id, or come from another input. Kind, key, name and order still hold;
- marks of commands without an answer go, so that they are asked for as if for the first time: a child gets another id;
- the first entry says whose random numbers are drawn; a last one, `forked`, puts off what was pending by the time in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from durable.core.journal import CHILD, COMMAND_KINDS, LOG, REMOTE, RUN, STEP, Entry
from durable.core.replay import without

TURNS = 1_000_000_000
"""From this ordinal on commands ask for a turn of code that lives elsewhere. What such a turn recorded stands or falls with
it."""

_STEPS = frozenset({STEP, REMOTE, CHILD})
_ANSWERS = frozenset({"completed", "failed", "cancelled"})


class ForkNote(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """Payload of a `forked` entry. `held` in µs."""

    of: str
    from_: str | None = None
    held: int = 0


def effective(entries: Iterable[Entry]) -> list[Entry]:
    """Without what requeues have passed over. Log lines included."""
    kept: list[Entry] = []
    for entry in entries:
        if entry.kind == RUN and entry.status == "requeued":
            cut = msgspec.json.decode(entry.payload).get("from") if entry.payload else None
            kept = kept if cut is None else without(kept, cut)
        else:
            kept.append(entry)
    return kept


def steps(entries: Iterable[Entry]) -> list[str]:
    """Keys of the steps, remote steps and children of a run, in order of asking."""
    found: dict[str, int] = {}
    for entry in entries:
        if entry.kind in _STEPS and entry.key is not None and (entry.ordinal or 0) < TURNS:
            found.setdefault(entry.key, entry.ordinal or 0)
    return sorted(found, key=found.__getitem__)


def before(entries: Sequence[Entry], key: str) -> list[Entry]:
    """What was recorded when this step was asked for. Of effective entries. Raises KeyError."""
    mine = _of(entries, key)
    if not mine:
        raise KeyError(key)
    cut = mine[0]
    if _hosted(entries):
        return list(entries[: _turn(entries, cut)])
    begun = [at for index in mine if entries[index].kind == STEP and (at := entries[index].started_at) is not None]
    if begun:  # a local step's first mark comes late, but says since when
        began = min(begun)
        cut = next((index for index in range(cut) if entries[index].delivers and entries[index].at > began), cut)
    answer = next((index for index in mine if entries[index].status in _ANSWERS), None)
    if answer is not None and entries[answer].status == "cancelled":
        # The entry before it made the code give the step up; with that entry nobody would ask for it again.
        led = max(index for index in range(answer) if entries[index].delivers)
        cut = min(cut, led)
    return list(entries[:cut])


def with_result(entries: Sequence[Entry], key: str, result: bytes) -> list[Entry]:
    """What was recorded up to this step's answer, and this result as the answer. Of effective entries. Raises KeyError."""
    mine = [index for index in _of(entries, key) if entries[index].kind in _STEPS]
    if not mine:
        raise KeyError(key)
    answer = next((index for index in mine if entries[index].status in ("completed", "failed")), None)
    if answer is not None:
        edited = replace(entries[answer], status="completed", payload=result)
        return [*entries[:answer], edited, *_same_turn(entries, answer)]
    first = entries[mine[0]]
    prefix = before(entries, key)
    at = prefix[-1].at if prefix else first.at
    return [*prefix, Entry(0, at, first.kind, "completed", key, first.ordinal, first.name, 1, payload=result)]


def copied(prefix: Sequence[Entry], of: str, from_step: str | None, now: int) -> tuple[Entry, ...]:
    """A prefix as the first entries of another run, which goes on `now` (µs)."""
    answered = {e.key for e in prefix if e.kind in COMMAND_KINDS and e.status in _ANSWERS}
    kept: list[Entry] = []
    for entry in prefix:
        if not _belongs(entry, answered):
            continue
        changes: dict[str, object] = {"seq": len(kept) + 1, "fingerprint": None}
        if entry.kind == RUN and entry.status == "started":
            note = msgspec.json.decode(entry.payload) if entry.payload else {}
            changes["payload"] = msgspec.json.encode({"seed": of} | note)
        kept.append(replace(entry, **changes))
    last = kept[-1].at if kept else now
    note = ForkNote(of, from_step, max(0, now - last))
    name = kept[0].name if kept else None
    kept.append(Entry(len(kept) + 1, max(now, last), RUN, "forked", name=name, payload=msgspec.json.encode(note)))
    return tuple(kept)


def _belongs(entry: Entry, answered: set[str | None]) -> bool:
    if entry.kind in COMMAND_KINDS:
        return entry.key in answered and entry.status not in ("late", "held")
    if entry.kind == RUN:
        return entry.delivers or entry.held > 0
    return entry.kind != LOG or entry.key is None or entry.key in answered


def _of(entries: Sequence[Entry], key: str) -> list[int]:
    return [i for i, e in enumerate(entries) if e.kind in COMMAND_KINDS and e.key == key and e.status != "late"]


def _is_turn(entry: Entry) -> bool:
    return entry.kind in COMMAND_KINDS and entry.delivers and (entry.ordinal or 0) >= TURNS


def _hosted(entries: Iterable[Entry]) -> bool:
    return any(map(_is_turn, entries))


def _turn(entries: Sequence[Entry], cut: int) -> int:
    """The turn that led to what stands there: it is asked again as a whole."""
    return max((index for index in range(cut) if _is_turn(entries[index])), default=cut)


def _same_turn(entries: Sequence[Entry], answer: int) -> list[Entry]:
    """What the turn that recorded this step recorded after it."""
    if not _hosted(entries) or entries[answer].kind != STEP:
        return []
    rest: list[Entry] = []
    for entry in entries[answer + 1 :]:
        if entry.delivers and (entry.kind != STEP or _is_turn(entry)):
            break
        if entry.kind in (STEP, LOG):
            rest.append(entry)
    return rest
