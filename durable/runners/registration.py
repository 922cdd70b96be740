"""What apps register: functions over `/fn/sync` (wire section 4), a runner and its workflows (section 5). Read here, once, into
`FunctionSpec`; a definition that makes no sense is refused with all its reasons' first, and nothing of that request counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from durable.core.definition import check_name
from durable.core.errors import BadAnswer, DefinitionError
from durable.core.functions import Dialect
from durable.core.passes import retry_policy
from durable.core.retry import RetryPolicy
from durable.runners.interface import RunnerInfo

MAX_FUNCTIONS = 1_000
MAX_RETRIES = 20
_UNUSABLE = re.compile(r"[*?@%\\<>\"'`{}|^]")
"""In a name: wildcards, other people's names, and what breaks a URL or a page."""


class FunctionSpec(Struct, omit_defaults=True, kw_only=True):
    """A function as it is kept."""

    name: str
    version: str = "1"
    app: str
    dialect: Dialect
    enabled: bool = True
    triggers: list[dict[str, Any]] = []
    """As on the wire."""
    flow: dict[str, Any] = {}
    """Flow control, as on the wire."""
    retry: RetryPolicy | None = None
    timeout: float | None = None
    """Seconds."""
    on_failure: bool = False
    priority: int = 0
    cap: Any = None
    cleans: bool = False
    """Its code may clean up when a run is cancelled."""
    versioned: bool = False
    """Whether the app named the version, of functions over HTTP: then it is asked for `<id>@<version>`."""


class Registration(Struct, kw_only=True):
    """What a runner says of itself."""

    info: RunnerInfo
    functions: list[FunctionSpec]


class _Workflow(Struct, rename="camel"):
    name: Any
    triggers: Any = None
    retry: Any = None
    cap: Any = None
    on_failure: Any = None
    workflow_version: Any = None
    """Ours: the latest."""
    workflow_versions: Any = None
    """Ours: all that the runner has."""
    priority: Any = None
    enabled: Any = True
    timeout_ms: Any = None


class _Register(Struct, rename="camel"):
    app: str
    workflows: list[dict[str, Any]]
    runtime: Any = ""
    runner: str | None = None
    language: str | None = None
    sdk_name: Any = ""
    version: Any = ""
    framework: Any = ""
    region: str | None = None
    protocol_version: Any = 1
    min_protocol_version: Any = 1
    max_protocol_version: Any = 1
    url: str | None = None
    key_fingerprint: str | None = None
    heartbeat_ms: Any = None


class _Sync(Struct, rename="camel"):
    functions: list[dict[str, Any]]
    sdk_version: str | None = None
    url: str | None = None


OURS = "durable"
"""The SDK that knows what is ours on this wire."""
FLOW_KEYS = ("concurrency", "throttle", "rateLimit", "debounce", "batch", "singleton", "weight")


def read_register(payload: bytes, *, instance: str) -> Registration:
    """The payload of `runner.register` or `/register`. Raises DefinitionError."""
    said = _read(payload, _Register, "A registration")
    app = _name(said.app, "app")
    if not _speaks(said.min_protocol_version, said.max_protocol_version, said.protocol_version):
        raise DefinitionError("This engine speaks protocol version 1, and the runner does not.")
    runner = None if said.runner is None else _name(said.runner, "runner")
    if len(said.workflows) > MAX_FUNCTIONS:
        raise DefinitionError(f"A runner has at most {MAX_FUNCTIONS:,} workflows, not {len(said.workflows):,}.")
    functions = [function for one in said.workflows for function in _workflow(app, one)]
    for function in functions:
        function.cleans = said.sdk_name == OURS
    _distinct(functions)
    info = RunnerInfo(
        instance=instance,
        app=app,
        runner=runner,
        mode="serve" if said.url else "connect",
        url=said.url,
        runtime=_word(said.runtime),
        language=None if said.language is None else _word(said.language),
        sdk_name=_word(said.sdk_name),
        version=_word(said.version),
        framework=_word(said.framework),
        region=None if said.region is None else _word(said.region),
        key_fingerprint=None if said.key_fingerprint is None else _word(said.key_fingerprint),
        heartbeat_ms=said.heartbeat_ms if isinstance(said.heartbeat_ms, int) and said.heartbeat_ms > 0 else 0,
        workflows=list(dict.fromkeys(function.name for function in functions)),
    )
    return Registration(info=info, functions=functions)


def read_sync(payload: bytes, app: str) -> tuple[list[FunctionSpec], str | None]:
    """The body of `/fn/sync`: the functions, and the app's URL where it says one. Raises DefinitionError."""
    said = _read(payload, _Sync, "A sync")
    if len(said.functions) > MAX_FUNCTIONS:
        raise DefinitionError(f"An app has at most {MAX_FUNCTIONS:,} functions, not {len(said.functions):,}.")
    functions = [_function(app, one) for one in said.functions]
    _distinct(functions)
    return functions, said.url


