"""Why a connection was lost: the SQLSTATE behind the server's last words.

When the server ends a connection in the middle of a statement, libpq keeps the text of its FATAL message
but drops the code. The texts below are PostgreSQL's (untranslated); anything else is `ConnectionLost`.
"""

from __future__ import annotations

import psycopg2

from dbgate.driver.waiting import operational_error
from dbgate.errors import ConnectionLost, OperationalError

_LAST_WORDS = {
    "terminating connection due to administrator command": "57P01",
    "terminating connection because of crash of another server process": "57P02",
    "terminating connection because of unexpected postmaster exit": "57P02",
    "the database system is shutting down": "57P03",
    "terminating connection due to idle-session timeout": "57P05",
    "terminating connection due to idle-in-transaction timeout": "25P03",
    "terminating connection due to transaction timeout": "25P04",
}


def loss(error: psycopg2.Error) -> OperationalError:
    """The error of a connection that broke."""
    if isinstance(error, OperationalError):
        return error
    message = str(error).strip()
    for words, sqlstate in _LAST_WORDS.items():
        if words in message:
            return operational_error(sqlstate, message)
    return ConnectionLost(message)
