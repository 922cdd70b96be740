"""Which workflows and steps this process knows, by name.

Decides that a name means one thing, and which version a start without one gets. Called by whoever registers (authors,
modules, workers) and by engine, runner and worker to look up. Never falls back: a version that is not here is an
error, not the latest instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from durable.core.definition import (
    StepDefinition,
    WorkflowDefinition,
    is_step,
    is_workflow,
    step_of,
    steps_in,
    workflow_of,
)
from durable.core.errors import DefinitionError, DuplicateDefinition, UnknownStep, UnknownVersion, UnknownWorkflow


class Registry:
    """Filled while an application is put together, then only read."""

    def __init__(self, things: Iterable[Any] = ()) -> None:
        self._workflows: dict[str, dict[str, WorkflowDefinition]] = {}
        self._steps: dict[str, StepDefinition] = {}
        self._default_inputs: dict[str, Any] = {}
        self._by_event: dict[str, list[WorkflowDefinition]] | None = None
        for thing in things:
            self.add(thing)

    def add(self, thing: Any) -> None:
        """A workflow, a step, or an instance with steps among its methods. Raises DefinitionError."""
        if is_workflow(thing):
            self.add_workflow(thing)
        elif is_step(thing):
            self.add_step(thing)
        elif steps := steps_in(thing):
            for step in steps:
                self.add_step(step)
        else:
            raise DefinitionError(
                f"{thing!r} is neither a workflow nor a step, and no method of it is one. "
                "Put @workflow or @durable_step on it."
            )

    def add_workflow(self, thing: Any) -> WorkflowDefinition:
        """Raises DuplicateDefinition; the same function again is no duplicate."""
        new = workflow_of(thing)
        new.resolve()
        versions = self._workflows.get(new.name, {})
        old = versions.get(new.version)
        if old is not None and old.fn is not new.fn:
            raise DuplicateDefinition(
                f"Workflow {new.name} version {new.version} is defined twice: at {old.place} and at {new.place}. "
                "Rename one, or give it another version."
            )
        versions[new.version] = new
        self._by_event = None
        # Sorted here, so that the latest is the last without asking again at every start.
        self._workflows[new.name] = dict(sorted(versions.items(), key=lambda item: version_key(item[0])))
        return new

    def replace(self, definition: WorkflowDefinition) -> None:
        """Have this definition instead of one of its name and version, if there is one."""
        versions = self._workflows.setdefault(definition.name, {})
        definition.resolve()
        versions[definition.version] = definition
        self._by_event = None

    def add_step(self, thing: Any) -> StepDefinition:
        """Raises DuplicateDefinition; the same step again, or now with its instance, is no duplicate."""
        new = step_of(thing)
        new.resolve()
        old = self._steps.get(new.name)
        if old is not None and (old.fn is not new.fn or _two_instances(old, new)):
            raise DuplicateDefinition(
                f"Step {new.name} is defined twice: at {old.place} and at {new.place}. "
                "Rename one, or register one instance only."
            )
        if old is None or new.instance is not None:
            self._steps[new.name] = new
        return self._steps[new.name]

    def workflow(self, name: str, version: str) -> WorkflowDefinition:
        """Exactly this version. Raises UnknownWorkflow, UnknownVersion."""
        versions = self._versions(name)
        if version not in versions:
            raise UnknownVersion(
                f"Workflow {name} has no version {version} here; it has {', '.join(versions)}. "
                "Deploy the code of that version, or ask for one of these."
            )
        return versions[version]

    def latest(self, name: str) -> WorkflowDefinition:
        """The version a start without one gets: the last by `version_key`. Raises UnknownWorkflow."""
        return next(reversed(self._versions(name).values()))

    def triggered(self, event: str) -> list[WorkflowDefinition]:
        """The workflows whose latest version has a trigger of that name, by name."""
        if self._by_event is None:
            self._by_event = {}
            for definition in map(self.latest, sorted(self._workflows)):
                for name in dict.fromkeys(trigger.event for trigger in definition.triggers):
                    if name is not None:
                        self._by_event.setdefault(name, []).append(definition)
        return self._by_event.get(event, [])

    def prefer(self, name: str, version: str) -> None:
        """Have `latest` be this version, whatever the others are called. Raises UnknownWorkflow, UnknownVersion."""
        chosen = self.workflow(name, version)
        others = {known: one for known, one in self._workflows[name].items() if known != version}
        self._workflows[name] = {**others, version: chosen}
        self._by_event = None

    def step(self, name: str) -> StepDefinition:
        """Raises UnknownStep."""
        if name not in self._steps:
            raise UnknownStep(f"No step {name} is registered here.{_hint(name, self._steps, 'step')}")
        return self._steps[name]

    def workflows(self, *, tag: str | None = None, category: str | None = None) -> list[WorkflowDefinition]:
        """All, by name and version; with a tag or a category, those that carry it."""
        return [
            definition
            for name in sorted(self._workflows)
            for definition in self._workflows[name].values()
            if (tag is None or tag in definition.tags) and (category is None or category == definition.category)
        ]

    def set_default_input(self, tag: str, value: Any) -> None:
        """What workflows with this tag are started with when no input is given."""
        self._default_inputs[tag] = value

    def default_input(self, definition: WorkflowDefinition) -> Any:
        """The default input of the first of its tags that has one; None where there is none, or it takes no input."""
        if definition.input_type is None:
            return None
        return next((self._default_inputs[tag] for tag in definition.tags if tag in self._default_inputs), None)

    def steps(self) -> list[StepDefinition]:
        """All, by name."""
        return [self._steps[name] for name in sorted(self._steps)]

    def dead_letters(self) -> list[StepDefinition]:
        """The steps that read dead letters and can be run here, by name."""
        return [step for step in self.steps() if step.dead_letter and not step.needs_instance]

    def routes(self) -> list[tuple[str, str]]:
        """(name, version) of every workflow: what an engine with this registry may claim."""
        return [(definition.name, definition.version) for definition in self.workflows()]

    def _versions(self, name: str) -> dict[str, WorkflowDefinition]:
        if name not in self._workflows:
            raise UnknownWorkflow(f"No workflow {name} is registered here.{_hint(name, self._workflows, 'workflow')}")
        return self._workflows[name]


_PIECE = re.compile(r"([0-9]+)|([^0-9.\-_+]+)")


def version_key(version: str) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Natural order: numbers as numbers, and text after one before its absence: 1.9 < 1.10-rc1 < 1.10 < 1.10.1 < 2."""
    pieces = [(2, int(number), "") if number else (0, 0, text) for number, text in _PIECE.findall(version)]
    return (*pieces, (1, 0, "")), version


def _two_instances(old: StepDefinition, new: StepDefinition) -> bool:
    return old.instance is not None and new.instance is not None and old.instance is not new.instance


def _hint(name: str, known: Iterable[str], kind: str) -> str:
    names = sorted(known)
    if not names:
        return f" None is; register a {kind} before starting."
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f" Known: {shown}."
