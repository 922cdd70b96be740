"""What starts a workflow's runs and what holds them back: triggers and flow control, as data.

The same shapes for workflows decorated here and for functions that apps register over the wire (`read_triggers`, `read_flow`).
Keys are paths into `event.data`: a rule with a key holds for each value apart; events without the value share one. Limits that
hold a run back (concurrency, throttle) are of its lane; the others decide when the event is accepted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Struct

from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError
from durable.core.event import check_event_name
from durable.core.expression import TooCostly, look_up, parse, parse_path

MAX_RULES = 10
"""Concurrency rules of one workflow."""
MAX_LIMIT = 1_000_000
MAX_BATCH = 1_000
"""Events in one run."""
MAX_TRIGGERS = 20
MAX_WEIGHTS = 1_000
MAX_VALUE = 100
"""Characters of a key's value that stand in the key itself; a longer one is hashed."""
CATCH_UP = ("skip", "last", "all")
MODES = ("skip", "cancel", "queue")


class Trigger(Struct, frozen=True):
    """What starts runs: events of a name, those `where` holds for, or the clock."""

    event: str | None = None
    where: str | None = None
    """An expression over the event (core/expression.py)."""
    cron: str | None = None
    """Five or six fields."""
    timezone: str = "UTC"
    catch_up: str = "last"
    """Occurrences that were missed: `skip` them, run the `last`, or `all`."""

    def __post_init__(self) -> None:
        if (self.event is None) == (self.cron is None):
            raise DefinitionError("A trigger has an event name or a cron text, one of the two.")
        if self.catch_up not in CATCH_UP:
            raise DefinitionError(f"catch_up is {', '.join(CATCH_UP)}, not {self.catch_up!r:.40}.")
        if self.cron is not None:
            _check_cron(self)
            return
        check_event_name(self.event)
        if self.where is not None:
            parse(self.where)


class Concurrency(Struct, frozen=True):
    """At most `limit` runs under way at any instant, over all engines; the others wait. A run that only waits or sleeps holds
    no place."""

    limit: int
    key: str | None = None

    def __post_init__(self) -> None:
        _check_limit(self.limit, "concurrency")
        _check_key(self.key)


class Throttle(Struct, frozen=True):
    """At most `limit` runs begin within any `period`; the others wait."""

    limit: int
    period: Duration
    key: str | None = None

    def __post_init__(self) -> None:
        _check_limit(self.limit, "throttle")
        microseconds(self.period, "the period of throttle")
        _check_key(self.key)


class RateLimit(Struct, frozen=True):
    """At most `limit` events start runs within any `period`; the others are dropped."""

    limit: int
    period: Duration
    key: str | None = None

    def __post_init__(self) -> None:
        _check_limit(self.limit, "rate_limit")
        microseconds(self.period, "the period of rate_limit")
        _check_key(self.key)


class Debounce(Struct, frozen=True):
    """One run, of the last event, once none has come for `period`, or `max_wait` after the first."""

    period: Duration
    key: str | None = None
    max_wait: Duration | None = None

    def __post_init__(self) -> None:
        period = microseconds(self.period, "the period of debounce")
        if self.max_wait is not None and microseconds(self.max_wait, "max_wait of debounce") < period:
            raise DefinitionError("max_wait of debounce is shorter than its period, which could then never pass.")
        _check_key(self.key)


class Batch(Struct, frozen=True):
    """One run for up to `max_size` events, `timeout` after the first or when it is full; `event.data` is the list of theirs."""

    max_size: int
    timeout: Duration
    key: str | None = None

    def __post_init__(self) -> None:
        if _not_whole(self.max_size) or not 1 <= self.max_size <= MAX_BATCH:
            raise DefinitionError(f"max_size of batch is a number from 1 to {MAX_BATCH:,}, not {self.max_size!r:.40}.")
        microseconds(self.timeout, "the timeout of batch")
        _check_key(self.key)


class Singleton(Struct, frozen=True):
    """One unfinished run at a time. Another event is skipped (`skip`), asks the run there is to stop (`cancel`), or waits its
    turn (`queue`)."""

    key: str | None = None
    mode: str = "skip"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DefinitionError(f"The mode of singleton is {', '.join(MODES)}, not {self.mode!r:.40}.")
        _check_key(self.key)


