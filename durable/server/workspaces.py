"""Workspaces (an app in an environment) and their keys, kept as items. Making one is idempotent; after a rotation two keys
live."""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from typing import Literal

import msgspec
from msgspec import Struct

from durable.engine.engine import WorkflowEngine
from durable.protocol.signature import fingerprint
from durable.server.errors import ApiError
from durable.store.items import Item, ItemKey, ItemQuery, NewItem
from durable.store.records import DEFAULT_WORKSPACE

KIND = "workspace"
ENVIRONMENTS = ("dev", "acc", "prod")
REMEMBERED = 10_000
"""Workspaces kept in memory, unknown ones among them."""
FRESH = 2.0
"""Seconds for which what was read is believed: so long another node's rotation may take to be seen here."""
_APP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Role = Literal["read", "full"]


class Key(Struct, frozen=True, rename="camel"):
    """`secret` is the whole key, since signatures need it. `ends_at`: µs by the store's clock; None: it stays."""

    id: str
    secret: str
    role: Role
    created_at: int
    ends_at: int | None = None


class Workspace(Struct, frozen=True, rename="camel"):
    """What the item says."""

    app: str
    environment: str
    keys: tuple[Key, ...]
    created_at: int
    app_url: str | None = None

    @property
    def token(self) -> str:
        return f"{self.app}.{self.environment}"

    def live(self, now: int) -> list[Key]:
        return [key for key in self.keys if key.ends_at is None or now < key.ends_at]

    def signing_key(self, now: int) -> Key:
        """The newest that may do everything: what we sign with, and tell."""
        return max((key for key in self.live(now) if key.role == "full"), key=lambda key: key.created_at)


def split(token: str) -> tuple[str, str]:
    """(app, environment) of a workspace; the engine's own is `default` in dev."""
    app, _, environment = token.rpartition(".")
    return (app, environment) if environment in ENVIRONMENTS and app else (token, "dev")


def check_app(name: str) -> str:
    """Raises ApiError for what cannot be an app's name."""
    if not _APP.fullmatch(name) or name == DEFAULT_WORKSPACE:
        raise ApiError(
            400,
            "bad_body",
            "An app's name is 1 to 64 letters, digits, dots, dashes and underscores, and not `default`.",
        )
    return name


def workspace_of_key(key: str) -> str | None:
    """`dk_<workspace>_<secret>` → workspace; None for what is no key."""
    if not key.startswith("dk_") or len(key) > 300:
        return None
    workspace, _, secret = key[3:].rpartition("_")
    return workspace if workspace and secret else None


