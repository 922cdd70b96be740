"""Calls to addresses that somebody else has chosen: apps, runners, webhooks. Nothing else in the product calls out.

An address is resolved once, every address it resolves to is checked, and the connection goes to the very one that was checked;
the name stays in the Host header and in TLS. Nothing follows a redirect. Addresses of cloud metadata are refused whatever
the settings say; those of private networks and of this machine unless a setting allows them. An answer is read up to a size
and within a time, and never repeated in an error: it may be somebody's secret page.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import httpx2
from msgspec import Struct

from durable.core.errors import CallRefused, RunnerGone, RunnerRefused, RunnerTimeout

MAX_BODY = 1 << 20
"""Bytes of a request and of an answer."""
MAX_URL = 4_000
POOL = 8
"""Connections of one pool."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_METADATA = [
    ipaddress.ip_network(net)
    for net in (
        "169.254.0.0/16",  # link-local, where most clouds keep it
        "fe80::/10",
        "fd00:ec2::/32",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
    )
]
_NOWHERE = [ipaddress.ip_network(net) for net in ("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4", "::/128", "ff00::/8")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Calls(Struct, frozen=True, kw_only=True):
    """What may be called."""

    loopback: bool = False
    """This machine: on in development."""
    private: bool = False
    """Private networks."""
    plain: bool = True
    """Without TLS."""


class Answered(Struct, frozen=True):
    """An answer, read to its end."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    """Names in small letters."""


class Outgoing:
    """Makes such calls, over connections that are kept.

    A pool looks through all its connections, and all who wait for one, whenever a call begins or ends. So there are many
    small ones, nobody waits in them, and a host's calls begin at the same.
    """

    def __init__(self, calls: Calls | None = None, *, connections: int = 200) -> None:
        self.calls = calls or Calls()
        self._room = asyncio.Semaphore(connections)
        self._pools = [_Pool() for _ in range(-(-connections // POOL))]
        self._context: ssl.SSLContext | None = None

    async def close(self) -> None:
        """Let the connections go."""
        clients = [pool.client for pool in self._pools if pool.client is not None]
        self._pools = [_Pool() for _ in self._pools]
        for client in clients:
            await client.aclose()

    async def request(
        self,
        method: str,
        url: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout: float = 10.0,
        limit: int = MAX_BODY,
    ) -> Answered:
        """Raises CallRefused (an address that is not called), RunnerGone (nobody there), RunnerRefused (too large, broken off),
        RunnerTimeout."""
        host = check_url(url, self.calls)
        if len(body) > limit:
            raise RunnerRefused(
                f"The request to {host} is {len(body):,} bytes, and the limit is {limit:,} (1 MiB either way).",
                retryable=False,
            )
        try:
            async with asyncio.timeout(timeout), self._room:
                pool = self._pool_of(host)
                pool.busy += 1
                try:
                    return await self._send(self._open(pool), method, url, body, headers or {}, limit, host)
                finally:
                    pool.busy -= 1
        except TimeoutError:
            raise RunnerTimeout(f"{host} did not answer within {timeout:g} s.") from None

    async def _send(
        self,
        client: httpx2.AsyncClient,
        method: str,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        limit: int,
        host: str,
    ) -> Answered:
        said = {"accept-encoding": "identity", "content-type": "application/json", **headers}
        try:
            async with client.stream(method, url, content=body, headers=said) as answer:
                if answer.headers.get("content-encoding", "identity").lower() != "identity":
                    raise RunnerRefused(f"{host} answered in an encoding it was not asked for.", retryable=False)
                length = answer.headers.get("content-length", "")
                if length.isdigit() and int(length) > limit:
                    raise _too_large(host, limit)
                parts: list[bytes] = []
                size = 0
                async for part in answer.aiter_raw():
                    size += len(part)
                    if size > limit:
                        raise _too_large(host, limit)
                    parts.append(part)
                return Answered(answer.status_code, b"".join(parts), {k.lower(): v for k, v in answer.headers.items()})
        except CallRefused:
            raise
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            refused = _refusal(error)
            if refused is not None:
                raise refused from None
            if isinstance(error, httpx2.ConnectError | OSError):
                raise RunnerGone(f"Nobody answers at {host}.") from None
            raise RunnerRefused(f"The call to {host} broke off: {type(error).__name__}.") from None

    def _pool_of(self, host: str) -> _Pool:
        """The host's first, or the next that has room; there is one, since who got here has room."""
        count, first = len(self._pools), hash(host)
        return next(pool for nth in range(count) if (pool := self._pools[(first + nth) % count]).busy < POOL)

    def _open(self, pool: _Pool) -> httpx2.AsyncClient:
        if pool.client is None:
            if self._context is None:
                self._context = ssl.create_default_context()
            pool.client = httpx2.AsyncClient(
                transport=_Transport(self.calls, self._context),
                follow_redirects=False,
                timeout=None,
                trust_env=False,
            )
        return pool.client


class _Pool:
    """At most `POOL` connections."""

    def __init__(self) -> None:
        self.client: httpx2.AsyncClient | None = None
        self.busy = 0


def check_url(url: str, calls: Calls) -> str:
    """The host a URL names, for people. Raises CallRefused for one that is not called whatever it resolves to."""
    if len(url) > MAX_URL:
        raise CallRefused(f"A URL has at most {MAX_URL} characters.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise CallRefused("That is no URL.") from None
    if parts.scheme not in ("http", "https"):
        raise CallRefused("Only http and https URLs are called.")
    if parts.scheme == "http" and not calls.plain:
        raise CallRefused("Only https URLs are called from here.")
    if not parts.hostname or any(char.isspace() or ord(char) < 32 for char in url):
        raise CallRefused("That URL names no host.")
    if parts.username is not None or parts.password is not None:
        raise CallRefused("A URL that is called bears no user and no password; they belong in a header.")
    host = parts.hostname.rstrip(".")
    literal = _literal(host)
    if literal is not None:
        check_address(literal, host, calls)
    elif _is_local(host) and not calls.loopback:
        raise _local(host)
    return host if port is None else f"{host}:{port}"


def check_address(address: _Address, host: str, calls: Calls) -> None:
    """Raises CallRefused for an address that is not called."""
    inner = _inner(address)
    for one in {address, inner}:
        if any(one.version == net.version and one in net for net in _METADATA):
            raise CallRefused(f"{host} is an address of cloud metadata or of the link, which are never called.")
        if any(one.version == net.version and one in net for net in _NOWHERE):
            raise CallRefused(f"{host} is no address of one machine.")
    if inner.is_loopback:
        if not calls.loopback:
            raise _local(host)
    elif not inner.is_global and not calls.private:
        raise CallRefused(
            f"{host} is in a private network. If apps live there, allow it: setting `private_calls` (DURABLE_PRIVATE_CALLS=1)."
        )


def _inner(address: _Address) -> _Address:
    """The IPv4 address that an IPv6 one carries, if any."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address.teredo is not None:
            return address.teredo[1]
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if int(address) >> 32 == 0 and int(address) > 1:
            return ipaddress.IPv4Address(int(address))
    return address


def _literal(host: str) -> _Address | None:
    """An address written as one, also in the ways that only resolvers know: `0x7f000001`, `2130706433`, `0177.1`."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    if not host or not host[0].isdigit():
        return None
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _is_local(host: str) -> bool:
    low = host.lower()
    return low == "localhost" or low.endswith(".localhost")


def _local(host: str) -> CallRefused:
    return CallRefused(
        f"{host} is this machine. If apps live here, allow it: setting `private_calls` (DURABLE_PRIVATE_CALLS=1)."
    )


def _too_large(host: str, limit: int) -> RunnerRefused:
    return RunnerRefused(f"The answer of {host} is larger than the limit of {limit:,} bytes (1 MiB).", retryable=False)


def _refusal(error: BaseException | None) -> CallRefused | None:
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, CallRefused):
            return error
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


class _CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Resolves, checks, and connects to what was checked."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await resolve(host, port)
        for address in addresses:
            check_address(address, host, self._calls)
        failure: Exception | None = None
        for address in addresses:
            try:
                return await self._backend.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout, OSError) as error:
                failure = error
        raise failure or httpcore2.ConnectError("the name resolves to nothing")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        raise CallRefused("Sockets in the file system are not called.")

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


async def resolve(host: str, port: int) -> list[_Address]:
    """All addresses of a name, in the system's order."""
    literal = _literal(host.rstrip("."))
    if literal is not None:
        return [literal]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses: dict[_Address, None] = {}
    for *_, place in found:
        addresses[ipaddress.ip_address(str(place[0]).partition("%")[0])] = None
    return list(addresses)


class _Transport(httpx2.AsyncHTTPTransport):
    """httpx's own, over connections that are checked."""

    def __init__(self, calls: Calls, context: ssl.SSLContext) -> None:
        super().__init__(verify=context, trust_env=False)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=context,
            max_connections=POOL,
            max_keepalive_connections=POOL,
            keepalive_expiry=15.0,
            http1=True,
            http2=False,
            network_backend=_CheckedBackend(calls),
        )
