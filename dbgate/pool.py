"""Who holds which connection: a first-come, first-served pool.

A connection that comes back clean goes straight to whoever has waited longest, in the same step, without
a round trip. One that is not provably clean (a statement abandoned, a transaction open, session state
changed) is cleaned in the background first, or closed (D2). A connection that the server ended is
noticed while idle and replaced before anybody gets it (D3).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from psycopg2.extensions import TRANSACTION_STATUS_IDLE

from dbgate.driver import Connection
from dbgate.errors import (
    AcquireTimeout,
    Error,
    InterfaceError,
    OperationalError,
    SettingsError,
)
from dbgate.lifecycle import Background
from dbgate.observe import Trace

CLEANING_TIMEOUT = 5.0
"""Seconds that cleaning a connection may take; then it is closed."""

_FIRST_RETRY, _LAST_RETRY = 0.05, 0.5
"""Seconds between attempts to connect to a server that is down: doubling, with jitter."""

_PERMANENT = ("28", "3D", "0A", "42")
"""SQLSTATE classes of refusals that waiting does not cure: wrong password, no such database."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How large a pool is and how long its users wait.

    Attributes:
        min_size: connections to hold open even when nobody needs them.
        max_size: connections to have at most.
        acquire_timeout: seconds to wait for a connection; None for as long as it takes.
        close_timeout: seconds that statements under way get when the pool closes.
    """

    min_size: int = 1
    max_size: int = 10
    acquire_timeout: float | None = 30.0
    close_timeout: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_size <= self.max_size or self.max_size < 1:
            raise SettingsError(
                f"min_size={self.min_size} and max_size={self.max_size}: "
                "0 <= min_size <= max_size and 1 <= max_size must hold"
            )


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool at one moment.

    Attributes:
        size: connections that are open.
        idle: of these, ready for the next user.
        connecting: attempts to connect that are under way.
        waiting: users in the queue.
        acquired: connections handed out since the start.
        waited: of these, after standing in the queue.
        wait_seconds: how long those stood there together.
        lost: connections that the server ended.
    """

    size: int
    idle: int
    connecting: int
    waiting: int
    acquired: int
    waited: int
    wait_seconds: float
    lost: int


