"""Every error the product raises, in one tree. Codes are stable and shared with protocol/; messages say what to do next.

DurableError
├── DefinitionError            duplicate_definition, bad_definition, reserved_id: found when registering
│   ├── DuplicateDefinition
│   └── ReservedId
├── NotRegistered              unknown_workflow, unknown_version, unknown_step
├── PayloadError               payload_type: a value that cannot be written as JSON, or read back as its type
│   ├── PayloadTooLarge        payload_too_large
│   └── PayloadText            payload_text: NUL or lone surrogate
├── RunError                   what waiting for a run, or a step in it, can raise
│   ├── RunNotFound            run_not_found
│   ├── RunFinished            run_finished: a signal or cancel came too late
│   ├── RunActive              run_active: a rerun came too early
│   ├── ForkRefused            fork_refused: no run can begin with that part of another one
│   ├── RunFailed              run_failed
│   ├── RunCancelled           run_cancelled
│   ├── RunDead                run_dead
│   └── RunTimeout             run_timeout
├── StepFailed                 step_failed: inside a workflow, after the last attempt
│   ├── StepTimeout            step_timeout
│   └── ChildFailed            child_failed
├── StepCancelled              step_cancelled: what `raise_if_cancelled` raises; in `error.code` also of a body that
│                              cancelled itself, or that its worker has cancelled
├── WaitTimeout                wait_timeout: also a TimeoutError
├── ScheduleNotFound           schedule_not_found
├── IdempotencyConflict        idempotency_conflict: same key, other input
├── NonRetryable               non_retryable: raise it in a step to end retries at once
├── RetryAfter                 retry_after: raise it in a step to say when to come back
├── DeterminismError           the workflow broke a rule of replay
│   ├── NonDeterminism         non_determinism: journal and code disagree; the run is blocked
│   ├── ForeignAwait           foreign_await: a socket, driver, thread or other loop inside a workflow
│   └── Stalled                stalled: a turn did not end, or ended with nothing to wait for
├── StoreError                 store_error
│   ├── StoreUnavailable       store_unavailable: try again; nothing is known to be lost
│   ├── StoreFull              store_full
│   ├── StoreReadOnly          store_read_only
│   ├── StoreTooNew            store_too_new
│   ├── StoreRestored          store_restored
│   └── WeakDurability         weak_durability
├── TransportError             transport_error
│   ├── AllTransportsFailed    all_transports_failed: no member of the pool took the task
│   ├── UnknownTransport       unknown_transport: a step is pinned to a member the pool does not have
│   └── MessageRefused         message_refused: a message that nobody may take in, however often it comes
│                              (bad_decision: in `error.code`, of a hosted run whose worker answers nonsense)
│                              (worker_failed: in `error.code`, of a task the broker has given up on)
├── RunnerError                runner_error: an app's function could not be asked for a pass
│   ├── RunnerGone             runner_gone: no live runner has it, or the one the run is pinned to is away
│   ├── RunnerTimeout          runner_timeout: no answer within the bound of a call
│   ├── RunnerRefused          runner_refused: the app refused the call, or its answer is refused (signature, status, size)
│   └── BadAnswer              bad_answer: an answer that cannot be understood
│                              (id_reused: in `error.code`, of a function that used one id for two operations)
│                              (unknown_operation: in `error.code`, of an operation that the engine does not offer)
├── WrongApp                   wrong_app: a registration names another app than its credential is of
├── CallRefused                call_refused: an address this engine does not call (runners/outgoing.py)
├── CallFailed                 call_failed: an outgoing call that may be tried again
├── Fenced                     fenced: another engine owns the run now
└── EngineStopped              engine_stopped

Unwound (BaseException)        a run is being dropped from memory: not an Exception, so that nobody swallows it
"""

from __future__ import annotations

from typing import Any, ClassVar

from msgspec import Struct


class ErrorData(Struct, frozen=True, rename="camel", omit_defaults=True):
    """An error as data: how it is journaled and sent. Never turned back into the class it came from."""

    message: str
    code: str = "error"
    type: str = ""
    """The exception's class name, as a hint for people and for `non_retryable`."""
    retryable: bool = True
    retry_after: float | None = None
    details: Any = None
    stack: str | None = None

    @property
    def line(self) -> str:
        """For people. An error of somebody else's class bears its name: of a KeyError the message alone says nothing."""
        return f"{self.type}: {self.message}" if self.code == "error" and self.type else self.message


class DurableError(Exception):
    """The root. `code` is stable; `str(error)` says what to do next."""

    code: ClassVar[str] = "error"


class DefinitionError(DurableError):
    code = "bad_definition"


class TooCostly(DurableError):
    """An expression looked at more of an event than its budget allows; a condition counts as not met then."""

    code = "expression_budget"


class DuplicateDefinition(DefinitionError):
    code = "duplicate_definition"


class ReservedId(DefinitionError):
    code = "reserved_id"


class NotRegistered(DurableError):
    code = "not_registered"


