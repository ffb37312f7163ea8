"""Everything celery_memolock raises of its own accord, under one root; and the text of what others raise."""

from __future__ import annotations

from typing import Literal

__all__ = [
    "ArgumentError",
    "ConfigurationError",
    "DecodeError",
    "DispatchError",
    "EncodeError",
    "FlightFailed",
    "MemoLockError",
    "NothingStale",
    "OptionError",
    "ReentrantFlight",
    "RemoteTraceback",
    "StoreUnavailable",
    "TaskFailed",
    "ValueTooLarge",
    "WaitTimeout",
    "described",
    "text_of",
]


class MemoLockError(Exception):
    """The root: `except MemoLockError` catches whatever the library itself raises."""


class ConfigurationError(MemoLockError):
    """The library cannot work as set up: no Redis named, no Celery app found, or several to choose from."""


class OptionError(ConfigurationError, ValueError):
    """An option is unknown, missing or has a value that makes no sense; the message names it."""


class ArgumentError(MemoLockError, TypeError):
    """An argument of a call cannot become part of a key; the message names the argument and the cure."""


class StoreUnavailable(MemoLockError, ConnectionError):
    """Redis cannot be reached, or refused the command; the message names its address without the password.

    Attributes:
        refused: whether it is there and turns this user away, or has no such database: to try again is in vain until
            somebody changes the settings of one of the two.
    """

    def __init__(self, message: str = "", refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class DispatchError(MemoLockError):
    """The task's message could not be handed to the broker in time.

    Everybody who waited for that flight gets this error, and the key is free again at once.
    """


class WaitTimeout(MemoLockError, TimeoutError):
    """No outcome came within `wait_timeout`; the message says in which state the flight was and for how long.

    The flight itself goes on: only this caller stopped waiting. All fields are in `args`, so whatever rebuilds an
    exception keeps them.

    Attributes:
        task: the task's name.
        key: the key's, as the message shows it.
        state: of the flight: "PENDING", its message is on the way to the queue; "QUEUED", it waits for a worker;
            "RUNNING". None if that is not known, as the server did not answer, or the flight had just ended.
        seconds_in_state: for how long it had been in it; None if `state` is.
        waited: for how many seconds the caller did.
    """

    def __init__(
        self,
        message: str = "",
        task: str = "",
        key: str = "",
        state: Literal["PENDING", "QUEUED", "RUNNING"] | None = None,
        seconds_in_state: float | None = None,
        waited: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.args = (message, task, key, state, seconds_in_state, waited)
        self.task = task
        self.key = key
        self.state = state
        self.seconds_in_state = seconds_in_state
        self.waited = waited

    def __str__(self) -> str:
        return str(self.args[0])


class EncodeError(MemoLockError, TypeError):
    """A value cannot be serialised with the task's serializer."""


class ValueTooLarge(MemoLockError, ValueError):
    """A value, encoded or decompressed, exceeds `max_value_size`."""


class DecodeError(MemoLockError, ValueError):
    """A stored entry cannot be read: garbage, an unknown format, or a content type that is not accepted."""


class ReentrantFlight(MemoLockError, RuntimeError):
    """A task asked, while computing a key, for that very key (directly or through others)."""


class FlightFailed(MemoLockError):
    """A flight ended without a value and without an exception of the task itself.

    It was ignored or rejected by the task, is not registered on the worker, was revoked, crashed its workers too often,
    was handed out too often without being settled, or ended by a cancellation in its own code. The message says which.
    """


class NothingStale(MemoLockError, LookupError):
    """A task answered `not_modified` where no value is stored that could still hold."""


class TaskFailed(MemoLockError):
    """The task raised an exception that cannot be rebuilt safely in this process.

    Attributes:
        type_name: the exception's qualified name in the worker, such as ``"shop.errors:NoStock"``.
        message: its text.
    """

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(type_name, message)
        self.type_name = type_name
        self.message = message

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}"


class RemoteTraceback(Exception):
    """The worker's traceback as text: the `__cause__` of an exception that was raised in a worker."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def text_of(error: BaseException) -> str:
    """Return an exception's text, whatever its class does: to tell of one error must not end in another."""
    try:
        return str.__str__(str(error))  # plain text, of whatever subclass it is
    except BaseException:  # whatever that was, it is not what ended the run; `traceback` does the same
        return f"<unprintable {type(error).__name__}>"


def described(error: BaseException) -> str:
    """Return an exception's type and text, whatever its class does."""
    return f"{type(error).__name__}: {text_of(error)}"
