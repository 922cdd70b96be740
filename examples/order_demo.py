"""The demo: orders from a CSV, an engine that is killed with -9 again and again, and the books that balance all the same.

    python3 dev.py demo

This process only conducts. It starts the orders and looks on; the engine (examples/orders.py) is a process of its own,
which it kills at moments told by the ledger, a file the engine knows nothing about, and starts again. In the end the same
ledger says what happened.
"""

from __future__ import annotations

import asyncio
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".durable" / "demo"
CSV = ROOT / "examples" / "orders.csv"
os.environ["ORDERS_HOME"] = str(HOME)
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from orders import STORE, Order, fulfil, shop  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from durable import Durable, DurableError  # noqa: E402
from durable.cli.feed import Feed  # noqa: E402
from durable.cli.text import clock, safe  # noqa: E402
from durable.cli.view import EventPrinter  # noqa: E402

GIVE_UP_AFTER = 120.0
"""Seconds. Normally it takes about ten."""

UNDER_WAY = """
  SELECT count(*) FROM facts b WHERE b.kind = 'began' AND b.pid = ? AND b.step LIKE ?
     AND NOT EXISTS (SELECT 1 FROM facts e WHERE e.kind = 'ended' AND e.pid = b.pid AND e.step = b.step
                                             AND e.order_id = b.order_id AND e.number > b.number)"""
MONEY_MOVED = """
  SELECT c.order_id FROM facts c WHERE c.kind = 'charged' AND c.pid = ?
     AND NOT EXISTS (SELECT 1 FROM facts e WHERE e.kind = 'ended' AND e.step = 'charge' AND e.order_id = c.order_id
                                             AND e.number > c.number)"""
BETWEEN = """
  SELECT count(*) FROM facts r WHERE r.kind = 'ended' AND r.step = ?
     AND NOT EXISTS (SELECT 1 FROM facts n WHERE n.kind = 'began' AND n.step = ? AND n.order_id = r.order_id)"""