class Workspaces:
    """The directory, over the store, with a short memory."""

    def __init__(self, engine: WorkflowEngine, rotation_us: int) -> None:
        self._engine = engine
        self._rotation = rotation_us
        self._known: OrderedDict[str, tuple[float, Workspace | None]] = OrderedDict()

    @property
    def now(self) -> int:
        return self._engine.clock.now()

    async def find(self, token: str) -> Workspace | None:
        """The workspace of this token, as it was at most `FRESH` seconds ago."""
        monotonic = self._engine.clock.monotonic()
        known = self._known.get(token)
        if known is not None and monotonic - known[0] < FRESH:
            return known[1]
        found = await self._read(token)
        self._remember(token, found[0] if found else None)
        return found[0] if found else None

    async def all(self) -> list[Workspace]:
        """Every workspace there is, by token."""
        found: list[Workspace] = []
        after: ItemKey | None = None
        while True:
            page = await self._engine.deps.store.list_items(ItemQuery(KIND, after=after, limit=500))
            found += [_decode(item) for item in page.items]
            if len(page.items) < 500:
                return sorted(found, key=lambda one: one.token)
            last = page.items[-1]
            after = ItemKey(last.workspace, last.kind, last.id)

    async def provision(self, app: str, environment: str, app_url: str | None = None) -> tuple[Workspace, bool]:
        """The workspace of this app and environment, made if there is none: (it, whether it is new)."""
        token = f"{check_app(app)}.{environment}"
        for _ in range(10):
            found = await self._read(token)
            if found is None:
                now = self.now
                new = Workspace(app, environment, (self._new_key(token, "full", now),), now, app_url)
                if await self._write(new, 0):
                    return new, True
                continue
            old, version = found
            now = self.now
            keyless = not any(key.role == "full" for key in old.live(now))
            if not keyless and app_url in (None, old.app_url):
                return old, False
            keys = (*old.keys, self._new_key(token, "full", now)) if keyless else old.keys
            changed = msgspec.structs.replace(old, keys=keys, app_url=app_url or old.app_url)
            if await self._write(changed, version):
                return changed, False
        raise _busy()

    async def adopt(self, app: str, app_url: str, secret: str | None) -> Workspace:
        """The workspace, in dev, of an app that was there before this service: with the key it has, or with none. One that
        is here already keeps its keys, too. Raises ApiError."""
        token = f"{check_app(app)}.dev"
        for _ in range(10):
            found = await self._read(token)
            now = self.now
            old, version = found or (Workspace(app, "dev", (), now), 0)
            keys = old.keys
            if secret is not None and secret not in [key.secret for key in keys]:
                keys = (*keys, Key(fingerprint(secret), secret, "full", now))
            new = msgspec.structs.replace(old, keys=keys, app_url=app_url)
            if new == old or await self._write(new, version):
                return new
        raise _busy()

    async def set_url(self, token: str, url: str) -> None:
        """Where the workspace's app is. Raises ApiError: there is no such workspace."""
        for _ in range(10):
            old, version = await self._must_read(token)
            if old.app_url == url or await self._write(msgspec.structs.replace(old, app_url=url), version):
                return
        raise _busy()

    async def rotate(self, token: str, keep_us: int | None = None) -> Workspace:
        """A new key beside the newest one, which ends after `keep_us`; those older end now. Raises ApiError."""
        for _ in range(10):
            old, version = await self._must_read(token)
            now = self.now
            newest = old.signing_key(now)
            until = now + (self._rotation if keep_us is None else keep_us)
            kept = [
                msgspec.structs.replace(key, ends_at=min(until, key.ends_at or until)) if key is newest else key
                for key in old.live(now)
                if key is newest or key.role == "read"
            ]
            new = msgspec.structs.replace(old, keys=(*kept, self._new_key(token, "full", now)))
            if await self._write(new, version):
                return new
        raise _busy()

    async def add_reader(self, token: str) -> Key:
        """A key that may look and not touch. Raises ApiError."""
        for _ in range(10):
            old, version = await self._must_read(token)
            now = self.now
            if sum(key.role == "read" for key in old.live(now)) >= 20:
                raise ApiError(409, "conflict", "A workspace has at most 20 read-only keys. End one first.")
            key = self._new_key(token, "read", now)
            if await self._write(msgspec.structs.replace(old, keys=(*old.live(now), key)), version):
                return key
        raise _busy()

    async def end_key(self, token: str, key_id: str) -> None:
        """This key counts no more, from now on. Raises ApiError: there is none, or it is the last full one."""
        for _ in range(10):
            old, version = await self._must_read(token)
            now = self.now
            left = tuple(key for key in old.live(now) if key.id != key_id)
            if len(left) == len(old.live(now)):
                raise ApiError(404, "not_found", f"Workspace {token} has no live key {key_id}.")
            if not any(key.role == "full" and key.ends_at is None for key in left):
                raise ApiError(409, "conflict", "That is the last key of the workspace. Rotate it instead.")
            if await self._write(msgspec.structs.replace(old, keys=left), version):
                return
        raise _busy()

    async def first_time(self, token: str, key_id: str, nonce: str, seconds: int) -> bool:
        """Whether this nonce has not been used; from now on it has."""
        item = NewItem(token, "nonce", f"{key_id}:{nonce}", b"", expires_in=seconds * 1_000_000, expected=0)
        return (await self._engine.deps.store.put_items([item]))[0].done

    async def _must_read(self, token: str) -> tuple[Workspace, int]:
        found = await self._read(token)
        if found is None:
            raise ApiError(404, "not_found", "There is no such workspace. POST /api/apps makes one.")
        return found

    async def _read(self, token: str) -> tuple[Workspace, int] | None:
        item = (await self._engine.deps.store.get_items([ItemKey(token, KIND, token)]))[0]
        return None if item is None else (_decode(item), item.version)

    async def _write(self, workspace: Workspace, expected: int) -> bool:
        token = workspace.token
        item = NewItem(token, KIND, token, msgspec.json.encode(workspace), expected=expected)
        done = (await self._engine.deps.store.put_items([item]))[0].done
        self._known.pop(token, None)
        return done

    def _remember(self, token: str, found: Workspace | None) -> None:
        self._known[token] = (self._engine.clock.monotonic(), found)
        self._known.move_to_end(token)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _new_key(self, token: str, role: Role, now: int) -> Key:
        secret = f"dk_{token}_{secrets.token_hex(24)}"
        return Key(fingerprint(secret), secret, role, now)


def _decode(item: Item) -> Workspace:
    return msgspec.json.decode(item.data, type=Workspace)


def _busy() -> ApiError:
    return ApiError(409, "conflict", "Somebody else is changing this workspace. Try again.", retry_after=1)
