"""Fixtures for tests of module apps. In conftest.py:

    pytest_plugins = ["durable.testing.pytest_plugin"]

    @pytest.fixture
    def durable_module():
        return AppModule

A test then takes `durable_app`, an open `durable.testing.harness.Test`; a file or class that wants other fakes defines
`durable_overrides` anew. Async fixtures are pytest-asyncio's where it is installed, and otherwise left to anyio's plugin.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from durable.testing.harness import Test

_fixture: Any
try:
    from pytest_asyncio import fixture as _fixture
except ImportError:  # anyio takes plain async fixtures
    _fixture = pytest.fixture


@pytest.fixture
def durable_module() -> Any:
    """The root module under test. Define it in your conftest.py."""
    raise pytest.UsageError("Define a fixture `durable_module` that returns your root module.")


@pytest.fixture
def durable_overrides() -> Mapping[Any, Any]:
    """Token → what stands in for it: nothing, unless defined anew."""
    return {}


@_fixture  # type: ignore[untyped-decorator]
async def durable_app(durable_module: Any, durable_overrides: Mapping[Any, Any]) -> AsyncIterator[Test]:
    """The app, running on a memory store in virtual time; stopped after the test."""
    app = Test.create(durable_module)
    for token, value in durable_overrides.items():
        app.override(token, value)
    async with app:
        yield app
