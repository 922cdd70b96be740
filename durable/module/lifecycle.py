"""Starting and stopping providers: each is made and started after all it needs, and stopped before any of them.

`on_start` runs before the engine is up, `on_ready` when it is, `on_stop` after it is drained; each `def` or `async def`.
Called by `Application` only. A value's hooks are not called: who made it looks after it.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from durable.module.container import Container
from durable.module.tree import Node

log = logging.getLogger("durable.module")


class Lifecycle:
    """The providers of one app, as far as they are started."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self.instances: dict[Node, Any] = {}
        """Singletons, in the order in which they came to be."""

    async def start(self) -> None:
        """Make every singleton and call its `on_start`. What fails says whose it was; `stop` ends the ones before it."""
        for node in self._container.graph.order:
            if node.target is not None or node.spec.scope != "singleton":
                continue
            try:
                self.instances[node] = await self._container.make(node)
                await self._call(node, "on_start")
            except Exception as error:
                error.add_note(f"while starting {node.where}")
                raise

    async def ready(self) -> None:
        """The engine is up."""
        for node in list(self.instances):
            try:
                await self._call(node, "on_ready")
            except Exception as error:
                error.add_note(f"while {node.where} was told that the engine is up")
                raise

    async def stop(self) -> None:
        """In reverse. One that fails does not keep the others from stopping; then all failures are raised."""
        failures: list[Exception] = []
        while self.instances:
            node = next(reversed(self.instances))
            for end in (self._on_stop, self._container.end):
                try:
                    await end(node)
                except Exception as error:
                    error.add_note(f"while stopping {node.where}")
                    log.error("stopping %s: %r", node.label, error)
                    failures.append(error)
            del self.instances[node]
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup("providers that could not be stopped", failures)

    async def _on_stop(self, node: Node) -> None:
        await self._call(node, "on_stop")

    async def _call(self, node: Node, hook: str) -> None:
        if node.spec.form == "value":
            return
        method = getattr(self.instances[node], hook, None)
        if callable(method):
            answer = method()
            if inspect.isawaitable(answer):
                await answer
