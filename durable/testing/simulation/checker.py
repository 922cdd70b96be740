"""Whether a simulation went right: a pure function over witness, client history, server log and the store at the end.

Each check is named, and has a planted violation in tests/simulation/test_checker.py. Numbers are those of the promises
in the specification (S1 to S43) that a check stands for, where there is one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import msgspec

from durable.core.clock import SECOND, SystemClock
from durable.core.commands import Cancelled, Command, Completed, Failed, Record, TakeTurn
from durable.core.definition import workflow_of
from durable.core.errors import DeterminismError
from durable.core.hosted import PATIENT, TURNS
from durable.core.journal import (
    CHILD,
    COMMAND_KINDS,
    EMIT,
    EVENT,
    LOG,
    REMOTE,
    RUN,
    SIGNAL,
    STEP,
    TIMER,
    WAIT,
    Entry,
)
from durable.core.registry import Registry
from durable.core.replay import Machine
from durable.protocol.messages import RecordStep, Sleep, WorkflowDecision, WorkflowTask, turn_id
from durable.protocol.states import TERMINAL, Status
from durable.testing.programs import PROGRAM
from durable.testing.simulation.programs import CODE, RETRY
from durable.testing.simulation.world import EPOCH, Evidence, Stored
from durable.worker.turns import TurnHandler

ENDS = frozenset(status.value for status in TERMINAL)


def check(evidence: Evidence) -> list[str]:
    """Every violation, in words. Empty: all is well."""
    found: list[str] = []
    for one in CHECKS:
        found += [f"{one.__name__}: {what}" for what in one(evidence)]
    return found


# ------------------------------------------------------------------ the whole


def went_on(evidence: Evidence) -> Iterator[str]:
    """The simulation came to an end, and the product met nothing that it did not expect."""
    if evidence.stuck:
        yield evidence.stuck
    for complaint, times in Counter(evidence.complaints).items():
        yield f"{complaint} ({times} times)"


def settled(evidence: Evidence) -> Iterator[str]:
    """Liveness: after healing, every run ends. An acknowledged start is among them."""
    begun_again = _begun_again(evidence)
    for run_id, stored in evidence.runs.items():
        run = stored.run
        if run.status not in TERMINAL and run_id.partition(".")[0] not in begun_again:
            last = stored.journal[-1] if stored.journal else None
            yield (
                f"{run_id} is {run.status.value}/{run.activity.value}, owner {run.owner}, wake_at "
                f"{None if run.wake_at is None else (run.wake_at - EPOCH) / SECOND}, inbox {run.inbox_read}/{run.inbox_last}, "
                f"last entry {last and (last.kind, last.status, last.key)}; healed at {evidence.healed_at:.1f}, now "
                f"{evidence.ended_at:.1f}"
            )
    for call in evidence.history:
        if call.what == "start" and call.outcome == "ok" and call.run_id not in evidence.runs:
            yield f"the acknowledged run {call.run_id} of plan {call.plan} does not exist"


def _begun_again(evidence: Evidence) -> set[str]:
    """Runs of a start that came late, when its key's run had been deleted: their client knows nothing of them, and sends
    no signals."""
    deleted = {line.run_id for line in evidence.log if line.what == "prune"} & evidence.runs.keys()
    plans = {tag for run_id in deleted for tag in evidence.runs[run_id].run.tags}
    return {run_id for run_id, stored in evidence.runs.items() if run_id not in deleted and plans & {*stored.run.tags}}


def started_once(evidence: Evidence) -> Iterator[str]:
    """S24: one key, one run; and a start that nobody answered makes one run or none."""
    made: dict[int, list[str]] = defaultdict(list)
    for run_id, stored in evidence.runs.items():
        for tag in stored.run.tags:
            if tag.startswith("plan-"):
                made[int(tag[5:])].append(run_id)
    for number, plan in evidence.plans.items():
        calls = [c for c in evidence.history if c.plan == number and c.what == "start"]
        acknowledged = {c.run_id for c in calls if c.outcome == "ok"}
        if plan.key is not None and len(acknowledged) > 1 and not _one_after_another(evidence, acknowledged):
            yield f"key {plan.key!r} gave {sorted(acknowledged)}"
        if plan.key is not None and len(made[number]) > 1 and not _one_after_another(evidence, made[number]):
            yield f"key {plan.key!r} made {made[number]}"
        possible = sum(c.outcome in ("ok", "info") for c in calls)
        if len(made[number]) > possible:
            yield f"plan {number} has {len(made[number])} runs from {possible} starts that may have worked"


def _one_after_another(evidence: Evidence, run_ids: Iterable[str]) -> bool:
    """Each was deleted before the next began: a key lives as long as its run."""
    alive: set[str] = set()
    for line in evidence.log:
        if line.run_id in run_ids and line.what in ("start", "prune"):
            (alive.add if line.what == "start" else alive.discard)(line.run_id)
            if len(alive) > 1:
                return False
    return True


def pruned_rightly(evidence: Evidence) -> Iterator[str]:
    """Only finished runs are deleted, and none whose parent or child is active; nobody writes to them afterwards."""
    gone: set[str] = set()
    for line in evidence.log:
        if line.what == "prune":
            gone.add(line.run_id)
            if line.status not in ENDS:
                yield f"{line.run_id} was deleted at {line.at} and was {line.status}"
            if line.family:
                yield f"{line.run_id} was deleted at {line.at}; of its family {line.family} were active"
        elif line.what == "start":
            gone.discard(line.run_id)
        elif line.run_id in gone and (line.what == "claim" or line.status in ("done", "accepted")):
            yield f"{line.run_id} was deleted, and {line.node} did {line.what} to it at {line.at}"


# ------------------------------------------------------------------ writes


def fenced(evidence: Evidence) -> Iterator[str]:
    """S1, S2: epochs rise at every claim, and nothing is written under an old one."""
    epochs: dict[str, int] = {}
    for line in evidence.log:
        known = epochs.get(line.run_id, -1)
        if line.what in ("claim", "requeue"):
            if line.epoch <= known:
                yield f"{line.run_id} was claimed at epoch {line.epoch} by {line.node}, after epoch {known}"
            epochs[line.run_id] = line.epoch
        elif line.what == "start":
            epochs[line.run_id] = line.epoch
        elif line.what == "commit" and line.status == "done" and not line.last and line.epoch < known:
            yield f"{line.node} committed to {line.run_id} under epoch {line.epoch} at {line.at}; it was at {known}"


def absorbing(evidence: Evidence) -> Iterator[str]:
    """S23: a terminal state is the last, but for a requeue."""
    ended: dict[str, float] = {}
    for line in evidence.log:
        if line.what == "requeue":
            ended.pop(line.run_id, None)
        elif line.what == "commit" and line.status == "done" and not line.last:
            if line.run_id in ended:
                yield f"{line.run_id} ended at {ended[line.run_id]}, and {line.node} committed to it at {line.at}"
            if line.ends:
                ended[line.run_id] = line.at
        elif line.what == "claim" and line.run_id in ended:
            yield f"{line.run_id} ended at {ended[line.run_id]}, and {line.node} claimed it at {line.at}"


def ambiguous(evidence: Evidence) -> Iterator[str]:
    """S39: a commit that has happened is never reported as refused, however often it is asked after."""
    for line in evidence.log:
        if line.what == "commit" and line.last and line.status != "done":
            yield f"commit {line.commit_id} of {line.run_id} had happened; asked again at {line.at} it was {line.status}"
        if line.what == "commit" and line.status.startswith("refused"):
            yield f"the store {line.status} of {line.run_id}"


def dense(evidence: Evidence) -> Iterator[str]:
    """S33, S30: journals and inboxes are numbered without gap, stamped in order, and the row says so too."""
    for run_id, stored in evidence.runs.items():
        run, journal, inbox = stored.run, stored.journal, stored.inbox
        if [entry.seq for entry in journal] != list(range(1, len(journal) + 1)):
            yield f"{run_id} has entries {[entry.seq for entry in journal]}"
        if run.seq != len(journal):
            yield f"{run_id} is at seq {run.seq} with {len(journal)} entries"
        if [row.number for row in inbox] != list(range(1, len(inbox) + 1)) or run.inbox_last != len(inbox):
            yield f"{run_id} has inbox rows {[row.number for row in inbox]}, and counts {run.inbox_last}"
        if run.inbox_read > run.inbox_last:
            yield f"{run_id} has read {run.inbox_read} of {run.inbox_last} inbox rows"
        for before, after in pairwise(journal):
            if after.at < before.at and after.status not in ("requeued", "unblocked"):
                yield f"{run_id}: entry {after.seq} is stamped before entry {before.seq}"


def in_time(evidence: Evidence) -> Iterator[str]:
    """S31: stamps are the store's time, whatever the engines' own clocks say."""
    slack = 0.02 + evidence.swarm.drift * 4 * evidence.swarm.lease
    committed: dict[tuple[str, int], float] = {}
    for line in evidence.log:
        if line.what in ("commit", "start", "requeue") and line.status in ("done", "") and not line.last:
            committed[line.run_id, line.seq] = line.at
    for run_id, stored in evidence.runs.items():
        for entry in stored.journal:
            at = (entry.at - EPOCH) / SECOND
            written = committed.get((run_id, entry.seq))
            if written is not None and at > written + slack:
                yield f"{run_id}: entry {entry.seq} is stamped {at:.4f} and was committed at {written:.4f}"
            if at < 0:
                yield f"{run_id}: entry {entry.seq} is stamped {at:.4f}, before time began"


def watched(evidence: Evidence) -> Iterator[str]:
    """S33: whoever watches a run sees every entry once, in order, over every break."""
    deleted = {line.run_id for line in evidence.log if line.what == "prune"}
    for run_id, seen in evidence.streams.items():
        stored = evidence.runs[run_id].journal
        if seen != (stored[: len(seen)] if run_id in deleted else stored):
            yield f"{run_id}: watchers saw {[entry.seq for entry in seen]} of {len(stored)} entries"


def tidy(evidence: Evidence) -> Iterator[str]:
    """S26: nothing is left of a run that has ended."""
    yield from evidence.leftovers
    for run_id, stored in evidence.runs.items():
        run = stored.run
        if run.status in TERMINAL and (run.owner is not None or run.wake_at is not None or run.finished_at is None):
            yield f"{run_id} is {run.status.value} with owner {run.owner}, wake_at {run.wake_at}"


# ------------------------------------------------------------------ results


def committed_once(evidence: Evidence) -> Iterator[str]:
    """S4, S7: a step has one delivered result, and a body returned that very value; a run ends once."""
    returned = {
        (body.run_id, body.step_id, body.attempt, body.value) for body in evidence.bodies if body.outcome == "completed"
    }
    # A hosted step is tried again in the worker's turn, and the wire says nothing of its attempts.
    in_turns = {(body.run_id, body.step_id, body.value) for body in evidence.bodies if body.outcome == "completed"}
    for run_id, stored in evidence.runs.items():
        hosted = _hosted(stored, evidence)
        results: Counter[tuple[str, str | None]] = Counter()
        ends = 0
        for entry in stored.journal:
            if entry.kind == RUN and entry.status == "requeued":
                results.clear()
                ends = 0
            if entry.kind == RUN and entry.status in ENDS:
                ends += 1
                if ends > 1:
                    yield f"{run_id} ended twice"
            if entry.kind in (STEP, REMOTE, CHILD) and entry.status in ("completed", "failed"):
                results[entry.kind, entry.key] += 1
                if results[entry.kind, entry.key] > 1:
                    yield f"{run_id}: {entry.kind} {entry.key} has two results"
            if entry.kind in (STEP, REMOTE) and entry.status == "completed" and _witnessed(stored, entry):
                value = msgspec.json.decode(entry.payload or b"null")
                step = f"{run_id}:{entry.ordinal}"
                known = (
                    (run_id, step, value) in in_turns
                    if hosted and entry.kind == STEP
                    else (run_id, step, entry.attempt, value) in returned
                )
                if not known:
                    yield f"{run_id}: {entry.kind} {entry.key} attempt {entry.attempt} has a result nobody returned: {value!r}"


def _witnessed(stored: Stored, entry: Entry) -> bool:
    return stored.run.workflow != PROGRAM and not (entry.name or "").startswith("side_effect") and not _is_turn(entry)


def _is_turn(entry: Entry) -> bool:
    return entry.kind == REMOTE and entry.ordinal is not None and entry.ordinal >= TURNS


def _hosted(stored: Stored, evidence: Evidence) -> bool:
    return workflow_of(evidence.workflows[stored.run.workflow]).hosting is not None


def retried_by_policy(evidence: Evidence) -> Iterator[str]:
    """Attempts count up by one, stop at the policy's maximum, and none begins before its time."""
    for run_id, stored in evidence.runs.items():
        due: dict[tuple[str, int], float] = {}
        attempts: dict[str, int] = {}
        latest: dict[str, int] = {}
        spent: dict[str, int] = {}
        for entry in stored.journal:
            if entry.kind == RUN and entry.status == "requeued":
                # A task goes on counting, a local step begins anew; both have a fresh budget.
                spent = dict(latest)
                attempts = dict(spent)
                due.clear()
            if entry.kind not in (STEP, REMOTE) or entry.key is None or entry.status == "late":
                continue
            if entry.kind == REMOTE and entry.attempt:
                latest[entry.key] = max(entry.attempt, latest.get(entry.key, 0))
            if entry.status == "retrying":
                before = attempts.get(entry.key, 0)
                if entry.attempt != before + 1:
                    yield f"{run_id}: {entry.key} failed attempt {entry.attempt} after attempt {before}"
                attempts[entry.key] = entry.attempt
                next_at = msgspec.json.decode(entry.payload or b"{}")["next_at"]
                due[f"{run_id}:{entry.ordinal}", entry.attempt + 1] = (next_at - EPOCH) / SECOND
            most = PATIENT.max_attempts if _is_turn(entry) else RETRY.max_attempts
            if entry.attempt > spent.get(entry.key, 0) + most:
                yield f"{run_id}: {entry.key} came to attempt {entry.attempt} of {RETRY.max_attempts}"
        if any(entry.kind == RUN and entry.status == "requeued" for entry in stored.journal):
            continue
        slack = 0.001 + evidence.swarm.drift * 4 * evidence.swarm.lease
        for body in evidence.bodies:
            if body.run_id == run_id and body.began < due.get((body.step_id, body.attempt), 0.0) - slack:
                yield f"{run_id}: {body.step_id} attempt {body.attempt} began early, at {body.began:.4f}"


