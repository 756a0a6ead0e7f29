"""The client library under psycopg2: the few functions of libpq that psycopg2 does not show.

psycopg2 exposes its connection's `PGconn *` as `pgconn_ptr`, and looking a symbol up in psycopg2's own
extension module finds the very libpq that it was linked with; never load another one, since its
structures may differ. A pointer dangles once the connection is closed: every function here checks.

Manual: "libpq - C Library", https://www.postgresql.org/docs/current/libpq.html.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
from collections.abc import Callable
from typing import Any

from psycopg2 import _psycopg
from psycopg2.extensions import connection as RawConnection  # noqa: N812 (it is a class)

from dbgate.errors import InterfaceError, OperationalError

_lib = ctypes.CDLL(_psycopg.__file__)


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any] | None:
    """A function of libpq, or None where this libpq is too old to have it."""
    function: Any = getattr(_lib, name, None)
    if function is not None:
        function.restype = result
        function.argtypes = arguments
    return function  # type: ignore[no-any-return]


_set_error_verbosity = _function("PQsetErrorVerbosity", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_cancel_create = _function("PQcancelCreate", ctypes.c_void_p, ctypes.c_void_p)
_cancel_start = _function("PQcancelStart", ctypes.c_int, ctypes.c_void_p)
_cancel_poll = _function("PQcancelPoll", ctypes.c_int, ctypes.c_void_p)
_cancel_socket = _function("PQcancelSocket", ctypes.c_int, ctypes.c_void_p)
_cancel_error = _function("PQcancelErrorMessage", ctypes.c_char_p, ctypes.c_void_p)
_cancel_finish = _function("PQcancelFinish", None, ctypes.c_void_p)

has_cancel = _cancel_create is not None
"""Whether this libpq can cancel without blocking (17 and later; the wheel of psycopg2 has it)."""


class Verbosity(enum.IntEnum):
    """How much an error's message tells (`PGVerbosity`)."""

    TERSE = 0
    DEFAULT = 1
    VERBOSE = 2


class _Poll(enum.IntEnum):
    FAILED = 0
    READING = 1
    WRITING = 2
    OK = 3


def set_error_verbosity(raw: RawConnection, verbosity: Verbosity) -> None:
    """Choose how much the messages of errors on this connection tell."""
    assert _set_error_verbosity is not None  # noqa: S101 (every libpq has it)
    _set_error_verbosity(_pointer(raw), verbosity)


async def cancel(raw: RawConnection) -> None:
    """Ask the server to cancel the statement that runs on `raw`, without blocking the loop.

    When this returns, the server has sent its backend the signal; whether it came in time to stop the
    statement shows in the statement's result. The request goes to the very server that the connection
    is on (no name is looked up), encrypted if the connection is.

    Raises:
        OperationalError: the server could not be reached.
    """
    assert _cancel_create and _cancel_start and _cancel_poll  # noqa: S101, PT018 (has_cancel)
    assert _cancel_socket and _cancel_error and _cancel_finish  # noqa: S101, PT018 (has_cancel)
    request = _cancel_create(_pointer(raw))
    if not request:
        raise OperationalError("cannot cancel: out of memory")
    try:
        if not _cancel_start(request):
            raise OperationalError(f"cannot cancel: {_cancel_error(request).decode().strip()}")
        while (state := _cancel_poll(request)) != _Poll.OK:
            if state == _Poll.FAILED:
                raise OperationalError(f"cannot cancel: {_cancel_error(request).decode().strip()}")
            await socket_ready(_cancel_socket(request), write=state == _Poll.WRITING)
    finally:
        _cancel_finish(request)


async def socket_ready(fd: int, *, write: bool) -> None:
    """Wait once until a socket that somebody else owns can be read or written."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    if write:
        loop.add_writer(fd, wake)
    else:
        loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        if write:
            loop.remove_writer(fd)
        else:
            loop.remove_reader(fd)


def _pointer(raw: RawConnection) -> int:
    pointer = None if raw.closed else raw.pgconn_ptr
    if pointer is None:
        raise InterfaceError("the connection is closed")
    return pointer
