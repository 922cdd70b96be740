"""What a URL means: schemes, options by annotation, planes that are transports, and what is said of a mistake."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Durable
from durable.control_plane.local import LocalControlPlane
from durable.core.durations import Duration
from durable.core.errors import DefinitionError
from durable.opening import _Kind, _open, open_control_plane, open_pool, open_transport
from durable.transports.event_emitter import EventEmitterTransport


class Built:
    """An adapter that remembers what it was given."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "durable",
        lease: float = 1.0,
        every: Duration = 1,
        count: int | None = None,
        signed: bool = False,
        hook: LocalControlPlane | None = None,
    ) -> None:
        self.given = (url, prefix, lease, every, count, signed, hook)


class Placed:
    """One whose place is a region."""

    def __init__(self, *, region: str | None = None, endpoint_url: str | None = None) -> None:
        self.given = (region, endpoint_url)


BUILT = _Kind(__name__, "Built", "x", ("x",), frozenset({"db"}))
KINDS = {"here": (BUILT, "there"), "place": (_Kind(__name__, "Placed", "x", ("x",)), "")}


def opened(url: str, **wished: Any) -> Any:
    return _open(url, KINDS, "transport", "here://host", wished).given


def test_options_are_read_by_the_constructors_annotations() -> None:
    """Numbers, durations and flags as people write them; the driver's own stay in the URL; the scheme is the driver's."""
    url = "here://u:p%40ss@host:1/2?lease=1500ms&every=2m&count=7&signed=yes&db=3&prefix=a%20b"
    assert opened(url) == ("there://u:p%40ss@host:1/2?db=3", "a b", 1.5, 120.0, 7, True, None)
    assert opened("here://h?lease=2.5&signed=off")[2:6] == (2.5, 1, None, False)
    assert opened("place://eu-west-1?endpoint=http://localhost:4566") == ("eu-west-1", "http://localhost:4566")
    assert opened("place://") == (None, None)


def test_what_the_url_says_wins() -> None:
    """Options given beside it hold where it says nothing, and where the adapter has them at all."""
    assert opened("here://h", prefix="b", namespace="n")[1] == "b"
    assert opened("here://h?prefix=a", prefix="b")[1] == "a"
    assert opened("here://h", prefix=None)[1] == "durable"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("here://h?leese=1", "no option 'leese'. Did you mean lease?"),
        ("here://h?hook=1", "no option 'hook'"),
        ("here://h?self=1", "no option 'self'"),
        ("here://h?url=1", "no option 'url'"),
        ("here://h?count=many", "count is a whole number, not 'many'"),
        ("here://h?signed=maybe", "signed is true or false, not 'maybe'"),
        ("here://h?lease=soon", "option lease: 'soon' is not a duration"),
        ("here:h", "No transport is known for 'here:h'"),
        ("elsewhere://u:secret@h", "No transport is known for 'elsewhere…'"),
    ],
)
def test_a_mistake_is_said(url: str, words: str) -> None:
    """In a sentence that knows what there is, and never shows a password."""
    with pytest.raises(DefinitionError, match=words.replace("?", r"\?")) as caught:
        opened(url)
    assert "secret" not in str(caught.value)


def test_objects_are_themselves() -> None:
    """A transport or a control plane that is one is handed on; the in-process one has a URL too."""
    emitter, plane = EventEmitterTransport(), LocalControlPlane()
    assert open_transport(emitter) is emitter
    assert open_control_plane(plane) is plane
    assert isinstance(open_transport("event-emitter://"), EventEmitterTransport)


def test_a_control_plane_that_is_a_transport_is_that_very_one() -> None:
    """The same object, or the same URL: one connection, started once."""
    pool, plane = open_pool({"a": "event-emitter://", "b": EventEmitterTransport()}, "event-emitter://")
    assert plane is pool.members["a"]
    emitter = EventEmitterTransport()
    pool, plane = open_pool({"a": EventEmitterTransport(), "b": emitter}, emitter)
    assert plane is pool.members["b"]


def test_real_adapters_open_by_url() -> None:
    """Without connecting: names by prefix and namespace, for the transport and for a control plane of its own."""
    lane = open_transport("redis://localhost:1/0?namespace=acc&lease=4s", prefix="shop")
    assert (lane._prefix, lane._lease) == ("shop-acc", 4.0)  # type: ignore[attr-defined]
    plane = open_control_plane("redis://localhost:1/0?prefix=shop", namespace="acc")
    assert plane._name == "shop-acc-control"  # type: ignore[attr-defined]


async def test_an_app_takes_urls_for_its_transports() -> None:
    """`transport=` and `transports=` of Durable, as text."""
    async with Durable("memory://", transport="event-emitter://") as app:
        assert list(app.engine.deps.transport.members) == ["default"]
    async with Durable("memory://", transports={"a": "event-emitter://", "b": "event-emitter"}) as app:
        assert list(app.engine.deps.transport.members) == ["a", "b"]
    with pytest.raises(DefinitionError, match="No transport is known"):
        await Durable("memory://", transport="smoke://hill").open()


def test_transports_in_a_row_are_called_by_their_kind() -> None:
    """A list is a pool in that order; two of one kind are told apart, and a control plane is found in it as well."""
    pool, plane = open_pool(["event-emitter://", "redis://localhost:1/0", "event-emitter"], "redis://localhost:1/0")
    assert list(pool.members) == ["event-emitter", "redis", "event-emitter-2"]
    assert plane is pool.members["redis"]