def replays(evidence: Evidence) -> Iterator[str]:
    """The outcome is what the program computes from the journal, and nothing else."""
    for run_id, stored in evidence.runs.items():
        run, journal = stored.run, stored.journal
        if any(entry.kind == RUN and entry.status == "blocked" for entry in journal) and not _may_block(
            evidence, run.tags
        ):
            entry = next(entry for entry in journal if entry.kind == RUN and entry.status == "blocked")
            yield f"{run_id} was blocked: {entry.payload!r}"
            continue
        if run.status not in TERMINAL or run.status is Status.DEAD:
            continue
        if _may_block(evidence, run.tags) and any(entry.name == "bad" for entry in journal):
            continue  # it began and ended under the bad deploy, which is gone
        machine = _machine(stored, evidence)
        entries = _until_the_end(journal)
        try:
            machine.replay(entries)
        except DeterminismError as error:
            if run.status is Status.FAILED and type(error).__name__.encode() in (run.error or b""):
                continue
            yield f"{run_id} does not replay: {error}"
            continue
        finally:
            outcome = machine.outcome
            machine.drop()
        if isinstance(outcome, Completed):
            if run.status is not Status.COMPLETED or outcome.output != run.output:
                yield f"{run_id} replays to {outcome.output!r} and is {run.status.value} {run.output!r}"
        elif isinstance(outcome, Failed):
            if run.status is not Status.FAILED or _message(outcome.error) != _message(run.error):
                yield f"{run_id} replays to failed {outcome.error!r} and is {run.status.value} {run.error!r}"
        elif isinstance(outcome, Cancelled):
            if run.status is not Status.CANCELLED:
                yield f"{run_id} replays to cancelled and is {run.status.value}"
        elif run.status is not Status.CANCELLED and b"run_timeout" not in (run.error or b""):
            # Only a clean-up that took too long, of a run cancelled or timed out, is ended from outside.
            yield f"{run_id} is {run.status.value}, and its journal leads to no end"


