"""From a workflow and an event to what the store is to decide: the run, its lane, and the policies that are looked at in the
event's own transaction. Keys are whole: workspace, workflow and version, rule, value."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from msgspec.structs import replace

from durable.core.definition import WorkflowDefinition
from durable.core.expression import TooCostly, parse
from durable.core.flow import Flow, key_value, microseconds, priority_of, weight_of
from durable.core.origin import Origin, meta_of
from durable.core.payload import fingerprint
from durable.store import admission
from durable.store.records import Lane, NewRun, Rule


def wanted(definitions: Iterable[WorkflowDefinition], event: Mapping[str, Any]) -> list[WorkflowDefinition]:
    """The workflows that an event `{id, name, data, ts}` starts, each once, whichever of its triggers it meets."""
    return [
        definition
        for definition in definitions
        if any(
            trigger.event == event["name"] and (trigger.where is None or _holds(trigger.where, event))
            for trigger in definition.triggers
        )
    ]


def _holds(where: str, event: Mapping[str, Any]) -> bool:
    try:
        return parse(where).holds(event)
    except TooCostly:
        return False


def trigger_of(
    definition: WorkflowDefinition,
    event: Mapping[str, Any],
    data: bytes,
    *,
    at: int,
    run_id: str,
    workspace: str,
    origin: Origin,
    tags: Sequence[str] = (),
) -> admission.Trigger:
    """What the store is asked for this workflow. `data` is the event's, as bytes; `at` in µs."""
    flow, base = definition.flow, _base(definition, workspace)
    stored = definition.input_from(event["id"], event["name"], at, data)
    run = NewRun(
        id=run_id,
        workflow=definition.name,
        version=definition.version,
        input=stored,
        input_hash=fingerprint(stored),
        workspace=workspace,
        priority=priority_of(flow, definition.priority, event),
        tags=tuple(dict.fromkeys((*definition.tags, *tags))),
        lane=lane_of(definition, event, workspace),
        meta=meta_of(origin),
    )
    trigger = admission.Trigger(run)
    if (rate := flow.rate_limit) is not None:
        key = _key(base, "rate", rate.key, event)
        trigger = replace(trigger, rate=admission.Rate(key, rate.limit, microseconds(rate.period, "period")))
    if (singleton := flow.singleton) is not None and singleton.mode != "queue":
        key = _key(base, "singleton", singleton.key, event)
        trigger = replace(trigger, singleton=admission.Singleton(key, singleton.mode))
    if (debounce := flow.debounce) is not None:
        key = _key(base, "debounce", debounce.key, event)
        longest = None if debounce.max_wait is None else microseconds(debounce.max_wait, "max_wait")
        trigger = replace(trigger, debounce=admission.Debounce(key, microseconds(debounce.period, "period"), longest))
    if (batch := flow.batch) is not None:
        key = _key(base, "batch", batch.key, event)
        timeout = microseconds(batch.timeout, "timeout")
        trigger = replace(trigger, batch=admission.Batch(key, batch.max_size, timeout, data))
    return trigger


def lane_of(definition: WorkflowDefinition, event: Mapping[str, Any], workspace: str) -> Lane | None:
    """Where a run of this workflow queues; None where nothing limits it."""
    flow = definition.flow
    if not flow.holds_back:
        return None
    base = _base(definition, workspace)
    rules = [
        Rule(_key(base, f"concurrency{number or ''}", rule.key, event), rule.limit)
        for number, rule in enumerate(flow.concurrency)
    ]
    if flow.singleton is not None and flow.singleton.mode == "queue":
        rules.append(Rule(_key(base, "singleton", flow.singleton.key, event), 1))
    if flow.throttle is not None:
        period = microseconds(flow.throttle.period, "period")
        rules.append(Rule(_key(base, "throttle", flow.throttle.key, event), flow.throttle.limit, "throttle", period))
    value, weight = weight_of(flow, event)
    # One lane for each combination of values: runs in it have the same rules.
    return Lane(_lane_key(base, flow, rules, value), tuple(rules), weight)


def lane_of_input(definition: WorkflowDefinition, stored: bytes, workspace: str) -> Lane | None:
    """The lane of a run that no event has started: its keys are looked up in its input."""
    if not definition.flow.holds_back:
        return None
    return lane_of(definition, definition.as_event(stored), workspace)


def _base(definition: WorkflowDefinition, workspace: str) -> str:
    place, name, version = (quote(part, safe=" .-_:") for part in (workspace, definition.name, definition.version))
    return f"{place}/{name}@{version}"


def _key(base: str, rule: str, key: str | None, event: Mapping[str, Any]) -> str:
    return f"{base}/{rule}/{key_value(key, event)}"


def _lane_key(base: str, flow: Flow, rules: list[Rule], value: str) -> str:
    parts = [rule.key[len(base) + 1 :] for rule in rules]
    if flow.fairness is not None:
        parts.append(f"fair/{value}")
    text = "|".join(quote(part, safe=" .-_:/#@") for part in parts)
    return f"{base}/{text}" if len(text) <= 300 else f"{base}/#{hashlib.sha256(text.encode()).hexdigest()[:32]}"
