"""The door for ids and randomness. Production draws from the system; a simulation hands in a seeded source."""

from __future__ import annotations

import random
from typing import Protocol

import uuid_utils


class Ids(Protocol):
    """Makes ids and random numbers."""

    def run_id(self) -> str:
        """A new run id: a uuid7, so ids sort by time."""
        ...

    def unique(self) -> str:
        """A short id nobody else has: commit ids, incarnations, message ids."""
        ...

    def random(self) -> float:
        """Uniform in [0, 1): jitter."""
        ...


class SystemIds:
    """uuid7 and the system's randomness."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def run_id(self) -> str:
        return str(uuid_utils.uuid7())

    def unique(self) -> str:
        return uuid_utils.uuid4().hex

    def random(self) -> float:
        return self._random.random()


class SeededIds:
    """The same door over a seed: what the simulation and tests use."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)

    def run_id(self) -> str:
        return f"run-{self._random.getrandbits(64):016x}"

    def unique(self) -> str:
        return f"{self._random.getrandbits(64):016x}"

    def random(self) -> float:
        return self._random.random()
