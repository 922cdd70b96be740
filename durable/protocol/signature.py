"""Signatures of HTTP messages, both ways. Two forms of one header, `x-durable-signature`:

    <hex>                          HMAC-SHA256 of the raw body: what apps in any language send to and get from the service
    v1,ts,nonce,key-id,<hex>       HMAC-SHA256 of "v1.ts.nonce.key-id.METHOD.path.<hex SHA-256 of the body>"

`ts` is seconds since the epoch, `nonce` 16 to 64 letters or digits, `key-id` the key's `fingerprint`. The path is the
request's as sent, with its query. Pure: whose key it is, whether the time fits and the nonce is new, the receiver decides.
"""

from __future__ import annotations

import hashlib
import hmac
import re

from msgspec import Struct

HEADER = "x-durable-signature"
APP_HEADER = "x-durable-app"
WINDOW = 300
"""Seconds a v1 signature's time may be off, either way."""
_V1 = re.compile(r"v1,([0-9]{1,12}),([A-Za-z0-9_-]{16,64}),([0-9a-f]{16}),([0-9a-f]{64})")
_HEX = re.compile(r"[0-9a-f]{64}")


class Signed(Struct, frozen=True):
    """A v1 header, read."""

    ts: int
    nonce: str
    key_id: str
    hex: str
    head: str
    """What stands before the method in the signed text."""


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


def read(header: str) -> Signed | str | None:
    """A v1 header as Signed, a plain one as its hex digits, anything else None."""
    if _HEX.fullmatch(header):
        return header
    found = _V1.fullmatch(header)
    if found is None:
        return None
    ts, nonce, key_id, digest = found.groups()
    return Signed(int(ts), nonce, key_id, digest, f"v1.{ts}.{nonce}.{key_id}")


def matches(signed: Signed | str, key: str, method: str, path: str, body: bytes) -> bool:
    """Whether this key has signed this message; in constant time."""
    if isinstance(signed, str):
        return hmac.compare_digest(signed, body_signature(key, body))
    return hmac.compare_digest(signed.hex, _v1(key, signed.head, method, path, body))


def _v1(key: str, head: str, method: str, path: str, body: bytes) -> str:
    text = f"{head}.{method}.{path}.{hashlib.sha256(body).hexdigest()}"
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
