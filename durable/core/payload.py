"""Values to JSON bytes and back, once. The annotation decides what comes back.

Decides which values may be stored, what each becomes as JSON, and every bound on it: size, depth, keys, text that
wedges stores. Called wherever a value enters or leaves: ctx, steps, clients, workers, the HTTP edge. Never pickles,
never imports a model library by itself, never lets an error of a parser or of a foreign exception's `__str__` out.

The law: the live value is the replayed one. What a step returned is handed on as `through` gives it, which is
`decode(encode(value), annotation)`; so the first time and every replay see the same. Without an annotation (`Any`)
a value comes back as plain JSON: tuples and sets as lists, keys as text, datetimes, Decimals, UUIDs and bytes as text.
A subclass comes back as the class the annotation names. Time zones come back as their offset.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import inspect
import math
import re
import sys
import typing
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import TracebackType
from typing import Any

import msgspec

from durable.core.errors import (
    DurableError,
    ErrorData,
    NonRetryable,
    PayloadError,
    PayloadText,
    PayloadTooLarge,
    RetryAfter,
    StepFailed,
)

DEFAULT_LIMIT = 1 << 20
"""Bytes one payload may have, unless the engine says otherwise."""
MAX_DEPTH = 100
"""Levels of nesting. Far below where any parser gives up, so that what was written can be read from every stack."""
MAX_KEYS = 100_000
"""Object keys in one payload."""
MAX_MESSAGE = 4_000
MAX_STACK = 8_000
"""Characters kept of an error's message and stack."""
MAX_ERROR = 64 << 10
"""Bytes of an error in all, its details with it."""

Reader = Callable[[bytes], Any]


# Writing


def encode(value: Any, annotation: Any = Any, *, what: str, limit: int = DEFAULT_LIMIT) -> bytes:
    """The value as JSON bytes. `what` names it in errors: "the result of step charge".

    With an annotation, one that could never be read back is refused here, before anything is written.
    Raises PayloadError, PayloadTooLarge, PayloadText.
    """
    if annotation is not Any:
        decoder(annotation)
    try:
        data = _encode_json(value)
    except Exception as error:
        raise _unwritable(value, error, what) from error
    if b"\\" in data and _has_nul(data):
        raise PayloadText(_text_problem(what, _path(value, _is_nul_text), "a NUL character"))
    # msgspec writes NaN and infinity as null without a word; only a payload with a null can hide one.
    if b"null" in data and _has_nonfinite(value):
        raise PayloadError(
            f"{what}: {_path(value, _is_nonfinite)} is NaN or infinite, which JSON cannot carry. Send None or text."
        )
    if len(data) > limit or len(data) > MAX_DEPTH * 2:
        _check_bounds(data, what, limit)
    return data


def canonical(value: Any, *, what: str) -> bytes:
    """Bytes for comparing, never for storing: sets and keys sorted, so that every process writes the same.

    Plain `encode` writes a set of strings in the order of their hashes, which differs from process to process.
    """
    try:
        return _encode_sorted(value)
    except TypeError:
        return _resorted(encode(value, what=what, limit=sys.maxsize))  # keys that are no text, sets that do not sort
    except Exception as error:
        raise _unwritable(value, error, what) from error


def through(value: Any, annotation: Any, *, what: str, limit: int = DEFAULT_LIMIT) -> tuple[bytes, Any]:
    """The bytes to store and the value to go on with, which is what a replay will read from them."""
    read = decoder(annotation)  # one that can never be read back is refused before anything is written
    data = encode(value, what=what, limit=limit)
    try:
        return data, read(data)
    except PayloadError as error:
        raise PayloadError(f"{what}: {error}") from error


def check(data: bytes, *, what: str, limit: int = DEFAULT_LIMIT) -> None:
    """Refuse JSON bytes of somebody else's that could not be stored and read back. For edges and wires."""
    _check_bounds(data, what, limit)
    decode(data, Any, what=what)
    if b"\\" in data and _has_nul(data):
        raise PayloadText(_text_problem(what, "a text", "a NUL character"))


def fingerprint(*parts: bytes) -> str:
    """A short stable hash, 16 hex digits; ("ab", "c") differs from ("a", "bc")."""
    if len(parts) == 1:
        return hashlib.sha256(parts[0]).hexdigest()[:16]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()[:16]


# Reading


def decode(data: bytes, annotation: Any, *, what: str) -> Any:
    """The value as its annotation says. Raises PayloadError naming the place that does not fit."""
    try:
        return decoder(annotation)(data)
    except PayloadError as error:
        raise PayloadError(f"{what}: {error}") from error


