"""Signatures v1: what holds, and every way in which one does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from durable.protocol.signature import WINDOW, sign
from durable.runners.proof import BadSignature, Nonces, check

VECTORS = json.loads((Path(__file__).resolve().parents[2] / "protocol" / "vectors" / "signature.json").read_text())
KEY, NOW, BODY = "dk_shop.dev_secret", 1_767_225_600.0, b'{"a":1}'


def signed(**changes: Any) -> str:
    given = {"method": "POST", "path": "/invoke", "body": BODY, "ts": int(NOW), "nonce": "n0nce-1234567890"} | changes
    key = given.pop("key", KEY)
    return sign(key, **given)


def checked(header: str, *more: str, **changes: Any) -> Any:
    given: dict[str, Any] = {"key": KEY, "method": "POST", "path": "/invoke", "body": BODY, "now": NOW} | changes
    return check([header, *more], **given)


@pytest.mark.parametrize("vector", VECTORS["signatures"], ids=lambda vector: vector["name"])
def test_golden_signatures(vector: dict[str, Any]) -> None:
    """Every language signs the same request the same way."""
    body = vector["body"].encode()
    header = sign(vector["key"], vector["method"], vector["path"], body, ts=vector["ts"], nonce=vector["nonce"])
    assert header == vector["header"]
    found = check(
        [header],
        vector["key"],
        vector["method"],
        vector["path"],
        body,
        now=vector["ts"],
    )
    assert found == vector["nonce"]


@pytest.mark.parametrize(
    "changes",
    [
        {"body": b'{"a":2}'},
        {"path": "/invoke?x=1"},
        {"method": "GET"},
        {"key": "other"},
    ],
    ids=["body", "path", "method", "key"],
)
def test_a_signature_is_of_one_request_only(changes: dict[str, Any]) -> None:
    """A02, A05: moved to another body, path, method or key it does not hold."""
    assert checked(signed())
    with pytest.raises(BadSignature):
        checked(signed(), **changes)


def test_malformed_headers_are_refused() -> None:
    """A01, A02: none, two, truncated, upper case, one flipped bit."""
    good = signed()
    for bad in ["", good[:-1], good.upper(), good[:-1] + ("0" if good[-1] != "0" else "1"), "v2" + good[2:]]:
        with pytest.raises(BadSignature):
            checked(bad)
    with pytest.raises(BadSignature):
        checked(good, good)
    with pytest.raises(BadSignature):
        check([], KEY, "POST", "/invoke", BODY, now=NOW)


@pytest.mark.parametrize("off", [-WINDOW - 1, WINDOW + 1])
def test_old_and_early_signatures_are_refused(off: float) -> None:
    """Five minutes either way by the receiver's clock."""
    header = signed()
    assert checked(header, now=NOW + WINDOW - 1)
    with pytest.raises(BadSignature, match="clocks"):
        checked(header, now=NOW + off)


def test_a_nonce_counts_once() -> None:
    """The same request again is refused for as long as its signature could hold, and forgotten afterwards."""
    nonces = Nonces(limit=2)
    assert checked(signed(), nonces=nonces)
    with pytest.raises(BadSignature, match="used before"):
        checked(signed(), nonces=nonces, now=NOW + WINDOW)
    checked(signed(nonce="another-nonce-here"), nonces=nonces)
    with pytest.raises(BadSignature, match="Too many"):
        checked(signed(nonce="a-third-nonce-here"), nonces=nonces)
    later = NOW + 2 * WINDOW + 1
    assert checked(signed(nonce="a-third-nonce-here", ts=int(later)), nonces=nonces, now=later)


def test_an_answer_answers_its_request() -> None:
    """It bears the request's nonce and its own status; a request given back is no answer."""
    answer = signed(method="200")
    assert checked(answer, method="200", nonce="n0nce-1234567890")
    with pytest.raises(BadSignature, match="another request"):
        checked(answer, method="200", nonce="another-nonce-here")
    with pytest.raises(BadSignature):
        checked(signed(), method="200", nonce="n0nce-1234567890")
