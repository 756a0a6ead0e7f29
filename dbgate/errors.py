"""The errors of dbgate: one tree, and psycopg2's classes within it.

    Error
    ├── DatabaseError            PostgreSQL or libpq said no (is a psycopg2.DatabaseError)
    │   ├── OperationalError     … and so on: psycopg2's six families, each also psycopg2's own class
    │   │   └── ConnectionLost   the connection broke and the server gave no reason
    │   └── (by SQLSTATE)        UniqueViolation, …: made on demand, also psycopg2.errors.UniqueViolation
    ├── InterfaceError           a call that cannot be right: wrong order, wrong argument, already closed
    │   └── SettingsError        a DSN, option or environment variable that cannot be used
    ├── Timeout                  (is a TimeoutError)
    │   ├── ConnectTimeout       no server answered in time
    │   ├── AcquireTimeout       no connection of the pool came free in time
    │   └── StatementTimeout     the statement took longer than its `timeout=`
    ├── ServiceError             the query service refused, or could not be reached
    └── MessagingError
        ├── SchemaMissing        `dbgate migrate` has not been run on this database
        ├── InvalidCursor        not a cursor of this installation
        └── CursorExpired        a cursor from before a failover, or older than what is kept

Code that catches psycopg2's classes goes on working: `except psycopg2.errors.UniqueViolation` catches
what dbgate raises for SQLSTATE 23505, and so does `except dbgate.IntegrityError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import psycopg2
import psycopg2.errors
import psycopg2.extensions

DIAGNOSTIC_FIELDS = tuple(
    name for name in dir(psycopg2.extensions.Diagnostics) if not name.startswith("_")
)
"""The names of what PostgreSQL says about an error (its manual, "Error and Notice Message Fields")."""


class Error(Exception):
    """The root of everything that dbgate raises."""


class InterfaceError(Error, psycopg2.InterfaceError):
    """A call that cannot be right, whatever the database says."""


class SettingsError(InterfaceError):
    """A DSN, an option or an environment variable that cannot be used."""


class Timeout(Error, TimeoutError):
    """Something took longer than it was given."""


class ConnectTimeout(Timeout):
    """No server answered in time."""


class AcquireTimeout(Timeout):
    """No connection of the pool came free in time."""


class StatementTimeout(Timeout):
    """A statement took longer than its `timeout=`; it has been cancelled on the server."""


class ServiceError(Error):
    """The query service refused a request, or could not be reached.

    Attributes:
        status: the HTTP status of its answer; None when there was none.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class MessagingError(Error):
    """Topics and queues cannot do what was asked."""


class SchemaMissing(MessagingError):
    """The tables of topics and queues are not in this database, or are of an older version."""


class InvalidCursor(MessagingError, ValueError):
    """What was given as a cursor is not one of this installation."""


class CursorExpired(MessagingError):
    """Messages after this cursor may be gone: it is from before a failover, or too old."""


class DatabaseError(Error, psycopg2.DatabaseError):
    """What PostgreSQL, or the client library on its behalf, reported about a statement."""

    @property
    def sqlstate(self) -> str | None:
        """The five-character code (appendix A of the manual); None when no server gave one."""
        return self.pgcode

    @property
    def diag(self) -> Any:  # type: ignore[override]
        """Everything that the server said, under psycopg2's names (`diag.table_name`, …)."""
        carried = self.__dict__.get("_diag")
        return carried if carried is not None else super().diag

    @property
    def detail(self) -> str | None:
        """The server's DETAIL."""
        return self.diag.message_detail  # type: ignore[no-any-return]

    @property
    def hint(self) -> str | None:
        """The server's HINT."""
        return self.diag.message_hint  # type: ignore[no-any-return]

    @property
    def constraint(self) -> str | None:
        """The constraint that was violated."""
        return self.diag.constraint_name  # type: ignore[no-any-return]


class OperationalError(DatabaseError, psycopg2.OperationalError):
    """The server's operation: connections, resources, shutdowns, cancellation."""


class ConnectionLost(OperationalError):
    """The connection broke, and the server gave no reason."""


class IntegrityError(DatabaseError, psycopg2.IntegrityError):
    """A constraint was violated (SQLSTATE class 23)."""


