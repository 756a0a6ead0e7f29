"""Turn a finished statement's result into rows, without holding the event loop for long.

psycopg2 converts in C, 0.1–0.2 µs a value; ten thousand rows at once would stall every other task for
milliseconds. So big results are converted in slices, and other tasks run in between.
"""

from __future__ import annotations

import asyncio
from typing import Any

from psycopg2.extensions import cursor as Cursor  # noqa: N812 (it is a class)

from dbgate.rows import Row, row_class

_VALUES_PER_SLICE = 10_000
"""About 2 ms of converting."""


async def rows_from(cursor: Cursor) -> list[Row]:
    """All rows of a result; none where the statement returns no rows."""
    description = cursor.description
    if description is None:
        return []
    make = row_class(tuple([column[0] for column in description]))
    if cursor.rowcount * len(description) <= _VALUES_PER_SLICE:
        return list(map(make, cursor.fetchall()))
    slice_size = max(1, _VALUES_PER_SLICE // max(1, len(description)))
    rows: list[Row] = []
    while values := cursor.fetchmany(slice_size):
        rows.extend(map(make, values))
        await asyncio.sleep(0)
    return rows


def first_row_of(cursor: Cursor) -> Row | None:
    """The first row of a result; None where there is none."""
    description = cursor.description
    if description is None:
        return None
    values: tuple[Any, ...] | None = cursor.fetchone()
    if values is None:
        return None
    return row_class(tuple([column[0] for column in description]))(values)
