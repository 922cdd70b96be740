"""Signatures of HTTP messages, made and checked here and nowhere else. Two forms of one header, `x-durable-signature`:

    <hex>                          HMAC-SHA256 of the raw body: what apps in any language send to and get from the service
    v1,ts,nonce,key-id,<hex>       HMAC-SHA256 of "v1.ts.nonce.key-id.METHOD.path.<hex SHA-256 of the body>"

`ts` is seconds since the epoch, `nonce` 16 to 64 letters, digits, dashes and underscores, `key-id` the key's `fingerprint`.
The path is the request's as sent, with its query. An answer is signed as a request is, with its request's nonce, and its
status in the place of the method: so it answers this request, and no request can be given back as an answer.

Keys are those that count now: one, or two while one is being replaced. Whose they are, the receiver knows.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from durable.core.errors import DurableError

HEADER = "x-durable-signature"
APP_HEADER = "x-durable-app"
TIMESTAMP_HEADER = "x-durable-timestamp"
WINDOW = 300
"""Seconds a v1 signature's time may be off, either way."""
NONCES_MAX = 200_000
"""Nonces remembered at once. With more in the window, the next request is refused: forgetting one would let it be replayed."""
_V1 = re.compile(r"v1,([0-9]{1,12}),([A-Za-z0-9_-]{16,64}),([0-9a-f]{16}),([0-9a-f]{64})")
_HEX = re.compile(r"[0-9a-f]{64}")


class BadSignature(DurableError):
    """The signature is missing, wrong, old or used. For logs: a stranger is only told that."""

    code = "bad_signature"


class Signed(Struct, frozen=True):
    """A v1 signature that holds. Its nonce has still to be remembered, and refused if it was used before."""

    key: str
    nonce: str


class Nonces:
    """Remembers nonces, in this process, for as long as their signatures could hold."""

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
        self._until[nonce] = now + 2 * WINDOW


def fingerprint(key: str) -> str:
    """The name of a key that may be shown: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def body_signature(key: str, body: bytes) -> str:
    """The plain form."""
    return hmac.new(key.encode(), body, hashlib.sha256).hexdigest()


def sign(key: str, method: str, path: str, body: bytes, *, ts: int, nonce: str) -> str:
    """The v1 form, whole."""
    key_id = fingerprint(key)
    return f"v1,{ts},{nonce},{key_id},{_v1(key, f'v1.{ts}.{nonce}.{key_id}', method, path, body)}"


def is_plain(given: Sequence[str]) -> bool:
    """Whether it is of the plain form, right or wrong. `given`: the values of the header."""
    return len(given) == 1 and _HEX.fullmatch(given[0]) is not None


def check_body(given: Sequence[str], keys: Iterable[str], body: bytes) -> str:
    """The key of a plain signature that holds. `given`: the values of the header, of which there is one. Raises
    BadSignature."""
    if not is_plain(given):
        _one(given)
        raise BadSignature(f"{HEADER} is not 64 small hexadecimal digits.")
    found = None
    for key in keys:  # all of them, so that the time it takes tells nothing
        if hmac.compare_digest(given[0], body_signature(key, body)):
            found = key
    if found is None:
        raise BadSignature("The signature does not fit what was sent: another key, or another body.")
    return found


def check(
    given: Sequence[str],
    keys: Iterable[str],
    method: str,
    path: str,
    body: bytes,
    *,
    now: float,
    nonce: str | None = None,
) -> Signed:
    """What a v1 signature that holds says. `given`: the values of the header, of which there is one. `now`: epoch seconds.
    An answer's nonce is its request's, given as `nonce`, and its status stands as `method`. Raises BadSignature."""
    read = _V1.fullmatch(_one(given))
    if read is None:
        raise BadSignature(f"{HEADER} is not of the form v1,ts,nonce,key-id,hex.")
    ts, said, key_id, digest = read.groups()
    head = f"v1.{ts}.{said}.{key_id}"
    found = None
    for key in keys:
        same = hmac.compare_digest(digest, _v1(key, head, method, path, body))
        if hmac.compare_digest(key_id, fingerprint(key)) and same:
            found = key
    if found is None:
        raise BadSignature("The signature does not fit what was sent: another key, body, method or path.")
    if abs(now - int(ts)) > WINDOW:
        raise BadSignature(f"The signature is more than {WINDOW} s off. Is one of the clocks wrong?")
    if nonce is not None and nonce != said:
        raise BadSignature("The answer is signed for another request.")
    return Signed(found, said)


def _one(given: Sequence[str]) -> str:
    if len(given) != 1:
        raise BadSignature(f"One {HEADER} header is needed, and {len(given)} came.")
    return given[0]


def _v1(key: str, head: str, method: str, path: str, body: bytes) -> str:
    text = f"{head}.{method}.{path}.{hashlib.sha256(body).hexdigest()}"
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
