"""How long finished runs are kept. The engine deletes what a rule lets go; without a rule nothing is ever deleted."""

from __future__ import annotations

from msgspec import Struct

from durable.core.clock import SECOND
from durable.core.durations import Duration, seconds
from durable.core.errors import DefinitionError


class Retention(Struct, frozen=True):
    """A rule: a finished run goes when it is too old, or one too many. `Retention()` keeps for ever. Raises
    DefinitionError for what is no duration and no count."""

    age: Duration | None = None
    """It goes if it finished longer ago than this ("30d")."""
    keep: int | None = None
    """It goes if at least so many runs of its workflow finished after it."""

    def __post_init__(self) -> None:
        if self.age is not None:
            seconds(self.age)
        keep: object = self.keep
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
            raise DefinitionError(f"keep is how many finished runs of a workflow stay, 0 or more, not {keep!r}.")

    @property
    def age_us(self) -> int | None:
        return None if self.age is None else int(seconds(self.age) * SECOND)

    @property
    def for_ever(self) -> bool:
        """It lets nothing go."""
        return self.age is None and self.keep is None


def retention_of(given: Retention | Duration | None) -> Retention | None:
    """What an author gives: a rule, or only an age."""
    return given if given is None or isinstance(given, Retention) else Retention(age=given)
