"""What time it is, here and on the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["Clock"]

#: Seconds after which the server is asked anew: its clock may have been set.
_GOOD_FOR: Final = 10.0


class Clock:
    """This process's monotonic clock, and the server's clock beside it.

    Args:
        monotonic: seconds from some moment on.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._offset = 0.0
        self._learnt = float("-inf")

    def __call__(self) -> float:
        """Return seconds from some moment on, for what happens in this process alone."""
        return self._monotonic()

    def server(self) -> int | None:
        """Return the server's time in microseconds since 1970; None if it is not known, or was learnt too long ago."""
        now = self._monotonic()
        if now - self._learnt > _GOOD_FOR:
            return None
        return int(now * 1e6 + self._offset)

    def learn(self, server: int, asked: float, answered: float) -> None:
        """The server said so, in answer to what was asked then.

        It may have said it as early as that. So the time that is told here is never behind the server's: what the
        server called stale before a call is stale to that call.
        """
        self._offset = server - asked * 1e6
        self._learnt = answered
