"""How a process is told to stop: the first SIGINT or SIGTERM drains it, the second ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

INTERRUPTED = 130
"""Exit code of a process that was stopped at once."""


@contextmanager
def stop_signals(draining: Callable[[], None], forced: Callable[[], None]) -> Iterator[asyncio.Event]:
    """Set at the first signal, after `draining`. At the second the process ends at once, after `forced`, with 130. At the
    end the signals are the caller's again."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    plain: dict[int, object] = {}

    def stop() -> None:
        # Whatever cannot be said, for instance because nobody reads the output any more, keeps nobody from stopping.
        if stopping.is_set():
            with suppress(Exception):
                forced()
                sys.stdout.flush()
            os._exit(INTERRUPTED)
        stopping.set()
        with suppress(Exception):
            draining()

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:  # Windows
            plain[number] = signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
    try:
        yield stopping
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):
                loop.remove_signal_handler(number)
        for known, before in plain.items():
            signal.signal(known, before)  # type: ignore[arg-type]
