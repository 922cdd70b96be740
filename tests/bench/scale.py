"""Whether size costs anything, on Postgres: a million finished runs, a hundred thousand sleeping ones, timers all at once.

    python3 dev.py bench scale [--finished 1000000] [--sleeping 100000] [--timers 2000] [--runs 3] [--quick]

finished  w1 and w2 (see `bench postgres`) on a store with that many finished five-step runs, and on an empty one, in turn
sleeping  runs started by one engine that sleep for an hour: how many a second, what the engine's memory grows by for each
          once all are cold, and how many statements the database gets in 20 s while nothing happens
timers    beside those: so many timers due within one second, and how late each workflow goes on

The finished runs are copies, made in the database, of one that an engine really ran. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import psycopg
from psycopg import sql

from tests.bench.kit.site import Failure, Process, Site, last_line, machine, median, p95, run, say, site, table

STEPS = 5
PARTS = ("finished", "sleeping")
CHUNK = 50_000
AT_ONCE = 500


def engine(url: str, **settings: Any) -> Process:
    return Process(sys.executable, "ours", url, settings=settings)


# -- finished runs


def fill(url: str, count: int) -> float:
    """Copy the one finished run in this database until there are `count`; seconds it took."""
    begun = time.perf_counter()
    with psycopg.connect(url, autocommit=True) as connection:
        schema, model = "durable", connection.execute("SELECT id FROM durable.runs").fetchone()
        assert model is not None
        for first in range(1, count, CHUNK):
            last = min(first + CHUNK, count) - 1
            for name, key in (("runs", "id"), ("journal", "run_id")):
                connection.execute(copies(connection, schema, name, key), [first, last, model[0]])
        connection.execute("VACUUM (ANALYZE)")  # as the server would have done meanwhile
        connection.execute("CHECKPOINT")
    return time.perf_counter() - begun


def copies(connection: psycopg.Connection[Any], schema: str, name: str, key: str) -> sql.Composed:
    """INSERT … SELECT of the model's rows of one table for each number; columns as the table has them now."""
    columns = connection.execute(
        "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = %s"
        " AND is_identity = 'NO' AND is_generated = 'NEVER' ORDER BY ordinal_position",
        [schema, name],
    ).fetchall()
    values = {
        # An id of the past of the shape that ids have: in the order of time, random where they are.
        key: sql.SQL(
            "'01900000-' || lpad(to_hex(n >> 16), 4, '0') || '-7' || substr(md5(n::text), 1, 3)"
            " || '-8' || substr(md5(n::text), 4, 3) || '-' || lpad(to_hex(n), 12, '0')"
        ),
        "commit_id": sql.SQL("m.commit_id || '-' || n"),
    }
    names = [column for (column,) in columns]
    picked = [values.get(column, sql.SQL("m.{}").format(sql.Identifier(column))) for column in names]
    return sql.SQL(
        "INSERT INTO {} ({}) SELECT {} FROM {} m, generate_series(%s::int, %s::int) n WHERE m.{} = %s"
    ).format(
        sql.Identifier(schema, name),
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.SQL(", ").join(picked),
        sql.Identifier(schema, name),
        sql.Identifier(key),
    )


def finished(where: Site, options: argparse.Namespace) -> dict[str, Any]:
    """Cost of a step on a full and on an empty store, in turn."""
    rates: dict[str, list[float]] = {"empty": [], "full": []}
    lone: dict[str, list[float]] = {"empty": [], "full": []}
    own: dict[str, list[float]] = {"empty": [], "full": []}
    server: dict[str, list[float]] = {"empty": [], "full": []}
    with where.database() as empty, where.database() as full:
        with engine(full) as process:
            process.ask("one")
        took = fill(full, options.finished)
        with psycopg.connect(full) as connection:
            runs, size = connection.execute(
                "SELECT (SELECT count(*) FROM durable.runs), pg_database_size(current_database())"
            ).fetchone() or (0, 0)
        say(f"\nfinished: {runs:,} runs stored in {took:.0f} s, {size / 1e9:.2f} GB")
        for _ in range(options.runs):
            for name, url in (("empty", empty), ("full", full)):
                with engine(url) as process:
                    process.ask("w1", seconds=min(2.0, options.seconds), at_once=AT_ONCE)
                    mark, cpu = where.mark(), process.cpu()
                    done = process.ask("w1", seconds=options.seconds, at_once=AT_ONCE)
                    steps = done["workflows"] * STEPS
                    rates[name].append(done["rate"])
                    own[name].append((process.cpu() - cpu) / steps * 1e6)
                    server[name].append(where.since(mark).server / steps * 1e6)
                    lone[name] += process.ask("w2", steps=50 if options.quick else 500)["ms"]
    rows = []
    for name in rates:
        cells = [median(rates[name]), median(rates[name]) * STEPS, median(own[name]), median(server[name])]
        rows.append([name, *(f"{cell:,.0f}" for cell in cells), f"{median(lone[name]):.2f}", f"{p95(lone[name]):.2f}"])
    table(["store", "w1 workflows/s", "steps/s", "own CPU µs/step", "server's", "w2 p50 ms", "p95"], rows)
    busy, alone = median(rates["empty"]) / median(rates["full"]), median(lone["full"]) / median(lone["empty"])
    cpu_ratio = sum(median(part["full"]) for part in (own, server)) / sum(
        median(part["empty"]) for part in (own, server)
    )
    say(f"  a step costs {busy:.2f} times as much under load, {alone:.2f} times alone; {cpu_ratio:.2f} times the CPU")
    return {
        "finished": runs,
        "database_bytes": size,
        "step_cost_at_1m_vs_empty": max(busy, alone),
        "w1_cost_ratio": busy,
        "w2_cost_ratio": alone,
        "cpu_cost_ratio": cpu_ratio,
        "server_cpu_us_per_step": {name: median(got) for name, got in server.items()},
        "w1_workflows_per_s": {name: median(got) for name, got in rates.items()},
        "w2_p50_ms": {name: median(got) for name, got in lone.items()},
    }


