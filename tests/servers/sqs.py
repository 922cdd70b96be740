"""An SQS for tests: moto's server in a process of its own. SQS_ENDPOINT_URL names another one, which is used as it is."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.process import ServerProcess, free_port
from tests.servers.services import require, service

REMEDY = "pip install 'durable[sqs]' 'moto[sqs]' flask flask-cors, or name an endpoint as SQS_ENDPOINT_URL"


def at_hand() -> bool:
    needed = ("aiobotocore",) if os.environ.get("SQS_ENDPOINT_URL") else ("aiobotocore", "moto", "flask", "flask_cors")
    return all(importlib.util.find_spec(name) is not None for name in needed)


service("sqs", at_hand, REMEDY)

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "eu-west-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class SqsServer(ServerProcess):
    """An SQS of one's own; what it holds is gone when it ends."""

    def __init__(self) -> None:
        port = free_port()
        program = Path(__file__).with_name("moto_sqs.py")
        command = [sys.executable, str(program), "-H", "127.0.0.1", "-p", str(port)]
        super().__init__(command, port, env={"PYTHONWARNINGS": "ignore"})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def sqs_server() -> Iterator[str]:
    """The endpoint of a running server."""
    require("sqs")
    given = os.environ.get("SQS_ENDPOINT_URL")
    if given:
        yield given
        return
    server = SqsServer()
    server.start()
    try:
        yield server.url
    finally:
        server.close()


@pytest.fixture
def sqs_url(sqs_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint, with credentials that it takes in the environment. Use a prefix of your own: queues stay."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    return sqs_server
