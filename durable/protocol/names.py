"""How queues, channels, keys and tables are called on every transport. A wrong name is a silent black hole: a queue that
somebody fills and nobody reads. So every name is built here, and `protocol/vectors/names.json` pins each.
"""

from __future__ import annotations

import re

from durable.core.errors import DefinitionError

DEFAULT_PREFIX = "durable"
_ESCAPED = re.compile(r"_x([0-9A-F]{2})_")
_MISLEADING = re.compile(r"_(?=x[0-9A-F]{2}(?:_|[^A-Za-z0-9_-]))")
"""An underscore that would begin an escape in what is written: one may be followed by another, or by what becomes one."""


def effective_prefix(prefix: str = DEFAULT_PREFIX, namespace: str | None = None) -> str:
    """`<prefix>`, or `<prefix>-<namespace>` where there is one that says something. Raises DefinitionError for one with a
    colon, which the queues' own grammar takes, or an empty one."""
    suffix = f"-{namespace}" if namespace and namespace != "default" else ""
    whole = prefix + suffix
    if not prefix or ":" in whole or not whole.isprintable() or " " in whole:
        raise DefinitionError(f"A prefix is a text without colons and spaces, not {whole!r}.")
    return whole


def tasks(prefix: str, token: str) -> str:
    """Where tasks of one routing token wait: one queue for each step name, or hosted workflow."""
    return f"{prefix}-tasks-{token}"


def results(prefix: str) -> str:
    """Where all results go: any engine takes any."""
    return f"{prefix}-results"


def decisions(prefix: str) -> str:
    """Where decisions of hosted workflows go."""
    return f"{prefix}-decisions"


def step_events(prefix: str) -> str:
    """Where local steps of turns under way are told of."""
    return f"{prefix}-step-events"


def start_run(prefix: str) -> str:
    """Where others ask for runs."""
    return f"{prefix}-start-run"


def groups(prefix: str) -> str:
    """The set of all groups that tasks have been sent to, so that an engine that starts knows where to look."""
    return f"{prefix}-groups"


def engine(prefix: str, incarnation: str) -> str:
    """A key by which an engine's end sees that its Redis still is what it was."""
    return f"{prefix}-engine:{incarnation}"


def given_up(prefix: str) -> str:
    """Where a broker puts tasks that it has delivered too often; an engine takes them from there as failed."""
    return f"{prefix}-given-up"


def dead(prefix: str) -> str:
    """Where a broker puts tasks it has given up on, and we put messages nobody may read."""
    return f"{prefix}-dead"


def control(prefix: str) -> str:
    """The control plane's channel."""
    return f"{prefix}-control"


def heartbeat(prefix: str) -> str:
    """The channel of heartbeats of tasks."""
    return f"{prefix}-heartbeat"


def worker_heartbeat(prefix: str, token: str, instance: str) -> str:
    """The key that says that a worker is alive."""
    return f"{prefix}-worker-heartbeat:{token}:{instance}"


def workers_pattern(prefix: str) -> str:
    """What a SCAN looks for to find all who are alive."""
    literal = re.sub(r"([\[\]*?\\])", r"\\\1", prefix)
    return worker_heartbeat(literal, "*", "*")


def worker_descriptor(prefix: str, token: str, instance: str) -> str:
    """The key that says what a worker is."""
    return f"{prefix}-worker-descriptor:{token}:{instance}"


def lane_tasks(prefix: str, token: str) -> str:
    """The Redis lane's stream of tasks of one routing token."""
    return f"{prefix}-lane-tasks-{token}"


def lane_results(prefix: str, instance: str) -> str:
    """The Redis lane's stream of answers for one engine."""
    return f"{prefix}-lane-results-{instance}"


def lane_unclaimed(prefix: str) -> str:
    """The Redis lane's stream of answers that came while no engine was there."""
    return f"{prefix}-lane-unclaimed"


def lane_engines(prefix: str) -> str:
    """The Redis lane's sorted set of engines, each with the epoch ms until which it counts as alive."""
    return f"{prefix}-lane-engines"


def lane_cancels(prefix: str) -> str:
    """The Redis lane's channel on which workers hear what to cancel, and nothing else."""
    return f"{prefix}-lane-cancels"


def lane_held(prefix: str) -> str:
    """The Redis lane's hash of tasks that are queued, under way or answered and not yet taken: id → attempt."""
    return f"{prefix}-lane-held"


def tasks_table(prefix: str) -> str:
    """The DB transport's rows of tasks. Quoted as it is: a prefix may contain a dash."""
    return f"{prefix}_transport_tasks"


def results_table(prefix: str) -> str:
    """The DB transport's rows of results."""
    return f"{prefix}_transport_results"


def restricted(name: str) -> str:
    """A name for a place that takes only letters, digits, `-` and `_` (SQS): plain names stay as they are, every other
    byte becomes `_x<HH>_`, and so does the underscore of what would read as such an escape. `unrestricted` is its inverse."""
    guarded = _MISLEADING.sub("_x5F_", name)
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: "".join(f"_x{byte:02X}_" for byte in found[0].encode()), guarded)


def spellings(name: str) -> tuple[str, ...]:
    """What a queue of this name may be called in such a place, in the order to look; the last is what we create. The plain
    name goes first, but not where it reads as the escaped one of another: that is a stranger's queue."""
    escaped = restricted(name)
    return (escaped,) if escaped == name or _MISLEADING.search(name) else (name, escaped)


def unrestricted(name: str) -> str:
    """What `restricted` was given."""
    out = bytearray()
    at = 0
    for found in _ESCAPED.finditer(name):
        out += name[at : found.start()].encode()
        out.append(int(found[1], 16))
        at = found.end()
    return (out + name[at:].encode()).decode()
