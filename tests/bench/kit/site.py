"""What the benchmarks on Postgres stand on: one embedded server for all, a fresh database for each process under test, the
server's own counters, and the CPU seconds of everyone involved."""

from __future__ import annotations

import json
import os
import platform
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
from msgspec import Struct

from durable.store.postgres.binaries import find_binaries
from durable.store.postgres.embedded import EmbeddedPostgres

ROOT = Path(__file__).resolve().parents[3]
PEERS = {"dbos": "3.4.0", "absurd-sdk": "0.5.1", "absurdctl": "0.5.1", "psycopg[binary]": "3.3.9"}
TICK = os.sysconf("SC_CLK_TCK")
CORES = len(os.sched_getaffinity(0))


class Failure(Exception):
    """Says in a sentence what is wrong and what to do about it."""


# -- processes under test


class Process:
    """A child that is told what to do; see kit/child.py."""

    def __init__(self, python: str, module: str, url: str, **options: Any) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [python, "-m", f"tests.bench.kit.{module}", url, json.dumps(options)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._rest = b""
        self.pid = self._process.pid
        self.hello: dict[str, Any] = self.answer(60)

    def tell(self, do: str, **told: Any) -> None:
        """Begin something; its answer is to be fetched."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **told}).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, timeout: float = 300) -> dict[str, Any]:
        """What came of it."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise Failure(f"A measured process did not answer within {timeout:.0f} s:\n{self.said()}")
                got = os.read(self._process.stdout.fileno(), 1 << 20)
                if not got:
                    raise Failure(f"A measured process ended before its time:\n{self.said()}")
                self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failure(f"A measured process failed:\n{answer['failed']}")
        return answer

    def ask(self, do: str, timeout: float = 300, **told: Any) -> dict[str, Any]:
        """Tell it, and wait for the answer."""
        self.tell(do, **told)
        return self.answer(timeout)

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-3000:]

    def cpu(self) -> float:
        """CPU seconds it has used."""
        return cpu_of(self.pid)

    def kill(self) -> None:
        """As with kill -9."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it end; killed if it will not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def cpu_of(pid: int, *, reaped: bool = False) -> float:
    """CPU seconds of a process, of its ended children too where asked for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11 : 15 if reaped else 13])) / TICK


def machine_cpu() -> float:
    """CPU seconds that the whole machine has been busy."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICK


def children_of(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


# -- the server


class Used(Struct):
    """What was used since a mark: CPU seconds of the server and of the whole machine, and what the server's log grew by."""

    wall: float
    server: float
    machine: float
    wal_bytes: int

    def shares(self, processes: float) -> dict[str, float]:
        """Of all cores: the processes under test (whose CPU seconds are given), the server, and everybody else."""
        whole = self.wall * CORES
        others = max(0.0, self.machine - self.server - processes)
        return {"processes": processes / whole, "server": self.server / whole, "others": others / whole}


class Mark(Struct):
    """Where counting begins."""

    lsn: str
    server: float
    machine: float
    at: float


class Site:
    """One embedded server with its default settings, and what is measured on it. `counting` loads Postgres' own statistics
    of statements and log records, which cost time: such a server is not for the clock."""

    def __init__(self, folder: Path, *, counting: bool = False) -> None:
        settings = {"shared_preload_libraries": "pg_stat_statements", "wal_keep_size": "4GB"} if counting else {}
        self._server = EmbeddedPostgres(folder, settings=settings)
        self.url = self._server.start()
        self._admin = psycopg.connect(self.url, autocommit=True)
        self._made = 0
        if counting:
            self._admin.execute("CREATE EXTENSION pg_stat_statements")
            self._admin.execute("CREATE EXTENSION pg_walinspect")

    def close(self) -> None:
        self._admin.close()
        self._server.stop("immediate")

    def sql(self, query: str, *values: Any) -> list[Any]:
        """Ask the server something."""
        cursor = self._admin.execute(query, values)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []

    def on(self, database: str) -> str:
        """The URL of one of its databases."""
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{database}"))

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a fresh database, dropped afterwards. A checkpoint comes before, so that nobody pays for another."""
        self._made += 1
        name = f"bench_{os.getpid()}_{self._made}"
        self.sql(f"CREATE DATABASE {name}")
        self.sql("CHECKPOINT")
        try:
            yield self.on(name)
        finally:
            self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def cpu(self) -> float:
        """CPU seconds of the whole server, backends that have ended included."""
        postmaster = self._server.pid or 0
        return cpu_of(postmaster, reaped=True) + sum(map(cpu_of, children_of(postmaster)))

    def lsn(self) -> str:
        """Where its log ends now."""
        return str(self.sql("SELECT pg_current_wal_insert_lsn()")[0][0])

    def mark(self) -> Mark:
        """Begin to count."""
        return Mark(self.lsn(), self.cpu(), machine_cpu(), time.perf_counter())

    def since(self, mark: Mark) -> Used:
        """What was used meanwhile."""
        wall, server, machine = time.perf_counter() - mark.at, self.cpu() - mark.server, machine_cpu() - mark.machine
        return Used(wall, server, machine, int(self.sql("SELECT pg_wal_lsn_diff(%s, %s)", self.lsn(), mark.lsn)[0][0]))

    def forget(self) -> None:
        """Count statements from here on. Needs `counting`."""
        self.sql("SELECT pg_stat_statements_reset()")

    def asked(self) -> list[tuple[str, int]]:
        """Statements sent to databases of ours, those sent most often first; only how they begin."""
        found = self.sql(
            "SELECT left(regexp_replace(query, '\\s+', ' ', 'g'), 60), sum(calls)::int FROM pg_stat_statements s"
            " JOIN pg_database d ON d.oid = s.dbid WHERE datname ~ '^bench' GROUP BY 1 ORDER BY 2 DESC"
        )
        return [(str(query), int(calls)) for query, calls in found]

    def statements(self) -> int:
        """Sent by clients to databases of ours, ever. Needs `counting`."""
        ours = "SELECT sum(calls) FROM pg_stat_statements(false) s JOIN pg_database d ON d.oid = s.dbid WHERE datname ~ '^bench'"
        return int(self.sql(ours)[0][0] or 0)

    def commits(self, since: str) -> int:
        """Transactions that wrote something, as the log has them. Needs `counting`."""
        records = (
            "SELECT coalesce(sum(count), 0) FROM pg_get_wal_stats(%s, pg_current_wal_flush_lsn(), true)"
            " WHERE \"resource_manager/record_type\" = 'Transaction/COMMIT'"
        )
        return int(self.sql(records, since)[0][0])

    def settings(self) -> dict[str, str]:
        """What durability and speed hang on."""
        names = "server_version fsync synchronous_commit full_page_writes wal_level shared_buffers max_connections"
        return {name: str(self.sql(f"SHOW {name}")[0][0]) for name in names.split()}


@contextmanager
def site(*, counting: bool = False) -> Iterator[Site]:
    """A server of our own in a temporary folder, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="durable-bench-", ignore_cleanup_errors=True) as folder:
        one = Site(Path(folder) / "server", counting=counting)
        try:
            yield one
        finally:
            one.close()


