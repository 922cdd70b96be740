"""How fast runs are on Postgres, beside DBOS and absurd on the same server, and beside what the driver itself can do.

    python3 dev.py bench postgres [--runs 3] [--seconds 10] [--only w1,w2,floor,counts,processes,signal] [--skip-peers] [--quick]

w1         five-step workflows, many at once, each step returning about 100 bytes; one process
w2         sequential steps of one workflow, nothing else going on; beside one INSERT + COMMIT of such a row
floor      rows a second through the store's commit alone, with the whole fence; and of bare journal rows
counts     statements, commits and bytes of log for each step
processes  w1 with one, two and four engines on one database
signal     from sending a signal to the workflow going on: one engine, and across two
profile    only when asked for: the functions in which w1 spends most of an engine's CPU

One embedded server with default settings for all. Each measurement has a process and a database of its own; systems take
turns, medians count. Which concurrency suits a system is tried first. docs/benchmarks.md says what the figures mean. The
last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

from msgspec import Struct

from tests.bench.kit.site import (
    CORES,
    Mark,
    Process,
    Site,
    last_line,
    machine,
    median,
    p95,
    peers_python,
    prepare_absurd,
    run,
    say,
    site,
    table,
)

PARTS = ("w1", "w2", "floor", "counts", "processes", "signal")
EXTRA = ("profile",)
STEPS = 5
BATCH = 250
PAUSE = 0.005
"""Seconds between two signals: the run is at rest again."""


class Setting(Struct, frozen=True):
    """One way to run a system."""

    at_once: int
    options: dict[str, Any]

    def __str__(self) -> str:
        words = [f"{name} {value}" for name, value in self.options.items()]
        return ", ".join([f"{self.at_once} at once", *words])


class System(Struct, frozen=True):
    """Whom we measure, and the ways that are tried to find its best."""

    name: str
    module: str
    settings: list[Setting]
    lone: list[dict[str, Any]]
    """For one workflow alone."""


OURS = System("durable", "ours", [Setting(250, {}), Setting(500, {}), Setting(1000, {})], [{}])
DBOS = System(
    "dbos",
    "peer_dbos",
    [Setting(n, {"mode": "async"}) for n in (10, 20, 50)]
    + [Setting(20, {"mode": "async", "pool": 50}), Setting(5, {"mode": "threads"}), Setting(20, {"mode": "threads"})],
    [{"mode": "async"}, {"mode": "threads"}],
)
ABSURD = System(
    "absurd",
    "peer_absurd",
    [
        Setting(64, {"workers": 1, "concurrency": 64}),
        Setting(64, {"workers": 8, "concurrency": 8}),
        Setting(64, {"workers": 16, "concurrency": 4}),
        Setting(200, {"workers": 16, "concurrency": 4}),
        Setting(128, {"workers": 32, "concurrency": 2}),
    ],
    [{"workers": 1, "concurrency": 1}],
)


class Counted(Struct, frozen=True):
    """Where a counting server stands."""

    mark: Mark
    statements: int

    @property
    def lsn(self) -> str:
        return self.mark.lsn

    @classmethod
    def of(cls, counting: Site) -> Counted:
        """Now."""
        return cls(counting.mark(), counting.statements())


class Bench:
    """What has been found out so far."""

    def __init__(self, where: Site, options: argparse.Namespace) -> None:
        self.site = where
        self.options = options
        self.systems = [OURS] if options.skip_peers else [OURS, DBOS, ABSURD]
        self.peers = "" if options.skip_peers else peers_python()
        self.best: dict[str, Setting] = {}
        self.lone: dict[str, dict[str, Any]] = {}
        self.report: dict[str, Any] = {}

    def process(self, system: System, url: str, options: dict[str, Any]) -> Process:
        """A fresh process of a system; its tables are there."""
        if system is ABSURD:
            prepare_absurd(self.peers, url)
        return Process(sys.executable if system is OURS else self.peers, system.module, url, **options)

    # -- which setting

    def choose(self) -> None:
        """Each system's best setting, found by trying."""
        seconds = min(3.0, self.options.seconds)
        for system in self.systems:
            rates = {}
            settings = system.settings[:1] if self.options.quick else system.settings
            for number, setting in enumerate(settings):
                with self.site.database() as url, self.process(system, url, setting.options) as process:
                    self.report.setdefault("versions", {})[system.name] = process.hello["version"]
                    process.ask("w1", seconds=min(1.0, seconds), at_once=setting.at_once)
                    rates[number] = process.ask("w1", seconds=seconds, at_once=setting.at_once)["rate"]
            best = max(rates, key=lambda number: rates[number])
            self.best[system.name] = settings[best]
            alone = {}
            for number, options in enumerate(system.lone):
                if len(system.lone) > 1:
                    with self.site.database() as url, self.process(system, url, options) as process:
                        process.ask("w2", steps=20)
                        alone[number] = median(process.ask("w2", steps=100)["ms"])
            self.lone[system.name] = system.lone[min(alone, key=lambda number: alone[number], default=0)]
            tried = "; ".join(f"{settings[number]}: {rate:,.0f}" for number, rate in rates.items())
            say(f"{system.name} {self.report['versions'][system.name]}, workflows/s of w1 tried at {tried}.")
            say(f"  taken: {self.best[system.name]}; for w2: {self.lone[system.name] or 'as it is'}")
        self.report["settings"] = {name: str(setting) for name, setting in self.best.items()}

    # -- the parts

    def w1(self) -> None:
        """Throughput of one process, systems taking turns."""
        rates: dict[str, list[float]] = {system.name: [] for system in self.systems}
        costs: dict[str, list[float]] = {system.name: [] for system in self.systems}
        rows: dict[str, list[str]] = {}
        for _ in range(self.options.runs):
            for system in self.systems:
                setting = self.best[system.name]
                with self.site.database() as url, self.process(system, url, setting.options) as process:
                    process.ask("w1", seconds=min(2.0, self.options.seconds), at_once=setting.at_once)
                    mark, cpu = self.site.mark(), process.cpu()
                    done = process.ask("w1", seconds=self.options.seconds, at_once=setting.at_once)
                    used, cpu = self.site.since(mark), process.cpu() - cpu
                rates[system.name].append(done["rate"])
                steps, shares = done["workflows"] * STEPS, used.shares(cpu)
                costs[system.name].append((cpu + used.server) / steps * 1e6)
                rows[system.name] = [
                    f"{cpu / steps * 1e6:,.0f}",
                    f"{used.server / steps * 1e6:,.0f}",
                    *(f"{shares[who]:.0%}" for who in ("processes", "server", "others")),
                ]
        say(f"\nw1: five-step workflows in one process; medians of {self.options.runs}, CPU of the last round")
        head = ["", "workflows/s", "steps/s", "rounds", "CPU µs/step", "of server", "own", "server", "others"]
        lines = []
        for name, got in rates.items():
            rate = median(got)
            self.report[f"w1_{name}_workflows_per_s"] = rate
            self.report[f"w1_{name}_cpu_us_per_step"] = median(costs[name])
            spread = f"{min(got):,.0f}-{max(got):,.0f}"
            lines.append([name, f"{rate:,.0f}", f"{rate * STEPS:,.0f}", spread, *rows[name]])
        table(head, lines)
        say(f"  own, server, others: shares of the {CORES} cores; load average now {os.getloadavg()[0]:.1f}")
        for name in rates:
            if name != OURS.name:
                ratio = median(rates[OURS.name]) / median(rates[name])
                self.report[f"w1_vs_{name}"] = ratio
                cpu = median(costs[name]) / median(costs[OURS.name])
                say(f"  {ratio:.1f} times {name}, which takes {cpu:.1f} times the CPU for a step, server included")

    def w2(self) -> None:
        """One step after another in one workflow."""
        steps = 50 if self.options.quick else 500
        found: dict[str, list[float]] = {
            name: [] for name in ["INSERT + COMMIT", "Store.commit", *(one.name for one in self.systems)]
        }
        for _ in range(self.options.runs):
            with self.site.database() as url, self.process(OURS, url, {"role": "store"}) as process:
                process.ask("commits", count=50)
                found["INSERT + COMMIT"] += process.ask("commits", count=steps)["ms"]
                process.ask("lone", count=50)
                found["Store.commit"] += process.ask("lone", count=steps)["ms"]
            for system in self.systems:
                with self.site.database() as url, self.process(system, url, self.lone[system.name]) as process:
                    process.ask("w2", steps=50)
                    found[system.name] += process.ask("w2", steps=steps)["ms"]
        say(f"\nw2: {steps} sequential steps of one workflow, ms a step; all steps of {self.options.runs} rounds")
        raw = median(found["INSERT + COMMIT"])
        rows = []
        for name, ms in found.items():
            key = {"INSERT + COMMIT": "raw_commit", "Store.commit": "lone_store_commit"}.get(name, f"w2_{name}")
            self.report[f"{key}_p50_ms"], self.report[f"{key}_p95_ms"] = median(ms), p95(ms)
            rows.append([name, f"{median(ms):.2f}", f"{p95(ms):.2f}", f"{median(ms) / raw:.2f}"])
        table(["", "p50", "p95", "of a raw commit"], rows)
        self.report["w2_vs_commit"] = self.report["w2_durable_p50_ms"] / raw

    def floor(self) -> None:
        """What lies below an engine."""
        rows = 1_000 if self.options.quick else 60_000
        bare, fenced = "journal rows alone", "Store.commit, whole fence, {} in flight"
        rates: dict[str, list[float]] = {bare: []}
        costs: dict[str, tuple[float, float]] = {}

        def measure(process: Process, do: str, **told: Any) -> None:
            mark, cpu = self.site.mark(), process.cpu()
            done = process.ask(do, rows=rows, batch=BATCH, **told)
            name = fenced.format(done["in_flight"]) if "in_flight" in done else bare
            costs[name] = ((process.cpu() - cpu) / rows * 1e6, self.site.since(mark).server / rows * 1e6)
            rates.setdefault(name, []).append(done["rate"])

        for _ in range(self.options.runs):
            with self.site.database() as url, self.process(OURS, url, {"role": "store"}) as process:
                process.ask("floor", rows=min(rows, 5_000), batch=BATCH, in_flight=1)
                measure(process, "rows")
                measure(process, "floor", in_flight=1)
                measure(process, "floor", in_flight=0)
        found = {name: median(got) for name, got in rates.items()}
        floor = max(rate for name, rate in found.items() if name != bare)
        say(f"\nfloor: rows a second in batches of {BATCH} runs, one row each; medians of {self.options.runs}")
        lines = [[name, f"{rate:,.0f}", *(f"{cost:.0f}" for cost in costs[name])] for name, rate in found.items()]
        table(["", "rows/s", "own CPU µs/row", "server's"], lines)
        self.report["floor_rows_per_s"], self.report["bare_rows_per_s"] = floor, found[bare]
        if "w1_durable_workflows_per_s" in self.report:
            share = self.report["w1_durable_workflows_per_s"] * STEPS / floor
            self.report["w1_share_of_floor"] = share
            say(f"  w1 reaches {share:.0%} of the fenced rate")

    def counts(self) -> None:
        """On a server of its own, that counts: what each step costs the database."""
        say(
            "\ncounts: what the server sees for each step of w1 and w2 (a server with pg_stat_statements, not for the clock)"
        )
        seconds = min(3.0, self.options.seconds)
        rows = []
        with site(counting=True) as counting:
            for system in self.systems:
                setting = self.best[system.name]
                with counting.database() as url, self.process(system, url, setting.options) as process:
                    process.ask("w1", seconds=min(1.0, seconds), at_once=setting.at_once)
                    before = Counted.of(counting)
                    done = process.ask("w1", seconds=seconds, at_once=setting.at_once)
                    rows.append(self._counted(f"w1_{system.name}", before, counting, done["workflows"] * STEPS))
                with counting.database() as url, self.process(system, url, self.lone[system.name]) as process:
                    process.ask("w2", steps=20)
                    before = Counted.of(counting)
                    process.ask("w2", steps=100)
                    rows.append(self._counted(f"w2_{system.name}", before, counting, 100))
        table(["", "statements", "commits", "WAL bytes"], rows)

    def _counted(self, what: str, before: Counted, counting: Site, steps: int) -> list[str]:
        after = Counted.of(counting)
        found = {
            "statements": (after.statements - before.statements) / steps,
            "commits": counting.commits(before.lsn) / steps,
            "wal_bytes": counting.since(before.mark).wal_bytes / steps,
        }
        self.report[f"{what}_per_step"] = found
        return [what, f"{found['statements']:.2f}", f"{found['commits']:.2f}", f"{found['wal_bytes']:,.0f}"]

    def processes(self) -> None:
        """Several engines on one database, each starting workflows of its own."""
        numbers = (1, 2) if self.options.quick else (1, 2, 4)
        setting = self.best[OURS.name]
        rates: dict[int, list[float]] = {number: [] for number in numbers}
        shares: dict[int, dict[str, float]] = {}
        for _ in range(self.options.runs):
            for number in numbers:
                with self.site.database() as url, ExitStack() as stack:
                    engines = [stack.enter_context(self.process(OURS, url, setting.options)) for _ in range(number)]
                    together(engines, min(2.0, self.options.seconds), setting.at_once)
                    mark, cpu = self.site.mark(), sum(engine.cpu() for engine in engines)
                    rates[number].append(together(engines, self.options.seconds, setting.at_once))
                    used = self.site.since(mark)
                    shares[number] = used.shares(sum(engine.cpu() for engine in engines) - cpu)
        say(f"\nprocesses: w1 with several engines on one database; medians of {self.options.runs}")
        head = ["engines", "workflows/s", "steps/s", "engines' CPU", "server's", "others'"]
        rows = []
        for number, got in rates.items():
            self.report[f"w1_{number}_processes_workflows_per_s"] = median(got)
            parts = [f"{shares[number][who]:.0%}" for who in ("processes", "server", "others")]
            rows.append([str(number), f"{median(got):,.0f}", f"{median(got) * STEPS:,.0f}", *parts])
        table(head, rows)
        last = shares[numbers[-1]]
        busy, server = sum(last.values()), last["server"] * CORES
        if busy > 0.85:
            limit = f"the machine's {CORES} cores, which are {busy:.0%} busy (the server's part: {server:.1f} cores)"
        elif server > 0.85 * min(numbers[-1], CORES):
            limit = f"the database, which uses {server:.1f} cores"
        else:
            limit = f"waiting, for the disk or for one another: the cores are {busy:.0%} busy"
        say(f"  the limit is {limit}")
        self.report["processes_limit"] = limit

    def signal(self) -> None:
        """From the call that sends a signal until the workflow's body goes on."""
        count = 20 if self.options.quick else 200
        rows = []
        for system in self.systems:
            if system is ABSURD:
                continue  # its events are fetched by polling; there is nothing of the kind to compare
            with self.site.database() as url, self.process(system, url, self.lone[system.name]) as receiver:
                one = receiver.ask("signals", count=count, pause=PAUSE)["ms"]
                sender_options = {"role": "engine"} if system is OURS else {"role": "client"}
                with self.process(system, url, sender_options) as sender:
                    two = across(sender, receiver, count)
            for where, ms in (("one process", one), ("across two", two)):
                key = "signal" if where == "one process" else "signal_across"
                name = key if system is OURS else f"{key}_{system.name}"
                self.report[f"{name}_p50_ms"], self.report[f"{name}_p95_ms"] = median(ms), p95(ms)
                rows.append([f"{system.name}, {where}", f"{median(ms):.2f}", f"{p95(ms):.2f}"])
        say(f"\nsignal: from sending it to the waiting workflow going on, ms; {count} samples each, the run hot")
        table(["", "p50", "p95"], rows)

    def profile(self) -> None:
        """Own CPU by function and by file."""
        setting = self.best[OURS.name]
        with self.site.database() as url, self.process(OURS, url, setting.options) as process:
            process.ask("w1", seconds=min(2.0, self.options.seconds), at_once=setting.at_once)
            told = process.ask("profile", seconds=self.options.seconds, at_once=setting.at_once, top=20)
        total = told["total"]
        say(f"\nprofile: own CPU under w1, {total:.0f} µs a step; {told['samples']:,} samples")
        functions = [[name, f"{us:.1f}", f"{us / total:.1%}", f"{all_:.1f}"] for name, us, all_ in told["functions"]]
        table(["by function", "µs/step", "share", "with what it calls"], functions)
        table(["by file", "µs/step", "share"], [[file, f"{us:.1f}", f"{us / total:.1%}"] for file, us in told["files"]])


