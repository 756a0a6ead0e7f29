"""Cursors: a place in the order of messages, as an opaque word that works on every process.

Inside are the epoch (which installation, and which history of it: it changes at a failover, after which
ids may be given out anew) and the id of the last message seen.
"""

from __future__ import annotations

import base64
import binascii
import struct

from dbgate.errors import CursorExpired, InvalidCursor

_FORMAT = struct.Struct(">qq")
_LENGTH = 22
_SHOWN = 40


def encode(epoch: int, position: int) -> str:
    """The word for a place."""
    return base64.urlsafe_b64encode(_FORMAT.pack(epoch, position)).decode().rstrip("=")


def decode(cursor: str, epoch: int) -> int:
    """The place that a word stands for.

    Args:
        cursor: what a client brought.
        epoch: the epoch of now.

    Raises:
        InvalidCursor: it is none, or belongs to another installation.
        CursorExpired: it is from before a failover.
    """
    try:
        if len(cursor) != _LENGTH:
            raise InvalidCursor(_not_one(cursor))
        then, position = _FORMAT.unpack(base64.b64decode(cursor + "==", b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError):
        raise InvalidCursor(_not_one(cursor)) from None
    if then == epoch and position >= 0:
        return int(position)
    if then >> 32 == epoch >> 32 and position >= 0:
        raise CursorExpired(
            "the cursor is from before a failover of the database, after which messages may be missing or "
            "numbered anew: fetch the state again and follow from 'now'"
        )
    raise InvalidCursor("the cursor belongs to another installation: start with 'now' or 'start'")


def _not_one(cursor: object) -> str:
    shown = repr(cursor)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return f"not a cursor: {shown}; use 'start', 'now', or the `cursor` of a message or page"
