"""A worker in a process of its own, for tests: serves the suite's step, and writes a line for each body that begins.

python db_worker.py URL LEASE LOG echo|hang
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from durable.protocol.messages import StepResult, Task
from durable.testing.suites.transport import ECHO, answer
from durable.transports.db import DbTransport


async def main(url: str, lease: float, lines: Path, kind: str) -> None:
    async def handle(task: Task) -> StepResult:
        with lines.open("a") as file:
            file.write(f"{task.id} {os.getpid()}\n")
        await asyncio.sleep(0 if kind == "echo" else 3600)
        return answer(task)

    worker = DbTransport(url, lease=lease, poll=0.05)
    await worker.start()
    await worker.serve([ECHO], handle, concurrency=4)
    with lines.open("a") as file:
        file.write(f"ready {os.getpid()}\n")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]))
