"""Signatures between the service and apps, both kinds, made and checked here and nowhere else.

    plain     hex HMAC-SHA256 of the body                                              wire section 4
    v1        `v1,ts,nonce,key-id,hex`, over method, path and the body's hash          section 5 and everything of ours

A workspace has one key, or two while one is being replaced; either signs. Whether a key is alive, and whether a time is
right, the receiver's clock says. A `v1` signature counts once: whoever checks remembers its nonce.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

from msgspec import Struct

from durable.core.errors import DurableError

HEADER = "x-durable-signature"
APP_HEADER = "x-durable-app"
TIMESTAMP_HEADER = "x-durable-timestamp"
WINDOW = 300
"""Seconds a signature's time may be off, either way."""

_PLAIN = re.compile(r"[0-9a-f]{64}\Z")
_V1 = re.compile(r"v1,([0-9]{1,12}),([A-Za-z0-9_-]{8,64}),([A-Za-z0-9_.-]{1,64}),([0-9a-f]{64})\Z")


class SignatureRefused(DurableError):
    """A request that is not signed as it has to be. The reason is for logs; whoever sent it is told nothing but no."""

    code = "bad_signature"


class Key(Struct, frozen=True):
    """A signing key of a workspace."""

    secret: str
    expires_at: float | None = None
    """Epoch seconds, by the receiver's clock; None: it is alive."""

    @property
    def id(self) -> str:
        """Which it is, without telling it: the first 16 hex digits of its SHA-256."""
        return fingerprint(self.secret)

    def alive(self, now: float) -> bool:
        """Whether it counts at `now`."""
        return self.expires_at is None or now < self.expires_at


class Checked(Struct, frozen=True):
    """A `v1` signature that is right. Its nonce has still to be remembered, and refused if it has been before."""

    key_id: str
    nonce: str
    remember_until: float
    """Epoch seconds."""


def fingerprint(secret: str) -> str:
    """Which key it is: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(secret.encode()).hexdigest()[:16]


def sign_plain(secret: str, body: bytes) -> str:
    """The signature of section 4."""
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def sign(secret: str, method: str, path: str, body: bytes, *, now: float, nonce: str | None = None) -> str:
    """The signature of ours. `path` with its query, as it stands in the request line; `now` in epoch seconds."""
    key_id = fingerprint(secret)
    nonce = nonce or secrets.token_urlsafe(16)
    timestamp = str(int(now))
    said = _said(timestamp, nonce, key_id, method, path, body)
    return f"v1,{timestamp},{nonce},{key_id},{hmac.new(secret.encode(), said, hashlib.sha256).hexdigest()}"


def check_plain(keys: Sequence[Key], given: Sequence[str], body: bytes, *, now: float) -> str:
    """Check the signature of section 4. `given`: every value that header had. Gives the key's id. Raises SignatureRefused."""
    said = _only(given)
    if not _PLAIN.match(said):
        raise SignatureRefused("The signature is not 64 small hexadecimal digits.")
    found = None
    for key in keys:  # all of them, so that the time it takes tells nothing
        if hmac.compare_digest(sign_plain(key.secret, body), said) and key.alive(now):
            found = key.id
    if found is None:
        raise SignatureRefused("The signature fits no live key of this workspace.")
    return found


def check(keys: Sequence[Key], given: Sequence[str], method: str, path: str, body: bytes, *, now: float) -> Checked:
    """Check the signature of ours. Raises SignatureRefused."""
    match = _V1.match(_only(given))
    if match is None:
        raise SignatureRefused("The signature is not v1,time,nonce,key id,hex.")
    timestamp, nonce, key_id, digits = match.groups()
    if abs(int(timestamp) - now) > WINDOW:
        raise SignatureRefused(f"The signature's time is more than {WINDOW} s off. Is that machine's clock right?")
    said = _said(timestamp, nonce, key_id, method, path, body)
    right = False
    for key in keys:
        same = hmac.compare_digest(hmac.new(key.secret.encode(), said, hashlib.sha256).hexdigest(), digits)
        right = right or (same and hmac.compare_digest(key.id, key_id) and key.alive(now))
    if not right:
        raise SignatureRefused("The signature fits no live key of this workspace.")
    return Checked(key_id, nonce, int(timestamp) + 2 * WINDOW)


def is_v1(given: Sequence[str]) -> bool:
    """Whether a request bears a signature of ours, right or wrong."""
    return len(given) == 1 and given[0].startswith("v1,")


def check_timestamp(given: str | None, *, now: float) -> None:
    """The time of a manifest's request, in milliseconds. Raises SignatureRefused."""
    if given is None or not re.match(r"[0-9]{1,15}\Z", given) or abs(int(given) / 1_000 - now) > WINDOW:
        raise SignatureRefused(f"The request's time is missing, or more than {WINDOW} s off.")


def _only(given: Sequence[str]) -> str:
    if len(given) != 1:
        raise SignatureRefused("A request has one signature, not none and not two.")
    return given[0]


def _said(timestamp: str, nonce: str, key_id: str, method: str, path: str, body: bytes) -> bytes:
    return f"v1.{timestamp}.{nonce}.{key_id}.{method.upper()}.{path}.{hashlib.sha256(body).hexdigest()}".encode()
