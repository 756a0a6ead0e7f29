"""One PostgreSQL connection on the event loop: statements, notifications, cancellation.

The reader is registered with the loop once and stays for the connection's life (D4): a statement is
`cursor.execute()`, a future, and one `poll()` when the answer has come. Because the reader is always
there, a server that goes away is noticed at once, even while the connection is idle.

A statement whose caller has left (a cancelled task, a time-out) is *abandoned*: it is cancelled on the
server, and its result is waited for and thrown away. Until then the connection is `busy`; whoever wants
it next waits in `settle()`. A connection that cannot be proved clean is closed (D2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg2
from psycopg2.extensions import (
    POLL_OK,
    POLL_READ,
    POLL_WRITE,
    TRANSACTION_STATUS_ACTIVE,
    TRANSACTION_STATUS_IDLE,
    Notify as Notification,
    connection as RawConnection,  # noqa: N812 (it is a class)
    cursor as Cursor,  # noqa: N812 (it is a class)
)
from psycopg2.sql import Composable

from dbgate.driver.addresses import Address
from dbgate.driver.cancelling import cancel
from dbgate.driver.losses import loss
from dbgate.driver.results import first_row_of, rows_from
from dbgate.errors import (
    ConnectionLost,
    Error,
    InterfaceError,
    OperationalError,
    StatementTimeout,
    adopt,
)
from dbgate.rows import Result, Row

__all__ = ["Connection", "Notification"]

SETTLE_TIMEOUT = 5.0
"""Seconds that the server gets to end an abandoned statement; then the connection is closed."""

_SENT_AT_ONCE = 8_000
"""A statement up to this many bytes fits any socket's buffer; a longer one is sent as the socket allows."""

_TLS_POLLS = 3
"""Polls per wakeup under TLS: a 16 KiB record can leave bytes decrypted where epoll does not see them."""

_CHANGES_SESSION = frozenset({"SET", "LISTEN", "PREPARE", "LOAD", "DECLARE CURSOR"})
"""Command tags of statements whose effect outlives them."""