class Pool:
    """Connections to one server for many users.

    Args:
        connector: opens one connection.
        settings: sizes and time-outs.
        trace: where to tell of connections made and lost.
    """

    def __init__(
        self, connector: Callable[[], Awaitable[Connection]], settings: PoolSettings, trace: Trace
    ) -> None:
        self._connector = connector
        self._settings = settings
        self._trace = trace
        self._background = Background("pool")
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._waiters: OrderedDict[asyncio.Future[Connection], None] = OrderedDict()
        self._connecting = 0
        self._last_refusal: Error | None = None
        self._closing = False
        self._emptied = asyncio.Event()
        self._acquired = self._waited = self._lost = 0
        self._wait_seconds = 0.0

    async def start(self) -> None:
        """Open the first connection, and the rest of `min_size` in the background.

        Raises:
            OperationalError, ConnectTimeout: the server cannot be reached; told at once, not retried.
        """
        if self._settings.min_size:
            self._welcome(await self._connector())
            self._top_up()

    async def stop(self) -> None:
        """Let users finish (`close_timeout`), then close every connection."""
        self._closing = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(InterfaceError("the gateway was closed"))
        self._waiters.clear()
        for connection in self._idle[:]:
            self._discard(connection)
        if self._open:
            try:
                async with asyncio.timeout(self._settings.close_timeout):
                    await self._emptied.wait()
            except TimeoutError:
                self._trace("pool.forced", open=len(self._open))
        await self._background.stop()
        for connection in list(self._open):
            self._discard(connection)

    def take(self) -> Connection | None:
        """An idle connection, if there is one: the way in without waiting."""
        if not self._idle:
            return None
        self._acquired += 1
        return self._idle.pop()

    async def acquire(self, timeout: float | None = None) -> Connection:
        """A connection, after everybody who asked before.

        Args:
            timeout: seconds to wait at most; None for the pool's `acquire_timeout`.

        Raises:
            AcquireTimeout: none came free in time. Its cause is the server's last refusal to connect,
                if there was one.
            OperationalError: the server refuses for a reason that waiting does not cure.
            InterfaceError: the pool is closed.
        """
        if self._closing:
            raise InterfaceError("the gateway is closed")
        limit = self._settings.acquire_timeout if timeout is None else timeout
        while (connection := self.take()) is None:
            connection = await self._wait(limit)
            if not connection.closed:
                self._acquired += 1
                break
        return connection

    def release(self, connection: Connection) -> None:
        """Give a connection back, in whatever state it is. Never waits."""
        if connection.clean:
            self._offer(connection)
        elif connection.closed:
            self._discard(connection)
        else:
            self._background.spawn(self._clean(connection), "cleaning a connection")

    def stats(self) -> PoolStats:
        """The pool at this moment."""
        return PoolStats(
            size=len(self._open),
            idle=len(self._idle),
            connecting=self._connecting,
            waiting=len(self._waiters),
            acquired=self._acquired,
            waited=self._waited,
            wait_seconds=self._wait_seconds,
            lost=self._lost,
        )

    # Waiting

    async def _wait(self, limit: float | None) -> Connection:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Connection] = loop.create_future()
        self._waiters[waiter] = None
        self._top_up()
        started = time.monotonic()
        timer = None if limit is None else loop.call_later(limit, self._expire, waiter, limit)
        try:
            return await waiter
        except asyncio.CancelledError:
            self._waiters.pop(waiter, None)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._offer(waiter.result())  # it was handed over just as its user left
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._waited += 1
            self._wait_seconds += time.monotonic() - started

    def _expire(self, waiter: asyncio.Future[Connection], limit: float) -> None:
        if self._waiters.pop(waiter, self) is self or waiter.done():
            return
        refusal = self._last_refusal
        state = f"{len(self._open)} of {self._settings.max_size} open"
        told = f"; the server's last answer: {refusal}" if refusal else ""
        timeout = AcquireTimeout(f"no connection came free within {limit:g} s ({state}{told})")
        timeout.__cause__ = refusal
        waiter.set_exception(timeout)

    def _offer(self, connection: Connection) -> None:
        """Hand a clean connection to whoever has waited longest, or keep it."""
        if self._closing or connection.closed:
            self._discard(connection)
            return
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(connection)
                return
        self._idle.append(connection)

    # Connections

    def _top_up(self) -> None:
        """Start connecting, as far as users wait or `min_size` wants."""
        while not self._closing and len(self._open) + self._connecting < self._settings.max_size:
            short = len(self._open) + self._connecting < self._settings.min_size
            if not short and self._connecting >= len(self._waiters):
                break
            self._connecting += 1
            self._background.spawn(self._connect(), "connecting")

    async def _connect(self) -> None:
        """Connect, again and again while somebody needs it."""
        delay = _FIRST_RETRY
        try:
            while self._waiters or len(self._open) < self._settings.min_size:
                try:
                    self._welcome(await self._connector())
                    break
                except Error as refusal:
                    self._refused(refusal)
                await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 (not for secrets)
                delay = min(delay * 2, _LAST_RETRY)
        finally:
            self._connecting -= 1

    def _welcome(self, connection: Connection) -> None:
        self._last_refusal = None
        self._open.add(connection)
        connection.on_loss = lambda: self._on_loss(connection)
        self._trace("pool.connected", pid=connection.backend_pid, size=len(self._open))
        self._offer(connection)

    def _refused(self, refusal: Error) -> None:
        self._last_refusal = refusal
        self._trace("pool.refused", reason=refusal)
        code = refusal.sqlstate if isinstance(refusal, OperationalError) else None
        if isinstance(refusal, InterfaceError) or (code or "").startswith(_PERMANENT):
            while self._waiters:
                waiter, _ = self._waiters.popitem(last=False)
                if not waiter.done():
                    waiter.set_exception(refusal)

    def _on_loss(self, connection: Connection) -> None:
        self._lost += 1
        self._trace("pool.lost", reason=connection.loss)
        if connection in self._idle:
            self._discard(connection)

    def _discard(self, connection: Connection) -> None:
        connection.close()
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._closing and not self._open:
            self._emptied.set()
        self._top_up()

    async def _clean(self, connection: Connection) -> None:
        """Bring a connection back to its first state; close it if that cannot be done soon."""
        try:
            async with asyncio.timeout(CLEANING_TIMEOUT):
                await connection.settle()
                if connection.transaction_status != TRANSACTION_STATUS_IDLE:
                    await connection.execute("rollback")
                if connection.session_used:
                    await connection.execute("discard all")
                    connection.session_used = False
        except (Error, TimeoutError) as error:
            self._trace("pool.discarded", reason=error)
        if connection.clean:
            self._offer(connection)
        else:
            self._discard(connection)
