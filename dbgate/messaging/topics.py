"""Topics: publish to everybody who follows, now or later, in any process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

from psycopg2 import errors as sqlstates

from dbgate.errors import InterfaceError
from dbgate.gateway import Gateway
from dbgate.messaging import cursors, schema
from dbgate.messaging.follower import SAFETY_POLL_INTERVAL, Follower
from dbgate.messaging.messages import Message, Page, Published, checked_name, to_json
from dbgate.messaging.wakeups import Wakeups
from dbgate.queries import Queries
from dbgate.transaction import Transaction

START, NOW = "start", "now"
MAX_LIMIT = 1000

_PUBLISH = "select * from dbgate.publish_batch(%s::text[], %s::text[], %s::text[])"

Draft = tuple[Published, str, str]
"""A message to be: where to tell what became of it, its payload and its headers."""


class Topic:
    """One topic; made by `gate.topic(name)`, or by `tx.topic(name)` to publish within a transaction."""

    def __init__(self, topics: Topics, name: str, within: Transaction | None) -> None:
        self.name = checked_name(name)
        self._topics = topics
        self._within = within

    async def publish(self, payload: Any, *, headers: Mapping[str, Any] | None = None) -> Published:
        """Publish a message to everybody who follows the topic, now or later.

        Args:
            payload: anything that has a JSON form.
            headers: what goes with it.

        Returns:
            the message's `.id` and `.cursor`; within a transaction they are known once it has committed.

        Raises:
            SchemaMissing: `dbgate migrate` has not been run.
            InterfaceError: the payload or the headers have no JSON form.
        """
        published = Published(self.name)
        draft = (published, to_json(payload, "the payload"), to_json(headers or {}, "the headers"))
        if self._within is None:
            await self._topics.publish([draft])
        else:
            self._topics.publish_at_commit(self._within, draft)
        return published

    async def subscribe(self, cursor: str = NOW) -> AsyncIterator[Message]:
        """Follow the topic: `async for message in topic.subscribe():`.

        Args:
            cursor: "now", "start", or the cursor of the last message seen.

        Raises:
            InvalidCursor, CursorExpired: the cursor is of no use here.
        """
        while True:
            page = await self._topics.read([self.name], cursor=cursor, wait=SAFETY_POLL_INTERVAL)
            for message in page.messages:
                yield message
            cursor = page.cursor


class Topics:
    """All topics of one database; `gate.topics`."""

    def __init__(self, gate: Gateway) -> None:
        self.follower = Follower(gate)
        self._gate = gate
        self._wakeups = Wakeups(gate)
        self._outboxes: WeakKeyDictionary[Transaction, list[Draft]] = WeakKeyDictionary()
        gate.on_close(self.stop)

    def topic(self, name: str, within: Transaction | None = None) -> Topic:
        """A topic by its name.

        Raises:
            InterfaceError: this cannot be a topic's name.
        """
        return Topic(self, name, within)

    async def stop(self) -> None:
        """Send the last wakeups, and let go of everybody who waits."""
        await self._wakeups.stop()
        await self.follower.stop()

    async def read(
        self, topics: Sequence[str], *, cursor: str | None = None, limit: int = 100, wait: float = 0
    ) -> Page:
        """One page of the messages of several topics, in the one order that is the same for everybody.

        Args:
            topics: their names.
            cursor: "now" (or None), "start", or a cursor of an earlier message or page.
            limit: messages at most, up to 1,000.
            wait: seconds to wait for the first message, if there is none yet.

        Returns:
            `.messages` (none when the wait is over) and the `.cursor` to go on from.

        Raises:
            InvalidCursor: the cursor is not one of this installation.
            CursorExpired: the cursor is from before a failover.
            SchemaMissing: `dbgate migrate` has not been run.
            InterfaceError: no topic, an impossible name, an impossible limit or wait.
        """
        if isinstance(topics, str) or not topics:
            raise InterfaceError(f"topics={topics!r}: expected a list of at least one name")
        names = tuple(dict.fromkeys(checked_name(name) for name in topics))
        if not 1 <= limit <= MAX_LIMIT:
            raise InterfaceError(f"limit={limit}: expected 1 to {MAX_LIMIT}")
        if not wait >= 0:
            raise InterfaceError(f"wait={wait}: expected a number of seconds, 0 or more")
        await self.follower.start()
        epoch = self.follower.epoch
        position: int | None
        if cursor is None or cursor == NOW:
            position = None
        elif cursor == START:
            position = 0
        else:
            position = cursors.decode(cursor, epoch)
        answer = await self.follower.page(names, position, limit, wait)
        if isinstance(answer, Page):
            return answer
        messages, reached = answer
        if messages:
            return Page(tuple(messages), messages[-1].cursor)
        # Not `reached` for a cursor that was given: it holds for any set of topics, this one for these.
        kept = cursor if position is not None and cursor not in (None, START) else None
        return Page((), kept or cursors.encode(epoch, reached))

    async def publish(self, drafts: Sequence[Draft]) -> None:
        """Write messages in a transaction of their own, and wake who waits for them."""
        await self._write(self._gate, drafts)
        self._wakeups.send(published.topic for published, _, _ in drafts)

    def publish_at_commit(self, transaction: Transaction, draft: Draft) -> None:
        """Write a message as the last thing in a transaction, and wake who waits when it has committed.

        Last, so that the time in which readers have to look out for it is one commit long.
        """
        outbox = self._outboxes.get(transaction)
        if outbox is None:
            outbox = self._outboxes[transaction] = []
            written: list[tuple[Published, tuple[int, datetime, int]]] = []

            async def write(committing: Transaction, drafts: list[Draft] = outbox) -> None:
                written.extend(await self._insert(committing, drafts))

            async def announce() -> None:
                for published, place in written:
                    published.committed(*place)
                self._wakeups.send(published.topic for published, _ in written)

            transaction.before_commit(write)
            transaction.after_commit(announce)
        outbox.append(draft)

    async def _write(self, where: Queries, drafts: Sequence[Draft]) -> None:
        for published, place in await self._insert(where, drafts):
            published.committed(*place)

    @staticmethod
    async def _insert(
        where: Queries, drafts: Sequence[Draft]
    ) -> list[tuple[Published, tuple[int, datetime, int]]]:
        topics, payloads, headers = zip(
            *((published.topic, payload, headers) for published, payload, headers in drafts),
            strict=True,
        )
        try:
            rows = await where.fetch(_PUBLISH, [list(topics), list(payloads), list(headers)])
        except (sqlstates.InvalidSchemaName, sqlstates.UndefinedFunction) as error:
            raise schema.missing(error) from None
        return [
            (published, (row.id, row.published_at, row.epoch))
            for (published, _, _), row in zip(drafts, rows, strict=True)
        ]
