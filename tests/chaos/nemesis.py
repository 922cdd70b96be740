"""A random nemesis on Postgres: `python -m tests.chaos.nemesis --minutes 5 --seed 7`, or `python3 dev.py chaos`.

Three engines, each over a proxy of its own, one ten minutes ahead and one behind; callers over a fourth. One move after
another, drawn from the seed, each given time to hurt and then, mostly, healed. In the end all heals, every caller gets its
outcome, and the verdict is read from the three records. A failure prints the moves made; the seed draws the same ones again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random

import psycopg

from durable.store.postgres.embedded import EmbeddedPostgres
from tests.chaos.proxy import Proxy, executes
from tests.chaos.site import GRACE, LEASE, Node, Site
from tests.chaos.traffic import PATIENCE, Traffic
from tests.servers.postgres import SETTINGS, fresh_database

SKEWS = (0.0, 600.0, -600.0)
TWO_AT_ONCE = 0.3
"""Share of moves made in pairs."""
CALLERS = 24
SECONDS = 0.1
"""Each body takes."""


class Engine:
    """A place for an engine: a link of its own, and whoever runs there now."""

    def __init__(self, number: int, proxy: Proxy) -> None:
        self.name = f"engine-{number}"
        self.proxy = proxy
        self.skew = SKEWS[number % len(SKEWS)]
        self.node: Node | None = None


class Nemesis:
    """Makes moves on a site until told otherwise."""

    def __init__(self, site: Site, server: EmbeddedPostgres, engines: list[Engine], caller: Proxy, seed: int) -> None:
        self.site = site
        self.server = server
        self.engines = engines
        self.caller = caller
        self.made: list[str] = []
        """Every move, in words."""
        self.counts: Counter[str] = Counter()
        self.ended: Callable[[], int] = lambda: 0
        """How many runs have ended."""
        self._draw = Random(f"nemesis/{seed}")
        self._began = time.monotonic()

    async def start(self, engine: Engine) -> None:
        """Somebody new in this place."""
        # A death is never the run's fault here, so none may be counted out.
        settings = {"skew": engine.skew, "max_recovery_attempts": 1_000_000, "drain_timeout": 1.0}
        deadline = time.monotonic() + PATIENCE
        while True:
            node = engine.node = self.site.launch(via=engine.proxy.named(engine.name), **settings)
            if await node.came_up():
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"no engine starts at {engine.name}\n{self.site.said()}")

    async def go_on(self, seconds: float) -> None:
        """Move after move for so long; then heal."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            at_once = 2 if self._draw.random() < TWO_AT_ONCE else 1
            # Different engines: one that is stopped can neither be drained nor come up.
            engines = self._draw.sample(self.engines, at_once)
            kinds = [self._draw.choice(sorted(MOVES if at_once == 1 else MOVES.keys() - ALONE)) for _ in engines]
            await asyncio.gather(*(self._move(kind, engine) for kind, engine in zip(kinds, engines, strict=True)))
            await asyncio.sleep(self._draw.uniform(0.0, LEASE))
        await self.heal()

    async def _move(self, kind: str, engine: Engine) -> None:
        hurts = self._draw.choice((0.1, 0.5, 1.0, 2.0)) * LEASE
        self.made.append(f"{time.monotonic() - self._began:7.2f} s  {kind}: {engine.name}, {hurts:.1f} s")
        self.counts[kind] += 1
        await MOVES[kind](self, engine, hurts)

    async def heal(self) -> None:
        """Everybody lives, every link carries, the server serves."""
        await asyncio.to_thread(self.server.start)
        self.caller.heal()
        for engine in self.engines:
            engine.proxy.heal()
            if engine.node is not None and engine.node.alive:
                engine.node.send(signal.SIGCONT)
            else:
                await self.start(engine)

    # ------------------------------------------------------------------ moves

    async def kill(self, engine: Engine, hurts: float) -> None:
        """SIGKILL; somebody new comes after a while."""
        assert engine.node is not None
        engine.node.send(signal.SIGKILL)
        await engine.node.ended()
        await asyncio.sleep(hurts / 4)
        await self.start(engine)

    async def kill_all(self, engine: Engine, hurts: float) -> None:
        """Every engine at once."""
        for one in self.engines:
            assert one.node is not None
            one.node.send(signal.SIGKILL)
        for one in self.engines:
            await self.start(one)

    async def zombie(self, engine: Engine, hurts: float) -> None:
        """SIGSTOP, mostly past the lease, and SIGCONT."""
        assert engine.node is not None
        engine.node.send(signal.SIGSTOP)
        await asyncio.sleep(hurts)
        engine.node.send(signal.SIGCONT)

    async def drain(self, engine: Engine, hurts: float) -> None:
        """SIGTERM, and a new one beside the one that drains."""
        old = engine.node
        assert old is not None
        old.send(signal.SIGTERM)
        await self.start(engine)
        code = await old.ended(60)
        if code != 0:
            raise AssertionError(f"a drain ended with {code}\n{self.site.said()}")

    async def restart_server(self, engine: Engine, hurts: float) -> None:
        """`stop -m immediate`, and up again after a while."""
        await asyncio.to_thread(self.server.stop, "immediate")
        await asyncio.sleep(hurts)
        await asyncio.to_thread(self.server.start)

    async def long_outage(self, engine: Engine, hurts: float) -> None:
        """The server is away for many leases. Nobody's pauses between attempts may have grown with that."""
        await asyncio.to_thread(self.server.stop, "immediate")
        await asyncio.sleep(self._draw.uniform(10, 20) * LEASE)
        await asyncio.to_thread(self.server.start)
        risen, ended = time.monotonic(), self.ended()
        while self.ended() == ended:
            if time.monotonic() > risen + LEASE + GRACE:
                raise AssertionError(f"the server is back, and nothing goes on\n{self.site.said()}")
            await asyncio.sleep(0.05)

    async def terminate(self, engine: Engine, hurts: float) -> None:
        """pg_terminate_backend of every connection, a few times."""
        for _ in range(3):
            with suppress(psycopg.OperationalError), psycopg.connect(self.site.url, autocommit=True) as direct:
                direct.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
            await asyncio.sleep(hurts / 8)

    async def cut(self, engine: Engine, hurts: float) -> None:
        """Every connection of one engine."""
        engine.proxy.cut()

    async def cut_after(self, engine: Engine, hurts: float) -> None:
        """The answers to the next few writes of one kind are lost: one engine's, or the callers'."""
        write, proxy = self._link(engine)
        proxy.cut_after(executes(write), self._draw.randint(1, 5))

    async def cut_before(self, engine: Engine, hurts: float) -> None:
        """The next few writes of one kind are lost."""
        write, proxy = self._link(engine)
        proxy.cut_before(executes(write), self._draw.randint(1, 5))

    async def half_open(self, engine: Engine, hurts: float) -> None:
        """Nothing passes and nobody is told, for a while."""
        engine.proxy.stop(new=self._draw.random() < 0.5)
        await asyncio.sleep(hurts)
        engine.proxy.heal()

    async def forgotten(self, engine: Engine, hurts: float) -> None:
        """Connections there are hang until the next healing; new ones work."""
        engine.proxy.stop(new=False)
        await asyncio.sleep(hurts)

    async def deaf(self, engine: Engine, hurts: float) -> None:
        """What the server says does not arrive."""
        engine.proxy.stop("down")
        await asyncio.sleep(hurts)
        engine.proxy.heal()

    async def dumb(self, engine: Engine, hurts: float) -> None:
        """What the engine says does not arrive."""
        engine.proxy.stop("up")
        await asyncio.sleep(hurts)
        engine.proxy.heal()

    async def slow(self, engine: Engine, hurts: float) -> None:
        """50 ms to half a second, each way."""
        engine.proxy.latency = self._draw.choice((0.05, 0.2, 0.5))
        await asyncio.sleep(hurts)
        engine.proxy.latency = 0.0

    async def callers_cut(self, engine: Engine, hurts: float) -> None:
        """Every connection of those who call."""
        self.caller.cut()

    async def during_recovery(self, engine: Engine, hurts: float) -> None:
        """An engine dies, and while others take its runs the server restarts."""
        assert engine.node is not None
        engine.node.send(signal.SIGKILL)
        await engine.node.ended()
        await asyncio.sleep(self._draw.uniform(0.1, LEASE))
        await self.restart_server(engine, 0.1)
        await self.start(engine)

    def _link(self, engine: Engine) -> tuple[str, Proxy]:
        """A write, and a link that it passes."""
        if self._draw.random() < 0.4:
            return self._draw.choice(("start_runs", "send_messages")), self.caller
        return self._draw.choice(("commit_runs", "appended AS", "claim_runs", "beat")), engine.proxy


