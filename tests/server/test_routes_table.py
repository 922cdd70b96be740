"""One table of routes: nothing is served that has no row, and each row says what is asked for."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route as StarletteRoute
from starlette.routing import WebSocketRoute

from durable.server.route import Route
from durable.server.routes_table import ROUTES
from tests.server.world import Running


def served(app: Starlette) -> set[tuple[str, str]]:
    """(method, path) of everything the application answers, as it stands and not as the table says."""
    found = set()
    for route in app.routes:
        assert isinstance(route, StarletteRoute | WebSocketRoute), f"{route} is no route of the table's"
        for method in getattr(route.endpoint, "routes", {"ANY": None}):
            found.add((method, route.path))
    return found


def test_every_route_has_a_row(service: Running) -> None:
    """What the application serves is the table, no more and no less."""
    assert served(service.asgi) == {(route.method, route.path) for route in ROUTES}


def test_a_route_without_a_row_is_found(service: Running) -> None:
    """The test above sees a route that was put in beside the table."""
    sly = Starlette(routes=[*service.asgi.routes, StarletteRoute("/sly", lambda request: PlainTextResponse("hello"))])
    assert served(sly) - {(route.method, route.path) for route in ROUTES} == {("ANY", "/sly")}


def test_no_two_rows_for_one_route() -> None:
    """A method and path stand in the table once."""
    pairs = [(route.method, route.path) for route in ROUTES]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.method + route.path)
def test_rows_make_sense(route: Route) -> None:
    """Without a credential nothing of a workspace is shown; what changes something asks for more than reading; a body is
    read by POST alone; every handler says what it does."""
    if route.auth == "none":
        assert (route.scope, route.role, route.method) == ("service", "read", "GET")
    if route.method == "GET":
        assert route.body is None
        assert route.role != "full"
    elif route.auth == "key":
        assert route.role == "full"
    if route.auth == "admin":
        assert route.role == "admin"
    if route.scope == "run":
        assert "{id}" in route.path or route.auth in ("app", "token")
    assert route.handler.__doc__
    assert route.summary
    assert route.cost > 0
    assert route.answer is not None or route.status == 204
