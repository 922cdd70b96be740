"""Which workflows an engine executes, workspace by workspace: its own application's in its own, and in others what their apps
have registered. A run of one workspace never meets a definition of another."""

from __future__ import annotations

from collections.abc import Callable

from durable.core.definition import WorkflowDefinition
from durable.core.registry import Registry
from durable.store.records import Route


class Catalog:
    """Workspaces and their registries."""

    def __init__(self, registry: Registry, workspace: str) -> None:
        self._own = workspace
        self._registries = {workspace: registry}
        self._none = Registry()
        self.ready: Callable[[str, WorkflowDefinition], bool] = lambda workspace, definition: True
        """Whether runs of a definition can be executed now. Those that cannot are not claimed, and wait."""
        self.on_change: list[Callable[[], None]] = []
        """Called when a workspace has got other definitions, or when what `ready` says may have changed."""

    def of(self, workspace: str) -> Registry:
        """What a workspace has; an empty registry for one that has nothing."""
        return self._registries.get(workspace, self._none)

    def workspaces(self) -> list[str]:
        """All that have definitions here, the engine's own first."""
        return list(self._registries)

    def put(self, workspace: str, registry: Registry) -> None:
        """Have these definitions instead of those before. The engine's own registry stays what it is: refused there."""
        if workspace == self._own:
            raise ValueError(f"Workspace {workspace!r} is this engine's own; its definitions are its application's.")
        self._registries[workspace] = registry
        self.changed()

    def remove(self, workspace: str) -> None:
        """Forget a workspace. Its runs wait until somebody knows them again."""
        if workspace != self._own and self._registries.pop(workspace, None) is not None:
            self.changed()

    def changed(self) -> None:
        """Tell those who look for work."""
        for tell in self.on_change:
            tell()

    def routes(self) -> tuple[Route, ...]:
        """What this engine may claim now."""
        return tuple(
            Route(definition.name, definition.version, workspace)
            for workspace, registry in self._registries.items()
            for definition in registry.workflows()
            if self.ready(workspace, definition)
        )
