"""What one process knows of a topic, and who waits for more of it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from heapq import merge
from itertools import islice

from dbgate.messaging.messages import Message, Page
from dbgate.messaging.reading import Reading
from dbgate.messaging.wakeups import key_of

KEPT_MESSAGES = 1000
"""Messages of a topic that stay in memory, for clients that come back for the next page."""

Place = tuple[tuple[str, ...], int, int]
"""Where readers are: topics, position, and how many messages they want at most."""

WANTS_FEEDS = 0
"""The limit of those who do not wait for messages, but for feeds to be live."""


class Feed:
    """What this process knows of one topic.

    Attributes:
        key: what stands for the topic in a notification.
        tail: every message after this position …
        head: … and up to this one, which is settled, is in `recent`. None: nothing read yet.
        stale: a read must start before the feed is up to date again.
        used: whether anybody asked since the last look for feeds that nobody needs.
        parties: who waits for it.
    """

    __slots__ = ("head", "key", "parties", "recent", "stale", "tail", "topic", "used")

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.key = key_of(topic)
        self.recent: deque[Message] = deque()
        self.tail = 0
        self.head: int | None = None
        self.stale = False
        self.used = True
        self.parties: set[Party] = set()

    @property
    def live(self) -> bool:
        """Whether what it knows is up to date, as far as wakeups tell."""
        return self.head is not None and not self.stale

    def grow(self, reading: Reading) -> None:
        """Take in what was read after `head`."""
        if self.head is None:
            self.tail = reading.bound
        self.recent.extend(reading.messages)
        self.head = reading.bound
        while len(self.recent) > KEPT_MESSAGES:
            self.tail = self.recent.popleft().id

    def after(self, position: int, bound: int) -> list[Message]:
        """The messages after a position that is not before `tail`, and up to `bound`."""
        found = []
        for message in reversed(self.recent):
            if message.id <= position:
                break
            if message.id <= bound:
                found.append(message)
        found.reverse()
        return found


class Party:
    """Everybody who waits at one place: they get the same page object, which is encoded once."""

    __slots__ = ("feeds", "place", "waiting")

    def __init__(self, place: Place, feeds: Sequence[Feed]) -> None:
        self.place = place
        self.feeds = feeds
        self.waiting: set[asyncio.Future[Page | None]] = set()
        for feed in feeds:
            feed.parties.add(self)

    def dissolve(self) -> None:
        """Nobody waits here any longer."""
        for feed in self.feeds:
            feed.parties.discard(self)


def bound_of(feeds: Iterable[Feed]) -> int:
    """Up to where several topics have one order: the least of their heads."""
    return min(feed.head or 0 for feed in feeds)


def remembered_from(feeds: Iterable[Feed]) -> int:
    """The earliest position from which all of these feeds remember every message."""
    return max(feed.tail for feed in feeds)


def messages_after(feeds: Sequence[Feed], position: int, limit: int) -> list[Message]:
    """The next messages of several feeds in their common order; the position must be remembered."""
    bound = bound_of(feeds)
    found = (feed.after(position, bound) for feed in feeds)
    return list(islice(merge(*found, key=by_id), limit))


def by_id(message: Message) -> int:
    """The order of messages."""
    return message.id
