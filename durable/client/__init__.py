"""The client of a Durable service, over HTTP: `Client`, and `SyncClient` for code without an event loop.

async with Client("http://localhost:3030") as client:
    answer = await client.events.send("order/created", {"id": "o-1"}, app="shop")
    async for frame in client.runs.watch(answer.run_id):
        print(frame.kind, frame.status)
"""

from durable.client.client import Client
from durable.client.errors import Conflict, NotAllowed, NotFound, Refused, ServiceError, Unavailable
from durable.client.shapes import Approval, Event, EventAnswer, Frame, LogLine, Run, Schedule, Step, Triggered
from durable.client.sync import SyncClient

__all__ = [
    "Approval",
    "Client",
    "Conflict",
    "Event",
    "EventAnswer",
    "Frame",
    "LogLine",
    "NotAllowed",
    "NotFound",
    "Refused",
    "Run",
    "Schedule",
    "ServiceError",
    "Step",
    "SyncClient",
    "Triggered",
    "Unavailable",
]
