"""The reference store: plain dicts, exact semantics, no durability. What the contract leaves to the reader, this package
decides, and the shared suite holds the others to it.

No operation awaits anything, so each is atomic; the lock is for `beat` and for engines on other threads. All time comes
from the given clock, so it runs under virtual time as well. `tables` has the data, `rows` what all others do to one row,
and the rest is one file for each part of the contract; `store` puts them together.
"""

from durable.store.memory.store import MemoryStore

__all__ = ["MemoryStore"]
