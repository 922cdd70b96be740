"""Both signatures of the wire, made and checked: whatever is off by a bit is refused, and why is told to no stranger."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from durable.runners.signing import (
    Key,
    SignatureRefused,
    check,
    check_plain,
    check_timestamp,
    fingerprint,
    sign,
    sign_plain,
)

NOW = 1_800_000_000.0
OLD, NEW = Key("old-secret", expires_at=NOW + 60), Key("new-secret")
BODY = b'{"a":1}'


def test_plain_signature_is_the_hmac_of_the_body() -> None:
    """The signature of section 4 is lowercase hex HMAC-SHA256 of the raw body."""
    assert sign_plain("k", BODY) == hmac.new(b"k", BODY, hashlib.sha256).hexdigest()
    assert check_plain([NEW], [sign_plain("new-secret", BODY)], BODY, now=NOW) == fingerprint("new-secret")


def test_ours_is_over_everything_that_counts() -> None:
    """`v1,ts,nonce,key-id,hex` over `v1.ts.nonce.key-id.METHOD.path.sha256(body)`."""
    header = sign("new-secret", "POST", "/x?y=1", BODY, now=NOW, nonce="n" * 16)
    version, ts, nonce, key_id, digits = header.split(",")
    assert (version, ts, nonce, key_id) == ("v1", "1800000000", "n" * 16, fingerprint("new-secret"))
    said = f"v1.{ts}.{nonce}.{key_id}.POST./x?y=1.{hashlib.sha256(BODY).hexdigest()}"
    assert digits == hmac.new(b"new-secret", said.encode(), hashlib.sha256).hexdigest()
    checked = check([NEW], [header], "POST", "/x?y=1", BODY, now=NOW + 299)
    assert checked.nonce == nonce
    assert checked.remember_until >= NOW + 299


@pytest.mark.parametrize("given", [[], [""], ["a", "b"]])
def test_no_signature_or_two(given: list[str]) -> None:
    """A01: none, an empty one, two headers."""
    for verify in (
        lambda: check_plain([NEW], given, BODY, now=NOW),
        lambda: check([NEW], given, "POST", "/", BODY, now=NOW),
    ):
        with pytest.raises(SignatureRefused):
            verify()


def test_every_bit_counts() -> None:
    """A02: a signature of another body, one flipped bit, capitals, a shorter one."""
    right = sign_plain("new-secret", BODY)
    flipped = ("1" if right[0] != "1" else "2") + right[1:]
    for wrong in (sign_plain("new-secret", b"other"), flipped, right.upper(), right[:-1], right + "0", f" {right}"):
        with pytest.raises(SignatureRefused):
            check_plain([NEW], [wrong], BODY, now=NOW)
    header = sign("new-secret", "POST", "/", BODY, now=NOW)
    for wrong in (header[:-1], header.upper(), header + "0", header.replace("v1", "v2"), f"{header},x"):
        with pytest.raises(SignatureRefused):
            check([NEW], [wrong], "POST", "/", BODY, now=NOW)


@pytest.mark.parametrize("ts", ["-301", "301", "nan", "-1", "1" + "0" * 30, " 1800000000", ""])
def test_times_that_do_not_count(ts: str) -> None:
    """A03: too old, from the future, and what is no time."""
    header = sign("new-secret", "POST", "/", BODY, now=NOW)
    if ts in ("-301", "301"):
        header = sign("new-secret", "POST", "/", BODY, now=NOW + int(ts))
    else:
        parts = header.split(",")
        parts[1] = ts
        header = ",".join(parts)
    with pytest.raises(SignatureRefused):
        check([NEW], [header], "POST", "/", BODY, now=NOW)


def test_another_path_or_method() -> None:
    """A05: a right signature that was moved."""
    header = sign("new-secret", "POST", "/a", BODY, now=NOW)
    for method, path in (("PUT", "/a"), ("POST", "/b"), ("POST", "/a?x")):
        with pytest.raises(SignatureRefused):
            check([NEW], [header], method, path, BODY, now=NOW)


def test_two_keys_live_and_the_receivers_clock_ends_one() -> None:
    """A06, A07: either key signs during a rotation; after its end the old one signs nothing, however its time is dated back."""
    for key in (OLD, NEW):
        header = sign(key.secret, "POST", "/", BODY, now=NOW)
        assert check([OLD, NEW], [header], "POST", "/", BODY, now=NOW).key_id == key.id
        assert check_plain([OLD, NEW], [sign_plain(key.secret, BODY)], BODY, now=NOW) == key.id
    back_dated = sign(OLD.secret, "POST", "/", BODY, now=NOW)
    with pytest.raises(SignatureRefused):
        check([OLD, NEW], [back_dated], "POST", "/", BODY, now=NOW + 61)
    with pytest.raises(SignatureRefused):
        check_plain([OLD, NEW], [sign_plain(OLD.secret, BODY)], BODY, now=NOW + 61)


def test_the_time_of_a_manifest_request() -> None:
    """Milliseconds within five minutes."""
    check_timestamp(str(int(NOW * 1_000) + 299_000), now=NOW)
    for wrong in (None, "", "nan", str(int(NOW * 1_000) + 301_000), "1e9", "-1"):
        with pytest.raises(SignatureRefused):
            check_timestamp(wrong, now=NOW)
