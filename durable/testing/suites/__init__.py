"""One suite per contract. Subclass it, build your adapter, run pytest (with pytest-asyncio in auto mode)."""
