"""Put a gateway together from a DSN: the one place that knows all kinds of them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from dbgate.embedded import EmbeddedServer, path_of
from dbgate.gateway import Gateway
from dbgate.messaging import Topics
from dbgate.observe import Observer
from dbgate.pool import PoolSettings
from dbgate.settings import Kind, conninfo_of, source_of

G = TypeVar("G", bound=Gateway)


class Connecting(Generic[G]):
    """What `connect()` returns: `await` it, or use it in `async with`."""

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, G]]) -> None:
        self._opening = opening
        self._gateway: G | None = None

    def __await__(self) -> Generator[Any, Any, G]:
        return self._opening().__await__()

    async def __aenter__(self) -> G:
        self._gateway = await self._opening()
        return self._gateway

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._gateway is not None:
            await self._gateway.close()


def connect(
    dsn: str | None = None,
    *,
    min_size: int = 1,
    max_size: int = 10,
    acquire_timeout: float | None = 30.0,
    observer: Observer | None = None,
) -> Connecting[Gateway]:
    """Connect to a database: `async with dbgate.connect(…) as gate:` or `gate = await dbgate.connect(…)`.

    Args:
        dsn: `postgresql://…` or any libpq conninfo; `embedded:` (a private PostgreSQL that keeps nothing) or
            `embedded:PATH` (one that keeps its data there); None for `$DBGATE_DSN`, else `$DATABASE_URL`.
        min_size: connections to hold open.
        max_size: connections to have at most.
        acquire_timeout: seconds that a call waits for a connection; None for as long as it takes.
        observer: called with the name and the fields of whatever happens (see `dbgate.observe`).

    Raises:
        SettingsError: the DSN or an option cannot be used.
        OperationalError, ConnectTimeout: the server cannot be reached.
    """
    source = source_of(dsn)
    settings = PoolSettings(
        min_size=min_size, max_size=max_size, acquire_timeout=acquire_timeout
    )

    async def opening() -> Gateway:
        if source.kind is Kind.EMBEDDED:
            server = await EmbeddedServer.start(path_of(source.dsn))
            gate = Gateway(conninfo_of(server.dsn), settings, observer)
            gate.on_close(server.close)
        else:
            gate = Gateway(source.conninfo, settings, observer)
        gate.topics = Topics(gate)
        try:
            await gate.start()
        except BaseException:
            await gate.close()
            raise
        return gate

    return Connecting(opening)
