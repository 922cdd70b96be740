"""Mistakes that everybody makes once, and the sentence that each gets."""

from __future__ import annotations

import re
from typing import Any

import pytest

from durable import Context, Durable, DurableError, RunFailed
from durable.opening import open_store

NOW = 0
"""Retries."""


async def body(number: int) -> int:
    return number


async def broken(number: int) -> int:
    table: dict[str, int] = {}
    return table[f"no. {number}"]


async def returns_the_wait(ctx: Context) -> Any:
    return ctx.step(body, 1)


async def adds_to_the_wait(ctx: Context) -> Any:
    return ctx.step(body, 1) + 1  # type: ignore[operator]


async def calls_the_body(ctx: Context) -> Any:
    return await ctx.step("one", body(1))  # type: ignore[call-overload]


async def fails_in_a_step(ctx: Context) -> Any:
    return await ctx.step(broken, 1, retries=NOW)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (returns_the_wait, r"was not awaited, so it is no value yet\. Write `await`"),
        (adds_to_the_wait, r"TypeError: .*'NotAwaited' and 'int'"),
        (calls_the_body, r"was given a call, not a function.*ctx\.step\('name', body, \.\.\.\)"),
        (fails_in_a_step, r"Step 'broken' failed: KeyError: 'no\. 1'"),
    ],
)
async def test_a_run_that_fails_says_why(mistake: Any, told: str) -> None:
    """The message of RunFailed is enough to find the mistake."""
    app = Durable("memory://")
    app.workflow(mistake)
    async with app:
        with pytest.raises(RunFailed, match=told):
            await app.start_and_wait(mistake, timeout=10)


async def test_a_failed_run_says_where() -> None:
    """RunFailed's notes lead to the line of the workflow, and to the line in the step's body."""
    app = Durable("memory://")
    app.workflow(fails_in_a_step)
    async with app:
        with pytest.raises(RunFailed) as caught:
            await app.start_and_wait(fails_in_a_step, timeout=10)
    (note,) = caught.value.__notes__
    assert re.search(
        r"test_mistakes\.py:\d+ in fails_in_a_step\n  in step broken, KeyError:\n(.*\n)*.*in broken$", note
    )


async def test_a_function_that_is_no_workflow_is_told_so() -> None:
    """Starting a plain function names the decorator that it lacks."""
    async with Durable("memory://") as app:
        with pytest.raises(DurableError, match=r"body is not a workflow\. Put @workflow on it"):
            await app.start(body, 1)


def test_a_misspelt_setting_is_known() -> None:
    """A setting that there is not is refused with the one that was meant."""
    with pytest.raises(DurableError, match=r"no setting 'leese'\. Did you mean lease\?"):
        Durable("memory://", leese=3)


def test_settings_take_durations_as_people_write_them() -> None:
    """Every setting that is a duration reads text, as `lease` does."""
    settings = Durable("memory://", poll_every="500ms", drain_timeout="1m").settings
    assert (settings.poll_every, settings.drain_timeout) == (0.5, 60.0)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://ann:s3cret@db.example/shop",
        "postgresql:/ann:s3cret@db.example/shop",
        "mysql://db.example/shop?password=s3cret",
        "host=db.example password=s3cret",
    ],
)
def test_a_store_that_is_not_known_keeps_its_password(url: str) -> None:
    """The sentence about a URL that no store reads names its beginning, never what follows."""
    with pytest.raises(DurableError, match="No store is known for") as caught:
        open_store(url)
    assert "s3cret" not in str(caught.value)
    assert re.split("[:=]", url)[0] in str(caught.value)
    with pytest.raises(DurableError, match="'runs\\.db'"):
        open_store("runs.db")
