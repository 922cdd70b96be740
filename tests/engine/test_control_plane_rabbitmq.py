"""Engines in two processes that reach each other through RabbitMQ alone: their store gives no hints."""

from __future__ import annotations

import asyncio

import pytest

from durable import Durable, RunCancelled
from durable.core.errors import DefinitionError
from durable.store.postgres import PostgresStore
from durable.transports.rabbitmq import RabbitMqTransport
from tests.engine.far_node import far
from tests.engine.test_control_plane import FAR
from tests.engine.test_control_plane_postgres import far_node
from tests.servers.rabbitmq import RabbitServer


def looker(url: str, amqp: str) -> Durable:
    """A pod that executes nothing, whose store is deaf."""
    store = PostgresStore(url, notifications=False)
    return Durable(store, workflows=[far], control_plane=amqp, poll_every=FAR, worker=False)


@pytest.mark.parametrize("closing", [False, True], ids=["calm", "connections closed"])
async def test_D12_a_run_is_taken_up_by_another_process_at_once(
    postgres_url: str, rabbit: RabbitServer, closing: bool
) -> None:
    """(D12) RabbitMQ as a wake-up queue: a run started where nothing executes begins in another process long before any
    poll, and its body sees the cancel; also after the broker has closed every connection (S43, B28)."""
    looks = looker(postgres_url, rabbit.url)
    async with looks, far_node(postgres_url, rabbit.url, str(FAR)) as hears:
        await hears("ready")
        if closing:
            before = await listening(rabbit)
            await asyncio.to_thread(rabbit.control, "close_all_connections", "a test")
            async with asyncio.timeout(20):
                while len(now := await listening(rabbit)) < 2 or now & before:
                    await asyncio.sleep(0.05)
        asked = asyncio.get_running_loop().time()
        handle = await looks.start(far)
        await hears("began")
        assert await looks.run(handle.id).cancel()
        await hears("cancelled")
        with pytest.raises(RunCancelled):
            await looks.run(handle.id).result(10)
        assert asyncio.get_running_loop().time() - asked < FAR / 3


async def listening(rabbit: RabbitServer) -> set[str]:
    """The queues that are bound to the control plane's exchange."""
    said = await asyncio.to_thread(rabbit.control, "-q", "list_bindings", "source_name", "destination_name")
    rows = [line.split("\t") for line in said.splitlines()]
    return {row[1] for row in rows if row[0] == "durable-control"}


async def test_D12_an_amqp_url_is_a_control_plane(amqp_url: str) -> None:
    """`amqp://` is understood; without its driver the extra would be named, and other URLs are refused with all that may be."""
    async with Durable("memory://", control_plane=amqp_url) as app:
        assert isinstance(app.engine.deps.control_plane, RabbitMqTransport)
    with pytest.raises(DefinitionError, match="amqp://"):
        async with Durable("memory://", control_plane="mqtt://host"):
            pass
