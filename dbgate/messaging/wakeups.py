"""Tell every process that topics have new messages: NOTIFY, after commit, many topics in one.

Up to PostgreSQL 18 a transaction that notifies holds a lock of the whole cluster until its commit is on
disk; so wakeups are sent by themselves, when the messages are already committed. While one is on its way
the next ones gather; the last is always sent.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from functools import lru_cache

from dbgate.errors import Error
from dbgate.gateway import Gateway
from dbgate.lifecycle import Background

CHANNEL = "dbgate"
EVERYTHING = "*"

_KEYS_PER_NOTIFY = 500  # of 13 bytes: below PostgreSQL's 8,000
_ATTEMPTS, _RETRY_DELAY = 5, 0.1
_LAST_SEND_TIMEOUT = 2.0


@lru_cache(maxsize=65536)
def key_of(topic: str) -> str:
    """What stands for a topic in a notification; `dbgate.topic_key()` computes the same."""
    return hashlib.sha256(topic.encode()).hexdigest()[:12]


class Wakeups:
    """The sender of one gateway."""

    def __init__(self, gate: Gateway) -> None:
        self._gate = gate
        self._background = Background("wakeups")
        self._keys: dict[str, None] = {}
        self._sending: asyncio.Task[None] | None = None

    def send(self, topics: Iterable[str]) -> None:
        """Wake whoever waits for these topics, in any process. Never waits, never fails."""
        self._keys.update((key_of(topic), None) for topic in topics)
        if self._sending is None:
            self._sending = self._background.spawn(self._send(), "sending")

    async def stop(self) -> None:
        """Send what is left, then stop."""
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=_LAST_SEND_TIMEOUT)
        await self._background.stop()

    async def _send(self) -> None:
        failures = 0
        try:
            while self._keys:
                keys = list(self._keys)[:_KEYS_PER_NOTIFY]
                for key in keys:
                    del self._keys[key]
                try:
                    await self._gate.execute("select pg_notify(%s, %s)", [CHANNEL, " ".join(keys)])
                except Error as error:
                    self._gate.trace("wakeups.failed", reason=error)
                    failures += 1
                    if failures == _ATTEMPTS:
                        break  # the readers' safety poll finds the messages
                    self._keys.update((key, None) for key in keys)
                    await asyncio.sleep(_RETRY_DELAY)
        finally:
            self._sending = None
