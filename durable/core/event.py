"""An event: a named fact with data. What triggers runs and what waits wait for."""

from __future__ import annotations

import typing
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Raw, Struct

from durable.core import payload
from durable.core.clock import EPOCH
from durable.core.errors import DefinitionError
from durable.core.names import check_name

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode


class Event(Struct, Generic[T], frozen=True):
    """A named fact, as a workflow gets it: `Event[Order]` has its data as an Order, plain `Event` as JSON values."""

    id: str
    name: str
    ts: int
    """When it was accepted, milliseconds since the epoch."""
    data: T
    """Last, so that a batch can grow at the end of what is stored."""

    @property
    def at(self) -> datetime:
        """When it was accepted, UTC."""
        return EPOCH + timedelta(milliseconds=self.ts)


class Fact(Struct, frozen=True):
    """An event on its way to a run that waits for it: payload of the inbox row and of the journal's `event received`."""

    id: str
    name: str
    at: int
    """When it was accepted, µs."""
    number: int
    """It rises in the order in which events were accepted."""
    data: Raw

    def plain(self) -> dict[str, Any]:
        """As conditions see it."""
        return {"id": self.id, "name": self.name, "ts": self.at // 1_000, "data": msgspec.json.decode(self.data)}


read_fact = msgspec.json.Decoder(Fact).decode


def fact_of(id: str, name: str, at: int, number: int, data: bytes) -> bytes:
    """A Fact's bytes."""
    return _encode(Fact(id, name, at, number, Raw(data)))


def input_of(id: str, name: str, at: int, data: bytes) -> bytes:
    """The event as the stored input of a run. `at` in µs; `data` stands last."""
    return _encode(Event[Raw](id, name, at // 1_000, Raw(data)))


def data_in(stored: bytes) -> bytes:
    """The data of an event that is a run's stored input."""
    return bytes(msgspec.json.decode(stored, type=_Sent).data)


class _Sent(Struct):
    data: Raw = Raw(b"null")


def is_event(annotation: Any) -> bool:
    """Whether an annotation asks for the event itself."""
    return annotation is Event or typing.get_origin(annotation) is Event


def event_reader(annotation: Any) -> Callable[[bytes], Event[Any]]:
    """From a Fact's bytes to an Event whose data is of that type. Raises PayloadError, also where it cannot be made."""
    read = payload.decoder(annotation)

    def reader(data: bytes) -> Event[Any]:
        fact = read_fact(data)
        return Event(fact.id, fact.name, fact.at // 1_000, read(bytes(fact.data)))

    return reader


def check_event_name(name: object) -> None:
    """Raises DefinitionError for what is no event's name."""
    check_name(name, "event name", reserved=False)
    if name == "*":
        raise DefinitionError("An event name is a whole name: there are no wildcards.")
