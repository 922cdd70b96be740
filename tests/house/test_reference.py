"""The tables of docs/ that people look things up in are complete, and say what the code says."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from durable import Durable
from durable.core import errors
from durable.core.errors import DurableError
from durable.engine.deps import DURATIONS, Settings
from durable.store.memory import MemoryStore
from durable.store.sqlite import SqliteStore
from durable.transports.bullmq import BullMQTransport
from durable.transports.db import DbTransport
from durable.transports.rabbitmq import RabbitMqTransport
from durable.transports.redis import RedisTransport
from durable.transports.sqs import SqsTransport
from tests.house.sources import ROOT, modules

TRANSPORTS: dict[str, Callable[..., object]] = {
    "bullmq": BullMQTransport,
    "db": DbTransport,
    "rabbitmq": RabbitMqTransport,
    "redis": RedisTransport,
    "sqs": SqsTransport,
}
SHARED = [
    *("prefix", "namespace"),
    *("lease", "visibility", "lock"),
    *("max_deliveries", "max_receives", "max_stalled", "delivery_limit"),
    *("heartbeat_interval", "timeout", "max_message", "signed"),
]
"""What several transports have, or the broker's own word for it, in the order in which all of them have it."""
UNITS = {"s": 1, "MiB": 1 << 20}
OPERATE = (ROOT / "docs" / "operate.md").read_text()
SERVICE = (ROOT / "docs" / "service.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
CODES: dict[str, str] = json.loads((ROOT / "protocol" / "errors.json").read_text())
LITERAL = re.compile(r'\bcode="([a-z_]+)"')


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The table whose first heading is this one: what stands in backticks in the first column → the other cells."""
    _, _, rest = page.partition(f"| {heading} |")
    table = rest.partition("\n\n")[0].splitlines()[2:]
    found = {}
    for line in table:
        first, *others = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", first), others)
    return found


def codes_in(files: list[Path]) -> set[str]:
    return {code for path in files for code in LITERAL.findall(path.read_text())}


def test_every_setting_is_in_the_table() -> None:
    """The operator's table has every argument of `Durable` and every field of `Settings`, and no other."""
    arguments = {name for name in inspect.signature(Durable).parameters if name != "settings"}
    fields = set(Settings.__struct_fields__) - {"execute"}  # `worker`, as the argument says
    assert set(rows(OPERATE, "setting")) == arguments | fields


def test_defaults_in_the_table_are_the_code_s() -> None:
    """A number, flag or name that the table gives as a default is the default."""
    table = rows(OPERATE, "setting")
    for field in msgspec.structs.fields(Settings):
        if isinstance(field.default, bool | int | float | str) and field.name in table:
            shown = table[field.name][0].strip("`")
            if field.name in DURATIONS:
                number, unit = shown.split()
                assert float(number) * {"s": 1, "ms": 1e-3}[unit] == field.default, field.name
            else:
                assert shown == str(field.default), field.name


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_every_option_of_a_transport_is_in_its_table(kind: str) -> None:
    """A transport's page has every argument of its constructor, in its order and with its default, and no other."""
    parameters = inspect.signature(TRANSPORTS[kind]).parameters
    table = rows((ROOT / "docs" / "transports" / f"{kind}.md").read_text(), "option")
    assert list(table) == list(parameters)
    for name, parameter in parameters.items():
        shown, default = table[name][0].strip("`"), parameter.default
        if isinstance(default, bool):
            assert shown == ("on" if default else "off"), name
        elif isinstance(default, int | float):
            number, _, unit = shown.partition(" ")
            assert float(number) * UNITS.get(unit, 1) == default, name
        elif isinstance(default, str):
            assert shown.split("`")[0] == default, name


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_transports_have_what_they_share_in_one_order(kind: str) -> None:
    """Behind the address, what several transports have comes first, in the same order; then what is one's own."""
    names = [name for name in inspect.signature(TRANSPORTS[kind]).parameters if not name.endswith(("url", "region"))]
    shared = [name for name in SHARED if name in names]
    assert names[: len(shared)] == shared


def test_every_environment_variable_is_in_the_table() -> None:
    """The operator's table and that of the service's settings have every DURABLE_ variable that the code, dev.py and the
    tests read, and no other."""
    files = [*modules("durable").values(), *modules("tests").values(), ROOT / "dev.py"]
    read = {name for path in files for name in re.findall(r'"(DURABLE_[A-Z_]+)"', path.read_text())}
    settings = set(re.findall(r"\| `(DURABLE_[A-Z_]+)` \|", SERVICE))
    assert set(rows(OPERATE, "environment variable")) | settings == read


def test_durability_sentences_are_the_stores() -> None:
    """What the operator's page says that a store survives is what the store says of itself."""
    stores = [
        MemoryStore(),
        SqliteStore("sqlite:///runs.db"),
        SqliteStore("sqlite:///runs.db?synchronous=normal", allow_weak_durability=True),
    ]
    assert [store.capabilities.durability for store in stores if store.capabilities.durability not in OPERATE] == []


def test_every_error_code_is_explained() -> None:
    """The table of errors has every code of `protocol/errors.json`, in its words, with its class; and no other."""
    classes = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, DurableError)]
    table = rows(ERRORS, "code")
    assert list(table) == list(CODES)
    for code, (name, means, remedy) in table.items():
        borne = [cls.__name__ for cls in classes if vars(cls).get("code") == code]
        assert (name.strip("`"), means) == ("".join(borne), CODES[code]), code
        assert remedy, code


def test_codes_in_the_source_are_known() -> None:
    """A code that is written where an error is made stands in a table: the command line's in its own."""
    cli = [path for name, path in modules().items() if name.startswith("durable.cli")]
    rest = [path for path in modules().values() if path not in cli]
    assert codes_in(rest) - set(CODES) == set()
    own = rows(ERRORS.partition("## Of the command line")[2], "code")
    assert codes_in(cli) - set(CODES) == set(own)
