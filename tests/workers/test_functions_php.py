"""Functions in PHP, behind PHP's own server, with a live service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import php
from tests.servers.services import require
from tests.workers.functions import FunctionsSuite, Language, Site, site

assert php.REMEDY  # registers the service

APP = str(Path(__file__).resolve().parents[2] / "workers" / "php" / "tests" / "functions_app.php")


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Site]:
    require("php")
    # Without more than one process PHP's server answers one request at a time.
    language = Language(["php", "-S", "127.0.0.1:{port}", APP], ["php", APP], PHP_CLI_SERVER_WORKERS="4")
    with site(language, tmp_path) as found:
        yield found


class TestFunctions(FunctionsSuite):
    """The suite of all languages."""
