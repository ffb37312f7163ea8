"""Exceptions whose classes keep them from being told of as others are."""

from __future__ import annotations

__all__ = ["Askew", "Coded"]


class Coded(Exception):
    """To it `args` means something else."""

    args = None  # type: ignore[assignment]

    def __init__(self, code: object) -> None:
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class Askew(SyntaxError):
    """Of it `traceback` makes nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.filename, self.lineno, self.offset, self.text = 3, "x", "k", 5  # type: ignore[assignment]
