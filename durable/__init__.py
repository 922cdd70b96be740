"""Workflows that survive crashes: plain async code, one journal, steps carried to workers in any language."""

__all__: list[str] = []
