"""One PostgreSQL connection on the event loop.

`addresses` finds out where the servers are, `handshake` connects to one of them, `connection` runs
statements on it, `results` turns what came back into rows, `libpq` is the one module that reaches
below psycopg2.
"""

from dbgate.driver.connection import Connection, Notification
from dbgate.driver.handshake import connect
from dbgate.driver.results import rows_from

__all__ = ["Connection", "Notification", "connect", "rows_from"]
