"""`durable runs`: acting on many runs: bulk, prune."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import click

from durable.cli.actions import by_option, json_of
from durable.cli.node import api_node, find_run, go, json_option, store_option
from durable.cli.output import Exit, Problem, show_json
from durable.cli.runs import ACTIVITIES, STATUSES, runs
from durable.cli.text import safe, shown_url

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.engine.bulk import BulkItem, BulkResult
    from durable.store.records import RunQuery


ACTIONS = ("cancel", "pause", "resume", "requeue", "rerun", "replay")
BATCH = 200
"""Runs asked between two lines of progress."""
SHOWN = 5
"""Ids and refusals named in text."""


@runs.command()
@click.argument("action", type=click.Choice(ACTIONS))
@click.option("--status", type=click.Choice(STATUSES), help="What became of them. Default: what the action is for.")
@click.option("--activity", type=click.Choice(ACTIVITIES), help="What active ones are doing.")
@click.option("--workflow", metavar="NAME", help="Only runs of this workflow.")
@click.option("--tag", metavar="TAG", help="Only runs with this tag.")
@click.option("--parent", metavar="ID", help="Only children of this run.")
@click.option(
    "--limit", type=click.IntRange(1), default=10_000, show_default=True, help="At most so many, newest first."
)
@click.option("--dry-run", is_flag=True, help="Only say how many there are, and the first of them.")
@click.option("--children", is_flag=True, help="cancel: with everything they have started.")
@click.option(
    "--timers", type=click.Choice(("run", "hold")), default="run", help="resume: as in `durable runs resume`."
)
@click.option("--from-step", metavar="KEY", help="rerun: keep what was before this step.")
@click.option("--input", "input_json", metavar="JSON", help="rerun, replay: another input.")
@click.option("--reason", default="", help="cancel, pause: kept in the runs' journals.")
@click.option("--key", default="", metavar="KEY", help="rerun, replay: another key makes other new runs.")
@by_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@store_option
def bulk(action: str, store: str, as_json: bool, yes: bool, dry_run: bool, limit: int, **given: Any) -> None:
    """Do one thing to all runs that the filters find.

    ACTION is cancel, pause, resume, requeue, rerun (again, or from a step) or replay (with another input). Safe to repeat: a run
    that was asked before is left as it is, and has one new run for each --key.

    \b
    Examples:
      durable runs bulk cancel --workflow order --tag eu --dry-run
      durable runs bulk rerun --workflow order --status failed --from-step charge --yes
      durable runs bulk pause --workflow payout --by ann --reason "the bank is down"
    """
    if not any(given[name] for name in ("status", "activity", "workflow", "tag", "parent")) and not dry_run:
        raise click.UsageError("Say which runs: --workflow, --tag, --status, --activity or --parent.")
    go(_bulk(store, action, limit, dry_run, yes, as_json, given))


async def _bulk(
    store: str, action: Any, limit: int, dry_run: bool, yes: bool, as_json: bool, given: dict[str, Any]
) -> int:
    options: dict[str, Any] = {name: given[name] for name in ("children", "timers", "from_step", "reason", "key", "by")}
    if given["input_json"] is not None:
        options["input"] = json_of(given["input_json"])
    async with api_node(store) as app:
        parent = (await find_run(app, given["parent"])).id if given["parent"] else None
        query = _found(given, parent)
        preview = await app.bulk(action, query, dry_run=True)
        if dry_run:
            _show_preview(preview, as_json)
            return Exit.OK
        count = min(limit, preview.matched)
        if count and not yes and not click.confirm(f"{action} {_runs(count)} on {shown_url(store)}?", err=True):
            raise Problem("Nothing was done.", code="not_confirmed", exit=Exit.REFUSED)
        items = await _all(app, action, query, limit, options)
    _show_done(action, items, as_json)
    return Exit.REFUSED if any(item.outcome == "refused" for item in items) else Exit.OK


def _found(given: dict[str, Any], parent: str | None) -> RunQuery:
    from durable.protocol.states import Activity, Status
    from durable.store.records import RunQuery

    return RunQuery(
        workflow=given["workflow"],
        status=Status(given["status"]) if given["status"] else None,
        activity=Activity(given["activity"]) if given["activity"] else None,
        tag=given["tag"],
        parent=parent,
    )


async def _all(app: Durable, action: Any, query: RunQuery, limit: int, options: dict[str, Any]) -> list[BulkItem]:
    import msgspec

    items: list[BulkItem] = []
    shown = sys.stderr.isatty()
    while True:
        part = await app.bulk(action, query, limit=min(BATCH, limit - len(items)), **options)
        items += part.items
        if shown:
            click.echo(f"\r{len(items):,} asked", err=True, nl=False)
        if part.cursor is None or len(items) >= limit:
            break
        query = msgspec.structs.replace(query, cursor=part.cursor)
    if shown:
        click.echo("\r\x1b[K", err=True, nl=False)
    return items


def _show_preview(found: BulkResult, as_json: bool) -> None:
    if as_json:
        show_json({"action": found.action, "dryRun": True, "matched": found.matched, "runIds": found.run_ids})
        return
    click.echo(f"{found.action} would be done to {_runs(found.matched)}.")
    for run_id in found.run_ids[:SHOWN]:
        click.echo(f"  {safe(run_id)}")
    if found.matched > SHOWN:
        click.echo(f"  and {found.matched - SHOWN:,} more")


def _show_done(action: str, items: list[BulkItem], as_json: bool) -> None:
    if as_json:
        shapes = [
            {
                "id": one.run_id,
                "outcome": one.outcome,
                "newId": one.new_run_id,
                "code": one.code,
                "message": one.message,
            }
            for one in items
        ]
        show_json({"action": action, "dryRun": False, "matched": len(items), "runs": shapes})
        return
    counts = {word: sum(item.outcome == word for item in items) for word in ("done", "unchanged", "refused")}
    told = [f"{counts['done']:,} done", f"{counts['unchanged']:,} unchanged", f"{counts['refused']:,} refused"]
    click.echo(f"{action}: {', '.join(told)}.")
    refused = [item for item in items if item.outcome == "refused"]
    for item in refused[:SHOWN]:
        click.echo(f"  {safe(item.run_id)}: {safe(item.message)}", err=True)
    if len(refused) > SHOWN:
        click.echo(f"  and {len(refused) - SHOWN:,} more", err=True)


def _runs(count: int) -> str:
    return f"{count:,} {'run' if count == 1 else 'runs'}"


# ------------------------------------------------------------------ prune

PRUNE_BATCH = 200


@runs.command()
@click.option("--older-than", metavar="DURATION", help="Those that finished longer ago than this: 30d, 12h, 1h30m.")
@click.option(
    "--keep", type=click.IntRange(0), metavar="N", help="All but the N newest finished runs of each workflow."
)
@click.option("--workflow", metavar="NAME", help="Only runs of this workflow.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@store_option
def prune(older_than: str | None, keep: int | None, workflow: str | None, yes: bool, as_json: bool, store: str) -> None:
    """Delete finished runs, with journal, messages and idempotency key. There is no way back.

    With both bounds given, a run goes that either lets go. A run stays while its parent or one of its children is active.
    Retention rules in the code are not looked at here.

    \b
    Examples:
      durable runs prune --older-than 30d
      durable runs prune --keep 1000 --workflow order --yes
    """
    from durable.core.clock import SECOND
    from durable.core.durations import seconds
    from durable.core.errors import DefinitionError

    if older_than is None and keep is None:
        raise click.UsageError("Say what may go: --older-than 30d, or --keep 1000.")
    try:
        age = None if older_than is None else int(seconds(older_than) * SECOND)
    except DefinitionError as error:
        raise click.UsageError(str(error)) from None
    bounds = ([f"older than {older_than}"] if older_than else []) + (
        [f"beyond the newest {keep}"] if keep is not None else []
    )
    which = f"of {safe(workflow)} " if workflow else ""
    if not yes and not click.confirm(
        f"Delete finished runs {which}{safe(' or '.join(bounds))} on {shown_url(store)} for good?", err=True
    ):
        raise Problem("Nothing was deleted.", code="not_confirmed", exit=Exit.REFUSED)
    go(_prune(store, age, keep, workflow, as_json))


async def _prune(store: str, age: int | None, keep: int | None, workflow: str | None, as_json: bool) -> None:
    from durable.store.records import PruneRequest

    request = PruneRequest(PRUNE_BATCH, workflow=workflow, older_than_us=age, keep=keep)
    total, count, shown = 0, PRUNE_BATCH, sys.stderr.isatty()
    async with api_node(store) as app:
        while count == PRUNE_BATCH:
            count = await app.engine.prune(request)
            total += count
            if shown:
                click.echo(f"\r{total:,} deleted", err=True, nl=False)
            await asyncio.sleep(0.01)  # engines on this store have their turn
    if shown:
        click.echo("\r\x1b[K", err=True, nl=False)
    if as_json:
        show_json({"deleted": total})
    else:
        click.echo(f"{total:,} finished {'run' if total == 1 else 'runs'} deleted.")