# -- sleeping runs, and timers


def sleeping(options: argparse.Namespace) -> dict[str, Any]:
    """On a server that counts statements: here it is numbers that matter, not speed."""
    hot_for, idle_for, ahead = (0.5, 1.0, 2.5) if options.quick else (5.0, 20.0, 12.0)  # ahead: these go cold as well
    with site(counting=True) as where, where.database() as url, engine(url, hot_for=hot_for) as process:
        process.ask("sleepers", count=500, seconds=3600)  # what an engine takes once is taken
        slept = process.ask("sleepers", count=options.sleeping, seconds=3600, timeout=3600)
        say(
            f"\nsleeping: {options.sleeping:,} runs started in {slept['seconds']:.1f} s"
            f" ({options.sleeping / slept['seconds']:,.0f}/s), all out of memory after {slept['settled']:.1f} s;"
            f" the engine grew by {slept['bytes_per_run']:.0f} bytes a run"
        )
        where.forget()
        cpu = process.cpu()
        process.ask("idle", seconds=idle_for)
        idle = where.statements() / idle_for
        share = (process.cpu() - cpu) / idle_for
        most = ", ".join(f"{calls / idle_for:.2f}/s {query}" for query, calls in where.asked()[:4])
        say(
            f"  idle: {idle:.2f} statements/s over {idle_for:.0f} s, {share:.2%} of a core in the engine; of these {most}"
        )
        late = process.ask("timers", count=options.timers, ahead=ahead, within=1.0)
        if late["started_ahead"] < 1:
            raise Failure("The timers could not be started before they were due. Give fewer: --timers.")
        seconds = late["seconds"]
        say(
            f"timers: {options.timers:,} due within a second; lateness p50 {median(seconds) * 1e3:.0f} ms,"
            f" p95 {p95(seconds) * 1e3:.0f} ms, last {max(seconds) * 1e3:.0f} ms"
        )
    return {
        "sleeping": options.sleeping,
        "sleepers_started_per_s": options.sleeping / slept["seconds"],
        "rss_bytes_per_sleeping_run": slept["bytes_per_run"],
        "idle_statements_per_s": idle,
        "idle_engine_cores": share,
        "timer_lateness_p50_s": median(seconds),
        "timer_lateness_p95_s": p95(seconds),
        "timer_lateness_max_s": max(seconds),
    }


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finished", type=int, help="finished runs stored (default 1000000; quick: 2000)")
    parser.add_argument("--sleeping", type=int, help="sleeping runs (default 100000; quick: 500)")
    parser.add_argument("--timers", type=int, help="timers due within a second (default 2000; quick: 100)")
    parser.add_argument("--runs", type=int, default=3, help="rounds, of which the median counts (default 3)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement of w1 (default 8)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument(
        "--quick", action="store_true", help="a glance: one short round, small numbers; no figures to quote"
    )
    options = parser.parse_args(args)
    quick = options.quick
    if quick:
        options.runs, options.seconds = 1, min(options.seconds, 0.5)
    options.finished = options.finished or (2_000 if quick else 1_000_000)
    options.sleeping = options.sleeping or (500 if quick else 100_000)
    options.timers = options.timers or (100 if quick else 2_000)
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    report: dict[str, Any] = {}
    with site() as where:
        facts = machine(where)
        if "finished" in parts:
            report |= finished(where, options)
    if "sleeping" in parts:
        report |= sleeping(options)
    facts["load_after"] = os.getloadavg()[0]
    report["machine"] = facts
    last_line(report)
    return report


if __name__ == "__main__":
    run(main)
