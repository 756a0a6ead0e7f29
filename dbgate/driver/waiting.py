"""The simplest way to drive psycopg2's asynchronous mode: poll, then wait for what it asks for.

For connecting and for one-off statements. The descriptor is read again before each wait, because while
connecting the socket may change between two polls (a second try without TLS). A `Connection` in use has
a reader that stays instead: see `connection`.
"""

from __future__ import annotations

import re

import psycopg2
import psycopg2.errors
from psycopg2.extensions import POLL_OK, POLL_WRITE, connection as RawConnection, make_dsn  # noqa: N812

from dbgate.driver.addresses import Address
from dbgate.driver.libpq import Verbosity, set_error_verbosity, socket_ready
from dbgate.errors import OperationalError, class_for, with_code

# libpq gives a refused connection no SQLSTATE field, but its verbose message has the code in it:
# "FATAL:  28P01: password authentication failed for user …" (the first word is in the server's language).
_CODE = re.compile(r"(?P<severity>[^\s:]+:  )(?P<code>[0-9A-Z]{5}): ")
_LOCATION = re.compile(r"\n\S+:  \S+, \S+:\d+\s*$")


async def open_raw(address: Address) -> RawConnection:
    """Connect to one address, however long it takes.

    Raises:
        OperationalError: the server did not accept; the subclass tells why, where the server said it.
    """
    raw: RawConnection | None = None
    connected = False
    try:
        raw = psycopg2.connect(make_dsn(**address.conninfo), async_=1)
        set_error_verbosity(raw, Verbosity.VERBOSE)
        await until_done(raw)
        set_error_verbosity(raw, Verbosity.DEFAULT)
        connected = True
    except psycopg2.Error as error:
        raise refusal(error) from None
    else:
        return raw
    finally:
        if raw is not None and not connected:
            raw.close()


async def until_done(raw: RawConnection) -> None:
    """Poll until the connection is made, or its statement is done."""
    while (state := raw.poll()) != POLL_OK:
        await socket_ready(raw.fileno(), write=state == POLL_WRITE)


def refusal(error: psycopg2.Error) -> OperationalError:
    """The error of a connection that did not come about, with the class of its SQLSTATE."""
    message = _LOCATION.sub("", str(error)).strip()
    found = _CODE.search(message)
    if found is None:
        return operational_error(None, message)
    return operational_error(found["code"], _CODE.sub(r"\g<severity>", message, count=1))


def operational_error(sqlstate: str | None, message: str) -> OperationalError:
    """An error with a SQLSTATE that only the text told.

    Where psycopg2's class for the code is of another family (3D000, no such database), the error stays an
    OperationalError: that is what psycopg2 raises for a connection that fails.
    """
    try:
        original = class_for(psycopg2.errors.lookup(sqlstate or ""))
    except KeyError:
        original = OperationalError
    if not issubclass(original, OperationalError):
        original = OperationalError
    error = original(message)
    with_code(error, sqlstate)
    return error
