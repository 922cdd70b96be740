"""What is wrong though every need is met: scopes, hooks, steps and names that do not go together. Called by `graph.py`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from durable.core.definition import WorkflowDefinition, is_workflow, step_of, steps_in, workflow_of
from durable.core.errors import DefinitionError
from durable.module.decorators import Provider
from durable.module.tree import HOOKS, Graph, scope

_DURABLE = "durable.module.durable_module"


def unfit(graph: Graph) -> list[str]:
    """Every such problem."""
    return [*_captives(graph), *_doubled(graph), *_never_kept(graph)]


def _captives(graph: Graph) -> list[str]:
    """A singleton must not keep what lives for one run."""
    return [
        f"{node.module.path}: {node.name} is a singleton and would keep the first {need.node.name} for ever, which lives for "
        f"one run. Ask for Callable[[], {need.node.name}] and call it in the step, or give {node.name} the scope 'run'."
        for node in graph.order
        if node.target is None and node.spec.scope == "singleton"
        for need in node.needs
        if need.node is not None and not need.lazy and scope(need.node) == "run"
    ]


def _doubled(graph: Graph) -> list[str]:
    """Workflows and steps of one name. The same function listed twice is one; the same class twice is two instances."""
    problems: list[str] = []
    first: dict[Any, tuple[Any, str, str]] = {}

    def meet(key: Any, what: str, identity: Any, owner: str, place: str) -> None:
        known, known_owner, known_place = first.setdefault(key, (identity, owner, place))
        if known is not identity:
            problems.append(
                f"{what} is defined twice: by {known_owner} ({known_place}) and by {owner} ({place}). Rename one; or, if it is "
                "the same class in two modules, provide it in one and export it."
            )

    def meet_workflow(flow: WorkflowDefinition, identity: Any, owner: str) -> None:
        what = f"Workflow {flow.name} version {flow.version}"
        meet((flow.name, flow.version), what, identity, owner, flow.place)

    for module in graph.modules:
        for thing in module.plain:
            if is_workflow(thing):
                meet_workflow(workflow_of(thing), workflow_of(thing).fn, module.name)
            else:
                step = step_of(thing)
                meet(step.name, f"Step {step.name}", step.fn, module.name, step.place)
        for node in module.nodes:
            made = node.spec.made
            if node.target is not None or made is None:
                continue
            for step in steps_in(made):
                meet(step.name, f"Step {step.name}", node, node.label, step.place)
            try:
                if node.is_workflow:
                    meet_workflow(workflow_of(made), node, node.label)
            except DefinitionError as error:  # a subclass of a workflow that is none itself
                problems.append(f"{module.path}: {error}")
    return problems


def _never_kept(graph: Graph) -> Iterator[str]:
    """What only a singleton can have."""
    for node in graph.order:
        spec, path = node.spec, node.module.path
        if node.target is not None or spec.scope == "singleton":
            continue
        steps = steps_in(spec.made) if spec.made else []
        if steps:
            yield (
                f"{path}: {node.name} has steps ({', '.join(step.name for step in steps)}), so it is a singleton: its "
                f"instance serves every run. Take its scope {spec.scope!r} away; what lives for one run it may ask for as "
                "Callable[[], T]."
            )
        hooks = [hook for hook in HOOKS if hasattr(spec.made, hook)]
        if hooks:
            yield (
                f"{path}: {node.name} has {' and '.join(hooks)}, which would never be called: only singletons are started "
                f"and stopped, and it is {spec.scope}."
            )
        if is_waiting(spec) or is_resource(spec):
            yield (
                f"{path}: the factory of {node.name} is async or a resource, and what is {spec.scope} is made without "
                "waiting. Make it a singleton, or a plain factory."
            )


def is_waiting(spec: Provider) -> bool:
    """Whether making it has to be awaited."""
    return spec.use_factory is not None and (
        inspect.iscoroutinefunction(spec.use_factory) or inspect.isasyncgenfunction(spec.use_factory)
    )


def is_resource(spec: Provider) -> bool:
    """A factory that yields, and cleans up after."""
    return spec.use_factory is not None and (
        inspect.isgeneratorfunction(spec.use_factory) or inspect.isasyncgenfunction(spec.use_factory)
    )


def durable_twice(graph: Graph) -> list[str]:
    """Asked first: everything else it would break reads worse."""
    found = [module for module in graph.modules if module.definition.module.__module__ == _DURABLE]
    if len(found) < 2:
        return []
    return [
        f"Durable is configured twice: at {' and at '.join(module.path for module in found)}. Call for_root once, in the "
        "root module; it is global, so that every module may ask for Durable."
    ]