def _may_block(evidence: Evidence, tags: tuple[str, ...]) -> bool:
    return any(plan.blocks for number, plan in evidence.plans.items() if f"plan-{number}" in tags)


def _until_the_end(journal: list[Entry]) -> list[Entry]:
    """What the outcome was computed from: without the last entry, and what was given up because of it."""
    entries = [entry for entry in journal if entry.kind != LOG]
    entries.pop()
    while entries and entries[-1].status == "cancelled" and entries[-1].kind in COMMAND_KINDS:
        entries.pop()
    return entries


def behind_the_barrier(evidence: Evidence) -> Iterator[str]:
    """D4: no body began before everything journaled before it was committed. S21: no timer fired early."""
    bodies = defaultdict(list)
    for body in evidence.bodies:
        bodies[body.run_id].append(body)
    for run_id, stored in evidence.runs.items():
        if any(entry.kind == RUN and entry.status in ("requeued", "blocked") for entry in stored.journal):
            continue
        causes, early = _relive(stored, evidence)
        yield from early
        sent: dict[tuple[str, int], int] = {}
        hosted = _hosted(stored, evidence)
        first = next((entry.seq for entry in stored.journal if _is_turn(entry)), 0)
        for entry in stored.journal:
            step = f"{run_id}:{entry.ordinal}"
            if entry.kind == REMOTE and entry.status == "dispatched":
                sent[step, entry.attempt] = entry.seq
            elif entry.kind == STEP and entry.status == "retrying":
                sent[step, entry.attempt + 1] = entry.seq
        for body in bodies[run_id]:
            needed = max(causes.get(body.step_id, 0), sent.get((body.step_id, body.attempt), 0))
            if hosted and not body.remote:
                # In a turn, whose decision may have been lost; the next may count its operations otherwise.
                needed = first
            if body.frontier < needed:
                yield (
                    f"{run_id}: {body.step_id} attempt {body.attempt} began on {body.node} at {body.began:.4f} with "
                    f"{body.frontier} entries committed; it was asked for by entry {needed}"
                )


