"""The engine's side of functions that live in apps is tested hot and cold, on every store."""

from __future__ import annotations

from tests.engine.conftest import database_url, residency, store_kind, world

__all__ = ["database_url", "residency", "store_kind", "world"]