Move = Callable[[Nemesis, Engine, float], Awaitable[None]]
MOVES: dict[str, Move] = {
    "SIGKILL": Nemesis.kill,
    "SIGKILL of all": Nemesis.kill_all,
    "SIGSTOP, SIGCONT": Nemesis.zombie,
    "drain and replace": Nemesis.drain,
    "server stopped and started": Nemesis.restart_server,
    "server away for long": Nemesis.long_outage,
    "backends terminated": Nemesis.terminate,
    "connections cut": Nemesis.cut,
    "cut between commit and reply": Nemesis.cut_after,
    "cut before commit": Nemesis.cut_before,
    "half-open": Nemesis.half_open,
    "half-open, forgotten": Nemesis.forgotten,
    "one way, deaf": Nemesis.deaf,
    "one way, dumb": Nemesis.dumb,
    "latency": Nemesis.slow,
    "callers cut off": Nemesis.callers_cut,
    "server restarts during recovery": Nemesis.during_recovery,
}
ALONE = frozenset(
    {
        "SIGKILL of all",
        "drain and replace",
        "server stopped and started",
        "server away for long",
        "server restarts during recovery",
    }
)
"""Moves that concern more than one engine, or whose outcome is asked for."""


async def chaos(
    server: EmbeddedPostgres, url: str, directory: Path, seconds: float, seed: int
) -> tuple[Nemesis, Traffic, int]:
    """One session of so many seconds. Returns who did what, and how many bodies ran more than once. Raises AssertionError
    with the verdict."""
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(url)) for _ in range(len(SKEWS) + 1)]
        engines = [Engine(number, proxy) for number, proxy in enumerate(proxies[:-1])]
        site = await Site(url, directory).open()
        nemesis = Nemesis(site, server, engines, proxies[-1], seed)
        try:
            for engine in engines:
                await nemesis.start(engine)
            async with site.caller(proxies[-1].url) as app:
                traffic = Traffic(site, Random(f"traffic/{seed}"), callers=CALLERS, seconds=SECONDS, app=app)
                nemesis.ended = traffic.made.total
                try:
                    await nemesis.go_on(seconds)
                    await traffic.stop()
                finally:
                    await traffic.abandon()
            for proxy in proxies:
                nemesis.counts.update({f"(link) {kind}": count for kind, count in proxy.counts.items()})
            return nemesis, traffic, await site.judge()
        except BaseException:
            kept = Path(tempfile.gettempdir()) / f"durable-chaos-{seed}.log"
            shutil.copy(site.log, kept)
            print(
                "\n".join([f"Seed {seed}. Moves made:", *nemesis.made, f"What the engines said: {kept}"]),
                file=sys.stderr,
            )
            raise
        finally:
            await site.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="chaos", description="Random faults on real processes and a real Postgres.")
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults; default 5")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="draws the moves; default: the time")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        logging.basicConfig(filename=Path(directory) / "callers.log", level=logging.WARNING)
        with EmbeddedPostgres(Path(directory) / "postgres", settings=SETTINGS) as server:
            with fresh_database(server.url) as url:
                print(f"Seed {options.seed}, {options.minutes:g} minutes.", flush=True)
                try:
                    nemesis, traffic, again = asyncio.run(
                        chaos(server, url, Path(directory), options.minutes * 60, options.seed)
                    )
                except AssertionError as verdict:
                    print(f"FAILED, seed {options.seed}: {verdict}")
                    return 1
    for kind, count in sorted(nemesis.counts.items()):
        print(f"{count:6d}  {kind}")
    print(
        f"{sum(traffic.made.values()):6d}  runs: "
        + ", ".join(f"{n} {name}" for name, n in sorted(traffic.made.items()))
    )
    print(f"{traffic.unsure:6d}  calls nobody answered, made again; {again} bodies ran again")
    print("Nothing lost, nothing committed twice, nothing stuck.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
