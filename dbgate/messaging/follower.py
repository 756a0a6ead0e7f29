"""Follow topics for everybody in this process who waits: one read per topic and wakeup (T5).

One task does all the reading:

    a wakeup, a lost LISTEN connection or the safety poll makes feeds *due*
      → the task reads all due feeds in one statement
      → each feed grows
      → parties for which there are messages now get their page

Several topics share one order, so a party gets messages up to the least head of its topics; that is why
topics that are waited for together are read together.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from heapq import merge
from itertools import islice

from dbgate.errors import CursorExpired, Error, InterfaceError
from dbgate.gateway import Gateway
from dbgate.lifecycle import Background
from dbgate.messaging import schema
from dbgate.messaging.feed import (
    WANTS_FEEDS,
    Feed,
    Party,
    Place,
    bound_of,
    by_id,
    messages_after,
    remembered_from,
)
from dbgate.messaging.messages import Message, Page
from dbgate.messaging.reading import read
from dbgate.messaging.wakeups import CHANNEL, EVERYTHING

SAFETY_POLL_INTERVAL = 30.0
"""Seconds after which feeds that are waited for are read without a wakeup; bounds a lost one (T4)."""

_READ_LIMIT = 1000
_TOPICS_PER_READ = 1000
_FIRST_RECHECK, _LAST_RECHECK = 0.002, 0.25
_RETRY_DELAY = 0.5


class Follower:
    """The reader of one gateway's topics.

    Attributes:
        epoch: which installation and history the positions belong to.
        reads: how many statements have read feeds.
        rescued: how often the safety poll found messages of which no wakeup had told.
    """

    def __init__(self, gate: Gateway) -> None:
        self.epoch = 0
        self.reads = 0
        self.rescued = 0
        self._gate = gate
        self._background = Background("topics")
        self._feeds: dict[str, Feed] = {}
        self._by_key: defaultdict[str, list[Feed]] = defaultdict(list)
        self._parties: dict[Place, Party] = {}
        self._due: set[Feed] = set()
        self._polled: set[Feed] = set()
        self._wake = asyncio.Event()
        self._catching_up: dict[Place, asyncio.Task[tuple[list[Message], int]]] = {}
        self._starting: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Listen first, and only then let anybody read: what is published from now on wakes us.

        Raises:
            SchemaMissing: `dbgate migrate` has not been run.
            InterfaceError: the gateway is closed.
        """
        if self._stopped:
            raise InterfaceError("the gateway is closed")
        if self._starting is None or (self._starting.done() and self._starting.exception()):
            self._starting = asyncio.get_running_loop().create_task(self._start())
        await asyncio.shield(self._starting)

    async def stop(self) -> None:
        """Stop following. Everybody who waits is answered: nothing new."""
        self._stopped = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
        await self._background.stop()
        for party in list(self._parties.values()):
            self._answer(party, None)

    async def page(
        self, topics: tuple[str, ...], position: int | None, limit: int, wait: float
    ) -> tuple[list[Message], int] | Page:
        """The messages after a position, as soon as there are any.

        Args:
            topics: their names, without repetition.
            position: where the reader is; None for now.
            limit: messages to return at most.
            wait: seconds to wait for the first.

        Returns:
            what was found for this reader alone, with the position reached; or the page of everybody who
            waited at the same place.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        recheck = _FIRST_RECHECK
        if position is None:
            feeds = await self._live_feeds(topics, afresh=True)
            position = bound_of(feeds)
        while True:
            feeds = await self._live_feeds(topics)
            if position >= remembered_from(feeds):
                found = messages_after(feeds, position, limit)
                if not found:
                    # Whoever is up to date is at one place, wherever the last message was.
                    position = max(position, bound_of(feeds))
            else:
                found, position = await self._catch_up((topics, position, limit))
                if not found and position >= remembered_from(feeds):
                    continue
            remaining = deadline - loop.time()
            if found or remaining <= 0 or self._stopped:
                return found, position
            if position < remembered_from(feeds):
                # A publisher in flight holds one topic back, below what is remembered of another.
                await asyncio.sleep(min(recheck, remaining))
                recheck = min(recheck * 2, _LAST_RECHECK)
                continue
            page = await self._wait((topics, position, limit), feeds, remaining)
            if page is not None:
                return page

    # Feeds

    async def _live_feeds(self, topics: tuple[str, ...], *, afresh: bool = False) -> list[Feed]:
        """The feeds of these topics, once they are up to date; `afresh`: by a read that starts now."""
        if afresh:
            for topic in topics:
                self._feed(topic).stale = True
        while True:
            feeds = [self._feed(topic) for topic in topics]
            for feed in feeds:
                feed.used = True
            behind = [feed for feed in feeds if not feed.live]
            if self._stopped:
                if any(feed.head is None for feed in feeds):
                    raise InterfaceError("the gateway is closed")
                return feeds
            if not behind:
                return feeds
            self._make_due(behind)
            await self._wait((topics, -1, WANTS_FEEDS), feeds, SAFETY_POLL_INTERVAL)

    def _feed(self, topic: str) -> Feed:
        feed = self._feeds.get(topic)
        if feed is None:
            feed = self._feeds[topic] = Feed(topic)
            self._by_key[feed.key].append(feed)
        return feed

    def _forget(self, feed: Feed) -> None:
        del self._feeds[feed.topic]
        self._by_key[feed.key].remove(feed)
        if not self._by_key[feed.key]:
            del self._by_key[feed.key]

    async def _catch_up(self, place: Place) -> tuple[list[Message], int]:
        """Read for those who are further back than the feeds remember; once for all at one place."""
        task = self._catching_up.get(place)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._read_after(*place))
            self._catching_up[place] = task

            def done(task: asyncio.Task[tuple[list[Message], int]]) -> None:
                del self._catching_up[place]
                if not task.cancelled():
                    task.exception()  # whoever waited has it; if all have left, nobody misses it

            task.add_done_callback(done)
        return await asyncio.shield(task)

    async def _read_after(
        self, topics: tuple[str, ...], position: int, limit: int
    ) -> tuple[list[Message], int]:
        asked = {topic: (position, self._feed(topic).head or 0) for topic in topics}
        readings = await read(self._gate, asked, limit)
        epoch = next(iter(readings.values())).epoch
        if epoch != self.epoch:
            raise self._begin_anew(epoch)
        bound = min(reading.bound for reading in readings.values())
        found = merge(*(reading.messages for reading in readings.values()), key=by_id)
        messages = [message for message in islice(found, limit) if message.id <= bound]
        return messages, max(position, bound)

    # Waiting

    async def _wait(self, place: Place, feeds: Sequence[Feed], seconds: float) -> Page | None:
        """Wait at a place; None when something else has changed, or the time is over."""
        party = self._parties.get(place)
        if party is None:
            party = self._parties[place] = Party(place, feeds)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Page | None] = loop.create_future()
        party.waiting.add(waiter)
        timer = loop.call_later(seconds, _resolve, waiter, None)
        try:
            return await waiter
        finally:
            timer.cancel()
            party.waiting.discard(waiter)
            if not party.waiting:
                self._dissolve(party)

    def _dissolve(self, party: Party) -> None:
        if self._parties.get(party.place) is party:
            del self._parties[party.place]
        party.dissolve()

    def _answer(self, party: Party, page: Page | None) -> None:
        self._dissolve(party)
        for waiter in party.waiting:
            _resolve(waiter, page)

    def _fail(self, party: Party, error: Error) -> None:
        self._dissolve(party)
        for waiter in party.waiting:
            if not waiter.done():
                waiter.set_exception(error)

    def _serve(self, party: Party) -> None:
        """Give a party its page, if there is one now."""
        _, position, limit = party.place
        if limit == WANTS_FEEDS:
            if all(feed.live for feed in party.feeds):
                self._answer(party, None)
        elif position < remembered_from(party.feeds):
            self._answer(party, None)  # more came at once than is kept: they have to catch up
        elif found := messages_after(party.feeds, position, limit):
            self._answer(party, Page(tuple(found), found[-1].cursor))

    # Wakeups

    def _on_notification(self, payload: str) -> None:
        if payload == EVERYTHING:
            self._on_reset()
            return
        woken = [feed for key in payload.split() for feed in self._by_key.get(key, ())]
        self._polled.difference_update(woken)
        self._woken(woken)

    def _on_reset(self) -> None:
        self._gate.trace("topics.reset", feeds=len(self._feeds))
        self._woken(self._feeds.values())

    def _woken(self, feeds: Iterable[Feed]) -> None:
        """There may be something new: read it if somebody waits, else when somebody comes."""
        for feed in feeds:
            feed.stale = True
        self._make_due([feed for feed in feeds if feed.parties])

    def _make_due(self, feeds: Iterable[Feed]) -> None:
        self._due.update(feeds)
        if self._due:
            self._wake.set()

    # The one task that reads, and the one that makes sure that it does

    async def _start(self) -> None:
        await self._gate.listener.listen(CHANNEL, self._on_notification, self._on_reset)
        self.epoch = await schema.epoch_of(self._gate)
        self._background.spawn(self._follow(), "following")
        self._background.spawn(self._poll(), "safety poll")

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        recheck = _FIRST_RECHECK
        while True:
            await self._wake.wait()
            self._wake.clear()
            due = list({other: None for feed in self._due for other in _companions(feed)})
            self._due = set()
            try:
                held = await self._read_due(due)
            except Error as error:
                self._failed(due, error)
                continue
            if held:
                # A publisher is in flight. If it commits there will be a wakeup, but if it rolls back
                # nobody tells; so look again soon.
                loop.call_later(recheck, self._woken, held)
                recheck = min(recheck * 2, _LAST_RECHECK)
            else:
                recheck = _FIRST_RECHECK

    async def _read_due(self, due: list[Feed]) -> list[Feed]:
        """Read feeds from their heads on; returns those which a publisher in flight holds back."""
        held: list[Feed] = []
        for start in range(0, len(due), _TOPICS_PER_READ):
            some = due[start : start + _TOPICS_PER_READ]
            for feed in some:
                feed.stale = (
                    False  # now, not afterwards: a wakeup during the read makes it stale again
                )
            asked = {feed.topic: (feed.head, feed.head or 0) for feed in some}
            readings = await read(self._gate, asked, _READ_LIMIT)
            self.reads += 1
            self._gate.trace("topics.read", topics=len(some))
            epoch = next(iter(readings.values())).epoch
            if epoch != self.epoch:
                self._begin_anew(epoch)
                return []
            for feed in some:
                reading = readings[feed.topic]
                feed.grow(reading)
                if reading.cut:
                    self._make_due([feed])
                elif reading.held:
                    held.append(feed)
                if feed in self._polled:
                    self._polled.discard(feed)
                    self.rescued += bool(reading.messages)
            for party in {party: None for feed in some for party in feed.parties}:
                self._serve(party)
        return held

    def _failed(self, due: list[Feed], error: Error) -> None:
        """A read failed: who came for the first time is told, who waits goes on waiting."""
        self._gate.trace("topics.read_failed", reason=error)
        for feed in due:
            feed.stale = True
        for party in {party: None for feed in due for party in feed.parties}:
            if party.place[2] == WANTS_FEEDS:
                self._fail(party, error)
        asyncio.get_running_loop().call_later(_RETRY_DELAY, self._woken, due)

    async def _poll(self) -> None:
        """Read what is waited for even if no wakeup came, and forget what nobody wants any longer."""
        while True:
            await asyncio.sleep(SAFETY_POLL_INTERVAL * random.uniform(0.8, 1.2))  # noqa: S311 (jitter)
            for feed in list(self._feeds.values()):
                if feed.parties:
                    self._polled.add(feed)
                elif feed.used:
                    feed.used = False
                else:
                    self._forget(feed)
            self._make_due(self._polled)

    def _begin_anew(self, epoch: int) -> CursorExpired:
        """The database has failed over: positions from before mean nothing now."""
        self._gate.trace("topics.epoch_changed", before=self.epoch, now=epoch)
        self.epoch = epoch
        self._feeds.clear()
        self._by_key.clear()
        self._due.clear()
        self._polled.clear()
        error = CursorExpired(
            "the database has failed over: fetch the state again and follow from 'now'"
        )
        for party in list(self._parties.values()):
            self._fail(party, error)
        return error


def _companions(feed: Feed) -> Iterable[Feed]:
    yield feed
    for party in feed.parties:
        if len(party.feeds) > 1:
            yield from party.feeds


def _resolve(waiter: asyncio.Future[Page | None], page: Page | None) -> None:
    if not waiter.done():
        waiter.set_result(page)
