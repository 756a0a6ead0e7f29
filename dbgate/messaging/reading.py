"""Read topics from the database, gap-free: the Python side of `dbgate.read_batch()`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import psycopg2.errors

from dbgate.gateway import Gateway
from dbgate.messaging import cursors
from dbgate.messaging.messages import Message

_SQL = (
    "select * from dbgate.read_batch(%s::text[], %s::bigint[], %s::bigint[], %s::int)"  # four steps
)


@dataclass(slots=True)
class Reading:
    """What was read of one topic.

    Attributes:
        bound: everything up to here is settled, and in `messages` if it was asked for.
        held: a publisher in flight keeps the bound below the newest id.
        cut: there are more messages than were asked for.
        epoch: see `cursors`.
        messages: in order.
    """

    bound: int
    held: bool
    epoch: int
    cut: bool = False
    messages: list[Message] = field(default_factory=list)


async def read(
    gate: Gateway, asked: Mapping[str, tuple[int | None, int]], limit: int
) -> dict[str, Reading]:
    """Read several topics in one statement.

    Args:
        gate: where.
        asked: for each topic the position to read after (None: only find out where it ends), and a
            position that is known to be settled.
        limit: messages of each topic at most.
    """
    after = [position for position, _ in asked.values()]
    settled = [known for _, known in asked.values()]
    parameters = [list(asked), after, settled, limit]
    try:
        rows = await gate.fetch(_SQL, parameters)
    except psycopg2.errors.InvalidTransactionState:
        # The role or the database has another default; the steps must not share a snapshot.
        async with gate.transaction(isolation="read committed") as tx:
            rows = await tx.fetch(_SQL, parameters)
    readings: dict[str, Reading] = {}
    for topic, bound, held, epoch, id_, published_at, payload, headers in rows:
        reading = readings.get(topic)
        if reading is None:
            reading = readings[topic] = Reading(bound, held, epoch)
        if id_ is not None:
            cursor = cursors.encode(epoch, id_)
            reading.messages.append(Message(topic, id_, published_at, cursor, payload, headers))
    for reading in readings.values():
        if len(reading.messages) == limit:
            reading.cut = True
            reading.bound = reading.messages[-1].id
    return readings