class Fairness(Struct, frozen=True):
    """Runs that wait are served in turn by the values of `key`, in proportion to their weights."""

    key: str
    weights: dict[str, float] = {}
    default: float = 1.0

    def __post_init__(self) -> None:
        _check_key(self.key)
        if not isinstance(self.weights, Mapping):
            raise DefinitionError(f"Weights are numbers by value of the key, not {self.weights!r:.60}.")
        if len(self.weights) > MAX_WEIGHTS:
            raise DefinitionError(f"At most {MAX_WEIGHTS:,} weights, not {len(self.weights):,}.")
        for weight in (*self.weights.values(), self.default):
            _check_weight(weight)


class Flow(Struct, frozen=True):
    """All flow control of a workflow. Made by `flow_of`."""

    concurrency: tuple[Concurrency, ...] = ()
    throttle: Throttle | None = None
    rate_limit: RateLimit | None = None
    debounce: Debounce | None = None
    batch: Batch | None = None
    singleton: Singleton | None = None
    priority: str | None = None
    """An expression that comes to a number; where it does not, the workflow's own priority holds."""
    weight: float = 1.0
    fairness: Fairness | None = None

    def __post_init__(self) -> None:
        if len(self.concurrency) > MAX_RULES:
            raise DefinitionError(f"A workflow has at most {MAX_RULES} concurrency rules, not {len(self.concurrency)}.")
        gathering = [name for name in ("debounce", "batch") if getattr(self, name) is not None]
        if len(gathering) == 2:
            raise DefinitionError("debounce and batch exclude each other: one keeps the last event, the other all.")
        for name in ("throttle", "rate_limit"):
            if gathering and getattr(self, name) is not None:
                raise DefinitionError(f"{gathering[0]} and {name} exclude each other. Leave one of them out.")
        if self.priority is not None:
            parse(self.priority)
        _check_weight(self.weight)

    @property
    def holds_back(self) -> bool:
        """Whether its runs stand in lanes."""
        queues = self.singleton is not None and self.singleton.mode == "queue"
        return bool(self.concurrency) or self.throttle is not None or queues


# ------------------------------------------------------------------ what authors write


def triggers_of(on: Any = None, cron: Any = None) -> tuple[Trigger, ...]:
    """From `on=` (a name, a Trigger, or a list of them) and `cron=` (a text, a Trigger, or a list). Raises DefinitionError."""
    found = [one if isinstance(one, Trigger) else Trigger(event=one) for one in _many(on, Trigger)]
    found += [one if isinstance(one, Trigger) else Trigger(cron=one) for one in _many(cron, Trigger)]
    if len(found) > MAX_TRIGGERS:
        raise DefinitionError(f"A workflow has at most {MAX_TRIGGERS} triggers, not {len(found)}.")
    return tuple(dict.fromkeys(found))


def flow_of(
    *,
    concurrency: Any = None,
    throttle: Throttle | None = None,
    rate_limit: RateLimit | None = None,
    debounce: Any = None,
    batch: Batch | None = None,
    singleton: Any = None,
    priority: str | None = None,
    weight: Any = None,
) -> Flow:
    """Flow control from what a decorator is given. Shorthands: `concurrency=5`, `debounce="3s"`, `singleton=True` or a mode;
    `weight`: a number, a Fairness, or weights by the value of the first rule's key. Raises DefinitionError."""
    rules = tuple(one if isinstance(one, Concurrency) else Concurrency(one) for one in _many(concurrency, Concurrency))
    if debounce is not None and not isinstance(debounce, Debounce):
        debounce = Debounce(debounce)
    if singleton is True:
        singleton = Singleton()
    elif isinstance(singleton, str):
        singleton = Singleton(mode=singleton)
    given = {
        "throttle": (throttle, Throttle),
        "rate_limit": (rate_limit, RateLimit),
        "batch": (batch, Batch),
        "singleton": (singleton or None, Singleton),
    }
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise DefinitionError(f"{name} is a {kind.__name__}(...), not {value!r:.60}.")
    fairness = weight if isinstance(weight, Fairness) else None
    if isinstance(weight, Mapping):
        keyed = [
            rule.key for rule in (*rules, throttle, singleton or None) if rule is not None and rule.key is not None
        ]
        if not keyed:
            raise DefinitionError("Weights by value need a rule with a key, or say Fairness(key, weights).")
        fairness = Fairness(keyed[0], dict(weight))
    return Flow(
        concurrency=rules,
        throttle=throttle,
        rate_limit=rate_limit,
        debounce=debounce,
        batch=batch,
        singleton=singleton or None,
        priority=priority,
        weight=1.0 if weight is None or fairness is not None else weight,
        fairness=fairness,
    )


