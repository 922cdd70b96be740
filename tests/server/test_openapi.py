"""The API's document: whole, and what the service really does. schemathesis draws requests from it."""

from __future__ import annotations

import json
import os
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS as known

from durable.server.openapi import document
from durable.server.routes_table import ROUTES
from tests.server.world import ADMIN, Running

CASES = int(os.environ.get("DURABLE_TEST_CASES", "5"))
"""Requests drawn for each operation; DURABLE_TEST_CASES asks for more."""
DOCUMENT = document(ROUTES)


def test_it_describes_every_route(service: Running) -> None:
    """Each row is an operation with its role, and the document is what the service serves."""
    operations = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert operations == {(route.method, route.path) for route in ROUTES if route.method != "WEBSOCKET"}
    names = [one["operationId"] for item in DOCUMENT["paths"].values() for one in item.values()]
    assert len(names) == len(set(names))
    with service.client() as client:
        assert client.get("/openapi.json").json() == json.loads(json.dumps(DOCUMENT))


def test_every_reference_leads_somewhere() -> None:
    """No $ref points at a schema that is not there, and every schema is one."""

    def refs(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for one in value.values() for found in refs(one)]
        return [found for one in value for found in refs(one)] if isinstance(value, list) else []

    known = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert set(refs(DOCUMENT)) <= known
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.generation.update(
    with_security_parameters=False
)  # the right key is sent; wrong ones have their own tests
CHECKS = [
    known.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
    )
]
STREAMS = [route.path for route in ROUTES if route.answer == "stream"]


@pytest.fixture(scope="module")
def credentials(service: Running, key: str) -> tuple[str, str, str]:
    return service.url, key, ADMIN


@schema.exclude(path=STREAMS).parametrize()
@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_it_does_what_it_says(case: schemathesis.Case, credentials: tuple[str, str, str]) -> None:
    """Whatever is sent, right or wrong, the answer is none of our mistakes, has a status, a content type and a shape that the
    document names."""
    url, key, admin = credentials
    wanted = case.operation.definition.raw.get("security", [{}])[0]
    token = admin if "admin" in wanted else key
    headers = {"authorization": f"Bearer {token}"} if wanted else {}
    answer = case.call(base_url=url, headers=headers, timeout=20)
    case.validate_response(answer, checks=CHECKS)
