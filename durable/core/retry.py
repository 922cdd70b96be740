"""When a failed attempt is tried again. Pure: (policy, attempt, error, random) → delay. The engine keeps the rest durable."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Backoff = Literal["fixed", "linear", "exponential"]


class RetryPolicy(Struct, frozen=True):
    """How often and how soon. Delays are seconds.

    `max_attempts` counts the first try too; 1 means never again.
    """

    max_attempts: int = 3
    backoff: Backoff = "exponential"
    initial_delay: float = 1.0
    max_delay: float = 300.0
    factor: float = 2.0
    jitter: float = 0.1
    """Share of the delay that is random, 0 to 1."""
    non_retryable: tuple[str, ...] = ()
    """Error codes or exception class names that end it at once."""

    def delay(self, attempt: int, random: float, *, retry_after: float | None = None) -> float:
        """Seconds to wait after the failed `attempt` (from 1). `retry_after`, asked for by the error, is a lower bound."""
        base = self.initial_delay
        if self.backoff == "linear":
            base = self.initial_delay * attempt
        elif self.backoff == "exponential":
            # The exponent is bounded: 2.0 ** 5000 would raise OverflowError long after max_delay has decided.
            base = self.initial_delay * self.factor ** min(attempt - 1, 64)
        base = min(base, self.max_delay)
        delay = base * (1 - self.jitter * random)
        return max(delay, retry_after or 0.0)

    def gives_up(self, attempt: int, *, retryable: bool, names: tuple[str, ...]) -> bool:
        """Whether the failed `attempt` was the last. `names`: the error's code and class names."""
        return not retryable or attempt >= self.max_attempts or any(n in self.non_retryable for n in names)
