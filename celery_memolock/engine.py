"""What the drivers and the callers' methods ask of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .protocol import Ticket
    from .store import Store

__all__ = ["Engine"]


class Engine(Protocol):
    """What runs flights. Engines send and run; they hold no locking code."""

    @property
    def store(self) -> Store:
        """The server of this engine; raises `ConfigurationError` if none is named."""
        ...

    @property
    def eager(self) -> bool:
        """Whether everything runs in the caller, so that a server is optional."""
        ...

    @property
    def in_worker(self) -> bool:
        """Whether the caller itself is a task in a worker."""
        ...

    def send(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Hand a flight's message to the queue within `timeout` seconds, or raise `DispatchError`."""

    def run_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a flight in this very thread, or without a ticket the bare task → its result."""
