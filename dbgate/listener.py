"""One LISTEN connection for the whole process, and many who wait on it.

Up to PostgreSQL 18 every NOTIFY wakes every listening session of its database, so a process has one. It
never sits in a transaction. When it is lost it comes back by itself; what was sent meanwhile is gone, so
everybody who waits is told to look again (`on_reset`): a notification is a hint, the table is the truth.

A connection can be dead without a word (a firewall that forgot it, a pooler that does not deliver), so
the listener notifies itself now and then, and reconnects when it does not hear it.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable

from psycopg2.sql import SQL, Composable, Identifier, Literal

from dbgate.driver import Connection, Notification
from dbgate.errors import ConnectionLost, Error
from dbgate.lifecycle import Background
from dbgate.observe import Trace

HEARTBEAT_INTERVAL = 15.0
"""Seconds between two notifications to oneself."""

HEARTBEAT_TIMEOUT = 5.0
"""Seconds in which one's own notification must be heard."""

_FIRST_RETRY, _LAST_RETRY = 0.05, 2.0
"""Seconds between attempts to reconnect: doubling, with jitter."""

OnNotification = Callable[[str], None]
OnReset = Callable[[], None]


class Listener:
    """The LISTEN connection of one gateway, opened when the first channel is wanted.

    Args:
        connector: opens a connection; not of the pool.
        trace: where to tell of losses and returns.

    Attributes:
        connects: how often it has connected.
    """

    def __init__(self, connector: Callable[[], Awaitable[Connection]], trace: Trace) -> None:
        self.connects = 0
        self._connector = connector
        self._trace = trace
        self._background = Background("listener")
        self._channels: dict[str, tuple[OnNotification, OnReset]] = {}
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()
        self._executing = asyncio.Lock()
        self._ready = asyncio.Event()
        self._lost = asyncio.Event()
        self._heard = asyncio.Event()
        self._own_channel = f"dbgate_{secrets.token_hex(8)}"

    @property
    def listening(self) -> bool:
        """Whether notifications can arrive at this moment, as far as is known."""
        return self._ready.is_set()

    @property
    def backend_pid(self) -> int | None:
        """The process on the server; None while not connected."""
        return self._connection.backend_pid if self._connection else None

    async def listen(
        self, channel: str, on_notification: OnNotification, on_reset: OnReset
    ) -> None:
        """Hear a channel from now on, for the listener's life. Returns once the server listens.

        Args:
            channel: its name, taken literally; at most 63 bytes.
            on_notification: called with each payload.
            on_reset: called when notifications may have been missed.

        Raises:
            OperationalError, ConnectTimeout: the server cannot be reached for the first time.
        """
        async with self._opening:
            self._channels[channel] = (on_notification, on_reset)
            if not len(self._background):
                await self._connect()
                self._background.spawn(self._keep_listening(), "listening")
            elif self._connection is not None:
                await self._execute(self._connection, _listen([channel]))
            else:
                await self._ready.wait()  # the next connection listens to every channel

    async def stop(self) -> None:
        """Stop listening and close the connection."""
        await self._background.stop()
        self._ready.clear()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _connect(self) -> None:
        connection = await self._connector()
        try:
            self._lost.clear()
            connection.on_loss = self._lost.set
            connection.on_notification = self._deliver
            await self._execute(connection, _listen([self._own_channel, *self._channels]))
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self.connects += 1
        self._trace("listener.connected", pid=connection.backend_pid)
        self._ready.set()

    async def _keep_listening(self) -> None:
        delay = _FIRST_RETRY
        while True:
            if self._connection is not None:
                reason = await self._until_deaf(self._connection)
                self._ready.clear()
                self._connection.close()
                self._connection = None
                self._trace("listener.lost", reason=reason)
            try:
                await self._connect()
            except Error as error:
                self._trace("listener.refused", reason=error)
                await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 (not for secrets)
                delay = min(delay * 2, _LAST_RETRY)
                continue
            delay = _FIRST_RETRY
            for _, on_reset in self._channels.values():
                on_reset()

    async def _until_deaf(self, connection: Connection) -> Error:
        """Wait until the connection is lost, or does not hear its own notification."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_INTERVAL):
                    await self._lost.wait()
            except TimeoutError:
                pass
            else:
                return connection.loss or ConnectionLost("the LISTEN connection was closed")
            self._heard.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_TIMEOUT):
                    await self._execute(
                        connection,
                        SQL("select pg_notify({}, '')").format(Literal(self._own_channel)),
                    )
                    await self._heard.wait()
            except (TimeoutError, Error) as error:
                if isinstance(error, Error):
                    return error
                return ConnectionLost(
                    f"its own notification did not arrive in {HEARTBEAT_TIMEOUT:g} s"
                )

    async def _execute(self, connection: Connection, statement: Composable) -> None:
        async with self._executing:  # a heartbeat and a new channel may want the connection at once
            await connection.execute(statement)

    def _deliver(self, notification: Notification) -> None:
        if notification.channel == self._own_channel:
            self._heard.set()
        elif notification.channel in self._channels:
            self._channels[notification.channel][0](notification.payload)


def _listen(channels: list[str]) -> Composable:
    return SQL("; ").join(SQL("listen {}").format(Identifier(channel)) for channel in channels)