def _relive(stored: Stored, evidence: Evidence) -> tuple[dict[str, int], list[str]]:
    """Drive the program live with the entries it was given: by which entry each step was asked for, and timers that
    fired early."""
    run_id = stored.run.id
    causes: dict[str, int] = {}
    early: list[str] = []
    machine = _machine(stored, evidence)
    try:
        for entry in stored.journal:
            if not entry.delivers or machine.outcome is not None:
                continue
            if entry.kind == TIMER:
                timer = machine.next_timer()
                if timer is None or timer.ordinal != entry.ordinal or timer.deadline > entry.at:
                    early.append(f"{run_id}: timer {entry.ordinal} fired at {entry.at}; next was {timer}")
            for command in machine.deliver(entry):
                if isinstance(command, Command) and not isinstance(command, Record):
                    causes[f"{run_id}:{command.ordinal}"] = entry.seq
    except DeterminismError:
        pass  # `replays` tells of it
    finally:
        machine.drop()
    return causes, early


def _machine(stored: Stored, evidence: Evidence) -> Machine:
    run = stored.run
    definition = workflow_of(evidence.workflows[run.workflow])
    generation = sum(1 for entry in stored.journal if entry.kind == RUN and entry.status == "requeued")
    return Machine(definition, run_id=run.id, input=run.input, generation=generation)


