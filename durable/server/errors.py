"""Errors as the API tells them: one JSON shape, stable codes.

    {"error": {"code": "run_not_found", "message": "There is no run …", "details": …}}

`code` is what programs compare, `message` says what to do next, `details` stands there where there is more to say.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from durable.core import errors
from durable.core.errors import WrongApp


class ErrorBody(Struct, frozen=True, omit_defaults=True, rename="camel"):
    """What every refusal has in it."""

    code: str
    message: str
    details: Any = None


class ErrorAnswer(Struct, frozen=True):
    """The body of every answer above 399."""

    error: ErrorBody


class ApiError(Exception):
    """A refusal. `retry_after`: seconds. `close`: what is left of the request is not read."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: Any = None,
        retry_after: float | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.details = details
        self.retry_after = retry_after
        self.close = close


STATUS: dict[type[Exception], int] = {
    errors.RunNotFound: 404,
    errors.ScheduleNotFound: 404,
    errors.RunFinished: 409,
    errors.RunActive: 409,
    errors.ForkRefused: 409,
    errors.IdempotencyConflict: 409,
    errors.NotRegistered: 404,
    errors.CallRefused: 400,
    WrongApp: 403,
    errors.PayloadTooLarge: 413,
    errors.PayloadError: 400,
    errors.DefinitionError: 400,
    errors.EngineStopped: 503,
    errors.StoreUnavailable: 503,
    errors.StoreFull: 507,
    errors.StoreReadOnly: 503,
    errors.StoreError: 503,
    errors.DurableError: 422,
}
"""By class; the nearest in the order of inheritance counts."""

CODES = {
    "unauthorized": "The credential is missing or wrong. Which of the two is not told.",
    "forbidden": "The credential is right, and may not do this.",
    "replayed": "This signed request has been taken before.",
    "not_found": "No such route, or nothing of this id in this workspace.",
    "method_not_allowed": "The route is there, with another method; the header Allow says which.",
    "bad_request": "The request is not HTTP as we take it.",
    "bad_json": "The body is not JSON, or JSON that programs read differently.",
    "bad_body": "The body is JSON of another shape; the message names the place.",
    "bad_query": "A query parameter is unknown or of another shape.",
    "bad_id": "What stands for an id cannot be one.",
    "body_too_large": "The body is above the limit.",
    "body_timeout": "The body did not arrive in time.",
    "unsupported_type": "A body is application/json.",
    "unsupported_encoding": "A body comes as it is, without compression.",
    "too_many_headers": "Too many headers, or too many bytes of them.",
    "rate_limited": "Too many requests; the header Retry-After says when to come back.",
    "too_many_streams": "This key holds too many streams open.",
    "conflict": "Somebody else changed it at the same time, or it is in another state.",
    "not_ready": "This process is starting or stopping; ask another.",
    "unreadable": "In a run: what it ended with cannot be read any more.",
    "internal": "A mistake of ours. The log has it under the request's id.",
}
"""Codes of the API's own, beside those of protocol/errors.json."""


def reference() -> str:
    """The table of docs/service.md. A test compares the page with it."""
    return "\n".join(["| code | means |", "|---|---|", *(f"| `{code}` | {means} |" for code, means in CODES.items())])


def of(error: Exception) -> ApiError | None:
    """What an error of the product is as a refusal; None for a mistake of ours."""
    if isinstance(error, ApiError):
        return error
    for kind in type(error).__mro__:
        if kind in STATUS:
            status = STATUS[kind]
            wait = 1.0 if status == 503 else None
            return ApiError(status, getattr(error, "code", "error"), str(error), retry_after=wait)
    return None


def body(error: ApiError) -> bytes:
    return msgspec.json.encode(ErrorAnswer(ErrorBody(error.code, str(error), error.details)))
