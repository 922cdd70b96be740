"""A runner's side of signatures v1 (protocol/signature.py): who asks, to whom, when, and only once; and its answers' own.

An answer is signed as a request is, with the request's nonce, and its status in the place of the method: so it answers this
request, and no request can be given back as an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from durable.core.errors import DurableError
from durable.protocol import signature

NONCES_MAX = 200_000
"""Nonces remembered at once. With more in the window, the next request is refused: forgetting one would let it be replayed."""


class BadSignature(DurableError):
    """The signature is missing, wrong, old or used. For logs: a stranger is only told that."""

    code = "bad_signature"


class Nonces:
    """Remembers nonces for as long as their signatures could hold."""

    def __init__(self, limit: int = NONCES_MAX) -> None:
        self._until: dict[str, float] = {}
        self._limit = limit

    def use(self, nonce: str, now: float) -> None:
        """Take a nonce. Raises BadSignature if it was used before, or there is no room to remember it."""
        for old, until in list(self._until.items()):  # in order of coming: the first that still counts ends it
            if until > now:
                break
            del self._until[old]
        if nonce in self._until:
            raise BadSignature("The signature's nonce was used before: each request needs one of its own.")
        if len(self._until) >= self._limit:
            raise BadSignature("Too many signed requests within ten minutes. Try again later.")
        self._until[nonce] = now + 2 * signature.WINDOW


def check(
    given: Sequence[str],
    key: str,
    method: str,
    path: str,
    body: bytes,
    *,
    now: float,
    nonces: Nonces | None = None,
    nonce: str | None = None,
) -> str:
    """The nonce of a v1 signature that holds. `given`: the values of the header, of which there is one. `now`: epoch seconds. A
    request's nonce is taken from `nonces`; an answer's is the request's, given as `nonce`, and its status stands as `method`.
    Raises BadSignature."""
    if len(given) != 1:
        raise BadSignature(f"One {signature.HEADER} header is needed, and {len(given)} came.")
    signed = signature.read(given[0])
    if not isinstance(signed, signature.Signed):
        raise BadSignature(f"{signature.HEADER} is not of the form v1,ts,nonce,key-id,hex.")
    if not signature.matches(signed, key, method, path, body) or signed.key_id != signature.fingerprint(key):
        raise BadSignature("The signature does not fit what was sent: another key, body, method or path.")
    if abs(now - signed.ts) > signature.WINDOW:
        raise BadSignature(f"The signature is more than {signature.WINDOW} s off. Is one of the clocks wrong?")
    if nonce is not None and nonce != signed.nonce:
        raise BadSignature("The answer is signed for another request.")
    if nonces is not None:
        nonces.use(signed.nonce, now)
    return signed.nonce