# ------------------------------------------------------------------ an event's keys


def key_value(key: str | None, event: Mapping[str, Any]) -> str:
    """What a rule's key comes to for an event `{id, name, data, ts}`: empty without a key and where there is no value. Objects
    and lists, and what is long, stand as a hash."""
    value = None if key is None else look_up(event, parse_path(key))
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else str(value) if type(value) is int else _canonical(value)
    if len(text) > MAX_VALUE or isinstance(value, Mapping | list):
        return "#" + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]
    return text


def priority_of(flow: Flow, default: int, event: Mapping[str, Any]) -> int:
    """The priority of an event's run."""
    if flow.priority is None:
        return default
    try:
        value = parse(flow.priority).value(event)
    except TooCostly:
        return default
    if not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return max(-(2**31), min(2**31 - 1, int(value)))


def weight_of(flow: Flow, event: Mapping[str, Any]) -> tuple[str, float]:
    """Under which value an event's run is served, and with what weight."""
    if flow.fairness is None:
        return "", flow.weight
    value = key_value(flow.fairness.key, event)
    return value, flow.fairness.weights.get(value, flow.fairness.default)


def microseconds(value: Duration, what: str) -> int:
    """A period in µs, at least a millisecond. Raises DefinitionError."""
    try:
        number = seconds(value)
    except DefinitionError as error:
        raise DefinitionError(f"{what}: {error}") from None
    if number < 0.001:
        raise DefinitionError(f"{what} is at least a millisecond, not {value!r:.40}.")
    return round(number * 1e6)


# ------------------------------------------------------------------ the wire


def read_triggers(given: Any) -> tuple[Trigger, ...]:
    """From the wire's `trigger` object, or `triggers` list of them: `{event, if?}` or `{cron, timezone?, catchUp?}`. Raises
    DefinitionError."""
    found = []
    for one in given if isinstance(given, list) else [given]:
        if not isinstance(one, Mapping):
            raise DefinitionError(f'A trigger is {{"event": name}} or {{"cron": text}}, not {one!r:.60}.')
        fields = {ours: one[theirs] for theirs, ours in _TRIGGER.items() if one.get(theirs) is not None}
        found.append(_made(Trigger, fields, "trigger"))
    if len(found) > MAX_TRIGGERS:
        raise DefinitionError(f"A function has at most {MAX_TRIGGERS} triggers, not {len(found)}.")
    return tuple(dict.fromkeys(found))


def write_triggers(triggers: Iterable[Trigger]) -> list[dict[str, Any]]:
    """As the wire has them."""
    written = []
    for trigger in triggers:
        plain = {theirs: getattr(trigger, ours) for theirs, ours in _TRIGGER.items()}
        if trigger.event is not None:
            plain.update(timezone=None, catchUp=None)
        written.append({name: value for name, value in plain.items() if value is not None})
    return written


def read_flow(given: Mapping[str, Any]) -> Flow:
    """From a function's definition on the wire; what is not flow control is passed over. Periods are milliseconds, or text
    such as "3s". Raises DefinitionError."""
    fields: dict[str, Any] = {}
    rules = given.get("concurrency")
    if rules is not None:
        listed = rules if isinstance(rules, list) else [rules]
        fields["concurrency"] = tuple(
            Concurrency(one) if isinstance(one, int) else _made(Concurrency, _of(one, "concurrency"), "concurrency")
            for one in listed
        )
    for theirs, (ours, kind) in _POLICIES.items():
        policy = given.get(theirs)
        if policy is None:
            continue
        if theirs == "singleton" and policy is True:
            policy = {}
        fields[ours] = _made(kind, _of(policy, theirs), theirs)
    if isinstance(given.get("priority"), str):
        fields["priority"] = given["priority"]
    weight = given.get("weight")
    if isinstance(weight, Mapping):
        fields["fairness"] = _made(Fairness, dict(weight), "weight")
    elif weight is not None:
        fields["weight"] = weight
    return Flow(**fields)