def _message(error: bytes | None) -> Any:
    return None if error is None else msgspec.json.decode(error).get("message")


# ------------------------------------------------------------------ hosted


def decided_once(evidence: Evidence) -> Iterator[str]:
    """A turn has one decision, that of the very task which was awaited; and it is one commit with the steps it recorded."""
    boundaries: dict[str, set[int]] = defaultdict(set)
    for line in evidence.log:
        if line.what == "commit" and line.status == "done" and not line.last:
            boundaries[line.run_id].add(line.seq)
    for run_id, stored in evidence.runs.items():
        if not _hosted(stored, evidence):
            continue
        decided: set[str] = set()
        recorded: set[int] = set()
        for index, entry in enumerate(stored.journal):
            if entry.kind == RUN and entry.status == "requeued":
                recorded.clear()  # what failed is asked for again
            if not _is_turn(entry) or entry.status != "completed":
                continue
            decision = msgspec.json.decode(entry.payload or b"{}", type=WorkflowDecision)
            awaited = turn_id(run_id, (entry.ordinal or 0) - TURNS, entry.attempt)
            if decision.task_id != awaited:
                yield f"{run_id}: {entry.key} attempt {entry.attempt} awaited {awaited}, and took {decision.task_id}"
            if decision.task_id in decided:
                yield f"{run_id}: {decision.task_id} was decided twice"
            decided.add(decision.task_id)
            new = {c.seq for c in decision.commands if isinstance(c, RecordStep)} - recorded
            recorded |= new
            for behind in stored.journal[index + 1 :]:
                if not new or (behind.kind == RUN and behind.status != "started"):
                    break  # its end: a decision that makes no sense records nothing
                if behind.kind == STEP:
                    new.discard(behind.ordinal or 0)
                if behind.seq - 1 in boundaries[run_id]:
                    yield f"{run_id}: entry {behind.seq} was committed after the decision {entry.seq} that it belongs to"
                    break


