"""Settings: one table, three sources, and a page that shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from durable.core.errors import DefinitionError
from durable.server.app import real_peer
from durable.server.errors import CODES
from durable.server.errors import reference as codes
from durable.server.settings import ServerSettings, load_settings, networks, reference, table
from tests.house.sources import ROOT, modules

PROMISED = {
    "PORT": 3030,
    "DATABASE_URL": None,
    "DURABLE_PG_DIR": ".durable/postgres",
    "DURABLE_WORKERS": 1_000,
    "DURABLE_LEASE_MS": 10_000,
    "DURABLE_MAX_ATTEMPTS": 3,
    "DURABLE_DRAIN_TIMEOUT_MS": 15_000,
    "DURABLE_ADMIN_TOKEN": None,
    "DURABLE_ENV": "dev",
    "DURABLE_PG_PORT": None,
}


def test_e11_the_promised_names() -> None:
    """E11: the variables that were promised are there, with their defaults."""
    found = {row.env: default for row, _, default in table().values()}
    assert PROMISED.items() <= found.items()
    assert len(found) == len(table())


def test_every_setting_is_on_the_page() -> None:
    """docs/service.md has the table as the code has it: every setting, its variable, its defaults."""
    assert reference() in (ROOT / "docs" / "service.md").read_text()


def test_every_code_is_on_the_page_and_is_used() -> None:
    """docs/service.md explains each code of the API's own; what the source says is in the table, or the product's."""
    assert codes() in (ROOT / "docs" / "service.md").read_text()
    source = "".join(path.read_text() for name, path in modules().items() if name.startswith("durable.server"))
    made = set(re.findall(r'(?:ApiError\(\s*\d+|ErrorBody\(|status_code),\s*"([a-z_]+)"', source))
    known = json.loads((ROOT / "protocol" / "errors.json").read_text())
    assert made - set(known) <= set(CODES)
    assert {code for code in CODES if source.count(f'"{code}"') < 2} == set()


def test_every_field_is_a_setting() -> None:
    """A field without a row cannot be set from outside, and there is none but what the command says itself."""
    assert set(ServerSettings.__struct_fields__) - set(table()) == {"given", "production"}


def test_file_then_environment_then_command_line(tmp_path: Path) -> None:
    """A file is overridden by the environment, and that by the command line; what nobody sets keeps its default."""
    path = tmp_path / "durable.toml"
    path.write_text('port = 1\nlease_ms = 2\nworkers = 3\nenv = "acc"\n')
    environ = {"DURABLE_CONFIG": str(path), "DURABLE_LEASE_MS": "20", "DURABLE_WORKERS": "30", "PORT": ""}
    found = load_settings({"workers": 300, "port": None}, environ=environ)
    assert (found.port, found.lease_ms, found.workers, found.env, found.max_attempts) == (1, 20, 300, "acc", 3)
    assert found.given == {"port", "lease_ms", "workers", "env"}


def test_production_has_other_defaults() -> None:
    """`durable serve` listens everywhere and is prod, unless told otherwise."""
    assert load_settings(environ={}, production=True).host == "0.0.0.0"
    assert load_settings(environ={"DURABLE_ENV": "acc"}, production=True).env == "acc"
    assert load_settings(environ={}).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"PORT": "abc"}, "PORT"),
        ({"PORT": "70000"}, "65535"),
        ({"DURABLE_LEASE_MS": "-1"}, "lease_ms"),
        ({"DURABLE_RATE": "nan"}, "rate"),
        ({"DURABLE_ENV": "staging"}, "dev, acc or prod"),
        ({"DURABLE_ADMIN_TOKEN": "hunter2"}, "16 characters"),
        ({"DURABLE_TRUSTED_PROXIES": "proxy.local"}, "trusted_proxies"),
        ({"DURABLE_CONFIG": "/nowhere/at/all.toml"}, "cannot be read"),
    ],
)
def test_what_cannot_be_is_a_sentence(environ: dict[str, str], says: str) -> None:
    """A setting that cannot be is named, with where it stands; a secret is not repeated."""
    with pytest.raises(DefinitionError, match=says) as raised:
        load_settings(environ=environ)
    assert "hunter2" not in str(raised.value)


def test_a_file_with_strangers(tmp_path: Path) -> None:
    """A misspelt name in the file is an error that lists the right ones; TOML that is none is one, too."""
    (tmp_path / "a.toml").write_text("prot = 1\n")
    with pytest.raises(DefinitionError, match="prot, which is no setting"):
        load_settings(environ={}, config=str(tmp_path / "a.toml"))
    (tmp_path / "b.toml").write_text("port = \n")
    with pytest.raises(DefinitionError, match="cannot be read"):
        load_settings(environ={}, config=str(tmp_path / "b.toml"))
    (tmp_path / "c.toml").write_text('port = "3030"\nlease_ms = true\n')
    with pytest.raises(DefinitionError, match="lease_ms"):
        load_settings(environ={}, config=str(tmp_path / "c.toml"))


def test_the_real_peer() -> None:
    """X-Forwarded-For counts only behind a proxy that is trusted, and of it only the last address that is none."""
    proxies = networks(ServerSettings(trusted_proxies="10.0.0.0/8, 192.0.2.1"))

    def peer(address: str, *forwarded: str) -> str:
        return real_peer(address, [(b"x-forwarded-for", one.encode()) for one in forwarded], proxies)

    assert peer("203.0.113.9", "198.51.100.1") == "203.0.113.9"
    assert peer("10.1.2.3", "198.51.100.1") == "198.51.100.1"
    assert peer("10.1.2.3", "1.1.1.1, 198.51.100.1, 10.9.9.9") == "198.51.100.1"
    assert peer("10.1.2.3", "1.1.1.1", "198.51.100.1, 192.0.2.1") == "198.51.100.1"
    assert peer("10.1.2.3") == "10.1.2.3"
    assert real_peer("10.1.2.3", [(b"x-forwarded-for", b"1.1.1.1")], ()) == "10.1.2.3"
