"""Rows: immutable tuples whose values also go by their column's name.

Every result shape (its tuple of column names) gets one class, made once, so a row costs what a tuple
costs: `row.id` is a C-level slot and iterating, unpacking, comparing and hashing are the tuple's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

_RESERVED = frozenset({"as_dict", "columns"})


class _One(NamedTuple):
    value: Any


# The descriptor that `typing.NamedTuple` gives its fields: reads a tuple's place without leaving C.
_place_descriptor: Any = type(_One.value)


class Row(tuple[Any, ...]):
    """One row of a result.

    `row[0]`, `row["id"]`, `row.id` and `id, name = row` all work; a row equals the tuple of its values.
    Where two columns have the same name, the name means the last of them, as in a dict.
    A column whose name starts with an underscore, or is `as_dict` or `columns`, has no attribute of
    its own: use `row["as_dict"]`.

        >>> row = row_class(("id", "name"))((7, "Ada"))
        >>> row.id, row["name"], row[0], row.as_dict()
        (7, 'Ada', 7, {'id': 7, 'name': 'Ada'})
    """

    __slots__ = ()
    _columns: tuple[str, ...] = ()
    _places: dict[str, int] = {}  # noqa: RUF012 (one per subclass, never changed)

    def __getitem__(self, key: Any) -> Any:
        """The value at a position, in a slice, or of a column."""
        if key.__class__ is str:
            try:
                key = self._places[key]
            except KeyError:
                raise KeyError(
                    f"no column {key!r}; this row has: {', '.join(self._columns)}"
                ) from None
        return tuple.__getitem__(self, key)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The value of a column."""

    def __repr__(self) -> str:
        pairs = zip(self._columns, self, strict=True)
        return f"Row({', '.join(f'{name}={value!r}' for name, value in pairs)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by column names: the class is made again on the other side."""
        return _rebuild, (self._columns, tuple(self))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in order."""
        return self._columns

    def as_dict(self) -> dict[str, Any]:
        """The values by column name."""
        return dict(zip(self._columns, self, strict=True))


class Result(NamedTuple):
    """What a statement did, where its rows are of no interest."""

    rowcount: int
    """How many rows it touched; -1 where PostgreSQL does not count (DDL)."""
    status: str
    """PostgreSQL's command tag: `INSERT 0 3`, `CREATE TABLE`."""


@lru_cache(maxsize=4096)
def row_class(columns: tuple[str, ...]) -> type[Row]:
    """The class of rows that have these columns."""
    namespace: dict[str, Any] = {
        "__slots__": (),
        "__doc__": f"A row of ({', '.join(columns)}).",
        "_columns": columns,
        "_places": {name: place for place, name in enumerate(columns)},
    }
    for place, name in enumerate(columns):
        if not name.startswith("_") and name not in _RESERVED:
            namespace[name] = _place_descriptor(place, f"The column {name!r}.")
    return type("Row", (Row,), namespace)


def _rebuild(columns: tuple[str, ...], values: tuple[Any, ...]) -> Row:
    return row_class(columns)(values)
