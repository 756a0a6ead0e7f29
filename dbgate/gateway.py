"""The gateway: queries and transactions on a pool of connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from dbgate.driver import Connection, connect
from dbgate.listener import Listener
from dbgate.observe import Observer, Trace
from dbgate.pool import Pool, PoolSettings, PoolStats
from dbgate.queries import Method, Parameters, Queries, Statement
from dbgate.transaction import Isolation, Transaction, begin_statement

if TYPE_CHECKING:
    from dbgate.messaging import Topic, Topics

T = TypeVar("T")
Cleanup = Callable[[], Awaitable[None]]


class Lease(Queries):
    """One connection, for as long as the block of `gate.connection()` lasts.

    Session state (`SET`, temporary tables, advisory locks) lives as long; it is reset before the
    connection's next user.
    """

    def __init__(self, connection: Connection, topics: Topics | None) -> None:
        self._connection = connection
        self._topics = topics

    @property
    def backend_pid(self) -> int:
        """The process on the server."""
        return self._connection.backend_pid

    def _run(
        self, method: Method[T], statement: Statement, parameters: Parameters, timeout: float | None
    ) -> Coroutine[Any, Any, T]:
        return method(self._connection, statement, parameters, timeout, "")

    def transaction(
        self,
        *,
        isolation: Isolation | None = None,
        read_only: bool = False,
        deferrable: bool = False,
    ) -> Transaction:
        """A transaction on this connection."""
        begin = begin_statement(isolation, read_only=read_only, deferrable=deferrable)
        return Transaction(self._connection, begin, self._topics)


class Gateway(Queries):
    """Queries, transactions and messages on one PostgreSQL database; made by `dbgate.connect()`.

    Args:
        conninfo: libpq's parameters by name.
        settings: the pool's sizes and time-outs.
        observer: called with every observation (see `dbgate.observe`).

        >>> async with dbgate.connect("postgresql://…") as gate:
        ...     rows = await gate.fetch("select id, name from users where team = %s", [7])
    """

    topics: Topics
    """All topics of the database (`dbgate.messaging` adds it; this floor does not know how)."""

    def __init__(
        self,
        conninfo: dict[str, str],
        settings: PoolSettings | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.trace = Trace(observer)
        self._conninfo = conninfo
        self._pool = Pool(self._connect, settings or PoolSettings(), self.trace)
        self.listener = Listener(self._connect, self.trace)
        self._cleanups: list[Cleanup] = []

    async def start(self) -> None:
        """Open the pool.

        Raises:
            OperationalError, ConnectTimeout: the server cannot be reached.
        """
        await self._pool.start()

    async def close(self) -> None:
        """Let what is under way finish, then close every connection."""
        while self._cleanups:
            await self._cleanups.pop()()
        await self.listener.stop()
        await self._pool.stop()

    def on_close(self, cleanup: Cleanup) -> None:
        """Await `cleanup` when the gateway closes, before its connections do; the last added first."""
        self._cleanups.append(cleanup)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(
        self, method: Method[T], statement: Statement, parameters: Parameters, timeout: float | None
    ) -> T:
        connection = self._pool.take()
        if connection is None:
            if timeout is None:
                connection = await self._pool.acquire()
            else:
                loop = asyncio.get_running_loop()
                deadline = loop.time() + timeout
                connection = await self._pool.acquire(timeout)
                timeout = max(0.0, deadline - loop.time())
        try:
            return await method(connection, statement, parameters, timeout, "")
        finally:
            self._pool.release(connection)

    # Connections and transactions

    @asynccontextmanager
    async def connection(self, *, timeout: float | None = None) -> AsyncIterator[Lease]:
        """Lease one connection for the block.

        Args:
            timeout: seconds to wait for one; None for the pool's `acquire_timeout`.
        """
        connection = await self._pool.acquire(timeout)
        connection.session_used = True
        try:
            yield Lease(connection, self._topics_if_any())
        finally:
            self._pool.release(connection)

    @asynccontextmanager
    async def transaction(
        self,
        *,
        isolation: Isolation | None = None,
        read_only: bool = False,
        deferrable: bool = False,
        timeout: float | None = None,
    ) -> AsyncIterator[Transaction]:
        """A transaction for the block: committed at its end, rolled back if it raises.

        Args:
            isolation: "read committed", "repeatable read" or "serializable"; None for the server's default.
            read_only: whether writing is refused.
            deferrable: with serializable and read_only: wait for a snapshot that cannot fail.
            timeout: seconds to wait for a connection; None for the pool's `acquire_timeout`.

        Raises:
            DatabaseError: COMMIT failed, or a statement had failed and the block went on all the same.
        """
        begin = begin_statement(isolation, read_only=read_only, deferrable=deferrable)
        connection = await self._pool.acquire(timeout)
        try:
            async with Transaction(connection, begin, self._topics_if_any()) as transaction:
                yield transaction
        finally:
            self._pool.release(connection)

    def topic(self, name: str) -> Topic:
        """A topic by its name: at most 255 bytes of UTF-8, case matters."""
        return self.topics.topic(name)

    def pool_stats(self) -> PoolStats:
        """The pool at this moment."""
        return self._pool.stats()

    def _topics_if_any(self) -> Topics | None:
        return getattr(self, "topics", None)

    async def _connect(self) -> Connection:
        return await connect(self._conninfo)
