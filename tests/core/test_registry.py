"""One name, one meaning; and what is said when there is none."""

from __future__ import annotations

from typing import Any

import pytest

from durable.core.definition import durable_step, workflow, workflow_of
from durable.core.errors import DefinitionError, DuplicateDefinition, UnknownStep, UnknownVersion, UnknownWorkflow
from durable.core.registry import Registry, version_key


def _workflow(name: str, version: str = "1", tags: tuple[str, ...] = ()) -> Any:
    async def body(ctx: object) -> None: ...

    return workflow(name, version, tags=tags)(body)


class Mail:
    @durable_step("mail.send")
    def send(self, to: str) -> str:
        return to

    @durable_step("mail.check")
    def check(self) -> None: ...


def test_what_was_added_is_found() -> None:
    """Workflows by name and version, steps by name, a provider's methods bound to it."""
    one, two = _workflow("a"), _workflow("a", "2")
    mail = Mail()
    registry = Registry([one, two, mail])
    assert registry.workflow("a", "1").fn is one
    assert registry.workflow("a", "2").fn is two
    assert registry.step("mail.send").call(b'"x"') == "x"
    assert [step.name for step in registry.steps()] == ["mail.check", "mail.send"]
    assert registry.routes() == [("a", "1"), ("a", "2")]


def test_a_duplicate_is_refused_naming_both_places() -> None:
    """Two functions of one name and version; the same one again is none."""
    registry = Registry([_workflow("a")])
    with pytest.raises(DuplicateDefinition, match=r"test_registry.py:\d+ and at .*test_registry.py:\d+") as caught:
        registry.add(_workflow("a"))
    assert caught.value.code == "duplicate_definition"
    registry.add(registry.workflow("a", "1"))

    @durable_step("mail.send")
    def other(to: str) -> None: ...

    registry.add(Mail)
    with pytest.raises(DuplicateDefinition, match=r"mail\.send is defined twice"):
        registry.add(other)


def test_a_method_gets_its_instance_later_and_only_one() -> None:
    """Registered by class first, by instance after; a second instance would be ambiguous."""
    registry = Registry([Mail])
    assert registry.step("mail.send").needs_instance
    mail = Mail()
    registry.add(mail)
    registry.add(Mail)
    assert registry.step("mail.send").instance is mail
    with pytest.raises(DuplicateDefinition, match="one instance only"):
        registry.add(Mail())


def test_a_container_may_bind_a_registered_workflow_again() -> None:
    """The same class with a factory replaces the one without."""

    @workflow("w")
    class Flow:
        async def run(self, ctx: object) -> None: ...

    registry = Registry([Flow])
    registry.add(workflow_of(Flow).bind(lambda cls: cls()))
    assert registry.workflow("w", "1").factory is not None


def test_the_latest_version_is_the_last_in_natural_order() -> None:
    """10 after 9, a release after its candidates; order of adding does not matter."""
    ordered = ["0.9", "1-alpha", "1-rc.1", "1", "1.0.1", "1.9", "1.10-rc1", "1.10", "2", "v1", "v2", "v10"]
    assert sorted(set(ordered), key=version_key) == [*ordered[9:], *ordered[:9]]
    registry = Registry([_workflow("a", version) for version in ("10", "9", "2", "10-rc1")])
    assert registry.latest("a").version == "10"
    assert registry.routes() == [("a", "2"), ("a", "9"), ("a", "10-rc1"), ("a", "10")]


def test_B54_an_unknown_version_is_refused_never_the_latest_instead() -> None:
    """A pinned version that does not exist: an error that lists what there is."""
    registry = Registry([_workflow("a", "1"), _workflow("a", "2")])
    with pytest.raises(UnknownVersion, match=r"no version 3 here; it has 1, 2") as caught:
        registry.workflow("a", "3")
    assert caught.value.code == "unknown_version"


def test_an_unknown_name_is_told_with_its_near_matches() -> None:
    """A slip of the pen finds its word; a far name gets the list; an empty registry says so."""
    registry = Registry([_workflow("checkout"), Mail()])
    with pytest.raises(UnknownWorkflow, match="Did you mean checkout"):
        registry.workflow("chekout", "1")
    with pytest.raises(UnknownWorkflow, match="Known: checkout"):
        registry.latest("zzz")
    with pytest.raises(UnknownStep, match=r"Did you mean mail\.send"):
        registry.step("mail.sent")
    with pytest.raises(UnknownWorkflow, match="register a workflow"):
        Registry().latest("a")


def test_workflows_are_listed_by_tag() -> None:
    """All of them, or those that carry a tag."""
    registry = Registry([_workflow("b", tags=("x",)), _workflow("a"), _workflow("c", tags=("x", "y"))])
    assert [w.name for w in registry.workflows()] == ["a", "b", "c"]
    assert [w.name for w in registry.workflows(tag="x")] == ["b", "c"]
    assert registry.workflows(tag="none") == []


@pytest.mark.parametrize("thing", [object(), len, 3, "name", Registry])
def test_what_is_neither_is_refused(thing: Any) -> None:
    """Nothing is registered by accident."""
    with pytest.raises(DefinitionError, match="neither a workflow nor a step"):
        Registry([thing])
