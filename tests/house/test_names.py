"""Names that people rely on: what `import durable` offers, and what stands at the top of the repository."""

from __future__ import annotations

import durable
from tests.house.sources import ROOT, tracked

PUBLIC = [
    "Adaptive",
    "Batch",
    "ChildFailed",
    "ChildHandle",
    "Concurrency",
    "Context",
    "DeadLetter",
    "Debounce",
    "Durable",
    "DurableError",
    "Event",
    "Fairness",
    "IdempotencyConflict",
    "NonRetryable",
    "Publication",
    "Published",
    "RateLimit",
    "Retention",
    "RetryAfter",
    "RetryPolicy",
    "RunCancelled",
    "RunDead",
    "RunFailed",
    "RunHandle",
    "RunTimeout",
    "Singleton",
    "StartRequest",
    "StepCancelled",
    "StepFailed",
    "StepTimeout",
    "Throttle",
    "Trigger",
    "WaitTimeout",
    "Worker",
    "current_step",
    "dead_letter",
    "durable_step",
    "remote_workflow",
    "workflow",
]

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "CONTRIBUTING.md", "SECURITY.md", "dev.py"),
    *("durable", "workers", "tests", "protocol", "examples", "deploy", "docs", "requirements.lock"),
}


def test_public_names_are_pinned() -> None:
    """`durable.__all__` is this list and nothing else; adding or removing a name is done here too."""
    assert sorted(durable.__all__) == sorted(PUBLIC)


def test_public_names_exist() -> None:
    """Each public name can be had."""
    assert [name for name in durable.__all__ if not hasattr(durable, name)] == []


def test_top_level_names() -> None:
    """Only the names the house allows stand at the top; everything else has a folder. Dotfiles are free."""
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} - TOP_LEVEL == set()
