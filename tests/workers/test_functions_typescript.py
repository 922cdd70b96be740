"""Functions in TypeScript, behind Node's own server, with a live service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import node
from tests.servers.services import require
from tests.workers.functions import FunctionsSuite, Language, Site, site


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Site]:
    require("node")
    ready = node.built()
    assert ready is not None
    command = [ready.node, str(ready.dist / "test" / "functions_app.js")]
    with site(Language(command, command), tmp_path) as found:
        yield found


class TestFunctions(FunctionsSuite):
    """The suite of all languages."""

    named = True
