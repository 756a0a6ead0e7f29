"""Connect to a conninfo: every host and address in turn, each with a deadline.

libpq ignores `connect_timeout` when it is driven asynchronously, so the deadline is ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from dbgate.driver.addresses import addresses
from dbgate.driver.connection import Connection
from dbgate.driver.waiting import open_raw, operational_error
from dbgate.errors import ConnectTimeout, OperationalError

DEFAULT_CONNECT_TIMEOUT = 10.0
"""Seconds that one address gets, where the conninfo has no `connect_timeout`."""


async def connect(conninfo: Mapping[str, str]) -> Connection:
    """Connect to the first server of a conninfo that accepts.

    Args:
        conninfo: libpq's parameters by name. `connect_timeout` is in seconds, for each address;
            10 if it is missing, no limit if 0.

    Raises:
        OperationalError: no server accepted (the subclass tells why, where the server said it).
        ConnectTimeout: no server answered in time.
        SettingsError: the conninfo contradicts itself.
    """
    parameters = dict(conninfo)
    limit = float(parameters.pop("connect_timeout", DEFAULT_CONNECT_TIMEOUT)) or None
    if parameters.get("target_session_attrs") != "prefer-standby":
        return await _first_of(parameters, limit)
    # libpq goes through the list of hosts twice for this one; it only ever sees one host at a time here.
    with suppress(OperationalError, ConnectTimeout):
        return await _first_of(parameters | {"target_session_attrs": "standby"}, limit)
    return await _first_of(parameters | {"target_session_attrs": "any"}, limit)


async def _first_of(conninfo: Mapping[str, str], limit: float | None) -> Connection:
    failures: list[OperationalError | ConnectTimeout] = []
    async for address in addresses(conninfo):
        if isinstance(address, OperationalError):
            failures.append(address)
            continue
        try:
            async with asyncio.timeout(limit):
                raw = await open_raw(address)
        except TimeoutError:
            failures.append(ConnectTimeout(f"no answer from {address.label} within {limit:g} s"))
        except OperationalError as error:
            text = f"cannot connect to {address.label}: {error}"
            failures.append(operational_error(error.sqlstate, text))
        else:
            return Connection(raw, address)
    raise _verdict(failures)


def _verdict(
    failures: list[OperationalError | ConnectTimeout],
) -> OperationalError | ConnectTimeout:
    """One error for all that was tried: everybody's text, and the class of the last that answered."""
    if len(failures) == 1:
        return failures[0]
    text = "no server accepted:" + "".join(f"\n- {failure}" for failure in failures)
    answers = [failure for failure in failures if isinstance(failure, OperationalError)]
    if not answers:
        return ConnectTimeout(text)
    codes = [answer.sqlstate for answer in answers if answer.sqlstate]
    return operational_error(codes[-1] if codes else None, text)