def _workflow(app: str, given: dict[str, Any]) -> list[FunctionSpec]:
    """One for each version, the latest last."""
    one = _convert(given, _Workflow, "A workflow")
    name = _name(one.name, "workflow")
    try:
        retry = retry_policy(one.retry)
    except BadAnswer as error:
        raise DefinitionError(f"Workflow {name}: {error}") from None
    spec = FunctionSpec(
        name=name,
        version=_version(one.workflow_version, name),
        app=app,
        dialect="runner",
        enabled=one.enabled is not False,
        triggers=_triggers(one.triggers, name),
        flow=_flow(given, one.priority),
        retry=retry,
        timeout=_timeout(one.timeout_ms, name),
        on_failure=bool(one.on_failure),
        priority=_priority(one.priority),
        cap=one.cap,
    )
    all_versions = one.workflow_versions if isinstance(one.workflow_versions, list) else []
    others = {_version(version, name) for version in all_versions[:100]} - {spec.version}
    return [*(msgspec.structs.replace(spec, version=version) for version in sorted(others)), spec]


def _function(app: str, given: dict[str, Any]) -> FunctionSpec:
    name = _name(given.get("id"), "function")
    retries = given.get("retries")
    if retries is not None and (not _is_whole(retries) or not 0 <= retries <= MAX_RETRIES):
        raise DefinitionError(f"Function {name}: retries is a number from 0 to {MAX_RETRIES}.")
    trigger = given.get("trigger")
    return FunctionSpec(
        name=name,
        version=_version(given.get("version"), name),
        app=app,
        dialect="operation",
        enabled=given.get("enabled") is not False,
        triggers=_triggers(given.get("triggers") if trigger is None else [trigger], name),
        flow=_flow(given, given.get("priority")),
        retry=None if retries is None else RetryPolicy(max_attempts=retries + 1),
        timeout=_timeout(given.get("timeoutMs"), name),
        on_failure=given.get("hasOnFailure") is True,
        priority=_priority(given.get("priority")),
        versioned=given.get("version") not in (None, ""),
    )


def _triggers(given: Any, name: str) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or len(given) > 100 or not all(isinstance(one, dict) for one in given):
        raise DefinitionError(f"{name}: triggers are a list of {{event}} or {{cron}} objects.")
    return given


def _flow(given: Mapping[str, Any], priority: Any) -> dict[str, Any]:
    flow = {key: given[key] for key in FLOW_KEYS if given.get(key) is not None}
    if isinstance(priority, str):
        flow["priority"] = priority
    return flow


def _priority(given: Any) -> int:
    return max(-(2**31), min(2**31 - 1, given)) if _is_whole(given) else 0


def _timeout(given: Any, name: str) -> float | None:
    if given is None:
        return None
    if not isinstance(given, int | float) or isinstance(given, bool) or not 0 < given < 1e13:
        raise DefinitionError(f"{name}: timeoutMs is a number of milliseconds above 0.")
    return given / 1_000


def _version(given: Any, name: str) -> str:
    if given is None or given == "":
        return "1"
    version = str(given) if _is_whole(given) else given
    check_name(version, f"version of {name}", reserved=False)
    if _UNUSABLE.search(version):
        raise DefinitionError(f"The version of {name} has no {_UNUSABLE.search(version)[0]!r} in it.")  # type: ignore[index]
    return str(version)


def _name(given: Any, what: str) -> str:
    check_name(given, f"{what}'s name")
    found = _UNUSABLE.search(given)
    if found:
        raise DefinitionError(f"The name of a {what} has no {found[0]!r} in it: {given[:60]!r}.")
    return str(given)


def _distinct(functions: list[FunctionSpec]) -> None:
    seen: set[tuple[str, str]] = set()
    for function in functions:
        if (function.name, function.version) in seen:
            raise DefinitionError(f"Function {function.name} version {function.version} is there twice.")
        seen.add((function.name, function.version))


def _speaks(lowest: Any, highest: Any, spoken: Any) -> bool:
    low = lowest if _is_whole(lowest) else spoken
    high = highest if _is_whole(highest) else spoken
    return _is_whole(low) and _is_whole(high) and low <= 1 <= high


def _is_whole(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _word(given: Any) -> str:
    """A word for people, of a stranger's: cut to length, without what breaks lines."""
    return "".join(char for char in str(given or "") if char.isprintable())[:100]


def _read(payload: bytes, wanted: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(payload, type=wanted)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DefinitionError(f"{what} is not what it should be: {error}") from None


def _convert(given: Any, wanted: Any, what: str) -> Any:
    try:
        return msgspec.convert(given, wanted)
    except msgspec.ValidationError as error:
        raise DefinitionError(f"{what} is not what it should be: {error}") from None
