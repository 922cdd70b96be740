"""Modules and injection, on dependency-injector: what an app is made of, and one object that runs it.

from durable.module import Application, DurableModule, module
"""

from __future__ import annotations

from durable.module.application import Application, create
from durable.module.decorators import DynamicModule, Inject, Provider, injectable, module, provide
from durable.module.durable_module import DurableModule, DurableOptions

__all__ = [
    "Application",
    "DurableModule",
    "DurableOptions",
    "DynamicModule",
    "Inject",
    "Provider",
    "create",
    "injectable",
    "module",
    "provide",
]
