"""Where the servers of a conninfo are: hosts, ports and addresses, in the order to try them.

libpq would look names up itself, with a blocking call that holds the interpreter's lock; so names are
resolved on the loop, and libpq gets each address as `hostaddr`, one at a time. The rules for several
hosts are libpq's (manual, "Specifying Multiple Hosts").
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from dbgate.errors import OperationalError, SettingsError

DEFAULT_PORT = "5432"

# Without these a peer that vanished without a word is noticed after two hours, or never.
# libpq's parameters of the same names; a conninfo that sets them wins.
_DEFAULTS = {
    "fallback_application_name": "dbgate",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}


@dataclass(frozen=True, slots=True)
class Address:
    """One server to try: what libpq is told, and what people are told."""

    conninfo: Mapping[str, str]
    label: str


async def addresses(conninfo: Mapping[str, str]) -> AsyncIterator[Address | OperationalError]:
    """Yield the addresses of every host in turn, and an error for a host whose name is unknown.

    Raises:
        SettingsError: the numbers of hosts, addresses and ports do not fit each other.
    """
    base = {**_DEFAULTS, **conninfo, "client_encoding": "UTF8"}
    hosts = _hosts(base)
    if base.pop("load_balance_hosts", "disable") == "random":
        random.shuffle(hosts)
    for host, known, port in hosts:
        given = base | {"port": port} | ({"host": host} if host else {})
        if known:
            yield Address(given | {"hostaddr": known}, f"{host or known}, port {port}")
        elif not host or host.startswith(("/", "@")):
            yield Address(given, f"socket {host or 'in the default directory'}, port {port}")
        else:
            try:
                found = await _resolve(host, port)
            except OSError as error:
                yield OperationalError(f"the name of host {host!r} is unknown: {error.strerror}")
                continue
            for address in found:
                label = host if address == host else f"{host} ({address})"
                yield Address(given | {"hostaddr": address}, f"{label}, port {port}")


def _hosts(base: dict[str, str]) -> list[tuple[str, str, str]]:
    """The triples of host, known address and port; takes those three out of `base`."""
    host_list = base.pop("host", None) or os.environ.get("PGHOST", "")
    address_list = base.pop("hostaddr", None) or os.environ.get("PGHOSTADDR", "")
    port_list = base.pop("port", None) or os.environ.get("PGPORT", DEFAULT_PORT)
    count = max(host_list.count(","), address_list.count(",")) + 1

    def for_each(name: str, listed: str) -> list[str]:
        values = listed.split(",")
        if len(values) not in (1, count):
            raise SettingsError(
                f"the connection string has {len(values)} values for {name!r} but {count} servers: "
                "give one for all, or one for each"
            )
        return values if len(values) == count else values * count

    hosts = for_each("host", host_list)
    known = for_each("hostaddr", address_list)
    ports = for_each("port", port_list)
    return [(h, k, p or DEFAULT_PORT) for h, k, p in zip(hosts, known, ports, strict=True)]


async def _resolve(host: str, port: str) -> list[str]:
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass  # a name
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
