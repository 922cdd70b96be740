"""`durable runs`: acting on one run: cancel, pause, resume, rerun, fork, signal, requeue. Nothing is executed here: whoever owns
the run, or takes the new one, does it."""

from __future__ import annotations

import sys
from typing import Any

import click

from durable.cli.node import api_node, find_run, go, json_option, store_option
from durable.cli.output import Exit, Problem, show_json
from durable.cli.runs import runs
from durable.cli.text import safe, shorten


@runs.command()
@click.argument("run_id", metavar="ID")
@click.option("--reason", default="", help="Kept in the run's journal.")
@click.option("--children", is_flag=True, help="And everything it has started, and what they have.")
@json_option
@store_option
def cancel(run_id: str, reason: str, children: bool, as_json: bool, store: str) -> None:
    """Ask a run to stop. It may clean up first; `durable runs watch ID` shows how it goes.

    Its children are cancelled as their parent's code says; with --children all of them are, and theirs. A paused run goes
    on for it.

    \b
    Examples:
      durable runs cancel a3b4 --reason "customer withdrew"
      durable runs cancel a3b4 --children
    """
    go(_cancel(store, run_id, reason, children, as_json))


async def _cancel(store: str, part: str, reason: str, children: bool, as_json: bool) -> None:
    async with api_node(store) as app:
        run = await find_run(app, part)
        first = await app.run(run.id).cancel(reason, children=children)
    if as_json:
        show_json({"id": run.id, "cancelled": first, "alreadyAsked": not first, "children": children})
    elif first:
        click.echo(f"Run {safe(run.id)}{' and all below it are' if children else ' is'} asked to stop.")
    else:
        click.echo(f"Run {safe(run.id)} had been asked before.")


# ------------------------------------------------------------------ pause, resume

by_option = click.option(
    "--by", metavar="NAME", envvar="DURABLE_USER", default="", show_envvar=True, help="Who; kept in the run's journal."
)


@runs.command()
@click.argument("run_id", metavar="ID")
@by_option
@click.option("--reason", default="", help="Kept in the run's journal.")
@json_option
@store_option
def pause(run_id: str, by: str, reason: str, as_json: bool, store: str) -> None:
    """Have a run begin nothing more. What is under way finishes and is recorded; what comes for it waits.

    \b
    Examples:
      durable runs pause a3b4 --by ann --reason "the bank is down"
      durable runs list --activity paused
    """
    go(_pause(store, run_id, by, reason, as_json))


async def _pause(store: str, part: str, by: str, reason: str, as_json: bool) -> None:
    async with api_node(store) as app:
        run = await find_run(app, part)
        first = await app.run(run.id).pause(by=by, reason=reason)
    if as_json:
        show_json({"id": run.id, "paused": first, "alreadyAsked": not first})
    elif first:
        click.echo(f"Run {safe(run.id)} is asked to pause. Go on with: durable runs resume {safe(run.id)}")
    else:
        click.echo(f"Run {safe(run.id)} is paused, or had been asked to.")


@runs.command()
@click.argument("run_id", metavar="ID")
@click.option(
    "--timers",
    type=click.Choice(("run", "hold")),
    default="run",
    show_default=True,
    help="run: deadlines went on, what is overdue is due at once. hold: all are later by the length of the pause.",
)
@by_option
@json_option
@store_option
def resume(run_id: str, timers: str, by: str, as_json: bool, store: str) -> None:
    """Have a paused run go on.

    \b
    Examples:
      durable runs resume a3b4
      durable runs resume a3b4 --timers hold
    """
    go(_resume(store, run_id, timers, by, as_json))


async def _resume(store: str, part: str, timers: Any, by: str, as_json: bool) -> None:
    async with api_node(store) as app:
        run = await find_run(app, part)
        resumed = await app.run(run.id).resume(by=by, timers=timers)
    if as_json:
        show_json({"id": run.id, "resumed": resumed})
    else:
        click.echo(f"Run {safe(run.id)} goes on." if resumed else f"Run {safe(run.id)} is not paused.")


# ------------------------------------------------------------------ rerun, fork

key_option = click.option(
    "--key", metavar="KEY", help="Makes it repeatable: the same key again finds the same new run."
)


@runs.command()
@click.argument("run_id", metavar="ID")
@click.option("--from-step", metavar="KEY", help="Keep what was before this step; ask it again, and all behind it.")
@click.option("--input", "input_json", metavar="JSON", help='Another input ("-" reads it from stdin).')
@key_option
@json_option
@store_option
def rerun(
    run_id: str, from_step: str | None, input_json: str | None, key: str | None, as_json: bool, store: str
) -> None:
    """Run a finished run again, as a new one of the same version: all of it, or from one of its steps on.

    \b
    Examples:
      durable runs rerun a3b4
      durable runs rerun a3b4 --from-step charge
      durable runs rerun a3b4 --input '{"order": 17}' --key mend-17
    """
    go(_rerun(store, run_id, from_step, input_json, key, as_json))


async def _rerun(
    store: str, part: str, from_step: str | None, input_json: str | None, key: str | None, as_json: bool
) -> None:
    given = {} if input_json is None else {"input": json_of(input_json)}
    async with api_node(store) as app:
        run = await find_run(app, part)
        new = await app.rerun(run.id, from_step=from_step, idempotency_key=key, **given)
    _tell_new(run.id, new.id, "rerun", from_step, as_json)


