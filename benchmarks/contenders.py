"""The ways from an event loop to PostgreSQL that are compared: each a pool of POOL_SIZE connections.

All run in autocommit, open every connection at once, and return rows as their users get them.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol
from urllib.parse import urlencode

from psycopg2.extensions import parse_dsn
from psycopg2.pool import ThreadedConnectionPool

import dbgate

POOL_SIZE = 10

Call = Callable[..., Awaitable[Any]]
"""Runs a statement once: without an argument, or with the list of its parameters' values."""


@dataclass(frozen=True)
class Shape:
    """A kind of statement.

    Attributes:
        key: its name on the command line.
        title: what it does.
        sql: with `%s` for its parameters.
        parameters: lists of their values, used in turn; none for a statement without parameters.
        returns_rows: whether they are fetched.
    """

    key: str
    title: str
    sql: str
    parameters: tuple[list[Any], ...] = ()
    returns_rows: bool = True


class Contender(Protocol):
    name: str
    distribution: str
    """Where it comes from, as `pip` knows it."""

    async def open(self, dsn: str) -> None: ...

    async def close(self) -> None: ...

    def call(self, shape: Shape) -> Call:
        """What runs a statement of this shape: one frame between the benchmark and the driver at most."""


class Dbgate:
    name = distribution = "dbgate"

    async def open(self, dsn: str) -> None:
        self._gate = await dbgate.connect(dsn, min_size=POOL_SIZE, max_size=POOL_SIZE)

    async def close(self) -> None:
        await self._gate.close()

    def call(self, shape: Shape) -> Call:
        return partial(self._gate.fetch if shape.returns_rows else self._gate.execute, shape.sql)


class Asyncpg:
    name = distribution = "asyncpg"

    async def open(self, dsn: str) -> None:
        # It knows no other form of conninfo than a URL.
        url = f"postgresql:///?{urlencode(parse_dsn(dsn))}"
        create_pool = import_module("asyncpg").create_pool
        self._pool = await create_pool(url, min_size=POOL_SIZE, max_size=POOL_SIZE)

    async def close(self) -> None:
        await self._pool.close()

    def call(self, shape: Shape) -> Call:
        numbers = itertools.count(1)
        sql = re.sub("%s", lambda _: f"${next(numbers)}", shape.sql)
        run = self._pool.fetch if shape.returns_rows else self._pool.execute
        return (lambda values: run(sql, *values)) if shape.parameters else partial(run, sql)


class Psycopg3:
    name = "psycopg 3"
    distribution = "psycopg-pool"

    async def open(self, dsn: str) -> None:
        self._pool = import_module("psycopg_pool").AsyncConnectionPool(
            dsn,
            min_size=POOL_SIZE,
            max_size=POOL_SIZE,
            open=False,
            kwargs={"autocommit": True},
        )
        await self._pool.open(wait=True)

    async def close(self) -> None:
        await self._pool.close()

    def call(self, shape: Shape) -> Call:
        async def fetch(*values: list[Any]) -> Any:
            async with self._pool.connection() as connection:
                cursor = await connection.execute(shape.sql, *values)
                return await cursor.fetchall()

        async def execute(*values: list[Any]) -> None:
            async with self._pool.connection() as connection:
                await connection.execute(shape.sql, *values)

        return fetch if shape.returns_rows else execute


class Aiopg:
    name = distribution = "aiopg"

    async def open(self, dsn: str) -> None:
        create_pool = import_module("aiopg").create_pool
        self._pool = await create_pool(dsn, minsize=POOL_SIZE, maxsize=POOL_SIZE)

    async def close(self) -> None:
        self._pool.close()
        await self._pool.wait_closed()

    def call(self, shape: Shape) -> Call:
        async def fetch(*values: list[Any]) -> Any:
            async with self._pool.acquire() as connection, connection.cursor() as cursor:
                await cursor.execute(shape.sql, *values)
                return await cursor.fetchall()

        async def execute(*values: list[Any]) -> None:
            async with self._pool.acquire() as connection, connection.cursor() as cursor:
                await cursor.execute(shape.sql, *values)

        return fetch if shape.returns_rows else execute


class Threads:
    name = "psycopg2 in threads"
    distribution = "psycopg2-binary"

    async def open(self, dsn: str) -> None:
        self._executor = ThreadPoolExecutor(POOL_SIZE)
        self._pool = ThreadedConnectionPool(POOL_SIZE, POOL_SIZE, dsn)
        connections = [self._pool.getconn() for _ in range(POOL_SIZE)]
        for connection in connections:
            connection.autocommit = True
            self._pool.putconn(connection)

    async def close(self) -> None:
        self._executor.shutdown()
        self._pool.closeall()

    def call(self, shape: Shape) -> Call:
        def run(*values: list[Any]) -> Any:
            connection = self._pool.getconn()
            try:
                with connection.cursor() as cursor:
                    cursor.execute(shape.sql, *values)
                    return cursor.fetchall() if shape.returns_rows else None
            finally:
                self._pool.putconn(connection)

        return partial(asyncio.get_running_loop().run_in_executor, self._executor, run)


CONTENDERS: tuple[Callable[[], Contender], ...] = (Dbgate, Asyncpg, Psycopg3, Aiopg, Threads)
