"""Many small calls become one: what is asked while a call is under way goes out with the next.

Nobody waits for a window: a lone entry goes at once. SQS settles each entry of a batch by itself, and so does this: an entry
that is refused fails alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

ENTRIES_MAX = 10
"""What SQS takes in one call."""
SIZE_MAX = 1 << 20
"""Bytes all messages of one call may have together."""
ONE_S_FAULT = {"InvalidMessageContents", "InvalidParameterValue", "InvalidAttributeValue", "BatchRequestTooLong"}
"""Refusals of a whole call that may be for one entry's sake: each is tried alone then."""

Call = Callable[..., Awaitable[dict[str, Any]]]


class EntryRefused(Exception):
    """SQS took the call and not this entry. `ours`: asking again would not help."""

    def __init__(self, code: str, message: str, *, ours: bool) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.code = code
        self.ours = ours


class _Entry:
    def __init__(self, fields: dict[str, Any], size: int, done: asyncio.Future[None]) -> None:
        self.fields = fields
        self.size = size
        self.done = done


class _Lane:
    """What goes to one queue."""

    def __init__(self) -> None:
        self.waiting: deque[_Entry] = deque()
        self.flying = 0
        self.scheduled = False


class Batches:
    """One kind of batch call, to any queue."""

    def __init__(self, call: Call, *, at_once: int) -> None:
        """`call`: the client's `…_batch` method. `at_once`: calls under way to one queue; 1 keeps the order."""
        self._call = call
        self._at_once = at_once
        self._lanes: dict[str, _Lane] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def put(self, url: str, fields: dict[str, Any], *, size: int = 0) -> None:
        """Returns once SQS has confirmed this entry. Raises EntryRefused, or what the call raised."""
        loop = asyncio.get_running_loop()
        lane = self._lanes.setdefault(url, _Lane())
        entry = _Entry(fields, size, loop.create_future())
        lane.waiting.append(entry)
        if not lane.scheduled and lane.flying < self._at_once:
            lane.scheduled = True
            loop.call_soon(self._fly, url, lane)  # others of this very moment come along
        await entry.done

    async def close(self) -> None:
        """Nothing more is sent; who waits hears of it."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            _fail(list(lane.waiting), ConnectionError("the transport was closed"))
            lane.waiting.clear()
        for call in list(self._calls):
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _fly(self, url: str, lane: _Lane) -> None:
        lane.scheduled = False
        while lane.flying < self._at_once and (batch := _next(lane)):
            lane.flying += 1
            call = asyncio.get_running_loop().create_task(self._carry(url, lane, batch))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        if not lane.flying and self._lanes.get(url) is lane:
            del self._lanes[url]

    async def _carry(self, url: str, lane: _Lane, batch: list[_Entry]) -> None:
        try:
            await self._settle(url, batch)
        finally:
            _fail(batch, ConnectionError("the transport was closed"))  # only what is not settled by now
            lane.flying -= 1
            self._fly(url, lane)

    async def _settle(self, url: str, batch: list[_Entry]) -> None:
        try:
            entries = [{"Id": str(number), **entry.fields} for number, entry in enumerate(batch)]
            answer = await self._call(QueueUrl=url, Entries=entries)
        except ClientError as error:
            if len(batch) > 1 and error.response["Error"].get("Code") in ONE_S_FAULT:
                for entry in batch:
                    await self._settle(url, [entry])
            else:
                _fail(batch, error)
            return
        except Exception as error:
            _fail(batch, error)
            return
        for failed in answer.get("Failed", ()):
            refused = EntryRefused(failed["Code"], failed.get("Message", ""), ours=bool(failed.get("SenderFault")))
            _fail([batch[int(failed["Id"])]], refused)
        for taken in answer.get("Successful", ()):
            done = batch[int(taken["Id"])].done
            if not done.done():
                done.set_result(None)
        _fail(batch, ConnectionError("SQS did not say what became of it"))


def _next(lane: _Lane) -> list[_Entry]:
    """What goes with the next call: as many as fit, in order. Whoever has given up waiting is not sent at all."""
    batch: list[_Entry] = []
    size = 0
    while lane.waiting and len(batch) < ENTRIES_MAX:
        entry = lane.waiting[0]
        if batch and size + entry.size > SIZE_MAX:
            break
        lane.waiting.popleft()
        if not entry.done.done():
            batch.append(entry)
            size += entry.size
    return batch


def _fail(batch: list[_Entry], error: Exception) -> None:
    for entry in batch:
        if not entry.done.done():
            entry.done.set_exception(error)