def decoder(annotation: Any) -> Reader:
    """A reader for one annotation, made once. It raises PayloadError; so does asking for one that cannot be made."""
    try:
        return _cached_decoder(annotation)
    except TypeError:  # an annotation that does not hash
        return _build_decoder(annotation)


def _build_decoder(annotation: Any) -> Reader:
    read = _raw_reader(annotation)

    def reader(data: bytes) -> Any:
        try:
            return read(data)
        except RecursionError as error:
            raise PayloadError(f"nested deeper than {MAX_DEPTH} levels") from error
        except Exception as error:
            raise PayloadError(_describe_misfit(annotation, error)) from error

    return reader


_cached_decoder = lru_cache(maxsize=4096)(_build_decoder)


def _raw_reader(annotation: Any) -> Reader:
    if _is_model(annotation):
        return _read_model(annotation)
    try:
        reader = msgspec.json.Decoder(annotation, dec_hook=_read_foreign)
        stranger = _stranger(msgspec.inspect.type_info(annotation), set())
    except Exception as error:
        if _mentions_model(annotation):
            # Unions of models are beyond msgspec; whoever declared one has pydantic loaded.
            adapter = sys.modules["pydantic"].TypeAdapter(annotation)
            return typing.cast(Reader, adapter.validate_json)
        raise PayloadError(
            f"{_name(annotation)} cannot be read back from JSON: {error}. "
            "Give it a tag (msgspec tagged unions, a pydantic discriminator) or use a plainer type."
        ) from error
    if stranger is not None:
        raise PayloadError(
            f"{_name(annotation)} cannot be read back from JSON: nothing is known about {_name(stranger)}. "
            "Use a dataclass, msgspec Struct, pydantic model, TypedDict or plain JSON types, "
            "and carry an id or a path in place of an open thing."
        )
    return reader.decode


# Errors as data


def describe(error: BaseException) -> ErrorData:
    """An exception as it is stored and sent. Survives any exception, however broken."""
    cls = type(error)
    return ErrorData(
        message=_message(error),
        code=clean(str(error.code)[:200]) if isinstance(error, DurableError) else "error",
        type=clean(cls.__name__[:200]),
        retryable=not isinstance(error, NonRetryable),
        retry_after=_finite(error.seconds) if isinstance(error, RetryAfter) else None,
        stack=_stack(error),
    )


def encode_error(error: ErrorData) -> bytes:
    """An error as bytes. Never refuses one: an error that cannot be stored would wedge its run."""
    try:
        return encode(error, what="an error", limit=MAX_ERROR)
    except PayloadError:
        tidy = msgspec.structs.replace(
            error,
            message=clean(_bounded(error.message, MAX_MESSAGE)),
            code=clean(_bounded(error.code, 200)),
            type=clean(_bounded(error.type, 200)),
            retry_after=_finite(error.retry_after),
            stack=None if error.stack is None else clean(error.stack[-MAX_STACK:]),
        )
    try:
        return encode(tidy, what="an error", limit=MAX_ERROR)
    except PayloadError:
        return _encode_json(msgspec.structs.replace(tidy, details=None))


def decode_error(data: bytes) -> ErrorData:
    """The error back. Raises PayloadError."""
    return typing.cast(ErrorData, decode(data, ErrorData, what="an error"))


def clean(text: str) -> str:
    r"""Text that every store takes: NUL and lone surrogates become `\u0000`, `\udXXX`; `restore` undoes it exactly."""
    if "\0" not in text and text.isascii() and "\\u" not in text:
        return text
    return _UNSTORABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def restore(text: str) -> str:
    """What `clean` was given."""
    return _CLEANED.sub(lambda found: chr(int(found[1], 16)), text)


# A backslash is escaped too, but only where the text already looks like one of our escapes.
_ESCAPE = r"u(?:0000|005c|d[89a-f][0-9a-f]{2})"
_UNSTORABLE = re.compile(rf"[\x00\ud800-\udfff]|\\(?={_ESCAPE})")
_CLEANED = re.compile(r"\\u(0000|005c|d[89a-f][0-9a-f]{2})")


def _finite(seconds: Any) -> float | None:
    try:
        return max(0.0, float(seconds)) if math.isfinite(seconds) else None
    except Exception:
        return None


def _message(error: BaseException) -> str:
    try:
        return clean(_bounded(str(error), MAX_MESSAGE))
    except Exception as broken:
        return f"(its message could not be read: __str__ raised {clean(type(broken).__name__[:200])})"


