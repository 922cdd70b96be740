"""Servers that some tests need: is it at hand, and if not, what to do about it.

On a laptop a missing one is a skip with its remedy; with DURABLE_TEST_REQUIRE=all, as in CI, it is a failure.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest

SERVICES: dict[str, tuple[Callable[[], bool], str]] = {}
"""Service → (is it at hand?, remedy). Register with `service(...)` beside the tests that need it."""


OPTIONAL: set[str] = set()


def service(name: str, at_hand: Callable[[], bool] | str, remedy: str, *, optional: bool = False) -> None:
    """Make a service known. `at_hand` is a check, or the name of a module that must be importable. An optional one, which no
    package registry brings, is a failure only where DURABLE_TEST_REQUIRE names it."""
    if optional:
        OPTIONAL.add(name)
    if isinstance(at_hand, str):
        module = at_hand
        SERVICES[name] = (lambda: importlib.util.find_spec(module) is not None, remedy)
    else:
        SERVICES[name] = (at_hand, remedy)


def require(name: str) -> None:
    """Go on if the service is at hand. Otherwise skip with its remedy; with DURABLE_TEST_REQUIRE=all (or naming it), fail. At
    the top of a module it is about all of its tests."""
    if name not in SERVICES:
        raise LookupError(
            f"unknown service {name!r}: register it with tests.servers.services.service(name, check, remedy)"
        )
    at_hand, remedy = SERVICES[name]
    if at_hand():
        return
    sentence = f"{name} is not at hand: {remedy}"
    required = os.environ.get("DURABLE_TEST_REQUIRE", "").replace(",", " ").split()
    if ("all" in required and name not in OPTIONAL) or name in required:
        pytest.fail(sentence, pytrace=False)
    pytest.skip(sentence, allow_module_level=True)
