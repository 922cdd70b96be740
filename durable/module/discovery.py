"""Workflows and steps of all providers, dead-letter methods among them, registered with their instances. Called at start."""

from __future__ import annotations

from typing import Any

from durable.app import Durable
from durable.core.definition import is_step, is_workflow, steps_in, workflow_of
from durable.core.errors import DefinitionError
from durable.core.registry import Registry
from durable.module.container import Container
from durable.module.tree import Node


def register(container: Container, instances: dict[Node, Any], durable: Durable) -> None:
    """Everything there is into the Durable's registry. Raises DefinitionError naming both places of a duplicate."""
    registry = durable.registry
    for module in container.graph.modules:
        for thing in module.plain:
            registry.add(thing)
        for node in module.nodes:
            if node.target is not None:
                continue
            if node.is_workflow and node.spec.made is not None:
                registry.add(workflow_of(node.spec.made).bind(_maker(container, node)))
            elif node in instances:
                _methods(registry, node, instances[node])


def _maker(container: Container, node: Node) -> Any:
    return lambda cls: container.fresh(node)


def _methods(registry: Registry, node: Node, instance: Any) -> None:
    if isinstance(instance, type) or is_workflow(instance) or is_step(instance):
        return
    try:
        for step in steps_in(instance):
            registry.add_step(step)
    except DefinitionError as error:
        error.add_note(f"while reading {node.where}")
        raise
