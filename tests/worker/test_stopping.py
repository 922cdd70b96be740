"""A process stops when it is told to, whether or not it can say so."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, sys
from durable.worker.stopping import stop_signals

def say():
    raise BrokenPipeError("nobody reads")

async def main():
    with stop_signals(say, say) as stopping:
        print("ready", flush=True)
        await stopping.wait()
        print("draining", flush=True)
        if sys.argv[1] == "twice":
            await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize(("how", "code"), [("once", 0), ("twice", 130)])
def test_a_process_whose_words_go_nowhere_stops_all_the_same(how: str, code: int) -> None:
    """The first signal drains and the second ends it at once, though saying so raises."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT, how], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "draining\n"
        if how == "twice":
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == code