def slept_enough(evidence: Evidence) -> Iterator[str]:
    """S21: hosted code sleeps as long as it asked to, whatever its worker's clock says. It asked when it heard of something,
    which came after the turn before was sent. (That no timer fires before it is due is `behind_the_barrier`'s.)"""
    for run_id, stored in evidence.runs.items():
        if not _hosted(stored, evidence) or any(entry.status == "requeued" for entry in stored.journal):
            continue
        sent: dict[str, int] = {}
        before = stored.journal[0].at
        for entry in stored.journal:
            if not _is_turn(entry) or entry.key is None:
                continue
            if entry.status == "dispatched":
                sent.setdefault(entry.key, entry.at)
            elif entry.status == "completed":
                for command in msgspec.json.decode(entry.payload or b"{}", type=WorkflowDecision).commands:
                    seconds = evidence.sleeps.get((run_id, command.seq))
                    if isinstance(command, Sleep) and seconds is not None:
                        lasts = (entry.at - before) / SECOND + command.ms / 1_000
                        if lasts < seconds - 0.002:
                            yield f"{run_id}: sleep {command.seq} of {seconds} s is over after {lasts} s"
                before = sent[entry.key]


def hosted_agrees(evidence: Evidence) -> Iterator[str]:
    """The workflow's code, given all that the journal says came to pass, ends as the run did."""
    ended = [
        (run_id, stored)
        for run_id, stored in evidence.runs.items()
        if stored.run.status in (Status.COMPLETED, Status.FAILED)
        and _hosted(stored, evidence)
        and not _may_block(evidence, stored.run.tags)  # of a bad deploy's code nothing is left
    ]
    if not ended:
        return
    handler = TurnHandler(Registry(CODE), SystemClock(), threads=0)
    loop = asyncio.new_event_loop()
    try:
        for run_id, stored in ended:
            if any(entry.kind == RUN and entry.status in ("requeued", "timed_out") for entry in stored.journal):
                continue
            task = _last_turn(stored, evidence)
            if task is None:
                continue
            decision = loop.run_until_complete(handler(task))
            assert isinstance(decision, WorkflowDecision)
            output = bytes(decision.output) if isinstance(decision.output, msgspec.Raw) else b"null"
            error = None if decision.error is None else decision.error.message
            if decision.status != stored.run.status.value:
                yield f"{run_id} is {stored.run.status.value}, and its code comes to {decision.status} {error or ''}"
            elif decision.status == "completed" and output != stored.run.output:
                yield f"{run_id} has output {stored.run.output!r}, and its code returns {output!r}"
            elif decision.status == "failed" and error != _message(stored.run.error):
                yield f"{run_id} failed with {stored.run.error!r}, and its code with {error!r}"
    finally:
        loop.close()


def _last_turn(stored: Stored, evidence: Evidence) -> WorkflowTask | None:
    """A turn with all that the worker had been told of when it ended the run."""
    machine, run = _machine(stored, evidence), stored.run
    turn: TakeTurn | None = None
    try:
        for entry in stored.journal:
            if not entry.delivers or machine.outcome is not None:
                continue
            for command in machine.deliver(entry):
                if isinstance(command, TakeTurn):
                    turn = command
    except DeterminismError:
        return None  # `replays` tells of it
    finally:
        machine.drop()
    if turn is None:
        return None
    return WorkflowTask(
        task_id="last",
        run_id=run.id,
        workflow=run.workflow,
        workflow_version=run.version,
        input=msgspec.Raw(run.input),
        history=sorted(turn.history, key=lambda item: item.seq),
        group="",
        attempt=1,
        at=turn.started_at // 1_000,
        started_at=turn.started_at // 1_000,
        seen=turn.seen,
        patches=list(turn.patches) or None,
        logs=turn.logs or None,
    )


def lines_once(evidence: Evidence) -> Iterator[str]:
    """Each line of an attempt that counted is journaled once, under its index, and none behind the attempt's end."""
    said: dict[tuple[str, int], list[list[str]]] = defaultdict(list)
    for body in evidence.bodies:
        if body.remote:
            said[body.step_id, body.attempt].append(body.said)
    for run_id, stored in evidence.runs.items():
        lines: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
        over: set[tuple[str, int]] = set()
        for entry in stored.journal:
            if entry.kind == RUN and entry.status == "requeued":
                lines.clear()
            if entry.key is None:
                continue
            attempt = entry.key, entry.attempt
            if entry.kind == LOG and entry.attempt:
                index, text = entry.ordinal or 0, msgspec.json.decode(entry.payload or b"{}")["message"]
                if index in lines[attempt]:
                    yield f"{run_id}: line {index} of {attempt} is there twice"
                if attempt in over:
                    yield f"{run_id}: line {index} of {attempt} came behind its end"
                lines[attempt][index] = text
            elif entry.kind == REMOTE and entry.status in ("completed", "failed", "retrying") and not _is_turn(entry):
                bodies = said[f"{run_id}:{entry.ordinal}", entry.attempt]
                told = lines[attempt]
                if any(text not in {b[i] for b in bodies if i < len(b)} for i, text in told.items()):
                    yield f"{run_id}: {attempt} has lines that nobody said: {told}"
                if not _by_body(entry):
                    continue  # the late answer may still bring them
                over.add(attempt)
                count = max((len(body) for body in bodies), default=0)
                if sorted(told) != list(range(count)):
                    yield f"{run_id}: of {count} lines of {attempt}, {sorted(told)} are there"