def write_flow(flow: Flow) -> dict[str, Any]:
    """As the wire has it, nothing for what is not declared."""
    written: dict[str, Any] = {}
    if flow.concurrency:
        written["concurrency"] = [_plain(rule) for rule in flow.concurrency]
    for theirs, (ours, _) in _POLICIES.items():
        policy = getattr(flow, ours)
        if policy is not None:
            written[theirs] = _plain(policy)
    if flow.priority is not None:
        written["priority"] = flow.priority
    if flow.fairness is not None:
        written["weight"] = _plain(flow.fairness)
    elif flow.weight != 1.0:
        written["weight"] = flow.weight
    return written


_TRIGGER = {"event": "event", "if": "where", "cron": "cron", "timezone": "timezone", "catchUp": "catch_up"}
_POLICIES: dict[str, tuple[str, type[Struct]]] = {
    "throttle": ("throttle", Throttle),
    "rateLimit": ("rate_limit", RateLimit),
    "debounce": ("debounce", Debounce),
    "batch": ("batch", Batch),
    "singleton": ("singleton", Singleton),
}
_NAMES = {
    "limit": "limit",
    "key": "key",
    "mode": "mode",
    "maxSize": "max_size",
    "period": "period",
    "periodMs": "period",
    "timeout": "timeout",
    "timeoutMs": "timeout",
    "maxWait": "max_wait",
    "maxWaitMs": "max_wait",
}
_DURATIONS = frozenset({"period", "timeout", "max_wait"})


def _of(policy: Any, what: str) -> dict[str, Any]:
    if not isinstance(policy, Mapping):
        raise DefinitionError(f"{what} is an object, not {policy!r:.60}.")
    fields = {_NAMES[name]: value for name, value in policy.items() if name in _NAMES and value is not None}
    for name in _DURATIONS & fields.keys():
        value = fields[name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            fields[name] = value / 1_000
    return fields


def _plain(policy: Struct) -> dict[str, Any]:
    names = {"max_size": "maxSize"} | {name: f"{'maxWait' if name == 'max_wait' else name}Ms" for name in _DURATIONS}
    written = {}
    for name in policy.__struct_fields__:
        value = getattr(policy, name)
        if value is not None:
            number = microseconds(value, name) / 1_000 if name in _DURATIONS else value
            written[names.get(name, name)] = int(number) if name in _DURATIONS and number.is_integer() else number
    return written


def _made(kind: type[Any], fields: dict[str, Any], what: str) -> Any:
    """The struct of a stranger's fields; each is looked at when it is made."""
    unknown = fields.keys() - set(kind.__struct_fields__)
    if unknown:
        raise DefinitionError(f"{what} has no {', '.join(sorted(map(str, unknown)))}.")
    required = kind.__struct_fields__[: len(kind.__struct_fields__) - len(kind.__struct_defaults__)]
    missing = [name for name in required if name not in fields]
    if missing:
        raise DefinitionError(f"{what} needs {' and '.join(missing)}.")
    return kind(**fields)


# ------------------------------------------------------------------ checks


def _check_limit(limit: object, what: str) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_LIMIT:
        raise DefinitionError(f"The limit of {what} is a number from 1 to {MAX_LIMIT:,}, not {limit!r:.40}.")


def _not_whole(value: object) -> bool:
    return not isinstance(value, int) or isinstance(value, bool)


def _check_key(key: str | None) -> None:
    if key is not None:
        parse_path(key)


def _check_weight(weight: object) -> None:
    whole = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not whole or not 0.001 <= weight <= 1_000_000:  # type: ignore[operator]
        raise DefinitionError(f"A weight is a number from 0.001 to 1,000,000, not {weight!r:.40}.")


def _check_cron(trigger: Trigger) -> None:
    """What can be said without the language of the text itself, which core/cron.py reads."""
    spec = trigger.cron
    if not isinstance(spec, str) or not spec.strip() or len(spec) > 200:
        raise DefinitionError(f"A cron is a text of five or six fields, such as '0 9 * * mon', not {spec!r:.60}.")
    if trigger.where is not None:
        raise DefinitionError("A cron trigger has no `where`: its event is the same each time.")
    try:
        ZoneInfo(trigger.timezone)
    except Exception:
        raise DefinitionError(
            f"There is no time zone {trigger.timezone!r:.60}; write it as Europe/Amsterdam or UTC."
        ) from None


def _many(given: Any, kind: type[Any]) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, str | int | Mapping | kind) or not isinstance(given, Iterable):
        return [given]
    return list(given)


def _canonical(value: Any) -> str:
    return msgspec.json.encode(value, order="sorted").decode()


NO_FLOW = Flow()