class ProgrammingError(DatabaseError, psycopg2.ProgrammingError):
    """The statement is wrong, or not allowed."""


class DataError(DatabaseError, psycopg2.DataError):
    """A value is wrong (SQLSTATE class 22)."""


class InternalError(DatabaseError, psycopg2.InternalError):
    """The server or the transaction is in a state in which the statement cannot run."""


class NotSupportedError(DatabaseError, psycopg2.NotSupportedError):
    """A feature that this server does not have."""


_FAMILIES: dict[type[psycopg2.Error], type[DatabaseError]] = {
    psycopg2.OperationalError: OperationalError,
    psycopg2.IntegrityError: IntegrityError,
    psycopg2.ProgrammingError: ProgrammingError,
    psycopg2.DataError: DataError,
    psycopg2.InternalError: InternalError,
    psycopg2.NotSupportedError: NotSupportedError,
    psycopg2.DatabaseError: DatabaseError,
}


_classes: dict[type[psycopg2.Error], type[DatabaseError]] = dict(_FAMILIES)


def class_for(original: type[psycopg2.Error]) -> type[DatabaseError]:
    """The class of this tree that is also `original`, one of psycopg2's classes."""
    if original not in _classes:
        family = next(ours for theirs, ours in _FAMILIES.items() if issubclass(original, theirs))
        namespace = {"__doc__": original.__doc__, "__module__": __name__}
        _classes[original] = type(original.__name__, (family, original), namespace)
    return _classes[original]


def adopt(error: psycopg2.Error) -> psycopg2.Error:
    """Give an error that psycopg2 raised its place in this tree.

    The object stays the same (traceback, `diag`, `pgcode`, `cursor`), only its class changes to one
    that derives from both trees, so mapping costs nothing and hides nothing.
    """
    if isinstance(error, Error):
        return error
    if isinstance(error, psycopg2.DatabaseError):
        error.__class__ = class_for(type(error))
    elif isinstance(error, psycopg2.InterfaceError):
        error.__class__ = InterfaceError
    return error


def from_fields(message: str, fields: Mapping[str, str | None]) -> DatabaseError:
    """Build the error that the server described elsewhere, as if psycopg2 had raised it here.

    Args:
        message: the whole text, as psycopg2 gives it.
        fields: what the server said, by the names in `DIAGNOSTIC_FIELDS`.
    """
    sqlstate = fields.get("sqlstate")
    try:
        original = psycopg2.errors.lookup(sqlstate or "")
    except KeyError:
        original = _family_of(sqlstate)
    error = with_code(class_for(original)(message), sqlstate)
    error.__dict__["_diag"] = SimpleNamespace(
        **{name: fields.get(name) for name in DIAGNOSTIC_FIELDS}
    )
    return error


def with_code(error: DatabaseError, sqlstate: str | None) -> DatabaseError:
    """Give an error that was made here the code and the text that psycopg2 would have given it."""
    error.__setstate__({"pgerror": str(error), "pgcode": sqlstate})  # type: ignore[no-untyped-call]
    return error


def fields_of(error: psycopg2.Error) -> dict[str, str]:
    """What the server said about `error`: the inverse of `from_fields`."""
    values = {name: getattr(error.diag, name) for name in DIAGNOSTIC_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def _family_of(sqlstate: str | None) -> type[psycopg2.Error]:
    """The family of a SQLSTATE that psycopg2 has no class for (an extension's, a RAISE's)."""
    # As psycopg2's own exception_from_sqlstate() decides.
    classes = {
        "0A": psycopg2.NotSupportedError,
        "22": psycopg2.DataError,
        "23": psycopg2.IntegrityError,
        "26": psycopg2.ProgrammingError,
        "28": psycopg2.OperationalError,
        "3D": psycopg2.ProgrammingError,
        "42": psycopg2.ProgrammingError,
        "53": psycopg2.OperationalError,
        "54": psycopg2.OperationalError,
        "57": psycopg2.OperationalError,
        "58": psycopg2.OperationalError,
    }
    return classes.get((sqlstate or "")[:2], psycopg2.DatabaseError)
