"""Messages and pages of them: values that are parsed and encoded at most once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from dbgate.errors import InterfaceError
from dbgate.messaging import cursors

MAX_TOPIC_BYTES = 255
_SHOWN = 60


@dataclass(frozen=True, eq=False)
class Message:
    """A message as subscribers see it.

    Attributes:
        topic: where it was published.
        id: its place in the order of all messages.
        published_at: when, by the database's clock.
        cursor: follow from here to get what comes after it.
        payload_json: the payload, as it was stored.
        headers_json: the headers, as they were stored.
    """

    topic: str
    id: int
    published_at: datetime
    cursor: str
    payload_json: str = field(repr=False)
    headers_json: str = field(repr=False)

    @cached_property
    def payload(self) -> Any:
        """What was published, parsed from JSON."""
        return json.loads(self.payload_json)

    @cached_property
    def headers(self) -> dict[str, Any]:
        """What goes with it."""
        return json.loads(self.headers_json)  # type: ignore[no-any-return]

    @cached_property
    def encoded(self) -> bytes:
        """The JSON that goes to browsers. The payload's text passes through: it is not parsed for this."""
        return (
            f'{{"id":{self.id},"topic":{json.dumps(self.topic)},"payload":{self.payload_json},'
            f'"headers":{self.headers_json},"published_at":"{self.published_at.isoformat()}",'
            f'"cursor":"{self.cursor}"}}'
        ).encode()


@dataclass(frozen=True, eq=False)
class Page:
    """Some messages, in order, and the cursor from which to go on.

    One page object answers everybody who waited at the same place, so it is encoded once for all.
    """

    messages: tuple[Message, ...]
    cursor: str

    @cached_property
    def encoded(self) -> bytes:
        """The JSON that goes to browsers."""
        messages = b",".join([message.encoded for message in self.messages])
        return b'{"messages":[%b],"cursor":"%b"}' % (messages, self.cursor.encode())


class Published:
    """What `publish` returns: where the message got to.

    Inside a transaction the message is written just before COMMIT, so `id`, `cursor` and `published_at`
    are known once it has committed; asking earlier raises InterfaceError.
    """

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self._written: tuple[int, datetime, int] | None = None

    def __repr__(self) -> str:
        state = f"id={self.id}" if self._written else "not committed"
        return f"<Published {self.topic!r} {state}>"

    @property
    def id(self) -> int:
        """Its place in the order of all messages."""
        return self._known()[0]

    @property
    def published_at(self) -> datetime:
        """When it was written, by the database's clock."""
        return self._known()[1]

    @property
    def cursor(self) -> str:
        """Follow from here to get what comes after it."""
        id_, _, epoch = self._known()
        return cursors.encode(epoch, id_)

    def committed(self, id_: int, published_at: datetime, epoch: int) -> None:
        """The transaction that wrote it has committed."""
        self._written = (id_, published_at, epoch)

    def _known(self) -> tuple[int, datetime, int]:
        if self._written is None:
            raise InterfaceError(
                "the message's id and cursor are known once its transaction has committed"
            )
        return self._written


def checked_name(name: object) -> str:
    """The name of a topic, if it can be one.

    Raises:
        InterfaceError: it is empty, too long, or not text that PostgreSQL can hold.
    """
    if not isinstance(name, str):
        raise InterfaceError(f"a topic's name is a string, not {type(name).__name__}")
    shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise InterfaceError(f"the topic's name {shown} is not valid Unicode") from None
    if "\0" in name:
        raise InterfaceError(f"the topic's name {shown} contains the character NUL")
    if not 1 <= length <= MAX_TOPIC_BYTES:
        raise InterfaceError(
            f"the topic's name {shown} has {length} bytes; 1 to {MAX_TOPIC_BYTES} are allowed"
        )
    return name


def to_json(value: object, what: str) -> str:
    """JSON text that PostgreSQL accepts.

    Raises:
        InterfaceError: the value has no JSON form (NaN and infinity have none either).
    """
    try:
        return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InterfaceError(f"{what} cannot be written as JSON: {error}") from None
