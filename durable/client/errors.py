"""What a service answers when it does not do what it was asked, as exceptions."""

from __future__ import annotations

from typing import Any

from durable.core.errors import DurableError


class ServiceError(DurableError):
    """The service did not do it. `status`: HTTP's, 0 where there was no answer; `code`: the service's own, stable;
    `details`: what else it said."""

    code = "service_error"

    def __init__(self, message: str, *, status: int = 0, code: str | None = None, details: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.details = details
        if code is not None:
            self.code = code  # type: ignore[misc]  # a class's word, but for what the service says itself


class Unavailable(ServiceError):
    """No answer, or none that counts: out of reach, overloaded, draining. The same call may be made again."""

    code = "unavailable"


class Refused(ServiceError):
    """What was asked makes no sense to the service (400, 413, 422)."""

    code = "refused"


class NotAllowed(ServiceError):
    """The key is missing, wrong, or may not do this (401, 403)."""

    code = "not_allowed"


class NotFound(ServiceError):
    """There is no such thing in the key's workspace."""

    code = "not_found"


class Conflict(ServiceError):
    """It stands against what is there: another input under the same key, a run that has ended (409, 410)."""

    code = "conflict"


_KINDS: dict[int, type[ServiceError]] = {
    400: Refused,
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    408: Unavailable,
    409: Conflict,
    410: Conflict,
    413: Refused,
    415: Refused,
    422: Refused,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def error_of(status: int, body: Any) -> ServiceError:
    """An answer's status and JSON body (`{"error": {"code", "message", "details"?}}`) as the error to raise."""
    said = body.get("error") if isinstance(body, dict) else None
    said = said if isinstance(said, dict) else {}
    message = str(said.get("message") or f"The service answered {status}.")
    kind = _KINDS.get(status, ServiceError)
    code = said.get("code")
    return kind(message, status=status, code=str(code) if code else None, details=said.get("details"))