def _stack(error: BaseException) -> str | None:
    """Where it came from: frames without source lines, so that telling costs no file access. The last ones count."""
    try:
        lines: list[str] = []
        seen: BaseException | None = error
        for _ in range(4):
            if seen is None:
                break
            if seen is not error:
                lines.append(f"after {type(seen).__name__}: {_message(seen)[:200]}")
            lines.extend(_frames(seen.__traceback__))
            if isinstance(seen, StepFailed) and seen.error is not None and seen.error.stack:
                lines.append(f"in step {seen.key}, {seen.error.type}:")
                lines.extend(seen.error.stack.splitlines())
            seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
        return clean(_bounded("\n".join(lines), MAX_STACK)) or None
    except Exception:
        return None


def _frames(trace: TracebackType | None) -> list[str]:
    lines = []
    while trace is not None:
        code = trace.tb_frame.f_code
        lines.append(f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}")
        trace = trace.tb_next
    return lines if len(lines) <= 20 else [*lines[:4], f"... {len(lines) - 20} more frames", *lines[-16:]]


def _bounded(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters in all)"


# Bounds on bytes


_FLATTEN = "Flatten it, or store it elsewhere and send its id."


def _check_bounds(data: bytes, what: str, limit: int) -> None:
    if len(data) > limit:
        raise PayloadTooLarge(
            f"{what} is {len(data)} bytes as JSON; the limit is {limit}. "
            "Store the data elsewhere (a bucket, a table, a file) and pass its id."
        )
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _too_deep(data):
        raise PayloadError(
            f"{what} is nested deeper than {MAX_DEPTH} levels. Flatten it, or store it elsewhere and send its id."
        )
    if len(data) > 4 * MAX_KEYS and (keys := _without_strings(data).count(b":")) > MAX_KEYS:
        raise PayloadTooLarge(f"{what} has {keys} keys; the limit is {MAX_KEYS}. Store it elsewhere and send its id.")


_FLAT = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b'[]{}"'))


def _without_strings(data: bytes) -> bytes:
    if b"\\" in data:
        data = data.replace(b"\\\\", b"--").replace(b'\\"', b"--")
    return b"".join(data.split(b'"')[::2])


def _too_deep(data: bytes) -> bool:
    """Peel innermost brackets off, one level a pass, at C speed; what is left after MAX_DEPTH passes is too deep."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"--").replace(b'\\"', b"--")
    brackets = b"".join(data.translate(_FLAT, _NO_BRACKETS).split(b'"')[::2])
    for left in range(MAX_DEPTH, 0, -1):
        if not brackets:
            return False
        if b"[" * (left + 1) in brackets:
            return True
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _has_nul(data: bytes) -> bool:
    r"""A `\u0000` that is an escape, and not the tail of an escaped backslash."""
    return b"\\u0000" in data and b"\\u0000" in data.replace(b"\\\\", b"--")


_NONFINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")


def _has_nonfinite(value: Any) -> bool:
    """MessagePack keeps what JSON loses, and is as fast; only a hit there is worth walking the value for."""
    try:
        if _NONFINITE.search(_encode_msgpack(value)) is None:
            return False
    except Exception:  # an integer beyond 64 bit
        pass
    return _find(value, _is_nonfinite) is not None


# Types that msgspec does not know


def _write_foreign(value: Any) -> Any:
    """msgspec's hook for a value it does not know."""
    if _is_model(type(value)):
        # round_trip leaves computed fields out, which the model would not take back.
        return value.model_dump(mode="json", by_alias=True, round_trip=True)
    # Subclasses of plain values (numpy's float64 is one) are written as what they are.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"nothing is known about {_name(type(value))}")


def _read_foreign(annotation: Any, value: Any) -> Any:
    """msgspec's hook for an annotation it does not know; `_stranger` has let only these two through."""
    return value if annotation is object else _read_model(annotation)(_encode_json(value))


def _read_model(model: Any) -> Reader:
    # By its JSON entrance: a strict model takes a datetime's text there, and only there.
    return typing.cast(Reader, model.model_validate_json)


def _is_model(annotation: Any) -> bool:
    """A pydantic model, by its looks, so that pydantic is not imported for whoever does not use it."""
    return (
        isinstance(annotation, type)
        and hasattr(annotation, "model_validate_json")
        and hasattr(annotation, "model_dump")
    )


def _mentions_model(annotation: Any) -> bool:
    return _is_model(annotation) or any(_mentions_model(part) for part in typing.get_args(annotation))


