"""What every test stands on: a real PostgreSQL, a database of its own, and a guard on the event loop."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psycopg2
import pytest
from blockbuster import blockbuster_ctx
from psycopg2.extensions import make_dsn

import dbgate
from dbgate import Gateway
from dbgate.embedded import EmbeddedServer

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Fail the test that makes a blocking call on the event loop (D1)."""
    with blockbuster_ctx() as guard:
        # pytest itself reads sources on the loop's thread when it explains a failed assertion.
        for function in guard.functions.values():
            function.can_block_in("_pytest/", {"getsource", "getfslineno"})
        yield


@pytest.fixture(scope="session")
def server_dsn() -> Iterator[str]:
    """A PostgreSQL: the one in $DBGATE_TEST_DSN, or one of our own."""
    if dsn := os.environ.get("DBGATE_TEST_DSN"):
        yield dsn
        return
    with EmbeddedServer.start_sync() as server:
        yield server.dsn


class Admin:
    """A connection beside the tested ones, for looking and for injecting faults; it blocks, briefly."""

    def __init__(self, dsn: str) -> None:
        self._connection = psycopg2.connect(dsn)
        self._connection.autocommit = True

    def query(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return cursor.fetchall() if cursor.description else []

    def backends(self, database: str) -> list[tuple[int, str, str]]:
        """Pid, state and statement of every client of a database."""
        return self.query(
            "select pid, state, query from pg_stat_activity "
            "where datname = %s and backend_type = 'client backend'",
            database,
        )

    def terminate(self, pid: int) -> None:
        self.query("select pg_terminate_backend(%s)", pid)

    def close(self) -> None:
        self._connection.close()


@pytest.fixture(scope="session")
def admin(server_dsn: str) -> Iterator[Admin]:
    connection = Admin(server_dsn)
    yield connection
    connection.close()


@pytest.fixture
def database(admin: Admin) -> Iterator[str]:
    """The name of an empty database that only this test uses."""
    name = f"dbgate_test_{os.getpid()}_{next(_numbers)}"
    admin.query(f'create database "{name}"')
    yield name
    admin.query(f'drop database "{name}" with (force)')


@pytest.fixture
def dsn(server_dsn: str, database: str) -> str:
    """The DSN of this test's database."""
    return make_dsn(server_dsn, dbname=database)


@pytest.fixture
async def gate(dsn: str) -> AsyncIterator[Gateway]:
    """A gateway to this test's database."""
    async with dbgate.connect(dsn) as gateway:
        yield gateway


@pytest.fixture
def backends(admin: Admin, database: str) -> Callable[[], list[tuple[int, str, str]]]:
    """Who is connected to this test's database: pid, state, statement."""
    return lambda: admin.backends(database)
