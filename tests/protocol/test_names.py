"""The names of the wire, spelled out: a wrong one is a queue that somebody fills and nobody reads."""

from __future__ import annotations

import fnmatch

import pytest

from durable.core.errors import DefinitionError
from durable.protocol import names
from durable.protocol.messages import routing_token


@pytest.mark.parametrize(
    ("prefix", "namespace", "whole"),
    [
        ("durable", None, "durable"),
        ("durable", "", "durable"),
        ("durable", "default", "durable"),
        ("durable", "acme", "durable-acme"),
        ("shop", "dev-ann", "shop-dev-ann"),
    ],
)
def test_prefixes(prefix: str, namespace: str | None, whole: str) -> None:
    """A namespace that says something is appended; empty and `default` say nothing."""
    assert names.effective_prefix(prefix, namespace) == whole


@pytest.mark.parametrize("wrong", ["", "a:b", "a b", "a\n"])
def test_wrong_prefixes(wrong: str) -> None:
    """What queues would read as their own grammar is refused."""
    with pytest.raises(DefinitionError):
        names.effective_prefix(wrong)


@pytest.mark.parametrize(
    ("name", "partition", "token"),
    [
        ("payments.charge", None, "payments.charge"),
        ("payments:charge:card", None, "payments-charge-card"),
        ("a", "default", "a"),
        ("a", "", "a"),
        ("a:b", "eu", "a-b@eu"),
    ],
)
def test_routing_tokens(name: str, partition: str | None, token: str) -> None:
    """Colons become dashes, dots stay, a partition is appended."""
    assert routing_token(name, partition) == token


def test_every_name() -> None:
    """Each queue, channel, key and table, for the plain prefix."""
    assert [
        names.tasks("durable", "pay-charge@eu"),
        names.results("durable"),
        names.decisions("durable"),
        names.step_events("durable"),
        names.start_run("durable"),
        names.groups("durable"),
        names.engine("durable", "0a1b"),
        names.dead("durable"),
        names.control("durable"),
        names.heartbeat("durable"),
        names.worker_heartbeat("durable", "pay-charge@eu", "py-1"),
        names.worker_descriptor("durable", "pay-charge@eu", "py-1"),
        names.tasks_table("durable"),
        names.results_table("durable"),
    ] == [
        "durable-tasks-pay-charge@eu",
        "durable-results",
        "durable-decisions",
        "durable-step-events",
        "durable-start-run",
        "durable-groups",
        "durable-engine:0a1b",
        "durable-dead",
        "durable-control",
        "durable-heartbeat",
        "durable-worker-heartbeat:pay-charge@eu:py-1",
        "durable-worker-descriptor:pay-charge@eu:py-1",
        "durable_transport_tasks",
        "durable_transport_results",
    ]


def test_the_pattern_finds_workers_and_nobody_elses() -> None:
    """A prefix that looks like a pattern is taken as it is."""
    assert names.workers_pattern("durable") == "durable-worker-heartbeat:*:*"
    assert names.workers_pattern("a*[b]?") == r"a\*\[b\]\?-worker-heartbeat:*:*"
    assert fnmatch.fnmatchcase(names.worker_heartbeat("p", "g", "i"), names.workers_pattern("p"))
