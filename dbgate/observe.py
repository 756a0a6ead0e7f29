"""The one seam through which dbgate tells what it does: it feeds the log, and a callback if there is one.

Every observation has a dotted name (`pool.connected`) and fields. The log gets it under the logger
`dbgate.<first part>`; metrics and traces hang on the callback. Statements and parameters never go
through here, so no secret can.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

Observer = Callable[[str, dict[str, Any]], None]
"""Called with the name and the fields of each observation."""

_log = logging.getLogger("dbgate.observe")


class Trace:
    """Where one gateway's observations go.

    Args:
        observer: called with each observation; what it raises is logged and goes no further.
    """

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = observer

    def __call__(self, name: str, *, level: int = logging.DEBUG, **fields: Any) -> None:
        """Tell that something happened."""
        logger = logging.getLogger(f"dbgate.{name.partition('.')[0]}")
        if logger.isEnabledFor(level):
            told = " ".join(f"{key}={value}" for key, value in fields.items())
            logger.log(level, "%s %s", name, told)
        if self._observer is not None:
            try:
                self._observer(name, fields)
            except Exception:  # noqa: BLE001 (it is the user's code)
                _log.exception("the observer failed at %s", name)