class Connection:
    """One connection, which runs one statement at a time.

    Made by `dbgate.driver.connect()`.

    Attributes:
        address: the server that it is connected to.
        loss: why it broke; None while it is whole, or when it was closed on purpose.
        on_loss: called, without arguments, when the server has gone.
        on_notification: called with each notification that arrives.
        session_used: whether something may have changed the session's state (`SET`, `LISTEN`, …), which
            the next user must not inherit.
    """

    def __init__(self, raw: RawConnection, address: Address) -> None:
        self.address = address
        self.loss: OperationalError | None = None
        self.on_loss: Callable[[], None] | None = None
        self.on_notification: Callable[[Notification], None] | None = None
        self.session_used = False
        self._raw = raw
        self._loop = asyncio.get_running_loop()
        self._cursor: Cursor | None = None
        self._pending: asyncio.Future[Cursor] | None = None
        self._settled: asyncio.Future[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._writing = False
        self._polls = _TLS_POLLS if raw.info.ssl_in_use else 1
        self._fd = raw.fileno()
        self._loop.add_reader(self._fd, self._advance)

    # What state it is in

    @property
    def raw(self) -> RawConnection:
        """psycopg2's own connection, in asynchronous mode."""
        return self._raw

    @property
    def closed(self) -> bool:
        """Whether it has ended, by us or by the server."""
        return bool(self._raw.closed)

    @property
    def busy(self) -> bool:
        """Whether a statement is on its way, awaited or abandoned."""
        return self._pending is not None

    @property
    def clean(self) -> bool:
        """Whether it is provably as good as new: open, nothing under way, no transaction, no settings."""
        return (
            self._pending is None
            and not self.session_used
            and not self._raw.closed
            and self._raw.get_transaction_status() == TRANSACTION_STATUS_IDLE
        )

    @property
    def transaction_status(self) -> int:
        """One of psycopg2.extensions' TRANSACTION_STATUS_… values; no round trip."""
        return self._raw.get_transaction_status()

    @property
    def backend_pid(self) -> int:
        """The process on the server; known without asking."""
        return self._raw.info.backend_pid

    # Statements

    async def fetch(
        self,
        statement: Any,
        parameters: Any = None,
        timeout: float | None = None,
        prefix: str = "",
    ) -> list[Row]:
        """Run a statement and return all its rows."""
        return await rows_from(await self.run(statement, parameters, timeout, prefix))

    async def fetch_one(
        self,
        statement: Any,
        parameters: Any = None,
        timeout: float | None = None,
        prefix: str = "",
    ) -> Row | None:
        """Run a statement and return its first row, or None."""
        return first_row_of(await self.run(statement, parameters, timeout, prefix))

    async def fetch_value(
        self,
        statement: Any,
        parameters: Any = None,
        timeout: float | None = None,
        prefix: str = "",
    ) -> Any:
        """Run a statement and return the first value of its first row, or None."""
        cursor = await self.run(statement, parameters, timeout, prefix)
        row = cursor.fetchone() if cursor.description is not None else None
        return row[0] if row else None

    async def execute(
        self,
        statement: Any,
        parameters: Any = None,
        timeout: float | None = None,
        prefix: str = "",
    ) -> Result:
        """Run a statement and return what it did."""
        cursor = await self.run(statement, parameters, timeout, prefix)
        return Result(cursor.rowcount, cursor.statusmessage or "")

    async def run(
        self,
        statement: Any,
        parameters: Any = None,
        timeout: float | None = None,
        prefix: str = "",
    ) -> Cursor:
        """Run a statement and return psycopg2's cursor, its result in memory.

        Read the cursor before the next statement starts: psycopg2 allows it no later.

        Args:
            statement: a string with psycopg2's parameters, or a `psycopg2.sql` object.
            parameters: their values.
            timeout: seconds; None for no limit.
            prefix: a statement to send in front, in the same message.

        Raises:
            DatabaseError: what the server said.
            StatementTimeout: `timeout` seconds have passed; the statement is being cancelled.
            InterfaceError: another task's statement is on this connection.
        """
        if self._settling is not None:
            await self.settle()
        pending = self.start(prefix + self._text(statement) if prefix else statement, parameters)
        if timeout is None:
            try:
                return await pending
            except asyncio.CancelledError:
                self.abandon()
                raise
        timer = self._loop.call_later(timeout, self._expire, pending, timeout)
        try:
            return await pending
        except asyncio.CancelledError:
            self.abandon()
            raise
        finally:
            timer.cancel()

    def start(self, statement: Any, parameters: Any = None) -> asyncio.Future[Cursor]:
        """Send a statement; the future has its cursor when the whole result is here.

        Whoever stops waiting for the future calls `abandon()`.
        """
        if self._pending is not None:
            raise InterfaceError("another statement is running on this connection")
        if self._raw.closed:
            raise self.loss or InterfaceError("the connection is closed")
        if statement.__class__ is str and "\0" in statement:
            raise InterfaceError("a statement cannot contain the character NUL")
        try:
            cursor = self._raw.cursor()
            cursor.execute(statement, parameters)
        except psycopg2.Error as error:
            if self._raw.closed:
                raise self._break(error) from None
            raise adopt(error) from None
        self._cursor = cursor
        pending: asyncio.Future[Cursor] = self._loop.create_future()
        self._pending = pending
        if len(cursor.query or b"") > _SENT_AT_ONCE:
            self._advance()
        return pending

    def abandon(self) -> None:
        """Nobody waits for the running statement any longer: cancel it on the server."""
        if self._pending is not None and self._settling is None:
            self._settled = self._loop.create_future()
            self._settling = self._loop.create_task(self._end_statement(self._settled))

    async def settle(self) -> None:
        """Wait until an abandoned statement has ended; the connection is then idle, or closed."""
        if self._settling is not None:
            await asyncio.shield(self._settling)

    def _text(self, statement: Any) -> str:
        return statement.as_string(self._raw) if isinstance(statement, Composable) else statement

    def close(self) -> None:
        """End the connection; a statement that is under way fails. Closing twice is harmless."""
        if self._raw.closed and self._fd < 0:
            return
        self._forget_socket()
        self._raw.close()
        self._finish(ConnectionLost("the connection was closed while the statement was running"))

    # What the loop calls

    def _advance(self) -> None:
        """The socket is readable (or writable, if that was asked for): see what psycopg2 makes of it."""
        try:
            state = self._raw.poll()
            polls = self._polls
            while state == POLL_READ and (polls := polls - 1):
                state = self._raw.poll()
        except psycopg2.Error as error:
            if self._raw.closed:
                self._break(error)
            else:
                self._finish(adopt(error))
                if self._raw.get_transaction_status() == TRANSACTION_STATUS_ACTIVE:
                    self.close()  # COPY: psycopg2 refuses it, but leaves the server waiting for data
        else:
            if state == POLL_OK:
                if self._pending is not None:
                    self._finish(None)
            elif (state == POLL_WRITE) != self._writing:
                self._toggle_writer()
        if self._raw.notifies:
            self._deliver_notifications()

    def _finish(self, error: psycopg2.Error | None) -> None:
        """The running statement has ended, with or without an error: tell who waits."""
        pending, self._pending = self._pending, None
        cursor, self._cursor = self._cursor, None
        if self._writing:
            self._toggle_writer()
        if pending is not None and not pending.done():
            if error is None:
                assert cursor is not None  # noqa: S101 (set where _pending is)
                if cursor.description is None and cursor.statusmessage in _CHANGES_SESSION:
                    self.session_used = True
                pending.set_result(cursor)
            else:
                pending.set_exception(error)
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)

    def _break(self, error: psycopg2.Error) -> OperationalError:
        """The server has gone."""
        self._forget_socket()
        self.loss = lost = loss(error)
        self._finish(lost)
        if self.on_loss is not None:
            self.on_loss()
        return lost

    def _expire(self, pending: asyncio.Future[Cursor], timeout: float) -> None:
        """A statement's time is over."""
        if not pending.done():
            pending.set_exception(
                StatementTimeout(f"the statement took longer than its timeout of {timeout:g} s")
            )
            self.abandon()

    def _toggle_writer(self) -> None:
        self._writing = not self._writing
        if self._writing:
            self._loop.add_writer(self._fd, self._advance)
        elif self._fd >= 0:
            self._loop.remove_writer(self._fd)

    def _forget_socket(self) -> None:
        # At once, in the same callback: the next socket to be opened may get the same number.
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            if self._writing:
                self._toggle_writer()
            self._fd = -1

    def _deliver_notifications(self) -> None:
        arrived = self._raw.notifies[:]
        self._raw.notifies.clear()
        if self.on_notification is not None:
            for notification in arrived:
                self.on_notification(notification)

    async def _end_statement(self, settled: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT):
                if not settled.done():
                    await cancel(self._raw, self.address)
                await settled
        except (TimeoutError, Error):
            self.close()
        finally:
            self._settling = self._settled = None
