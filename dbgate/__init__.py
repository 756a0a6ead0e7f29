"""dbgate: PostgreSQL for event-loop servers.

Queries that never block the loop, an optional query service, and messages that wake every process.

    async with dbgate.connect("postgresql://…") as gate:
        rows = await gate.fetch("select id, name from users where team = %s", [7])
"""

from dbgate.assembly import connect
from dbgate.errors import (
    AcquireTimeout,
    ConnectionLost,
    ConnectTimeout,
    CursorExpired,
    DatabaseError,
    DataError,
    Error,
    IntegrityError,
    InterfaceError,
    InternalError,
    InvalidCursor,
    MessagingError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    SchemaMissing,
    ServiceError,
    SettingsError,
    StatementTimeout,
    Timeout,
)
from dbgate.gateway import Gateway
from dbgate.rows import Result, Row

__version__ = "0.1.0"

__all__ = [
    "AcquireTimeout",
    "ConnectTimeout",
    "ConnectionLost",
    "CursorExpired",
    "DataError",
    "DatabaseError",
    "Error",
    "Gateway",
    "IntegrityError",
    "InterfaceError",
    "InternalError",
    "InvalidCursor",
    "MessagingError",
    "NotSupportedError",
    "OperationalError",
    "ProgrammingError",
    "Result",
    "Row",
    "SchemaMissing",
    "ServiceError",
    "SettingsError",
    "StatementTimeout",
    "Timeout",
    "connect",
]
