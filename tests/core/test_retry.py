"""The retry policy: delays and the end of them."""

from hypothesis import given
from hypothesis import strategies as st

from durable.core.retry import RetryPolicy


def test_delays_grow_as_named() -> None:
    """fixed, linear and exponential, without jitter."""
    assert [RetryPolicy(backoff="fixed").delay(n, 0) for n in (1, 2, 3)] == [1, 1, 1]
    assert [RetryPolicy(backoff="linear").delay(n, 0) for n in (1, 2, 3)] == [1, 2, 3]
    assert [RetryPolicy().delay(n, 0) for n in (1, 2, 3, 50)] == [1, 2, 4, 300]


@given(
    st.builds(
        RetryPolicy,
        backoff=st.sampled_from(["fixed", "linear", "exponential"]),
        initial_delay=st.floats(0, 1e6),
        max_delay=st.floats(0, 1e6),
        factor=st.floats(1, 100),
        jitter=st.floats(0, 1),
    ),
    st.integers(1, 10**9),
    st.floats(0, 1),
)
def test_a_delay_is_never_negative_and_never_over_the_maximum(policy: RetryPolicy, attempt: int, random: float) -> None:
    """Any policy, any attempt, any luck: no overflow, 0 to max_delay."""
    assert 0 <= policy.delay(attempt, random) <= policy.max_delay


def test_jitter_only_shortens() -> None:
    """A tenth of jitter: between 90 % and all of the delay."""
    policy = RetryPolicy(backoff="fixed", initial_delay=10)
    assert (policy.delay(1, 0.0), policy.delay(1, 1.0)) == (10, 9)


def test_what_the_error_asks_for_is_a_lower_bound() -> None:
    """retry_after wins over max_delay, and never shortens."""
    assert RetryPolicy(max_delay=5).delay(1, 0, retry_after=60) == 60
    assert RetryPolicy(initial_delay=90).delay(1, 0, retry_after=60) == 90


def test_it_gives_up_on_the_last_attempt_on_final_errors_and_on_named_ones() -> None:
    """max_attempts counts the first; a code or a class name in non_retryable ends it at once."""
    policy = RetryPolicy(max_attempts=2, non_retryable=("card_declined", "ValueError"))
    assert not policy.gives_up(1, retryable=True, names=("error", "OSError"))
    assert policy.gives_up(2, retryable=True, names=())
    assert policy.gives_up(1, retryable=False, names=())
    assert policy.gives_up(1, retryable=True, names=("card_declined", "Declined"))
    assert policy.gives_up(1, retryable=True, names=("error", "ValueError"))
    assert RetryPolicy(max_attempts=1).gives_up(1, retryable=True, names=())
