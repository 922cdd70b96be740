"""The functions of apps, as the settings have them called; with HTTP and without."""

from __future__ import annotations

from durable.engine.engine import WorkflowEngine
from durable.engine.functions import Functions
from durable.runners.outgoing import Calls
from durable.server.settings import ServerSettings


def functions_of(engine: WorkflowEngine, settings: ServerSettings) -> Functions:
    """The functions of apps, for an engine that serves them with these settings."""
    near = settings.private_calls or (not settings.production and settings.env == "dev")
    return Functions(engine, calls=Calls(loopback=near, private=near))
