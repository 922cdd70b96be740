"""The client of a Durable service, over HTTP: `Client`, and `SyncClient` for code without an event loop.

async with Client("http://localhost:3030") as client:
    answer = await client.events.send("order/created", {"id": "o-1"}, app="shop")
    async for frame in client.runs.watch(answer.run_id):
        print(frame.kind, frame.status)
"""

from durable.client.client import Client
from durable.client.errors import Conflict, NotAllowed, NotFound, Refused, ServiceError, Unavailable
from durable.client.shapes import (
    App,
    Approval,
    Bucket,
    Bulk,
    BulkOne,
    Changed,
    Error,
    Event,
    EventAnswer,
    Frame,
    Limit,
    LogLine,
    NewRun,
    Run,
    Runner,
    Schedule,
    Stats,
    Step,
    Trigger,
    Triggered,
    Workflow,
)
from durable.client.sync import SyncClient

__all__ = [
    "App",
    "Approval",
    "Bucket",
    "Bulk",
    "BulkOne",
    "Changed",
    "Client",
    "Conflict",
    "Error",
    "Event",
    "EventAnswer",
    "Frame",
    "Limit",
    "LogLine",
    "NewRun",
    "NotAllowed",
    "NotFound",
    "Refused",
    "Run",
    "Runner",
    "Schedule",
    "ServiceError",
    "Stats",
    "Step",
    "SyncClient",
    "Trigger",
    "Triggered",
    "Unavailable",
    "Workflow",
]
