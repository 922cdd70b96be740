"""What is wrong though every need is met: scopes, hooks, steps and names that do not go together. Called by `graph.py`."""

from __future__ import annotations

import inspect
from typing import Any

from durable.core.definition import WorkflowDefinition, is_workflow, step_of, steps_in, workflow_of
from durable.core.errors import DefinitionError
from durable.module.decorators import Provider
from durable.module.tree import HOOKS, Graph, scope


def unfit(graph: Graph) -> list[str]:
    """Every such problem."""
    return [*_captives(graph), *_misplaced(graph), *_durable_twice(graph)]


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


def _misplaced(graph: Graph) -> list[str]:
    problems = []
    steps: dict[str, tuple[str, str]] = {}
    flows: dict[tuple[str, str], tuple[str, str]] = {}
    for module in graph.modules:
        for thing in module.plain:
            if is_workflow(thing):
                flow = workflow_of(thing)
                problems += _once(
                    flows,
                    (flow.name, flow.version),
                    _workflow(flow),
                    module.name,
                    flow.place,
                    flow.fn,
                )
            else:
                step = step_of(thing)
                problems += _once(steps, step.name, f"Step {step.name}", module.name, step.place, step.fn)
        for node in module.nodes:
            made = node.spec.made
            if node.target is not None or made is None:
                continue
            try:
                if node.is_workflow:
                    flow = workflow_of(made)
                    problems += _once(
                        flows,
                        (flow.name, flow.version),
                        _workflow(flow),
                        node.label,
                        flow.place,
                        node,
                    )
            except DefinitionError as error:
                problems.append(f"{module.path}: {error}")
            found = steps_in(made)
            for step in found:
                problems += _once(steps, step.name, f"Step {step.name}", node.label, step.place, node)
            if node.spec.scope == "singleton":
                continue
            if found:
                problems.append(
                    f"{module.path}: {node.name} has steps ({', '.join(step.name for step in found)}), so it is a singleton: "
                    f"its instance serves every run. Take its scope {node.spec.scope!r} away; what lives for one run it may "
                    "ask for as Callable[[], T]."
                )
            hooks = [hook for hook in HOOKS if hasattr(made, hook)]
            if hooks:
                problems.append(
                    f"{module.path}: {node.name} has {' and '.join(hooks)}, which would never be called: only singletons are "
                    f"started and stopped, and it is {node.spec.scope}."
                )
            if is_waiting(node.spec) or is_resource(node.spec):
                problems.append(
                    f"{module.path}: the factory of {node.name} is async or a resource, and what is {node.spec.scope} is made "
                    "without waiting. Make it a singleton, or a plain factory."
                )
    return problems


def _workflow(flow: WorkflowDefinition) -> str:
    return f"Workflow {flow.name} version {flow.version}"


def _once(seen: dict[Any, tuple[str, str]], key: Any, what: str, owner: str, place: str, identity: Any) -> list[str]:
    first = seen.setdefault(key, (owner, place))
    if first == (owner, place):
        return []
    return [
        f"{what} is defined twice: by {first[0]} ({first[1]}) and by {owner} ({place}). Rename one; or, if it is the same "
        "class in two modules, provide it in one and export it."
    ]


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


def _durable_twice(graph: Graph) -> list[str]:
    found = [module for module in graph.modules if module.definition.module.__name__ == "DurableModule"]
    if len(found) < 2:
        return []
    return [
        f"Durable is configured twice: at {' and at '.join(module.path for module in found)}. Call for_root once, in the "
        "root module; it is global, so that every module may ask for Durable."
    ]
