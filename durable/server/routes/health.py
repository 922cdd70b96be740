"""Whether this process lives, whether it may be asked, and what may be asked. No route here looks into the store."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from durable.server.route import Answer, Call


class Health(Struct, frozen=True):
    status: Literal["ok"] = "ok"


class Ready(Struct, frozen=True, omit_defaults=True):
    status: Literal["ready", "not_ready"]
    checks: dict[str, str] = {}
    """Each `ok`, or what is wrong."""
    draining: bool = False


async def healthz(call: Call) -> Answer:
    """The process lives and its loop turns."""
    return Answer(Health())


async def readyz(call: Call) -> Answer:
    """200 while this process takes requests in; 503 while it drains, or its store takes nothing."""
    trouble = call.engine.trouble
    draining = call.service.draining
    ready = trouble is None and not draining
    checks = {"store": "ok" if trouble is None else trouble.code}
    return Answer(Ready("ready" if ready else "not_ready", checks, draining), 200 if ready else 503)


async def openapi(call: Call) -> Answer:
    """This document."""
    return Answer(call.service.document)
