"""What goes to a terminal is text and nothing else; times and JSON read as people and programs expect."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durable.cli import text

SECOND = 1_000_000


def test_no_steering_character_passes() -> None:
    """Of all of Unicode, no control, format, surrogate or line-separating character passes, joiners of scripts excepted."""
    joiners = {"\u200c", "\u200d"}
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        kind = unicodedata.category(char)
        if (
            kind in ("Cc", "Cs", "Zl", "Zp")
            or unicodedata.bidirectional(char) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        ) and char not in joiners:
            assert char not in text.safe(f"a{char}b"), hex(code)


@given(st.text())
def test_safe_text_is_printable_and_idempotent(value: str) -> None:
    """Whatever is given, what comes out is one line, and escaping it again changes nothing."""
    shown = text.safe(value)
    assert shown == text.safe(shown)
    assert len(shown.splitlines()) <= 1


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_is_safe_and_exact(value: object) -> None:
    """JSON output holds no character that steers a terminal, and reads back as what it was."""
    for indent in (None, 2):
        shown = text.to_json(value, indent=indent)
        assert shown.replace("\n", "") == text.safe(shown.replace("\n", ""))
        assert json.loads(shown) == value


def test_raw_payloads_keep_their_numbers() -> None:
    """A stored payload is passed on, not read and written: large and precise numbers stay as they are."""
    payload = b'{"n": 123456789012345678901234567890, "x": 1.10}'
    assert text.to_json({"p": text.raw(payload)}, indent=None) == '{"p":{"n":123456789012345678901234567890,"x":1.10}}'


@pytest.mark.parametrize("payload", [b"\xff\xfe", b"{", b"", b"[" * 5000])
def test_a_payload_that_is_no_json_is_told(payload: bytes) -> None:
    """Sealed or broken bytes are told by their size, and break neither text nor JSON output."""
    assert json.loads(text.to_json({"p": text.raw(payload)}))["p"].startswith("(not JSON: ")
    assert "not JSON" in text.pretty(payload)


def test_a_large_payload_is_told_by_its_size() -> None:
    """A preview never reads megabytes."""
    payload = b'"' + b"x" * 2_000_000 + b'"'
    assert text.preview(payload) == "(2.0 MB)"
    assert "2.0 MB" in text.pretty(payload)


@pytest.mark.parametrize(
    ("us", "shown"),
    [
        (900, "0.9 ms"),
        (12_345, "12 ms"),
        (1_234_000, "1.23 s"),
        (42 * SECOND, "42.0 s"),
        (61 * SECOND, "1 min 1 s"),
        (3600 * SECOND, "1 h"),
        (90_000 * SECOND, "1 d 1 h"),
    ],
)
def test_durations_show_what_matters(us: int, shown: str) -> None:
    """Two units at most."""
    assert text.span(us) == shown


def test_times_are_told_from_now() -> None:
    """Past, future and this very moment."""
    now = 1_700_000_000 * SECOND
    assert text.ago(now - 90 * SECOND, now) == "1 min ago"
    assert text.ago(now + 5 * SECOND, now) == "in 5 s"
    assert text.ago(now - 1, now) == "just now"
    assert text.iso(now + 5) == "2023-11-14T22:13:20.000005Z"


def test_a_password_is_not_shown() -> None:
    """A store's URL is shown without what would open it, wherever it stands."""
    assert text.shown_url("postgresql://ann:s3:cret@db.example/shop") == "postgresql://ann:***@db.example/shop"
    shown = text.shown_url("postgresql:///shop?user=ann&password=s3cret&port=1&sslpassword=x")
    assert shown == "postgresql:///shop?user=ann&password=***&port=1&sslpassword=***"
    for url in ("sqlite:///runs.db", "postgresql://ann@db.example:5432/shop", "postgresql://db.example:5432/a@b"):
        assert text.shown_url(url) == url