class Engine:
    """The engine's process."""

    def __init__(self) -> None:
        self.kills = 0
        self._log = (HOME / "engine.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def gone(self) -> bool:
        """It ended without being told to."""
        return self._process is None or self._process.poll() is not None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "orders.py")], stdout=self._log, stderr=self._log
        )

    def kill(self) -> None:
        """SIGKILL: no clean-up, no last words."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.kills += 1

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._process.kill()
            self._process.wait()
        self._log.close()


class Demo:
    """One performance."""

    def __init__(self) -> None:
        self.ledger = shop.ledger
        self.console = Console(
            highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200
        )
        self.engine = Engine()
        self.accepted: dict[str, str] = {}
        """Order → run."""
        self.finished: set[str] = set()
        self.cut: list[str] = []
        """Orders whose charge was cut off by a kill after the money had moved."""
        self.progress = Progress(
            TextColumn("[bold]orders"),
            BarColumn(40),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task("", total=None)

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(f"{clock(time.time_ns() // 1000)}  {text}", style=style))

    # ------------------------------------------------------------------ the acts

    async def play(self) -> int:
        started = time.monotonic()
        self.say(f"{CSV.relative_to(ROOT)} → {STORE}", "dim")
        async with Durable(STORE, workflows=[fulfil], worker=False, poll_every=0.2) as app:
            with self.progress:
                try:
                    async with asyncio.timeout(GIVE_UP_AFTER):
                        await self._perform(app)
                except TimeoutError:
                    self.say(f"Gave up after {GIVE_UP_AFTER:.0f} s; {HOME / 'engine.log'} may say why.", "bold red")
                finally:
                    self.engine.stop()
            return await self._account(app, time.monotonic() - started)

    async def _perform(self, app: Durable) -> None:
        watching = asyncio.create_task(self._watch(app))
        lines = list(read_orders())
        self.progress.update(self.bar, total=len({order.id for _, order in lines if not isinstance(order, str)}))
        morning, afternoon = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        self.engine.start()
        await asyncio.gather(self._start(app, morning), self._morning())
        await asyncio.gather(self._start(app, afternoon), self._afternoon())
        # Somebody sends the whole file again. Every line finds its run; nothing is done twice.
        before = dict(self.accepted)
        await self._start(app, lines, again=True)
        found = "every line found its run" if before == self.accepted else "NEW RUNS WERE MADE"
        self.say(f"The whole file was sent a second time: {found}.", "magenta")
        self.progress.update(self.bar, total=len(self.accepted))
        await watching

    async def _start(self, app: Durable, lines: list[tuple[int, Order | str]], *, again: bool = False) -> None:
        """Start a run for each line, by its order id. A broken line is told, and the rest goes on."""
        for number, order in lines:
            if isinstance(order, str):
                problem: str | None = order
            else:
                try:
                    run = await app.start(fulfil, order, key=order.id, tags=["demo"])
                    self.accepted[order.id] = run.id
                    problem = None
                except DurableError as error:
                    problem = f"{error} [{error.code}]"
            if again:
                continue
            if problem:
                self.say(f"{CSV.name}, line {number}: {safe(problem)}", "yellow")
            await asyncio.sleep(0.12)

    async def _morning(self) -> None:
        while not self.cut:  # on a machine too busy the answer may be quicker than the kill
            await self._kill("inside a charge: the money has moved, and the answer is not back", self._money_moved)
        await self._kill(
            "between two steps: reserved, and not yet charged", lambda: self._count(BETWEEN, "reserve", "charge")
        )
        await self._kill("while everything waits", lambda: self._all_wait(15))

    async def _afternoon(self) -> None:
        await self._kill(
            "inside a charge again, before the money moves",
            lambda: self._under_way("charge") and not self._money_moved(),
        )
        await self._kill("while parcels are packed", lambda: self._under_way("ship"))

    async def _kill(self, when: str, moment: Callable[[], object]) -> None:
        """Wait for the moment, as the ledger tells it; kill; say what it hit; start again."""
        while not moment():
            if self.engine.gone:
                self.say("The engine is gone, and nobody killed it. It is started again.", "bold red")
                self.engine.start()
            await asyncio.sleep(0.002)
        pid = self.engine.pid
        self.engine.kill()
        moved = [order for (order,) in self.ledger.ask(MONEY_MOVED, pid)]
        self.cut += moved
        hit = [f"{many(self._under_way('%', pid), 'step')} cut off"]
        if between := self._count(BETWEEN, "reserve", "charge"):
            hit.append(f"{many(between, 'order')} between two steps")
        if waiting := self._count(BETWEEN, "charge", "ship"):
            hit.append(f"{waiting} waiting")
        if moved:
            hit.append(f"the money of {', '.join(moved)} had moved")
        self.say(f"kill -9 {pid}, {when}: {', '.join(hit)}.", "bold red")
        self.progress.update(self.bar, description=f"[red]killed {self.engine.kills} times")
        self.engine.start()
        self.say(f"A new engine starts: {self.engine.pid}.", "bold green")
        while not self.ledger.ask("SELECT 1 FROM facts WHERE pid = ?", self.engine.pid):
            if self.engine.gone or len(self.finished) == len(self.accepted):
                return
            await asyncio.sleep(0.005)

    # ------------------------------------------------------------------ what the ledger says

    def _count(self, question: str, *values: object) -> int:
        [(count,)] = self.ledger.ask(question, *values)
        return int(count)

    def _under_way(self, step: str, pid: int | None = None) -> int:
        return self._count(UNDER_WAY, pid or self.engine.pid, step)

    def _money_moved(self) -> int:
        return len(self.ledger.ask(MONEY_MOVED, self.engine.pid))

    def _all_wait(self, at_least: int) -> bool:
        """Charged and not yet shipped, and nothing is being done for anybody."""
        return self._count(BETWEEN, "charge", "ship") >= at_least and not self._under_way("%")

    # ------------------------------------------------------------------ what is seen

    async def _watch(self, app: Durable) -> None:
        """The timeline of all runs, until every order has its receipt."""
        feed = Feed(app)
        show = EventPrinter(self.console, lambda run: run.idempotency_key or "", minor=False)
        while True:
            for run, entry in await feed.look():
                show(run, entry)
                if entry.kind == "run" and entry.status in ("completed", "failed", "cancelled", "dead"):
                    self.finished.add(run.id)
                    self.progress.update(self.bar, completed=len(self.finished))
            total = self.progress.tasks[0].total
            if total is not None and len(self.accepted) == total == len(self.finished):
                return
            await asyncio.sleep(0.05)

    async def _account(self, app: Durable, seconds: float) -> int:
        """The closing table: from the ledger, and from the store for the receipts."""
        completed: set[str] = set()
        cursor = None
        while True:
            page = await app.find(workflow="order", tag="demo", cursor=cursor, limit=200)
            completed |= {run.idempotency_key or "" for run in page.runs if run.status == "completed" and run.output}
            cursor = page.cursor
            if cursor is None:
                break
        lost = sorted(set(self.accepted) - completed)
        twice = self.ledger.ask(
            "SELECT order_id FROM facts WHERE kind = 'charged' GROUP BY order_id HAVING count(*) > 1"
        )
        uncharged = set(self.accepted) - {
            order for (order,) in self.ledger.ask("SELECT order_id FROM facts WHERE kind = 'charged'")
        }
        again = self._count(
            "SELECT coalesce(sum(n - 1), 0) FROM (SELECT count(*) n FROM facts WHERE kind = 'began' GROUP BY step, order_id)"
        )
        known = self._count("SELECT count(*) FROM facts WHERE kind = 'recognised'")
        table = Table(
            title="\nThe ledger's account", title_style="bold", title_justify="left", show_header=False, box=None
        )
        table.add_column(min_width=34)
        table.add_column(justify="right")
        table.add_column(style="dim")
        good = "bold green"
        rows: list[tuple[str, int, str, str]] = [
            ("orders in", len(self.accepted), "", ""),
            ("receipts out", len(completed & set(self.accepted)), "", good if not lost else "bold red"),
            (
                "engine killed with -9",
                self.engine.kills,
                f"{len(self.cut)} charges cut off after the money had moved",
                "",
            ),
            ("step bodies run twice", again, "they were cut off, so they ran again", ""),
            ("charge requests recognised by key", known, "asked twice, made once", ""),
            ("charges made twice", len(twice), "", good if not twice else "bold red"),
            ("lost", len(lost) + len(uncharged), "", good if not lost and not uncharged else "bold red"),
        ]
        for name, number, note, style in rows:
            table.add_row(Text(f"  {name}"), Text(str(number), style=style or "bold"), Text(f"  {note}"))
        self.console.print(table)
        ok = bool(self.accepted) and not (lost or twice or uncharged)
        self._next_steps(seconds)
        if lost:
            self.say(f"LOST: {', '.join(lost)}", "bold red")
        return 0 if ok else 1

    def _next_steps(self, seconds: float) -> None:
        script = Path(sys.executable).parent / ("durable.exe" if os.name == "nt" else "durable")
        command = shown(script) if script.exists() else f"{shown(Path(sys.executable))} -m durable"
        # Three slashes for a relative path, four for an absolute one.
        store = f"--store sqlite:///{shown(HOME / 'orders.db')}"
        run = next(
            (self.accepted[order] for order in self.cut if order in self.accepted),
            next(iter(self.accepted.values()), "ID"),
        )
        self.console.print(Text(f"\nIt took {seconds:.0f} s. Everything is kept; look at it:\n", style="bold"))
        about = f"order {self.cut[0]}, cut off inside its charge" if self.cut else "one order"
        for line, note in (
            (f"{command} runs show {run} {store}", about),
            (f"{command} runs list {store}", "all of them"),
            (f"{command} doctor {store}", "is everything all right?"),
        ):
            self.console.print(Text(f"  # {note}", style="dim"))
            self.console.print(Text(f"  {line}", no_wrap=True, overflow="ignore"), soft_wrap=True)
        self.console.print()


def read_orders() -> Iterator[tuple[int, Order | str]]:
    """(line, order), or (line, what is wrong with it)."""
    with CSV.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        for row in rows:
            missing = [name for name in rows.fieldnames or () if not row.get(name)]
            if missing:
                yield rows.line_num, f"no {' and no '.join(missing)}"
                continue
            try:
                quantity = int(row["quantity"])
            except ValueError:
                yield rows.line_num, f"quantity {row['quantity']!r} is not a whole number"
                continue
            try:
                total = Decimal(row["total"])
            except InvalidOperation:
                yield rows.line_num, f"total {row['total']!r} is not an amount"
                continue
            yield rows.line_num, Order(row["order_id"], row["customer"], row["item"], quantity, total)


def many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> int:
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    return asyncio.run(Demo().play())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
