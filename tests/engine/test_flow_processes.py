"""Each policy over three engines that are processes of their own, on one Postgres; events come in through all of them. What ran
when is read from the ledger of the bodies themselves and from the store."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from durable.protocol.states import Status
from durable.store.admission import EventQuery
from durable.store.postgres import PostgresStore
from durable.store.records import RunRecord
from durable.testing.facts import PATIENCE, PAUSE
from tests.conftest import ROOT
from tests.engine.flow_node import BATCH, RATE, THROTTLE
from tests.servers.postgres import PostgresServer, fresh_database

pytestmark = [pytest.mark.http, pytest.mark.service]

NODES = 3


class Said(NamedTuple):
    """What became of one event."""

    event_id: str
    verdict: str
    run_id: str | None
    new: bool


class Nodes:
    """The processes, their ledger and a look at their store."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.ledger = folder / "ledger"
        command = [sys.executable, "-m", "tests.engine.flow_node", url, str(self.ledger)]
        self._processes = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(NODES)
        ]
        for process in self._processes:
            assert self._heard(process) == "ready"

    def close(self) -> None:
        for process in self._processes:
            with process:
                process.kill()

    @staticmethod
    def _heard(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    async def publish(self, name: str, orders: Sequence[dict[str, Any]]) -> list[Said]:
        """By turns through each node, all at once. What became of them, in the order given."""

        def tell(node: int) -> list[Said]:
            process = self._processes[node]
            assert process.stdin is not None
            process.stdin.write(json.dumps([[name, order] for order in orders[node::NODES]]) + "\n")
            process.stdin.flush()
            return [Said(*one) for one in json.loads(self._heard(process))]

        told = await asyncio.gather(*(asyncio.to_thread(tell, node) for node in range(NODES)))
        return [told[n % NODES][n // NODES] for n in range(len(orders))]

    def lines(self, workflow: str, what: str | None = None) -> list[dict[str, Any]]:
        """What the bodies of a workflow wrote, in order."""
        lines = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        return [line for line in lines if line["workflow"] == workflow and what in (None, line["what"])]

    def most(self, workflow: str, key: Any = None) -> int:
        """How many bodies were under way at once at most, of all or of one key."""
        now = most = 0
        for line in sorted(self.lines(workflow), key=lambda line: line["at"]):
            if key is None or line["order"].get("key") == key:
                now += 1 if line["what"] == "begin" else -1
                most = max(most, now)
        return most


@pytest.fixture(scope="module")
def nodes(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with ExitStack() as stack:
        url = stack.enter_context(fresh_database(postgres_server.url))
        nodes = Nodes(url, tmp_path_factory.mktemp("flow"))
        stack.callback(nodes.close)
        yield nodes


@pytest.fixture
async def store(nodes: Nodes) -> AsyncIterator[PostgresStore]:
    store = PostgresStore(nodes.url)
    await store.open()
    yield store
    await store.close()


async def ended(store: PostgresStore, said: Sequence[Said]) -> list[RunRecord]:
    """Once all runs that these events are in have completed."""
    ids = list(dict.fromkeys(one.run_id for one in said if one.run_id is not None))
    async with asyncio.timeout(PATIENCE):
        while True:
            runs = await store.get(ids)
            if all(run is not None and run.status is not Status.ACTIVE for run in runs):
                break
            await asyncio.sleep(PAUSE)
    assert {run.status for run in runs if run is not None} == {Status.COMPLETED}
    return [run for run in runs if run is not None]


def none_too_close(times: Sequence[int], limit: int, period: float) -> bool:
    """No more than `limit` of these moments (µs) lie within any `period` (s)."""
    ordered = sorted(times)
    return all(
        later - sooner >= period * 1e6 for sooner, later in zip(ordered, islice(ordered, limit, None), strict=False)
    )


async def behind_a_gate(
    nodes: Nodes, name: str, gates: Sequence[dict[str, Any]], orders: Sequence[dict[str, Any]]
) -> list[Said]:
    """Publish, while all places are taken, and let them go."""
    said = await nodes.publish(name, [{**order, "gate": name} for order in gates])
    async with asyncio.timeout(PATIENCE):
        while not nodes.ledger.exists() or len(nodes.lines(name, "begin")) < len(gates):
            await asyncio.sleep(PAUSE)
    said += await nodes.publish(name, orders)
    nodes.folder.joinpath(name).touch()
    return said


async def test_S25_concurrency_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """S25, B32: never more than three bodies at any instant, on all engines together; each event has its run, each step ran
    once."""
    orders = [{"n": n, "seconds": 0.01} for n in range(60)]
    said = await nodes.publish("limited", orders)
    assert len(await ended(store, said)) == 60
    begun = nodes.lines("limited", "begin")
    assert sorted(line["order"]["n"] for line in begun) == sorted([*range(60), *range(60)])
    assert 1 < nodes.most("limited") <= 3
    assert len({line["process"] for line in begun}) > 1, "several engines took part"


async def test_S25_concurrency_by_key_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """One at a time of each key, four in all."""
    said = await nodes.publish("keyed", [{"key": n % 7, "seconds": 0.02} for n in range(49)])
    assert len(await ended(store, said)) == 49
    assert {nodes.most("keyed", key) for key in range(7)} == {1}
    assert 1 < nodes.most("keyed") <= 4


async def test_E5_throttle_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """Of twenty runs no six begin within half a second, by the store's clock, and all come."""
    said = await nodes.publish("spaced", [{"n": n} for n in range(20)])
    runs = await ended(store, said)
    times = [run.started_at or 0 for run in runs]
    assert len(times) == 20
    assert none_too_close(times, THROTTLE.limit, 0.5), sorted(times)
    assert max(times) - min(times) < 6e6, "nor are they held back for much longer than that"


async def test_S27_rate_limit_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """Of thirty events at once five start a run and the others are dropped, and say so; never more within any second."""
    said = await nodes.publish("rated", [{"n": n} for n in range(30)])
    assert Counter(one.verdict for one in said) == {"started": 5, "dropped": 25}
    async with asyncio.timeout(PATIENCE):
        while sum(one.verdict == "started" for one in said) < 10:
            said += await nodes.publish("rated", [{"n": n} for n in range(6)])
    assert len(await ended(store, said)) == sum(one.verdict == "started" for one in said) == 10
    accepted = {event.id: event.received_at for event in await store.events(EventQuery(name="rated", limit=10_000))}
    assert accepted.keys() == {one.event_id for one in said}
    times = [accepted[one.event_id] for one in said if one.verdict == "started"]
    assert none_too_close(times, RATE.limit, 1.0), sorted(times)


async def test_S28_debounce_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """S28: each event is in exactly one run, and each run is of the last of its events."""
    said: list[Said] = []
    for _ in range(4):
        said += await nodes.publish("calm", [{"key": n % 3} for n in range(15)])
        await asyncio.sleep(0.1)
    runs = {run.id: run for run in await ended(store, said)}
    assert {one.verdict for one in said} == {"debounced"}
    assert sum(one.new for one in said) == len(runs) == len(nodes.lines("calm", "end"))
    numbers = {event.id: event.number for event in await store.events(EventQuery(name="calm", limit=10_000))}
    for run_id, run in runs.items():
        last = max((one.event_id for one in said if one.run_id == run_id), key=numbers.__getitem__)
        assert json.loads(run.output or b"null") == last
    assert len(runs) < len(said) / 3


async def test_S28_B38_batch_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """S28, B38: every event is in exactly one run, the one that the answer names, and no run has more than seven."""
    orders = [{"key": n % 2, "n": n} for n in range(100)]
    said = await nodes.publish("batched", orders)
    runs = await ended(store, said)
    batches = [[order["n"] for order in line["order"]["orders"]] for line in nodes.lines("batched", "end")]
    assert sorted(n for batch in batches for n in batch) == list(range(100))
    assert len(batches) == len(runs)
    assert max(map(len, batches)) <= BATCH.max_size
    for batch in batches:
        assert len({said[n].run_id for n in batch}) == 1
        assert len({n % 2 for n in batch}) == 1


async def test_E5_singleton_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """Never two unfinished: those that came meanwhile are skipped and say because of which run."""
    said: list[Said] = []
    for _ in range(5):
        said += await nodes.publish("lone", [{"seconds": 0.02} for _ in range(12)])
        await asyncio.sleep(0.05)
    runs = await ended(store, said)
    started = {one.run_id for one in said if one.verdict == "started"}
    assert {one.verdict for one in said} == {"started", "skipped"}
    assert {run.id for run in runs} == started
    assert nodes.most("lone") == 1
    spans = sorted((run.created_at, run.finished_at or 0) for run in runs)
    assert all(one[1] <= two[0] for one, two in pairwise(spans))


async def test_fairness_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """While both have runs that wait, the one of weight three is served three times as often, within ten percent."""
    orders = [{"who": "big" if n < 45 else "small", "n": n} for n in range(90)]
    said = await behind_a_gate(nodes, "fair", [{"who": "x"}] * 3, orders)
    assert len(await ended(store, said)) == 93
    first = [line["order"]["who"] for line in nodes.lines("fair", "begin")][3:43]
    assert 27 <= Counter(first)["big"] <= 33, first
    assert nodes.most("fair") == 3


async def test_S29_priority_over_processes(nodes: Nodes, store: PostgresStore) -> None:
    """S29: among those that wait for one place the highest goes first, whoever published it and whoever runs it."""
    said = await behind_a_gate(nodes, "prior", [{"rank": 0}], [{"rank": n * 7 % 10} for n in range(30)])
    assert len(await ended(store, said)) == 31
    ranks = [line["order"]["rank"] for line in nodes.lines("prior", "begin")][1:]
    assert ranks == sorted(ranks, reverse=True)
    assert len(ranks) == 30
