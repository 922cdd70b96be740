"""Workspaces: made and given keys by whoever has the admin token."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from durable.server.errors import ApiError
from durable.server.route import Answer, Call
from durable.server.views import iso
from durable.server.workspaces import Key, Workspace, split
from durable.store.records import DEFAULT_WORKSPACE

Environment = Literal["dev", "acc", "prod"]


class NewApp(Struct, frozen=True, rename="camel"):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    environment: Environment | None = None
    """Default: the setting env's."""
    app_url: Annotated[str, Meta(max_length=2_000)] | None = None


class AppKey(Struct, frozen=True, rename="camel"):
    """`id` and `appId` are the same: older clients read one, newer ones the other."""

    id: str
    app_id: str
    name: str
    environment: str
    signing_key: str
    key_id: str
    created: bool


class KeyView(Struct, frozen=True, rename="camel"):
    """A key, without its secret."""

    id: str
    role: str
    created_at: str
    ends_at: str | None


class WorkspaceView(Struct, frozen=True, rename="camel"):
    id: str
    app: str
    environment: str
    app_url: str | None
    created_at: str
    keys: list[KeyView]


class Rotation(Struct, frozen=True, rename="camel"):
    keep_ms: Annotated[int, Meta(ge=0, le=90 * 86_400_000)] | None = None
    """How long the key before stays good. Default: the setting rotation_ms."""


class NewKey(Struct, frozen=True, rename="camel"):
    """The only answer that has the key."""

    id: str
    key: str
    role: str


class AppView(Struct, frozen=True, rename="camel"):
    id: str
    name: str
    environment: str
    workflows: int


async def create_app(call: Call) -> Answer:
    """The workspace of this name and environment; the same again gives the same id and key."""
    body: NewApp = call.body
    environment = body.environment or call.service.settings.env
    if body.app_url is not None and not body.app_url.startswith(("http://", "https://")):
        raise ApiError(400, "bad_body", "An appUrl begins with http:// or https://.")
    found, created = await call.service.workspaces.provision(body.name, environment, body.app_url)
    if body.app_url is not None:
        call.service.discovery.provisioned(found.token, body.app_url)
    key = found.signing_key(call.engine.clock.now())
    return Answer(AppKey(found.token, found.token, found.app, found.environment, key.secret, key.id, created))


async def list_workspaces(call: Call) -> Answer:
    """All of them, their keys without the secrets."""
    now = call.engine.clock.now()
    return Answer([_view(one, now) for one in await call.service.workspaces.all()])


async def rotate(call: Call) -> Answer:
    """A new key beside the one there is, which ends after `keepMs`."""
    keep = call.body.keep_ms
    found = await call.service.workspaces.rotate(call.params["id"], None if keep is None else keep * 1_000)
    return Answer(_told(found.signing_key(call.engine.clock.now())))


async def add_reader(call: Call) -> Answer:
    """A key that may look and not touch."""
    return Answer(_told(await call.service.workspaces.add_reader(call.params["id"])))


async def end_key(call: Call) -> Answer:
    """This key counts no more, from now on."""
    await call.service.workspaces.end_key(call.params["id"], call.params["key"])
    return Answer(None, 204)


async def list_apps(call: Call) -> Answer:
    """The apps of the credential's workspace: that one; in development without a key, all that are in development here."""
    mine = call.principal.workspace
    catalog = call.engine.deps.catalog
    if mine is not None:
        return Answer([_app(call, mine)])
    tokens = {one.token for one in await call.service.workspaces.all()} | set(catalog.workspaces())
    return Answer(
        [_app(call, token) for token in sorted(tokens) if token == DEFAULT_WORKSPACE or split(token)[1] == "dev"]
    )


def _app(call: Call, token: str) -> AppView:
    count = len(call.engine.deps.catalog.of(token).workflows())
    return AppView(token, call.service.app_of(token), split(token)[1], count)


def _view(one: Workspace, now: int) -> WorkspaceView:
    keys = [
        KeyView(key.id, key.role, iso(key.created_at), iso(key.ends_at) if key.ends_at is not None else None)
        for key in one.live(now)
    ]
    return WorkspaceView(one.token, one.app, one.environment, one.app_url, iso(one.created_at), keys)


def _told(key: Key) -> NewKey:
    return NewKey(key.id, key.secret, key.role)
