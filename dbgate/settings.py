"""What a data source name means: which kind of source it is, and libpq's parameters in it."""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psycopg2
from psycopg2.extensions import parse_dsn

from dbgate.errors import SettingsError

DSN_VARIABLES = ("DBGATE_DSN", "DATABASE_URL")
"""The environment variables that give the DSN where none is named, the first that is set."""


class Kind(enum.Enum):
    """The kinds of sources that a gateway can stand before."""

    POSTGRESQL = "postgresql"
    EMBEDDED = "embedded"
    SERVICE = "service"


@dataclass(frozen=True)
class Source:
    """A data source name, understood.

    Attributes:
        kind: what it leads to.
        dsn: as it was given.
        conninfo: libpq's parameters by name (POSTGRESQL only).
    """

    kind: Kind
    dsn: str = field(repr=False)  # may hold a password
    conninfo: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def shown(self) -> str:
        """The DSN as people and logs may see it."""
        return masked(self.dsn)


def source_of(dsn: str | None) -> Source:
    """Understand a DSN.

    Args:
        dsn: `postgresql://…` or any libpq conninfo, `embedded:` or `embedded:PATH`, `http(s)://…`;
            None for what `$DBGATE_DSN` or `$DATABASE_URL` says.

    Raises:
        SettingsError: there is none, or it is not one of these.
    """
    if dsn is None:
        dsn = next((os.environ[name] for name in DSN_VARIABLES if os.environ.get(name)), None)
    if dsn is None:
        raise SettingsError(
            "no data source: pass a DSN such as 'postgresql://user@host/database' or 'embedded:', "
            f"or set ${' or $'.join(DSN_VARIABLES)}"
        )
    if dsn == "embedded" or dsn.startswith("embedded:"):
        return Source(Kind.EMBEDDED, dsn)
    if dsn.startswith(("http://", "https://")):
        if not urlsplit(dsn).hostname:
            raise SettingsError(f"the address of the query service has no host: {masked(dsn)!r}")
        return Source(Kind.SERVICE, dsn)
    return Source(Kind.POSTGRESQL, dsn, conninfo_of(dsn))


def conninfo_of(dsn: str) -> dict[str, str]:
    """The parameters in a libpq conninfo or URI.

    SQLAlchemy's spelling (`postgresql+psycopg2://`) is accepted, since that is what is at hand in many
    a configuration.

    Raises:
        SettingsError: libpq does not understand it.
    """
    plain = re.sub(r"^postgres(ql)?\+\w+://", "postgresql://", dsn)
    try:
        return {name: str(value) for name, value in parse_dsn(plain).items()}
    except psycopg2.ProgrammingError as error:
        reason = re.sub(r'"[^"]*"', "…", str(error).strip())  # libpq quotes what it choked on
        raise SettingsError(
            f"not a PostgreSQL connection string: {masked(dsn)!r} ({reason}); expected "
            "'postgresql://user@host:port/database' or 'host=… dbname=… user=…'"
        ) from None


def masked(dsn: str) -> str:
    """A DSN without its password."""
    dsn = re.sub(r"(//[^:/?#@]*):[^/?#]*@", r"\1:***@", dsn)
    return re.sub(r"(\b(?:ssl)?password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]+)", r"\1***", dsn)
