"""Who asks, and for which workspace. The credential alone says it: a bearer key, a signature, the admin token; in
`durable dev` on loopback nothing at all.

Comparisons take the same time whatever is wrong, refusals say the same, and wrong credentials are counted by the real
peer, so that whoever guesses is held up and nobody else is.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable
from typing import Literal

from msgspec import Struct

from durable.protocol import signature
from durable.server.errors import ApiError
from durable.server.limits import Bucket
from durable.server.settings import ServerSettings
from durable.server.workspaces import Key, Workspaces, split, workspace_of_key
from durable.store.records import DEFAULT_WORKSPACE

Auth = Literal["none", "key", "app", "admin", "node", "token"]
"""none: anybody. key: a bearer key or a v1 signature. app: the same, and the plain signature of apps in any language; the
answer is signed, too. admin: the admin token. node: another engine, which the handler itself makes sure of. token: whoever
knows the address, likewise."""
Role = Literal["read", "full", "admin"]

_NOBODYS = secrets.token_hex(32)
"""Compared with where there is no key, so that an unknown workspace takes as long as a wrong key. Nobody knows it."""
ALLOWED: dict[Role, frozenset[Role]] = {
    "read": frozenset({"read"}),
    "full": frozenset({"read", "full"}),
    "admin": frozenset({"read", "full", "admin"}),
}
"""What a role may do."""


class Principal(Struct, frozen=True):
    """Who it is. `workspace` None: nobody in particular, in development here; then each request names an app."""

    workspace: str | None
    role: Role
    id: str
    """For counting."""
    key: str | None = None
    """What the answer is signed with."""


class Request(Struct, frozen=True):
    """What authentication looks at."""

    method: str
    path: str
    """As sent, with its query."""
    headers: list[tuple[bytes, bytes]]
    peer: str
    body: Callable[[], Awaitable[bytes]]

    def header(self, name: bytes) -> list[str]:
        return [value.decode("latin-1") for key, value in self.headers if key == name]


class Authenticator:
    """Turns a request's credential into a Principal, or into a refusal."""

    def __init__(self, workspaces: Workspaces, settings: ServerSettings, monotonic: Callable[[], float]) -> None:
        self._workspaces = workspaces
        self._settings = settings
        self._refused = Bucket(settings.refused_rate, settings.refused_burst, monotonic)
        self._open = not settings.production and settings.env == "dev" and is_loopback(settings.host)

    async def __call__(self, auth: Auth, role: Role, request: Request) -> Principal:
        """Raises ApiError: 401, 403, 409 for a signature that was used before, 429 for a peer that guesses."""
        wait = self._refused.wait(request.peer)
        if wait > 0:
            raise ApiError(429, "rate_limited", "Too many wrong credentials from here. Wait.", retry_after=wait)
        try:
            principal = await self._who(auth, request)
        except ApiError as error:
            if error.status == 401:
                self._refused.take(request.peer)
            raise
        if role not in ALLOWED[principal.role]:
            raise ApiError(403, "forbidden", "This key may look and not touch. Use a key of role full.")
        return principal

    async def _who(self, auth: Auth, request: Request) -> Principal:
        bearer = request.header(b"authorization")
        signatures = request.header(signature.HEADER.encode())
        if len(bearer) > 1 or len(signatures) > 1 or (bearer and signatures):
            raise unauthorized()
        if bearer:
            return await self._bearer(auth, bearer[0])
        if signatures and auth != "admin":
            return await self._signed(auth, request, signatures[0])
        if signatures or not self.open_to(request):
            raise unauthorized()
        if auth == "admin" and self._settings.admin_token is not None:
            raise unauthorized()
        return Principal(None, "admin", f"peer:{request.peer}")

    def open_to(self, request: Request) -> bool:
        """Whether this request needs no credential: development, from this machine, and not from a page of elsewhere that a
        browser here has open (its Origin, or a name that was bound to this address, give it away)."""
        if not self._open or not is_loopback(request.peer):
            return False
        hosts = request.header(b"host")
        origins = request.header(b"origin")
        return (
            len(hosts) == 1
            and is_loopback(_bare_host(hosts[0]))
            and all(is_loopback(_bare_host(origin.partition("://")[2])) for origin in origins)
        )

    async def _bearer(self, auth: Auth, header: str) -> Principal:
        scheme, _, token = header.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token.isascii():
            raise unauthorized()
        if auth == "admin":
            expected = self._settings.admin_token
            right = hmac.compare_digest(token.encode(), (expected or _NOBODYS).encode())
            if not right or expected is None:
                raise unauthorized()
            return Principal(None, "admin", "admin")
        workspace = workspace_of_key(token)
        found = None
        for key in await self._keys(workspace):
            if hmac.compare_digest(token.encode(), key.secret.encode()):
                found = key
        if found is None or workspace is None:
            raise unauthorized()
        return Principal(workspace, found.role, found.id, found.secret)

    async def _signed(self, auth: Auth, request: Request, header: str) -> Principal:
        apps = request.header(signature.APP_HEADER.encode())
        plain = signature.is_plain([header])
        if len(apps) != 1 or (plain and auth != "app"):
            raise unauthorized()
        body = await request.body()
        keys = {key.secret: key for key in await self._keys(apps[0])}
        nonce = None
        try:
            if plain:
                found = keys[signature.check_body([header], keys, body)]
            else:
                now = self._workspaces.now / 1e6
                signed = signature.check([header], keys, request.method, request.path, body, now=now)
                found, nonce = keys[signed.key], signed.nonce
        except signature.BadSignature:
            raise unauthorized() from None
        if found.role != "full":
            raise unauthorized()
        memory = 2 * signature.WINDOW + 60
        if nonce is not None and not await self._workspaces.first_time(apps[0], found.id, nonce, memory):
            raise ApiError(409, "replayed", "This signed request was taken before. Sign it anew, with another nonce.")
        return Principal(apps[0], found.role, found.id, found.secret)

    async def _keys(self, workspace: str | None) -> list[Key]:
        """The live keys; one that nobody has where there are none, so that an unknown workspace costs as much."""
        found = await self._workspaces.find(workspace) if workspace and _plausible(workspace) else None
        live = found.live(self._workspaces.now) if found else []
        return live or [Key("0" * 16, _NOBODYS, "read", 0)]


def unauthorized() -> ApiError:
    """One answer for whatever is wrong."""
    return ApiError(
        401,
        "unauthorized",
        "The credential is missing or wrong. Send `Authorization: Bearer <key>`, or a signature. "
        "POST /api/apps gives an app its key.",
    )


def in_reach(principal: Principal, workspace: str) -> bool:
    """Whether a run of this workspace may be told of. Without a credential: whatever is in development here."""
    if principal.workspace is not None:
        return principal.workspace == workspace
    return workspace == DEFAULT_WORKSPACE or split(workspace)[1] == "dev"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _bare_host(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _plausible(workspace: str) -> bool:
    return len(workspace) <= 80 and workspace.isascii() and workspace.isprintable()
