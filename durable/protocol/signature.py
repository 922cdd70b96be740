"""Signatures on what engines and runners send each other over HTTP: who said it, to whom, when, and only once.

`x-durable-signature: v1,<ts>,<nonce>,<key id>,<hex>`: an HMAC-SHA256 over `v1.<ts>.<nonce>.<key id>.<METHOD>.<path>.<hash>`, the
hash being the body's SHA-256 in hex. `ts` is epoch seconds, and counts within five minutes by the receiver's clock. The path is
as it was sent, its query with it. An answer is signed the same, with the request's nonce, and its status in the place of the
method: so it answers this request, and no request can be given back as an answer.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from durable.core.errors import DurableError
from durable.protocol.runners import key_fingerprint

HEADER = "x-durable-signature"
WINDOW_SECONDS = 300
NONCES_MAX = 200_000
"""Nonces remembered at once. With more in the window, the next request is refused: forgetting one would let it be replayed."""

_SHAPE = re.compile(r"v1,([0-9]{1,15}),([A-Za-z0-9_-]{8,64}),([A-Za-z0-9_.-]{1,64}),([0-9a-f]{64})")


class BadSignature(DurableError):
    """The signature is missing, wrong, old or used. What is told to a stranger is only that."""

    code = "bad_signature"


class Signed(Struct, frozen=True):
    """A signature that holds."""

    nonce: str
    key_id: str
    key: str


class Nonces:
    """Remembers nonces for as long as their signatures could hold."""

    def __init__(self, limit: int = NONCES_MAX) -> None:
        self._until: dict[str, float] = {}
        self._limit = limit

    def use(self, nonce: str, now: float) -> None:
        """Take a nonce. Raises BadSignature if it was used before, or there is no room to remember it."""
        for old, until in list(self._until.items()):  # in order of coming, so the first that is not over ends it
            if until > now:
                break
            del self._until[old]
        if nonce in self._until:
            raise BadSignature("The signature's nonce was used before: each request needs one of its own.")
        if len(self._until) >= self._limit:
            raise BadSignature("Too many signed requests within ten minutes. Try again later.")
        self._until[nonce] = now + 2 * WINDOW_SECONDS


def sign(key: str, method: str, path: str, body: bytes, *, now: float, nonce: str) -> str:
    """The header's value. `now`: epoch seconds. For an answer: its status as `method`, and the nonce of the request."""
    ts, key_id = str(int(now)), key_fingerprint(key)
    return f"v1,{ts},{nonce},{key_id},{_mac(key, ts, nonce, key_id, method, path, body)}"


def check(
    given: Sequence[str],
    keys: Mapping[str, str],
    method: str,
    path: str,
    body: bytes,
    *,
    now: float,
    nonces: Nonces | None = None,
    nonce: str | None = None,
) -> Signed:
    """Who signed it. `given`: the values of the header, of which there is one. `keys`: by key id. A request's nonce is taken
    from `nonces`; an answer's is the request's, given as `nonce`. Raises BadSignature."""
    if len(given) != 1:
        raise BadSignature(f"One {HEADER} header is needed, and {len(given)} came.")
    found = _SHAPE.fullmatch(given[0])
    if found is None:
        raise BadSignature(f"{HEADER} is not of the form v1,ts,nonce,key-id,hex.")
    ts, said, key_id, mac = found.groups()
    key = keys.get(key_id)
    if key is None:
        # As much work as for a known one.
        _mac("", ts, said, key_id, method, path, body)
        raise BadSignature("The signature is of a key that is not known here.")
    if not hmac.compare_digest(mac, _mac(key, ts, said, key_id, method, path, body)):
        raise BadSignature("The signature does not fit what was sent: another key, body, method or path.")
    if abs(now - int(ts)) > WINDOW_SECONDS:
        raise BadSignature(f"The signature is more than {WINDOW_SECONDS} s off. Is one of the clocks wrong?")
    if nonce is not None and not hmac.compare_digest(nonce, said):
        raise BadSignature("The answer is signed for another request.")
    if nonces is not None:
        nonces.use(said, now)
    return Signed(said, key_id, key)


def _mac(key: str, ts: str, nonce: str, key_id: str, method: str, path: str, body: bytes) -> str:
    said = f"v1.{ts}.{nonce}.{key_id}.{method}.{path}.{hashlib.sha256(body).hexdigest()}"
    return hmac.new(key.encode(), said.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