def together(engines: list[Process], seconds: float, at_once: int) -> float:
    """All at the same time: workflows a second of them all."""
    for engine in engines:
        engine.tell("w1", seconds=seconds, at_once=at_once)
    answers = [engine.answer() for engine in engines]
    return sum(answer["workflows"] for answer in answers) / max(answer["seconds"] for answer in answers)


def across(sender: Process, receiver: Process, count: int) -> list[float]:
    """Milliseconds from sending in one process to going on in another; the clock is the machine's."""
    run = receiver.ask("receive", count=count)["id"]
    took = []
    for number in range(count):
        time.sleep(PAUSE)
        receiver.tell("resumed", number=number)
        begun = sender.ask("send", id=run)["at"]
        took.append((receiver.answer()["at"] - begun) * 1e3)
    return took


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="rounds, of which the median counts (default 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of w1 (default 10)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join([*PARTS, *EXTRA])}")
    parser.add_argument("--skip-peers", action="store_true", help="Durable alone: nothing is installed")
    parser.add_argument(
        "--quick", action="store_true", help="a glance: one short round, first settings; no figures to quote"
    )
    options = parser.parse_args(args)
    if options.quick:
        options.runs, options.seconds = 1, min(options.seconds, 0.5)
    parts = options.only.split(",")
    if unknown := set(parts) - {*PARTS, *EXTRA}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join([*PARTS, *EXTRA])}")
    with site() as where:
        facts = machine(where)
        bench = Bench(where, options)
        bench.choose()
        for part in (*PARTS, *EXTRA):
            if part in parts:
                getattr(bench, part)()
        facts["load_after"] = os.getloadavg()[0]
    report = {**bench.report, "machine": facts}
    last_line(report)
    return report


if __name__ == "__main__":
    run(main)