@runs.command()
@click.argument("run_id", metavar="ID")
@click.option("--step", metavar="KEY", help="Go on behind this step, with another result.")
@click.option("--result", "result_json", metavar="JSON", help='What that step is to have returned ("-": stdin).')
@click.option("--input", "input_json", metavar="JSON", help='Another input ("-": stdin).')
@click.option("--from-step", metavar="KEY", help="With --input: keep the results before this step.")
@key_option
@json_option
@store_option
def fork(
    run_id: str,
    step: str | None,
    result_json: str | None,
    input_json: str | None,
    from_step: str | None,
    key: str | None,
    as_json: bool,
    store: str,
) -> None:
    """Begin a new run as this one did, but for one thing: another input, or another result of one step.

    The run itself stays as it is, and may still be active.

    \b
    Examples:
      durable runs fork a3b4 --step charge --result '{"cents": 1200}'
      durable runs fork a3b4 --input '{"order": 17}' --from-step ship
    """
    edits = {"step": step, "from_step": from_step}
    edits |= {
        name: json_of(text) for name, text in (("result", result_json), ("input", input_json)) if text is not None
    }
    chosen = {name: value for name, value in edits.items() if value is not None or name in ("result", "input")}
    go(_fork(store, run_id, chosen, key, as_json))


async def _fork(store: str, part: str, edits: dict[str, Any], key: str | None, as_json: bool) -> None:
    async with api_node(store) as app:
        run = await find_run(app, part)
        new = await app.fork(run.id, edits, idempotency_key=key)
    _tell_new(run.id, new.id, "fork", edits.get("step") or edits.get("from_step"), as_json)


def _tell_new(old: str, new: str, kind: str, step: str | None, as_json: bool) -> None:
    if as_json:
        show_json({"id": new, "replayOf": old, "fromStep": step, "kind": kind})
        return
    since = f" from step {safe(step)}" if step else ""
    click.echo(f"Run {safe(new)} is a {kind} of {safe(old)}{since}. Follow it: durable runs watch {safe(new)}")


# ------------------------------------------------------------------ signal, requeue


@runs.command()
@click.argument("run_id", metavar="ID")
@click.argument("name")
@click.argument("payload", metavar="[JSON]", default="null")
@click.option("--id", "signal_id", metavar="ID", help="Makes it repeatable: the same id again changes nothing.")
@json_option
@store_option
def signal(run_id: str, name: str, payload: str, signal_id: str | None, as_json: bool, store: str) -> None:
    """Send a signal with a JSON payload ("-" reads it from stdin). It is kept even if the run does not wait for it yet.

    \b
    Examples:
      durable runs signal a3b4 approve
      durable runs signal a3b4 approve '{"by": "ann"}' --id approval-17
      jq .decision file.json | durable runs signal a3b4 approve -
    """
    go(_signal(store, run_id, name, payload, signal_id, as_json))


async def _signal(store: str, part: str, name: str, payload: str, signal_id: str | None, as_json: bool) -> None:
    value = json_of(payload)
    async with api_node(store) as app:
        run = await find_run(app, part)
        new = await app.run(run.id).signal(name, value, id=signal_id)
    if as_json:
        show_json({"id": run.id, "signal": name, "accepted": new, "duplicate": not new})
    elif new:
        click.echo(f"Signal {safe(name)} is kept for run {safe(run.id)}.")
    else:
        click.echo(f"Signal {safe(name)} with this id was sent before; nothing changed.")


@runs.command()
@click.argument("run_id", metavar="ID")
@json_option
@store_option
def requeue(run_id: str, as_json: bool, store: str) -> None:
    """Reopen a dead or failed run where it stopped, or have a blocked one looked at again.

    What it had finished stays finished; a failed run asks again for what failed it.

    \b
    Examples:
      durable runs requeue a3b4
      durable runs list --status dead --json | jq -r '.runs[].id' | xargs -n1 durable runs requeue
    """
    go(_requeue(store, run_id, as_json))


async def _requeue(store: str, part: str, as_json: bool) -> None:
    from durable.cli.view import state

    async with api_node(store) as app:
        before = await find_run(app, part)
        await app.requeue(before.id)
        run = await app.get(before.id)
    reopened = run.epoch > before.epoch
    if as_json:
        show_json({"id": run.id, "requeued": reopened, "status": run.status, "activity": run.activity})
    elif reopened:
        click.echo(
            f"Run {safe(run.id)} was {state(before).plain} and is {state(run).plain}; the next free engine takes it."
        )
    else:
        click.echo(f"Run {safe(run.id)} is {state(run).plain}: there is nothing to reopen.")


def json_of(given: str) -> Any:
    """A JSON value from the command line; "-" reads it from stdin. Raises Problem."""
    import msgspec

    text = sys.stdin.read() if given == "-" else given
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise Problem(
            f"{shorten(safe(text), 60)} is not JSON ({safe(error)}). Text needs quotes inside the shell's: '\"yes\"'.",
            code="bad_json",
            exit=Exit.USAGE,
        ) from None