class UnknownWorkflow(NotRegistered):
    code = "unknown_workflow"


class UnknownVersion(NotRegistered):
    code = "unknown_version"


class UnknownStep(NotRegistered):
    code = "unknown_step"


class ScheduleNotFound(DurableError):
    code = "schedule_not_found"


class PayloadError(DurableError):
    code = "payload_type"


class PayloadTooLarge(PayloadError):
    code = "payload_too_large"


class PayloadText(PayloadError):
    code = "payload_text"


class RunError(DurableError):
    """Something about one run. `run_id` names it; `error` is what it ended with, where it did."""

    code = "run_error"

    def __init__(self, message: str, *, run_id: str = "", error: ErrorData | None = None) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.error = error


class RunNotFound(RunError):
    code = "run_not_found"


class RunFinished(RunError):
    code = "run_finished"


class RunActive(RunError):
    code = "run_active"


class ForkRefused(RunError):
    code = "fork_refused"


class RunFailed(RunError):
    code = "run_failed"


class RunCancelled(RunError):
    code = "run_cancelled"


class RunDead(RunError):
    code = "run_dead"


class RunTimeout(RunError):
    code = "run_timeout"


class StepFailed(DurableError):
    """A step failed for good. Built from data, so the live error and the replayed one are the same."""

    code = "step_failed"

    def __init__(self, message: str, *, key: str = "", error: ErrorData | None = None, attempts: int = 0) -> None:
        super().__init__(message)
        self.key = key
        self.error = error
        self.attempts = attempts


class StepTimeout(StepFailed):
    code = "step_timeout"


class ChildFailed(StepFailed):
    code = "child_failed"


class StepCancelled(DurableError):
    """Nobody waits for this body any more."""

    code = "step_cancelled"


class WaitTimeout(DurableError, TimeoutError):
    code = "wait_timeout"


class IdempotencyConflict(DurableError):
    code = "idempotency_conflict"

    def __init__(self, message: str, *, run_id: str = "") -> None:
        super().__init__(message)
        self.run_id = run_id


class NonRetryable(DurableError):
    """Raise it (or a subclass) in a step body: this failure is final."""

    code = "non_retryable"


class RetryAfter(DurableError):
    """Raise it in a step body: try again, but not before `seconds`."""

    code = "retry_after"

    def __init__(self, message: str, *, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class DeterminismError(DurableError):
    code = "determinism"


class NonDeterminism(DeterminismError):
    """The journal and the code disagree. `position` is the journal seq; the other two are one line each."""

    code = "non_determinism"

    def __init__(self, message: str, *, position: int = 0, recorded: str = "", asked: str = "") -> None:
        super().__init__(message)
        self.position = position
        self.recorded = recorded
        self.asked = asked


class ForeignAwait(DeterminismError):
    code = "foreign_await"


class Stalled(DeterminismError):
    code = "stalled"


class StoreError(DurableError):
    code = "store_error"


class StoreUnavailable(StoreError):
    """The store did not answer, or the connection broke. Whether the call took effect is not known."""

    code = "store_unavailable"


class StoreFull(StoreError):
    code = "store_full"


class StoreReadOnly(StoreError):
    code = "store_read_only"


class StoreTooNew(StoreError):
    code = "store_too_new"


class StoreRestored(StoreError):
    code = "store_restored"


class WeakDurability(StoreError):
    code = "weak_durability"


class TransportError(DurableError):
    code = "transport_error"


class AllTransportsFailed(TransportError):
    """`causes`: why not, by id of the member, in the order they were tried."""

    code = "all_transports_failed"

    def __init__(self, message: str, causes: dict[str, Exception]) -> None:
        super().__init__(message)
        self.causes = causes


class UnknownTransport(TransportError, NonRetryable):
    code = "unknown_transport"


class MessageRefused(TransportError):
    """Raised by a result handler: the message is put away where an operator finds it, and never delivered again."""

    code = "message_refused"


class RunnerError(DurableError):
    """A pass of an app's function came to nothing. `retryable`: whether asking again may help."""

    code = "runner_error"

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class RunnerGone(RunnerError):
    """Nobody is there to be asked. Not retryable: the run is pinned to a runner that is away."""

    code = "runner_gone"


class RunnerTimeout(RunnerError):
    code = "runner_timeout"


class RunnerRefused(RunnerError):
    code = "runner_refused"


class BadAnswer(RunnerError):
    code = "bad_answer"


class WrongApp(DurableError):
    code = "wrong_app"


class CallRefused(DurableError):
    """An address that must not be called from here. The message says which rule, and the setting that allows it, if any."""

    code = "call_refused"


class CallFailed(DurableError):
    """A receiver of ours could not take a call now."""

    code = "call_failed"


class Fenced(DurableError):
    code = "fenced"


class EngineStopped(DurableError):
    code = "engine_stopped"


class Unwound(BaseException):
    """The run is leaving memory. Every wait and every ctx call raises this; nothing durable can be done now.

    Not an Exception, so that an author's `except Exception` cannot swallow it.
    """
