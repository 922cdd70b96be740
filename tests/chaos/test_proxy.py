"""The proxy does to a raw client what it says, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests.chaos.proxy import Backend, Frontend, Proxy, Round, executes

pytestmark = pytest.mark.service


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[Proxy]:
    with Proxy(postgres_url) as proxy:
        with psycopg.connect(postgres_url, autocommit=True) as direct:
            direct.execute("CREATE TABLE things (n int)")
        yield proxy


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def connect(proxy: Proxy, **options: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(proxy.url, autocommit=True, **options)


def stored(url: str) -> list[int]:
    with psycopg.connect(url) as direct:
        return [n for (n,) in direct.execute("SELECT n FROM things ORDER BY n")]


def eventually(fact: Callable[[], bool], claim: str) -> None:
    deadline = time.monotonic() + 10
    while not fact():
        assert time.monotonic() < deadline, claim
        time.sleep(0.002)


def waits(future: Future[Any]) -> bool:
    """A little later there is still no answer."""
    with pytest.raises(TimeoutError):
        future.result(0.2)
    return True


def test_it_forwards(proxy: Proxy) -> None:
    """Plain queries, prepared ones, pipelines, COPY and errors go through unchanged, large values too."""
    with connect(proxy, prepare_threshold=1) as client:
        for n in range(5):
            assert client.execute("SELECT %s::int", [n]).fetchone() == (n,)
        with client.pipeline():
            cursors = [client.execute("INSERT INTO things VALUES (%s) RETURNING n", [n]) for n in range(50)]
        assert [cursor.fetchone() for cursor in cursors] == [(n,) for n in range(50)]
        with client.cursor() as cursor, cursor.copy("COPY things FROM STDIN") as copy:
            copy.write("50\n51\n")
        with pytest.raises(psycopg.errors.DivisionByZero):
            client.execute("SELECT 1 / 0")
        large = "x" * 3_000_000
        assert client.execute("SELECT %s::text, count(*) FROM things", [large]).fetchone() == (large, 52)
    eventually(lambda: proxy.links == 0, "the link ends with its client")
    assert not proxy.counts


def test_a_plea_for_encryption_is_declined(proxy: Proxy) -> None:
    """A client that would rather speak TLS is told no, as by a server without it, and goes on in clear."""
    with psycopg.connect(proxy.url.replace("sslmode=disable", "sslmode=prefer"), autocommit=True) as client:
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_notifications_arrive(proxy: Proxy, postgres_url: str) -> None:
    """What the server says unasked passes, between rounds."""
    with connect(proxy) as client, psycopg.connect(postgres_url, autocommit=True) as direct:
        client.execute("LISTEN news")
        direct.execute("NOTIFY news, 'hello'")
        assert [note.payload for note in client.notifies(timeout=10, stop_after=1)] == ["hello"]


def test_cut(proxy: Proxy) -> None:
    """Every connection is broken at once; new ones work."""
    with connect(proxy) as client, connect(proxy) as other:
        for one in (client, other):
            one.execute("SELECT 1")
        assert proxy.cut() == 2
        for one in (client, other):
            with pytest.raises(psycopg.OperationalError):
                one.execute("SELECT 1")
    with connect(proxy) as client:
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_cut_only_some(proxy: Proxy) -> None:
    """Connections are told apart by what they ever executed."""
    with connect(proxy) as writer, connect(proxy) as reader:
        writer.execute("INSERT INTO things VALUES (1)")
        reader.execute("SELECT n FROM things")
        assert proxy.cut(executes("insert", "things")) == 1
        assert reader.execute("SELECT n FROM things").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError):
            writer.execute("SELECT 1")


@pytest.mark.parametrize("prepared", [False, True])
def test_cut_between_commit_and_reply(proxy: Proxy, postgres_url: str, prepared: bool) -> None:
    """The client sees a lost connection, and the statement has happened; once, and prepared or not."""
    with connect(proxy, prepare_threshold=0 if prepared else None) as client:
        for n in range(3):
            client.execute("INSERT INTO things VALUES (%s)", [n])
        proxy.cut_after(executes("insert into things"))
        client.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError):
            client.execute("INSERT INTO things VALUES (%s)", [3])
    assert stored(postgres_url) == [0, 1, 2, 3]
    with connect(proxy) as client:
        client.execute("INSERT INTO things VALUES (%s)", [4])
    assert dict(proxy.counts) == {"cut after": 1}


def test_cut_after_the_word_commit(proxy: Proxy, postgres_url: str) -> None:
    """The same for a transaction of several statements: the answer to its COMMIT is what is lost."""
    with psycopg.connect(proxy.url) as client:
        proxy.cut_after(executes("commit"))
        client.execute("INSERT INTO things VALUES (1)")
        client.execute("INSERT INTO things VALUES (2)")
        with pytest.raises(psycopg.OperationalError):
            client.commit()
    assert stored(postgres_url) == [1, 2]


def test_cut_after_within_a_pipeline(proxy: Proxy, postgres_url: str) -> None:
    """Rounds that stand before the doomed one are answered; it has happened all the same."""
    with connect(proxy) as client:
        proxy.cut_after(executes("insert", "things"), times=1)
        first = client.cursor()

        def pipelined() -> None:
            with client.pipeline() as pipeline:
                first.execute("SELECT 7")
                pipeline.sync()
                client.execute("INSERT INTO things VALUES (1)")
                pipeline.sync()
                client.execute("SELECT 8")

        with pytest.raises(psycopg.OperationalError):
            pipelined()
    assert first.fetchone() == (7,)
    assert stored(postgres_url) == [1]


def test_cut_before(proxy: Proxy, postgres_url: str) -> None:
    """The same error for the client, and nothing has happened."""
    with connect(proxy) as client:
        proxy.cut_before(executes("insert"))
        with pytest.raises(psycopg.OperationalError):
            client.execute("INSERT INTO things VALUES (%s)", [1])
    assert stored(postgres_url) == []
    assert dict(proxy.counts) == {"cut before": 1}


def test_half_open(proxy: Proxy, postgres_url: str, threads: ThreadPoolExecutor) -> None:
    """Nothing passes, nobody is told, and new connections hang as well; after healing all goes on."""
    with connect(proxy) as client:
        client.execute("SELECT 1")
        proxy.stop()
        asked = threads.submit(client.execute, "INSERT INTO things VALUES (1)")
        new = threads.submit(connect, proxy)
        assert waits(asked)
        assert waits(new)
        assert stored(postgres_url) == []
        proxy.heal()
        asked.result(10)
        new.result(10).close()
    assert stored(postgres_url) == [1]


def test_half_open_for_those_there_are(proxy: Proxy, threads: ThreadPoolExecutor) -> None:
    """As when something between has forgotten them: old connections hang for ever, new ones work."""
    with connect(proxy) as old:
        old.execute("SELECT 1")
        proxy.stop(new=False)
        asked = threads.submit(old.execute, "SELECT 2")
        assert waits(asked)
        with connect(proxy) as new:
            assert new.execute("SELECT 1").fetchone() == (1,)
        assert waits(asked)
        proxy.heal()
        asked.result(10)


def test_one_way(proxy: Proxy, postgres_url: str, threads: ThreadPoolExecutor) -> None:
    """What the client says arrives; what the server says does not."""
    with connect(proxy) as client:
        client.execute("SELECT 1")
        proxy.stop("down")
        asked = threads.submit(client.execute, "INSERT INTO things VALUES (1)")
        eventually(lambda: stored(postgres_url) == [1], "the server has done it")
        assert waits(asked)
        proxy.heal()
        asked.result(10)


def test_latency(proxy: Proxy) -> None:
    """Every round takes the latency both ways, and not a multiple of it."""
    with connect(proxy) as client:
        client.execute("SELECT 1")
        proxy.latency = 0.1
        began = time.monotonic()
        client.execute("SELECT 1")
        assert 0.2 <= time.monotonic() - began < 2
        proxy.heal()


def test_no_server(postgres_url: str) -> None:
    """With nobody behind it, a client hears of a broken connection, and the proxy goes on."""
    with Proxy("postgresql://durable@/nothing?host=/nowhere") as proxy:
        for _ in range(2):
            with pytest.raises(psycopg.OperationalError):
                connect(proxy)


def test_pieces_of_any_size_are_understood() -> None:
    """Bytes that come one by one give the same messages as all at once."""
    startup = b"\0\0\0\x08\0\x03\0\0"
    said = startup + b"P\0\0\0\x0es\0SELECT 1\0"[:1] + (17).to_bytes(4, "big") + b"s\0SELECT 1\0\0\0"
    said += b"B" + (8).to_bytes(4, "big") + b"\0s\0\0"
    said += b"S\0\0\0\x04" + b"Q" + (13).to_bytes(4, "big") + b"SELECT 2\0"
    whole, single = Frontend().feed(said), Frontend()
    pieces = [found for byte in said for found in single.feed(bytes([byte]))]
    for messages in (whole, pieces):
        assert b"".join(message for message, _ in messages) == said
        assert [r.statements for _, r in messages if isinstance(r, Round)] == [[], ["SELECT 1"], ["SELECT 2"]]
    answer = b"C\0\0\0\x06a\0Z\0\0\0\x05I" * 2
    backend = Backend()
    ends = [piece for byte in answer for piece in backend.feed(bytes([byte]))]
    assert b"".join(piece for piece, _ in ends) == answer
    assert sum(last for _, last in ends) == 2


def test_it_ends(postgres_url: str) -> None:
    """Closed with links open, held ones too, it takes its thread with it."""
    proxy = Proxy(postgres_url)
    with proxy:
        client = connect(proxy)
        proxy.stop()
    assert not any(thread.name == "proxy" for thread in threading.enumerate())
    with pytest.raises(psycopg.OperationalError):
        client.execute("SELECT 1")
