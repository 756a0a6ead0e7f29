"""Cancel what runs on a connection, by the best way that this libpq has; none blocks the loop."""

from __future__ import annotations

from psycopg2.extensions import connection as RawConnection  # noqa: N812 (it is a class)

from dbgate.driver import libpq
from dbgate.driver.addresses import Address
from dbgate.driver.waiting import open_raw, until_done


async def cancel(raw: RawConnection, address: Address) -> None:
    """Ask the server to cancel the statement that runs on `raw`, a connection to `address`.

    Raises:
        OperationalError: the server could not be asked.
    """
    if libpq.has_cancel:
        await libpq.cancel(raw)
    else:
        await cancel_by_query(raw, address)


async def cancel_by_query(raw: RawConnection, address: Address) -> None:
    """Ask through a second connection, for a libpq before 17.

    (psycopg2's own `cancel()` opens a blocking socket and holds the interpreter's lock meanwhile.)
    """
    other = await open_raw(address)
    try:
        other.cursor().execute("select pg_cancel_backend(%s)", [raw.info.backend_pid])
        await until_done(other)
    finally:
        other.close()