def _stranger(info: Any, seen: set[Any]) -> Any:
    """The first type within that nobody knows how to read, or None."""
    if isinstance(info, msgspec.inspect.CustomType):
        return None if info.cls is object or _is_model(info.cls) else info.cls
    if isinstance(info, tuple):
        return next((found for part in info if (found := _stranger(part, seen)) is not None), None)
    if not isinstance(info, (msgspec.inspect.Type, msgspec.inspect.Field)):
        return None
    if (cls := getattr(info, "cls", None)) is not None:
        if cls in seen:
            return None
        seen.add(cls)
    parts = tuple(getattr(info, name) for name in info.__struct_fields__ if name != "cls")
    return _stranger(parts, seen)


_encode_json = msgspec.json.Encoder(enc_hook=_write_foreign).encode
_encode_sorted = msgspec.json.Encoder(enc_hook=_write_foreign, order="deterministic").encode
_encode_msgpack = msgspec.msgpack.Encoder(enc_hook=_write_foreign).encode


def _resorted(data: bytes) -> bytes:
    """Arrays and keys sorted by their bytes: loses the order of lists, which is better than an order that changes."""

    def again(value: Any) -> Any:
        if isinstance(value, list):
            return sorted((again(item) for item in value), key=_encode_sorted)
        if isinstance(value, dict):
            return {key: again(item) for key, item in value.items()}
        return value

    return _encode_sorted(again(msgspec.json.decode(data)))


# Saying what is wrong: the slow path, walked only once something is


def _unwritable(value: Any, error: Exception, what: str) -> DurableError:
    if isinstance(error, DurableError):
        return error
    if isinstance(error, RecursionError):
        return PayloadError(f"{what} is nested deeper than {MAX_DEPTH} levels or contains itself. {_FLATTEN}")
    if isinstance(error, UnicodeEncodeError):
        return PayloadText(_text_problem(what, _path(value, _is_surrogate_text), "half a surrogate pair"))
    if isinstance(error, TypeError) and (found := _find(value, _is_unknown)) is not None:
        path, culprit = found
        if isinstance(culprit, asyncio.Future) or inspect.iscoroutine(culprit):
            return PayloadError(f"{what}: {path} was not awaited, so it is no value yet. Write `await` before it.")
        return PayloadError(
            f"{what}: {path} is a {_name(type(culprit))}, which cannot be written as JSON. Use a dataclass, "
            "msgspec Struct, pydantic model or plain JSON value; carry an id or a path in place of an open thing."
        )
    return PayloadError(f"{what} cannot be written as JSON: {clean(_bounded(str(error), MAX_MESSAGE))}")


def _text_problem(what: str, path: str, problem: str) -> str:
    return f"{what}: {path} contains {problem}, which stores cannot keep. Remove it, or send it as bytes (base64)."


def _describe_misfit(annotation: Any, error: Exception) -> str:
    name = _name(annotation)
    return f"not {'an' if name[0] in 'aeiou' else 'a'} {name}: {clean(_bounded(str(error), MAX_MESSAGE))}"


def _name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        module = annotation.__module__
        return annotation.__qualname__ if module == "builtins" else f"{module}.{annotation.__qualname__}"
    return str(annotation)


def _path(value: Any, wrong: Callable[[Any], bool]) -> str:
    found = _find(value, wrong)
    return found[0] if found is not None else "a value inside"


def _find(value: Any, wrong: Callable[[Any], bool]) -> tuple[str, Any] | None:
    """The first part that is `wrong`, with its path; bounded, since a value may contain itself."""
    stack: list[tuple[str, Any, int]] = [("$", value, 0)]
    for _ in range(1_000_000):
        if not stack:
            return None
        path, part, depth = stack.pop()
        if wrong(part):
            return path, part
        if depth < MAX_DEPTH:
            stack.extend((path + step, child, depth + 1) for step, child in reversed(list(_children(part))))
    return None


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            label = f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{_bounded(ascii(key), 40)}]"
            yield f"{label} (the key)", key
            yield label, item
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield f".{name}", getattr(value, name, None)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield f".{field.name}", getattr(value, field.name, None)
    elif _is_model(type(value)):
        for name, item in vars(value).items():
            yield f".{name}", item


def _is_nul_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" in value


def _is_surrogate_text(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_unknown(value: Any) -> bool:
    """Not writable though none of its parts is to blame."""
    if any(True for _ in _children(value)):
        return False
    try:
        _encode_json(value)
    except TypeError:
        return True
    except Exception:
        return False
    return False