def _by_body(entry: Entry) -> bool:
    """Whether the attempt ended as its body did: otherwise its lines may be lost with it."""
    return entry.status == "completed" or b"s planned" in (entry.payload or b"")


# ------------------------------------------------------------------ messages


def events_once(evidence: Evidence) -> Iterator[str]:
    """S17 to S20, D3: an event comes to a run once, accepted since the run began, by a name that it waited for; one of its own is
    stored under the id that its call was answered with; an acknowledged one is there, and none is left unsettled."""
    for run_id, stored in evidence.runs.items():
        names = {wait.key: wait for wait in stored.journal if wait.kind == WAIT and wait.status == "opened"}
        heard = [entry for entry in stored.journal if entry.kind == EVENT]
        for key, times in Counter(entry.key for entry in heard).items():
            if times > 1:
                yield f"{run_id} journaled {key} {times} times"
        for entry in heard:
            event = evidence.events.get((entry.key or "").removeprefix("event:"))
            if event is None:
                yield f"{run_id} journaled {entry.key}, which nobody published"
            elif event.name != entry.name or event.received_at < stored.run.created_at:
                yield f"{run_id} journaled {entry.key}, which is none of its business"
            elif not any(wait.name == event.name and wait.seq < entry.seq for wait in names.values()):
                yield f"{run_id} journaled {entry.key}, and had never waited for {event.name}"
        for entry in stored.journal:
            if entry.kind == EMIT and entry.status == "completed":
                event_id = msgspec.json.decode(entry.payload or b"null")
                if event_id not in evidence.events:
                    yield f"{run_id} was told that its event is {event_id}, which is not stored"
    for event_id in evidence.events:
        sender, _, ordinal = event_id.rpartition(".event.")
        if sender and sender not in evidence.runs:
            yield f"event {event_id} is of a run that is not there"
        if sender and not ordinal.isdigit():
            yield f"event {event_id} has an id that no call could have"
    keys = {event.dedupe_id for event in evidence.events.values()}
    for call in evidence.history if keys else ():
        if call.what == "publish" and call.outcome == "ok" and call.detail not in keys:
            yield f"{call.detail} was published and acknowledged, and is not stored"
    if left := [event.id for event in evidence.events.values() if not event.settled]:
        yield f"events that nobody has settled: {left[:5]}"


def signals_once(evidence: Evidence) -> Iterator[str]:
    """S16 to S18: an acknowledged signal is stored, and journaled once by the run that read that far; none is invented."""
    for run_id, stored in evidence.runs.items():
        journaled = Counter(entry.key for entry in stored.journal if entry.kind == SIGNAL)
        rows = {row.message.id: row for row in stored.inbox if row.message.kind == "signal"}
        for message_id, times in journaled.items():
            if times > 1:
                yield f"{run_id} journaled {message_id} {times} times"
            if message_id not in rows:
                yield f"{run_id} journaled {message_id}, which nobody sent"
        for message_id, row in rows.items():
            if row.number <= stored.run.inbox_read and not journaled[message_id]:
                yield f"{run_id} has read {message_id} and not journaled it"
    for call in evidence.history:
        if call.what == "signal" and call.outcome == "ok" and call.run_id in evidence.runs:
            stored = evidence.runs[call.run_id]
            if all(row.message.id != f"signal:{call.detail}" for row in stored.inbox):
                yield f"{call.run_id}: signal {call.detail} was acknowledged and is gone"


