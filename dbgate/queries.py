"""The methods that run one statement: the same on a gateway, a transaction and a leased connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from psycopg2.sql import Composable

from dbgate.driver import Connection
from dbgate.rows import Result, Row

T = TypeVar("T")

Statement = str | Composable
"""SQL with psycopg2's `%s` or `%(name)s` parameters, or composed with `psycopg2.sql`."""

Parameters = Sequence[Any] | Mapping[str, Any] | None
"""The values of a statement's parameters. psycopg2 binds them by its adapters, never by hand."""

Method = Callable[[Connection, Statement, Parameters, float | None, str], Coroutine[Any, Any, T]]
"""One of the driver's ways to run a statement: statement, parameters, timeout, prefix."""


class Queries(ABC):
    """What runs statements on PostgreSQL.

    Every method takes:
        statement: SQL with `%s` or `%(name)s` parameters, or a `psycopg2.sql` object.
        parameters: their values, a sequence or a mapping.
        timeout: seconds for the whole call, the wait for a connection included; None for no limit. When it
            is over, or when the calling task is cancelled, the statement is cancelled on the server too.

    Every method raises:
        DatabaseError: what the server said; also psycopg2's class for the same SQLSTATE.
        StatementTimeout: the statement took longer than `timeout`.
        AcquireTimeout: no connection came free in time.
        InterfaceError: the call cannot be right here: closed, finished, or already in use.
    """

    # Plain functions that return the coroutine: one frame less between the caller and the driver.

    def fetch(
        self, statement: Statement, parameters: Parameters = None, *, timeout: float | None = None
    ) -> Coroutine[Any, Any, list[Row]]:
        """Run a statement and return all its rows; none for a statement that returns no rows."""
        return self._run(Connection.fetch, statement, parameters, timeout)

    def fetch_one(
        self, statement: Statement, parameters: Parameters = None, *, timeout: float | None = None
    ) -> Coroutine[Any, Any, Row | None]:
        """Run a statement and return its first row, or None."""
        return self._run(Connection.fetch_one, statement, parameters, timeout)

    def fetch_value(
        self, statement: Statement, parameters: Parameters = None, *, timeout: float | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Run a statement and return the first value of its first row, or None."""
        return self._run(Connection.fetch_value, statement, parameters, timeout)

    def execute(
        self, statement: Statement, parameters: Parameters = None, *, timeout: float | None = None
    ) -> Coroutine[Any, Any, Result]:
        """Run a statement and return what it did: `.rowcount` and `.status`."""
        return self._run(Connection.execute, statement, parameters, timeout)

    @abstractmethod
    def _run(
        self,
        method: Method[T],
        statement: Statement,
        parameters: Parameters,
        timeout: float | None,
    ) -> Coroutine[Any, Any, T]:
        """Run a statement by one of the driver's methods on the right connection."""
