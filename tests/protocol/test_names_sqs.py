"""Queue names where only letters, digits, `-` and `_` are allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.protocol import names

SPELLINGS = {
    "durable-tasks-charge": ("durable-tasks-charge",),
    "durable-tasks-snake_case-2": ("durable-tasks-snake_case-2",),
    "durable-tasks-payments.charge": ("durable-tasks-payments.charge", "durable-tasks-payments_x2E_charge"),
    "durable-tasks-resize@eu": ("durable-tasks-resize@eu", "durable-tasks-resize_x40_eu"),
    "durable-tasks-a_x2E_b": ("durable-tasks-a_x5F_x2E_b",),
    "durable-tasks-a_x2E_x2E_b": ("durable-tasks-a_x5F_x2E_x5F_x2E_b",),
    "durable-tasks-a_x2E.b": ("durable-tasks-a_x5F_x2E_x2E_b",),
    "durable-tasks-grün": ("durable-tasks-grün", "durable-tasks-gr_xC3__xBC_n"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_where_a_queue_is_looked_for(name: str) -> None:
    """The plain name first, then the escaped one; a name that reads as another's escaped one only escaped."""
    assert names.spellings(name) == SPELLINGS[name]


@given(st.text(st.sampled_from("ab_xX2E5F.:@-é"), max_size=12))
def test_no_two_names_share_a_queue(name: str) -> None:
    """What is spelled can be read back, so two names never come to the same queue; nor does a plain look-up of one."""
    spelled = names.spellings(name)
    assert names.unrestricted(spelled[-1]) == name
    assert all(names.restricted(plain) == spelled[-1] for plain in spelled[:-1])
    assert not spelled[:-1] or any(not (char.isascii() and (char.isalnum() or char in "-_")) for char in name)