def cancels_count(evidence: Evidence) -> Iterator[str]:
    """A cancel that was acknowledged is stored, and taken to heart by a run that read it; S23."""
    for call in evidence.history:
        if call.what != "cancel" or call.outcome != "ok" or call.run_id not in evidence.runs:
            continue
        stored = evidence.runs[call.run_id]
        row = next((row for row in stored.inbox if row.message.kind == "cancel"), None)
        if row is None:
            yield f"{call.run_id}: a cancel was acknowledged and is gone"
    for run_id, stored in evidence.runs.items():
        last = [entry.status for entry in stored.journal if entry.kind == RUN]
        read = any(row.message.kind == "cancel" and row.number <= stored.run.inbox_read for row in stored.inbox)
        if read and "cancelling" not in last and "timed_out" not in last and stored.run.status is not Status.DEAD:
            yield f"{run_id} has read a cancel and knows nothing of it: {last}"


def families(evidence: Evidence) -> Iterator[str]:
    """B47, B48: a child is there if and only if its parent journaled it, and its parent is told what became of it."""
    ended_at: dict[str, float] = {}
    closed: dict[str, bool] = {}
    """Run → whether its parent had ended when it did, and so could not be told."""
    parents = {run_id: stored.run.parent.run_id for run_id, stored in evidence.runs.items() if stored.run.parent}
    for line in evidence.log:
        if line.what == "requeue":
            ended_at.pop(line.run_id, None)
        elif line.what == "commit" and line.status == "done" and line.ends and not line.last:
            ended_at[line.run_id] = line.at
            closed[line.run_id] = parents.get(line.run_id) in ended_at
            for child, above_id in parents.items():
                if above_id == line.run_id and ended_at.get(child) == line.at:
                    closed[child] = True  # in one batch: neither came first
    for run_id, stored in evidence.runs.items():
        for entry in stored.journal:
            if entry.kind == CHILD and entry.status == "started":
                child = msgspec.json.decode(entry.payload or b"{}")["run_id"]
                if child not in evidence.runs:
                    yield f"{run_id} journaled the start of {child}, which does not exist"
        parent = stored.run.parent
        if parent is None:
            continue
        above = evidence.runs.get(parent.run_id)
        if above is None:
            yield f"{run_id} has a parent {parent.run_id} that does not exist"
            continue
        told = [row for row in above.inbox if row.message.id.startswith(f"{run_id}:outcome")]
        if stored.run.finished_at is not None and not told and not closed.get(run_id):
            yield f"{run_id} ended, and its parent {parent.run_id} was not told"
        starts = [
            entry.seq
            for entry in above.journal
            if entry.kind == CHILD and entry.status == "started" and run_id.encode() in (entry.payload or b"")
        ]
        if not starts:
            yield f"{run_id} runs, and its parent {parent.run_id} has not journaled that it started it"
        for entry in above.journal:
            if entry.kind == CHILD and entry.status == "completed" and entry.key == parent.key:
                rows = [row.message.payload for row in above.inbox if row.message.key == parent.key]
                if entry.payload not in rows:
                    yield f"{parent.run_id} took a result of {run_id} that it was not told"


def observed(evidence: Evidence) -> Iterator[str]:
    """What a client was told of an end is what is stored, unless the run was reopened since."""
    reopened = {line.run_id for line in evidence.log if line.what == "requeue"}
    for call in evidence.history:
        if call.what != "wait" or call.outcome != "ok" or call.run_id in reopened or call.run_id not in evidence.runs:
            continue
        run = evidence.runs[call.run_id].run
        status, output = msgspec.json.decode(call.detail)
        stored = msgspec.json.decode(run.output or b"null")
        if (status, output) != (run.status.value, stored):
            yield f"a client was told that {call.run_id} is {status} {output!r}; it is {run.status.value} {stored!r}"


def dead_by_count(evidence: Evidence) -> Iterator[str]:
    """S32: dead if and only if the attempts were used up."""
    crashed = Counter(line.run_id for line in evidence.log if line.what == "claim" and line.status == "crashed")
    for run_id, stored in evidence.runs.items():
        if stored.run.status is Status.DEAD and crashed[run_id] <= 6:
            yield f"{run_id} is dead after {crashed[run_id]} crashes"


CHECKS = (
    went_on,
    settled,
    started_once,
    pruned_rightly,
    fenced,
    absorbing,
    ambiguous,
    dense,
    in_time,
    watched,
    tidy,
    committed_once,
    retried_by_policy,
    replays,
    behind_the_barrier,
    decided_once,
    slept_enough,
    hosted_agrees,
    lines_once,
    signals_once,
    events_once,
    cancels_count,
    families,
    observed,
    dead_by_count,
)
