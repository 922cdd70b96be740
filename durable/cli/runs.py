"""`durable runs`: looking at runs: list, show, watch. What acts on them is in cli/actions.py, what acts on many in cli/bulk.py.
An API node on the store: nothing is executed here."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from durable.cli.node import api_node, find_run, go, json_option, store_option
from durable.cli.output import EXIT_HELP, Exit, console, show_json, show_table
from durable.cli.text import ago, moment, pretty, preview, safe, span

if TYPE_CHECKING:
    from durable.app import Durable
    from durable.cli.view import Teller
    from durable.core.journal import Entry
    from durable.store.records import RunPage, RunQuery, RunRecord

# Written out so that --help imports no engine; a test compares them with protocol/states.
STATUSES = ("active", "completed", "failed", "cancelled", "dead", "compensation_failed")
ACTIVITIES = (
    "executing",
    "queued",
    "waiting",
    "sleeping",
    "scheduled",
    "retrying",
    "paused",
    "blocked",
    "cancelling",
)


@click.group(epilog=EXIT_HELP)
def runs() -> None:
    """Look at runs and act on them. Nothing is executed here.

    An ID may be a part of one: its beginning or its end, at least 4 characters, if only one run has it.
    """


# ------------------------------------------------------------------ list


@runs.command("list")
@click.option("--status", type=click.Choice(STATUSES), help="What became of them.")
@click.option("--activity", type=click.Choice(ACTIVITIES), help="What active ones are doing.")
@click.option("--workflow", metavar="NAME", help="Only runs of this workflow.")
@click.option("--tag", metavar="TAG", help="Only runs with this tag.")
@click.option("--key", metavar="KEY", help="Only runs started with this idempotency key.")
@click.option("--parent", metavar="ID", help="Only children of this run.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="At most so many.")
@click.option("--cursor", metavar="ID", help="Go on after this id: what the page before ended with.")
@json_option
@store_option
def list_runs(store: str, as_json: bool, limit: int, **filters: str | None) -> None:
    """List runs, newest first.

    \b
    Examples:
      durable runs list --status active
      durable runs list --workflow order --tag eu --limit 100
      durable runs list --status failed --json | jq -r '.runs[].id'
    """
    go(_list(store, as_json, limit, filters))


async def _list(store: str, as_json: bool, limit: int, filters: dict[str, str | None]) -> None:
    from durable.cli.shape import run_shape

    async with api_node(store) as app:
        parent = filters["parent"]
        if parent is not None:
            parent = (await find_run(app, parent)).id
        page = await app.find(_query(limit, filters, parent))
        now = app.engine.clock.now()
    if as_json:
        show_json({"runs": [run_shape(run, payloads=False) for run in page.runs], "cursor": page.cursor})
        return
    _show_list(page, now)


def _query(limit: int, filters: dict[str, str | None], parent: str | None) -> RunQuery:
    from durable.protocol.states import Activity, Status
    from durable.store.records import RunQuery

    status, activity = filters["status"], filters["activity"]
    return RunQuery(
        workflow=filters["workflow"],
        status=Status(status) if status else Status.ACTIVE if activity else None,
        activity=Activity(activity) if activity else None,
        tag=filters["tag"],
        idempotency_key=filters["key"],
        parent=parent,
        cursor=filters["cursor"],
        limit=limit,
    )


def _show_list(page: RunPage, now: int) -> None:
    from rich.text import Text

    from durable.cli.view import error_line, error_of, kind_of, state

    if not page.runs:
        click.echo("No runs.")
        return
    rows = []
    for run in page.runs:
        error = error_of(run.error)
        note = error_line(error, 300) if error else safe(", ".join(run.tags))
        took = span((run.finished_at or now) - run.created_at)
        rows.append(
            [
                Text(safe(run.id)),
                Text(kind_of(run), style="bold"),
                state(run),
                Text(ago(run.created_at, now), style="dim"),
                Text(took, style="dim"),
                Text(safe(run.idempotency_key or "")),
                Text(note, style="red" if error else "dim"),
            ]
        )
    headers = ("ID", "WORKFLOW", "STATE", "STARTED", "TOOK", "KEY", "NOTE")
    show_table(headers, rows)
    if page.cursor is not None:
        click.echo(f"More: --cursor {safe(page.cursor)}", err=True)


# ------------------------------------------------------------------ show


@runs.command()
@click.argument("run_id", metavar="ID")
@json_option
@store_option
def show(run_id: str, as_json: bool, store: str) -> None:
    """Show one run: its row, its state, its journal as a timeline, its errors, its output.

    The timeline says of every step how long it waited (in a queue, for its retry) and how long it ran.

    \b
    Examples:
      durable runs show 01990a7e-5f0c-7d52-9a53-2c8e91f0a3b4
      durable runs show a3b4                      the run whose id ends so
      durable runs show a3b4 --json | jq '.journal[].kind'
    """
    go(_show(store, run_id, as_json))


async def _show(store: str, part: str, as_json: bool) -> None:
    from durable.cli.shape import entry_shape, run_shape

    async with api_node(store) as app:
        run = await find_run(app, part)
        journal: list[Entry] = []
        while entries := await app.engine.deps.store.page(run.id, journal[-1].seq if journal else 0, 500):
            journal += entries
        children = await app.engine.deps.store.children(run.id)
        run = await app.get(run.id)
        now = app.engine.clock.now()
    if as_json:
        shape = run_shape(run) | {
            "journal": [entry_shape(run.id, entry) for entry in journal],
            "children": [child.id for child in children],
        }
        show_json(shape)
        return
    _show_run(run, journal, children, now)


def _show_run(run: RunRecord, journal: list[Entry], children: list[RunRecord], now: int) -> None:
    from rich.text import Text

    from durable.cli.view import Teller, error_line, error_of, executing_time, kind_of, show_row, stack_of, state
    from durable.core.origin import origin_of

    out = console()
    teller = Teller()
    rows = [teller.tell(entry) for entry in journal]
    end = run.finished_at or now
    ran = executing_time(teller.executing)

    def field(name: str, value: Text | str) -> None:
        out.print(Text(f"{name:<10}", style="dim").append_text(Text(value) if isinstance(value, str) else value))

    out.print(Text(f"Run {safe(run.id)}", style="bold"))
    field("workflow", kind_of(run))
    field("state", state(run))
    field("started", f"{moment(run.created_at)} ({ago(run.created_at, now)})")
    if run.finished_at is not None:
        field("finished", f"{moment(run.finished_at)} ({ago(run.finished_at, now)})")
    elif run.owner is None and run.wake_at is not None:
        field("wakes", f"{moment(run.wake_at)} ({ago(run.wake_at, now)}), sooner if something arrives for it")
    field(
        "took",
        f"{span(end - run.created_at)}: {span(ran)} executing, {span(max(0, end - run.created_at - ran))} waiting",
    )
    if run.idempotency_key is not None:
        field("key", safe(run.idempotency_key))
    if run.tags:
        field("tags", safe(", ".join(run.tags)))
    for name, value in run.attributes.items():
        field("attribute", safe(f"{name}={value}"))
    origin = origin_of(run.meta)
    if origin.replay_of is not None:
        since = f" from step {origin.from_step}" if origin.from_step is not None else ""
        field("origin", safe(f"{origin.trigger_kind} of {origin.replay_of}{since}"))
    if run.parent is not None:
        field("parent", safe(f"{run.parent.run_id} ({run.parent.key})"))
    for child in children:
        field("child", Text(f"{safe(child.id)} {kind_of(child)} ").append_text(state(child)))
    if run.epoch > 1:
        field("taken up", f"{run.epoch} times: after waits that left memory, and by engines that took over from others")
    if run.recovery_attempts:
        field("crashes", f"{run.recovery_attempts} in a row while it was executing")
    _show_value("input", run.input)

    out.print(Text("\nTimeline", style="bold"))
    if not rows:
        out.print(Text("  nothing yet: no engine has taken it", style="dim"))
    for row in rows:
        show_row(out, row, run.created_at)
        if row.error is not None and row.entry.status == "failed" and row.error.stack:
            out.print(Text("\n".join(f"{'':>20}{line}" for line in stack_of(row.error).splitlines()), style="dim red"))
    error = error_of(run.error)
    if error is not None:
        out.print(Text("\nError  ", style="bold red").append(error_line(error, 4000), style="red"))
        if error.stack:
            out.print(Text(stack_of(error), style="dim red"))
    if run.output is not None:
        _show_value("\nOutput", run.output)
    remedy = _remedy(run)
    if remedy:
        out.print(Text(f"\n{remedy}", style="yellow"))


def _show_value(name: str, payload: bytes) -> None:
    from rich.text import Text

    text = pretty(payload)
    head = Text(f"{name:<10}", style="bold" if name.startswith("\n") else "dim")
    short = preview(payload, 10_000) or text
    body = short if len(short) <= 90 else "".join(f"\n  {line}" for line in text.splitlines())
    console().print(head.append(body, style=""))


def _remedy(run: RunRecord) -> str:
    if run.status == "active" and run.activity == "paused":
        return f"Paused: it begins nothing until somebody says durable runs resume {safe(run.id)}"
    if run.status == "active" and run.activity == "blocked":
        return (
            "Blocked: its journal and the code disagree. Deploy code that fits (ctx.patched keeps both ways); engines look\n"
            f"again when they start, or: durable runs requeue {safe(run.id)}"
        )
    if run.status in ("dead", "failed"):
        return f"When the cause is mended: durable runs requeue {safe(run.id)}"
    return ""


# ------------------------------------------------------------------ watch


@runs.command()
@click.argument("run_id", metavar="ID")
@click.option(
    "--from", "from_seq", type=click.IntRange(1), default=1, show_default=True, help="First journal row to show."
)
@click.option("--url", metavar="URL", help="Ask the service here, instead of looking into the store.")
@click.option("--key", metavar="KEY", envvar="DURABLE_KEY", show_envvar=True, help="With --url: a key of the app's.")
@json_option
@store_option
def watch(run_id: str, from_seq: int, as_json: bool, store: str, url: str | None, key: str | None) -> None:
    """Follow one run live until it ends. Exits 0 if it completed, 1 if it ended otherwise.

    On a terminal it is a tree: steps with how long they took, children's runs under them, log lines in place. In a pipe, or
    with --from, it is a line for each journal row: rows are numbered without a gap, and after a broken connection it goes on
    with --from and the next number. With --url broken connections are mended by themselves.

    \b
    Examples:
      durable runs watch a3b4
      durable runs watch a3b4 --from 17
      durable runs watch a3b4 --json | jq -c '{seq, kind, status}'
      durable runs watch 01990a7e-5f0c-7d52-9a53-2c8e91f0a3b4 --url http://127.0.0.1:3030
    """
    if url is not None:
        go(_watch_service(url, key, run_id, from_seq, as_json))
    else:
        go(_watch(store, run_id, from_seq, as_json))


async def _watch(store: str, part: str, from_seq: int, as_json: bool) -> int:
    from durable.cli.shape import entry_shape
    from durable.cli.view import Teller, kind_of

    async with api_node(store) as app:
        run = await find_run(app, part)
        if as_json:
            async for entry in app.watch(run.id, from_seq - 1):
                show_json(entry_shape(run.id, entry), indent=None)
        elif console().is_terminal and from_seq == 1:
            from durable.cli.watching import follow_tree, from_store

            await follow_tree(run.id, kind_of(run), from_store(app))
            await _show_end(app, run.id)
        else:
            await _watch_text(app, run, from_seq, Teller())
        run = await app.get(run.id)
    return Exit.OK if run.status == "completed" else Exit.FAILED


async def _watch_service(url: str, key: str | None, run_id: str, from_seq: int, as_json: bool) -> int:
    import msgspec

    from durable.cli.remote import open_service
    from durable.cli.watching import follow_tree

    async with open_service(url, key) as client:
        run = await client.runs.get(run_id)
        if as_json:
            frames = client.stream(f"/runs/{run.id}/stream", msgspec.Raw, {"from": from_seq - 1}, ends=True)
            async with aclosing(frames):
                async for frame in frames:
                    show_json(frame, indent=None)
        else:
            name = f"{run.workflow_name}@{run.version}"
            await follow_tree(run.id, name, lambda id: client.runs.watch(id, from_seq - 1 if id == run.id else 0))
        run = await client.runs.get(run.id)
        if not as_json:
            from rich.text import Text

            from durable.cli.text import shorten

            end = Text(f"Ended: {run.status.replace('_', ' ')}")
            if run.error is not None:
                kind = f"{run.error.type}: " if run.error.type else ""
                end.append(f"  {shorten(safe(kind + run.error.message), 2000)}", style="red")
            console().print(end)
            if run.result is not None:
                _show_value("output", msgspec.json.encode(run.result))
    return Exit.OK if run.status == "succeeded" else Exit.FAILED


async def _watch_text(app: Durable, run: RunRecord, from_seq: int, teller: Teller) -> None:
    from contextlib import nullcontext

    from rich.text import Text

    from durable.cli.view import kind_of, show_row, state

    out = console()
    out.print(Text(f"Run {safe(run.id)}  ", style="bold").append(kind_of(run)).append("  ").append_text(state(run)))
    with out.status("") if out.is_terminal else nullcontext() as status:

        async def tell_state() -> None:
            while status is not None:
                now = await app.get(run.id)
                status.update(state(now).append(f"  {span(app.engine.clock.now() - run.created_at)}", style="dim"))
                await asyncio.sleep(0.5)

        ticker = asyncio.create_task(tell_state())
        try:
            # Earlier rows are read too: they say since when something waits.
            async for entry in app.watch(run.id):
                row = teller.tell(entry)
                if entry.seq >= from_seq:
                    show_row(out, row, run.created_at)
        finally:
            ticker.cancel()
    await _show_end(app, run.id)


async def _show_end(app: Durable, run_id: str) -> None:
    from rich.text import Text

    from durable.cli.view import error_line, error_of, state

    out = console()
    run = await app.get(run_id)
    end = Text("Ended: ").append_text(state(run))
    error = error_of(run.error)
    if error is not None:
        end.append("  ").append(error_line(error, 2000), style="red")
    out.print(end)
    if run.output is not None:
        _show_value("output", run.output)
