"""Both signatures of the wire, made and checked: what holds, and every way in which one does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from durable.protocol.signature import (
    WINDOW,
    BadSignature,
    Nonces,
    body_signature,
    check,
    check_body,
    fingerprint,
    is_plain,
    sign,
)

VECTORS = Path(__file__).resolve().parents[2] / "protocol" / "vectors"
OURS = json.loads((VECTORS / "signature.json").read_text())["signatures"]
PLAIN = json.loads((VECTORS / "functions" / "signature.json").read_text())["signatures"]
KEY, OTHER, NOW, BODY = "dk_shop.dev_secret", "dk_shop.dev_another", 1_767_225_600.0, b'{"a":1}'
NONCE = "n0nce-1234567890"


def signed(**changes: Any) -> str:
    given = {"method": "POST", "path": "/invoke", "body": BODY, "ts": int(NOW), "nonce": NONCE} | changes
    key = given.pop("key", KEY)
    return sign(key, **given)


def checked(*headers: str, **changes: Any) -> Any:
    given: dict[str, Any] = {"method": "POST", "path": "/invoke", "body": BODY, "now": NOW} | changes
    keys = given.pop("keys", [KEY])
    return check(headers, keys, **given)


@pytest.mark.parametrize("vector", OURS, ids=lambda vector: vector["name"])
def test_golden_signatures_of_ours(vector: dict[str, Any]) -> None:
    """Every language signs the same request the same way."""
    key, method, path, body = vector["key"], vector["method"], vector["path"], vector["body"].encode()
    assert sign(key, method, path, body, ts=vector["ts"], nonce=vector["nonce"]) == vector["header"]
    assert check([vector["header"]], [key], method, path, body, now=vector["ts"]).nonce == vector["nonce"]


@pytest.mark.parametrize("vector", PLAIN, ids=lambda vector: vector["name"])
def test_golden_plain_signatures(vector: dict[str, Any]) -> None:
    """Lowercase hex HMAC-SHA256 of the raw body, in every language."""
    body = vector["body"].encode()
    assert body_signature(vector["key"], body) == vector["header"]
    assert check_body([vector["header"]], [OTHER, vector["key"]], body) == vector["key"]


@pytest.mark.parametrize("given", [[], [""], [body_signature(KEY, BODY)] * 2, [signed()] * 2], ids=len)
def test_no_signature_or_two(given: list[str]) -> None:
    """A01: none, an empty one, two headers."""
    assert not is_plain(given)
    with pytest.raises(BadSignature):
        check_body(given, [KEY], BODY)
    with pytest.raises(BadSignature):
        checked(*given)


def test_every_bit_counts() -> None:
    """A02: a signature of another body, one flipped bit, capitals, shorter, longer, another version, of the other form."""
    right = body_signature(KEY, BODY)
    flipped = ("1" if right[0] != "1" else "2") + right[1:]
    for wrong in (
        body_signature(KEY, b"other"),
        flipped,
        right.upper(),
        right[:-1],
        right + "0",
        f" {right}",
        signed(),
    ):
        with pytest.raises(BadSignature):
            check_body([wrong], [KEY], BODY)
    good = signed()
    flipped = good[:-1] + ("0" if good[-1] != "0" else "1")
    for wrong in (good[:-1], good.upper(), flipped, good + "0", "v2" + good[2:], f"{good},x", right):
        with pytest.raises(BadSignature):
            checked(wrong)


@pytest.mark.parametrize(
    "changes",
    [{"body": b'{"a":2}'}, {"path": "/invoke?x=1"}, {"method": "GET"}, {"keys": [OTHER]}],
    ids=["body", "path", "method", "key"],
)
def test_a_signature_is_of_one_request_only(changes: dict[str, Any]) -> None:
    """A02, A05: moved to another body, path, method or key it does not hold."""
    assert checked(signed()).key == KEY
    with pytest.raises(BadSignature):
        checked(signed(), **changes)


def test_a_key_is_named_truly() -> None:
    """A signature that is right and names another key is refused: what is logged by the name would be a lie."""
    head, _, digest = signed().rpartition(",")
    with pytest.raises(BadSignature):
        checked(f"{head.rpartition(',')[0]},{fingerprint(OTHER)},{digest}", keys=[KEY, OTHER])


@pytest.mark.parametrize("off", [-WINDOW - 1, WINDOW + 1])
def test_old_and_early_signatures_are_refused(off: float) -> None:
    """A03: five minutes either way by the receiver's clock."""
    assert checked(signed(), now=NOW + WINDOW - 1)
    with pytest.raises(BadSignature, match="clocks"):
        checked(signed(), now=NOW + off)


@pytest.mark.parametrize("ts", ["nan", "-1", "1" + "0" * 30, f" {int(NOW)}", ""])
def test_what_is_no_time(ts: str) -> None:
    """A03: what is no time is no signature."""
    version, _, *rest = signed().split(",")
    with pytest.raises(BadSignature):
        checked(",".join([version, ts, *rest]))


def test_either_of_two_keys_signs() -> None:
    """A06: while a key is replaced either signs, and it is told which has."""
    for key in (KEY, OTHER):
        assert checked(signed(key=key), keys=[KEY, OTHER]).key == key
        assert check_body([body_signature(key, BODY)], [KEY, OTHER], BODY) == key


def test_a_nonce_counts_once() -> None:
    """A04: the same request again is refused for as long as its signature could hold, and forgotten afterwards."""
    nonces = Nonces(limit=2)
    nonces.use("one", NOW)
    with pytest.raises(BadSignature, match="used before"):
        nonces.use("one", NOW + 2 * WINDOW - 1)
    nonces.use("two", NOW)
    with pytest.raises(BadSignature, match="Too many"):
        nonces.use("three", NOW)
    nonces.use("one", NOW + 2 * WINDOW + 1)


def test_an_answer_answers_its_request() -> None:
    """It bears the request's nonce and its own status; a request given back is no answer."""
    answer = signed(method="200")
    assert checked(answer, method="200", nonce=NONCE)
    with pytest.raises(BadSignature, match="another request"):
        checked(answer, method="200", nonce="another-nonce-here")
    with pytest.raises(BadSignature):
        checked(signed(), method="200", nonce=NONCE)