# -- the peers


def peers_python() -> str:
    """An interpreter that has the peers, in an environment of its own that is made at the first call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    pins = [f"{name}=={pinned}" for name, pinned in PEERS.items()]
    venv = cache / "durable-bench" / f"peers-{platform.python_version()}"
    python, stamp = venv / "bin" / "python", venv / "pins"
    if stamp.exists() and stamp.read_text() == "\n".join(pins):
        return str(python)
    say(f"Installing {', '.join(pins)} into {venv} ...")
    shutil.rmtree(venv, ignore_errors=True)
    uv = shutil.which("uv")
    make = (
        [uv, "venv", "--quiet", "--python", sys.executable, str(venv)] if uv else [sys.executable, "-m", "venv", venv]
    )
    install = (
        [uv, "pip", "install", "--quiet", "--python", str(python)] if uv else [python, "-m", "pip", "install", "-q"]
    )
    for command in (make, [*install, *pins]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise Failure(
                f"The peers could not be installed, which needs a package index: {done.stderr.strip()[-600:]}\n"
                "Give one that you can reach (PIP_INDEX_URL, UV_INDEX_URL), or measure without them: --skip-peers."
            )
    stamp.write_text("\n".join(pins))
    return str(python)


def prepare_absurd(python: str, url: str) -> None:
    """Its schema and one queue, by its own tool, which calls psql."""
    tool = Path(python).with_name("absurdctl")
    path = os.pathsep.join([str(find_binaries().folder), os.environ.get("PATH", "")])
    for command in (["init"], ["create-queue", "default"]):
        done = subprocess.run(
            [str(tool), *command], env={**os.environ, "PGDATABASE": url, "PATH": path}, capture_output=True, text=True
        )
        if done.returncode:
            raise Failure(f"`absurdctl {command[0]}` failed: {(done.stderr or done.stdout).strip()[-600:]}")


# -- telling


def run(main: Callable[[], Any]) -> None:
    """A benchmark as a command: a failure is a sentence, and who ends it with SIGTERM leaves no server behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except Failure as failure:
        sys.exit(str(failure))


def say(text: str = "") -> None:
    print(text, flush=True)


def machine(one: Site) -> dict[str, Any]:
    """Where and how it was measured, said and returned."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    settings = one.settings()
    facts = {
        "cores": CORES,
        "cpu": model,
        "python": platform.python_version(),
        "psycopg": psycopg.__version__,
        "fdatasync_ms": fdatasync_ms(),
        "load_before": os.getloadavg()[0],
        **settings,
    }
    python, system = f"Python {facts['python']}, psycopg {psycopg.__version__}", os.uname()
    say(f"{CORES} cores ({model}), {python}; {system.sysname} {system.release}")
    say(
        f"PostgreSQL {settings['server_version']}, embedded, default settings: "
        + ", ".join(f"{name} {value}" for name, value in settings.items() if name != "server_version")
    )
    say(f"fdatasync of 8 kB: p50 {facts['fdatasync_ms']:.2f} ms; load average before: {facts['load_before']:.1f}")
    if facts["load_before"] > CORES / 2:
        say("Others are at work on this machine: take ratios, not rates, and repeat when it is quiet.")
    return facts


def fdatasync_ms() -> float:
    """What one synced write costs on the disk under the server: no commit is cheaper."""
    took = []
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(50):
            begun = time.perf_counter()
            os.pwrite(file.fileno(), b"x" * 8192, 0)
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(took)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20)[18]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        first, *others = (
            cell.rjust(width) if n else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        say("  " + "   ".join([first, *others]).rstrip())


def last_line(report: dict[str, Any]) -> None:
    """One JSON object, figures to four significant digits."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {key: short(one) for key, one in value.items()}
        return [short(one) for one in value] if isinstance(value, list) else value

    print(json.dumps(short(report)), flush=True)
