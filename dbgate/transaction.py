"""Transactions and savepoints.

BEGIN travels in front of the transaction's first statement, in the same message, so a transaction costs
one round trip more than its statements (COMMIT), not two; one that runs nothing costs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import psycopg2.errors
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INERROR

from dbgate.driver import Connection
from dbgate.errors import InterfaceError, SettingsError, class_for, with_code
from dbgate.queries import Method, Parameters, Queries, Statement

if TYPE_CHECKING:
    from dbgate.messaging import Topic, Topics

Isolation = Literal["read committed", "repeatable read", "serializable"]
"""PostgreSQL's isolation levels (manual, "Transaction Isolation")."""

T = TypeVar("T")
LastWork = Callable[["Transaction"], Awaitable[None]]
Aftermath = Callable[[], Awaitable[None]]


def begin_statement(
    isolation: Isolation | None = None, *, read_only: bool = False, deferrable: bool = False
) -> str:
    """The BEGIN of a transaction.

    Raises:
        SettingsError: there is no such isolation level.
    """
    if isolation not in (None, "read committed", "repeatable read", "serializable"):
        raise SettingsError(
            f"isolation={isolation!r}: expected 'read committed', 'repeatable read' or 'serializable'"
        )
    words = ["BEGIN"]
    if isolation:
        words.append(f"ISOLATION LEVEL {isolation.upper()}")
    if read_only:
        words.append("READ ONLY")
    if deferrable:
        words.append("DEFERRABLE")
    return " ".join(words)


class Transaction(Queries):
    """A transaction on one connection, or a savepoint inside one; made by `gate.transaction()`.

    It commits when its block ends and rolls back when its block raises. `tx.transaction()` is a
    savepoint: what fails inside it does not spoil what is around it.
    """

    def __init__(
        self,
        connection: Connection,
        begin: str,
        topics: Topics | None,
        parent: Transaction | None = None,
    ) -> None:
        self._connection = connection
        self._begin = begin
        self._topics = topics
        self._parent = parent
        self._names: Iterator[int] = parent._names if parent else itertools.count(1)  # noqa: SLF001 (own kind)
        self._savepoint = f"dbgate_{next(self._names)}" if parent else ""
        self._state: Literal["new", "open", "done"] = "new"
        self._before_commit: list[LastWork] = []
        self._after_commit: list[Aftermath] = []

    async def _run(
        self, method: Method[T], statement: Statement, parameters: Parameters, timeout: float | None
    ) -> T:
        if self._state != "open":
            raise InterfaceError(
                "the transaction has ended"
                if self._state == "done"
                else "enter the transaction first: `async with gate.transaction() as tx:`"
            )
        prefix = f"{self._begin};" if self._idle() else ""
        return await method(self._connection, statement, parameters, timeout, prefix)

    def topic(self, name: str) -> Topic:
        """A topic whose messages are published when, and only if, this transaction commits."""
        if self._topics is None:
            raise InterfaceError("topics are not available on this connection")
        return self._topics.topic(name, within=self)

    # Nesting and hooks

    def transaction(self) -> Transaction:
        """A savepoint: `async with tx.transaction() as inner: …`."""
        return Transaction(self._connection, self._begin, self._topics, parent=self)

    def before_commit(self, hook: LastWork) -> None:
        """Await `hook(transaction)` as the last thing before COMMIT; what it runs there is committed too.

        A hook given to a savepoint moves to the transaction around it once the savepoint is released, and
        is forgotten when it is rolled back.
        """
        self._before_commit.append(hook)

    def after_commit(self, hook: Aftermath) -> None:
        """Await `hook` once the transaction has committed."""
        self._after_commit.append(hook)

    # The block

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise InterfaceError("a transaction object serves for one `async with` only")
        if self._parent is not None:
            # Not folded into the first statement: if that one had a syntax error, PostgreSQL would run
            # neither, and the error would spoil the whole transaction instead of this part of it.
            await self._parent.execute(f"SAVEPOINT {self._savepoint}")
        self._state = "open"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                await self._finish()
            elif isinstance(error, Exception) and not self._connection.closed:
                await self._roll_back()
            # Else the task is being cancelled, or the server has gone: whoever gets the connection back
            # rolls it back, or closes it, without keeping this task.
        finally:
            self._state = "done"

    async def _finish(self) -> None:
        if self._parent is not None:
            if self._spoiled():
                await self._roll_back()
                raise self._failed_error()
            await self._parent.execute(f"RELEASE SAVEPOINT {self._savepoint}")
            self._parent._before_commit += self._before_commit  # noqa: SLF001 (own kind)
            self._parent._after_commit += self._after_commit  # noqa: SLF001 (own kind)
            return
        for hook in self._before_commit:
            await hook(self)
        if self._spoiled():
            # COMMIT would answer "ROLLBACK" and no error: nobody would know that the work is lost.
            await self._roll_back()
            raise self._failed_error()
        if not self._idle():
            await self._connection.run("COMMIT")
        for aftermath in self._after_commit:
            await aftermath()

    async def _roll_back(self) -> None:
        await self._connection.settle()
        if self._idle() or self._connection.closed:
            return
        if self._parent is not None:
            name = self._savepoint
            await self._connection.run(f"ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}")
        else:
            await self._connection.run("ROLLBACK")

    # What state it is in

    def _idle(self) -> bool:
        return self._connection.transaction_status == TRANSACTION_STATUS_IDLE

    def _spoiled(self) -> bool:
        return self._connection.transaction_status == TRANSACTION_STATUS_INERROR

    @staticmethod
    def _failed_error() -> Exception:
        original = psycopg2.errors.InFailedSqlTransaction
        message = (
            "the transaction was rolled back: one of its statements had failed, and that error was "
            "caught inside the block; use `async with tx.transaction():` around what may fail"
        )
        return with_code(class_for(original)(message), "25P02")
