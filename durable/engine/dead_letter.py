"""Where dead runs go. The commit that buries a run starts what reads its letter: so it is routed once, whatever crashes.

A workflow named by the run's own, or the application's default, gets the letter as its input. Handlers (`engine.on_dead`,
`@dead_letter`) are steps of a workflow of ours, so they are retried and journaled like any other. A reader that dies in
its turn is not written about: there is no letter about a letter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from durable.core import dead_letter
from durable.core.ctx import Context
from durable.core.dead_letter import DeadLetter
from durable.core.definition import WorkflowDefinition, is_step, workflow, workflow_of
from durable.core.errors import NotRegistered, StepFailed
from durable.core.payload import decode_error, encode
from durable.core.registry import Registry
from durable.engine.deps import Deps
from durable.engine.residents import Final, Resident
from durable.store.records import NewRun, StartRun

log = logging.getLogger("durable.dead_letter")

HANDLERS = "__dead_letter"
"""The workflow that runs handlers."""


def listen(registry: Registry, handler: Callable[[DeadLetter], Any]) -> None:
    """Register a handler. A function that is no reader yet becomes one, under its own name."""
    if not is_step(handler):
        dead_letter.dead_letter(f"on_dead.{handler.__qualname__.rpartition('<locals>.')[2]}")(handler)
    registry.add_step(handler)


def prepare(deps: Deps) -> None:
    """Before claiming: what letters will be sent to must be here. Raises NotRegistered."""
    registry = deps.registry
    targets = {definition.dead_letter_workflow for definition in registry.workflows()}
    for name in sorted({deps.settings.dead_letter_workflow, *targets} - {None}, key=str):
        registry.latest(str(name))
    if registry.dead_letters() and not any(definition.name == HANDLERS for definition in registry.workflows()):
        registry.add_workflow(_handlers(registry))  # once: an app may be opened again


def route(deps: Deps, run: Resident, final: Final) -> tuple[StartRun, ...]:
    """The runs to start for a dead one, in the commit that buries it."""
    registry, settings = deps.catalog.of(run.workspace), deps.settings
    default = settings.dead_letter_workflow if run.workspace == settings.workspace else None
    target = run.definition.dead_letter_workflow or default
    readers = {definition.dead_letter_workflow for definition in registry.workflows()}
    if run.definition.name in {HANDLERS, settings.dead_letter_workflow, *readers}:
        log.error("run %s, which reads dead letters, is dead itself; nobody is told", run.run_id)
        return ()
    assert final.error is not None
    letter = DeadLetter(
        run_id=run.run_id,
        workflow=run.definition.name,
        version=run.definition.version,
        input=msgspec.json.decode(run.machine.input),
        error=decode_error(final.error),
        recovery_attempts=run.recovery_attempts,
    )
    starts = []
    # Named by where its journal stood: a run that is requeued and dies again is told of again.
    name = f"{run.run_id}.dead.{run.seq + 1}"
    for workflow_name, run_id in ((target, name), (HANDLERS if registry.dead_letters() else None, f"{name}.handlers")):
        if workflow_name is None:
            continue
        try:
            definition = registry.latest(workflow_name)
        except NotRegistered as error:
            log.error("dead run %s is not told to %s: %s", run.run_id, workflow_name, error)
            continue
        # It holds an input and an error, each of which may be as large as a payload gets.
        data = encode(letter, what="a dead letter", limit=deps.store.capabilities.max_payload)
        new = NewRun(run_id, definition.name, definition.version, data, workspace=run.workspace, tags=("dead-letter",))
        starts.append(StartRun(new))
    return tuple(starts)


def _handlers(registry: Registry) -> WorkflowDefinition:
    """Our workflow over the handlers of this application."""

    async def tell(ctx: Context, letter: DeadLetter) -> None:
        names = await ctx.side_effect(lambda: [step.name for step in registry.dead_letters()], name="handlers")
        steps = [registry.step(name) for name in names]
        told = await ctx.gather(
            *(
                ctx.step(
                    step.name, step.body, letter, retries=step.options.retry, timeout=step.options.timeout, returns=Any
                )
                for step in steps
            ),
            mode="settled",
        )
        for outcome in told:
            if isinstance(outcome, StepFailed):
                raise outcome

    return replace(workflow_of(workflow("dead_letter_handlers")(tell)), name=HANDLERS)
