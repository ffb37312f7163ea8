"""What the drivers and the callers' methods ask of an engine."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .effects import Ticket
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
        """Whether the caller itself is a worker, so that it may compute what is missing."""
        ...

    @property
    def ends_with_job(self) -> bool:
        """Whether this process may end as soon as its caller has done its job, and with it all that goes on beside."""
        ...

    @property
    def travels(self) -> bool:
        """Whether a flight travels in a message, so that the options of its call must be plain data."""
        ...

    @property
    def holder(self) -> str:
        """What names this process where a winner that computes may claim its flight at once; else ""."""
        ...

    def send(self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float) -> None:
        """Hand a flight to those who run it within `timeout` seconds, or raise `DispatchError`."""

    def asend(
        self, ticket: Ticket, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: float
    ) -> Awaitable[None]:
        """Do what `send` does, from asyncio, without blocking the loop."""
        ...

    def attendance(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Future[str] | None:
        """Find out, without waiting for it or raising, which workers could take the message of a call → in words.

        None or "" if that cannot be known.
        """

    def run_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a flight in this very thread, or without a ticket the bare task.

        Returns:
            With a ticket the reply of `effects.Dispatch`; without one the task's result.
        """

    def arun_here(self, ticket: Ticket | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Awaitable[Any]:
        """Do what `run_here` does, from asyncio, without blocking the loop."""
        ...
