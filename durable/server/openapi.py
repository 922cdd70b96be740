"""The API's description, OpenAPI 3.1, made from the table of routes. Nothing here says what the table does not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from durable import __version__
from durable.server.errors import CODES, ErrorAnswer
from durable.server.route import MAX_ID, Nothing, Route

_PARAMETER = re.compile(r"\{(\w+)\}")
_REFUSALS = {
    "400": "The request cannot be understood.",
    "401": "The credential is missing or wrong.",
    "403": "The credential may not do this.",
    "404": "There is no such thing in this workspace.",
    "405": "The route has other methods.",
    "408": "The body did not arrive in time.",
    "409": "It is in another state, or this was asked before.",
    "413": "The body is too large.",
    "415": "The body is not plain JSON.",
    "422": "It cannot be done.",
    "429": "Too many requests.",
    "503": "Not now.",
}


def document(table: Sequence[Route]) -> dict[str, Any]:
    """The whole document, as plain data."""
    types: list[Any] = [ErrorAnswer]
    table = [route for route in table if route.method != "WEBSOCKET"]
    for route in table:
        types += [kind for kind in (route.body, route.answer) if kind is not None and kind != "stream"]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    found = dict(zip(map(_key, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in table:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, found)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Durable",
            "version": __version__,
            "description": "Runners dial in at /connect (WebSocket). Error codes: "
            + " ".join(f"`{code}` {meaning}" for code, meaning in CODES.items()),
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A workspace's key: dk_<workspace>_<secret>.",
                },
                "signature": {"type": "apiKey", "in": "header", "name": "x-durable-signature"},
                "admin": {"type": "http", "scheme": "bearer", "description": "The service's admin token."},
            },
        },
    }


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": route.handler.__module__.rpartition(".")[2] + "_" + route.handler.__name__,
        "summary": route.summary,
        "description": inspect.getdoc(route.handler) or "",
        "parameters": [*_path_parameters(route), *_query_parameters(route)],
        "responses": {str(route.status): _answer(route, schemas)} | _refusals(schemas),
        "x-role": route.role,
        "x-scope": route.scope,
    }
    if route.path == "/readyz":
        made["responses"]["503"] = _answer(route, schemas)
    if route.auth not in ("none", "node", "token"):
        made["security"] = [{"admin": []}] if route.auth == "admin" else [{"key": []}, {"signature": []}]
    if route.body is not None:
        made["requestBody"] = {
            "required": False,
            "content": {"application/json": {"schema": schemas[_key(route.body)]}},
        }
    return made


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    schema = {"type": "string", "minLength": 1, "maxLength": MAX_ID}
    return [{"name": name, "in": "path", "required": True, "schema": schema} for name in _PARAMETER.findall(route.path)]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    if route.query is Nothing:
        return []
    _, components = msgspec.json.schema_components([route.query])
    properties = components[route.query.__name__]["properties"]
    return [
        {"name": name, "in": "query", "required": False, "schema": _without_null(schema)}
        for name, schema in properties.items()
    ]


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query parameter is there or is not; it is never null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    return kinds[0] if kinds else {name: value for name, value in schema.items() if value is not None}


def _answer(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    if route.answer == "stream":
        return {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    if route.answer is None:
        return {"description": "Done."}
    return {"description": "Done.", "content": {"application/json": {"schema": schemas[_key(route.answer)]}}}


def _refusals(schemas: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schemas[_key(ErrorAnswer)]}}
    return {status: {"description": meaning, "content": content} for status, meaning in _REFUSALS.items()}


def _key(kind: Any) -> str:
    return repr(kind)
