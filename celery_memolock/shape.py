"""Values of a type: to plain data that any serializer takes, and back, by pydantic or, for attrs classes, by cattrs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final, get_type_hints

from .errors import OptionError

__all__ = ["Shape"]


#: As text, bytes need not be UTF-8.
_ANY_BYTES: Final = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}


class Shape:
    """Turns values of one type into plain data and back.

    Args:
        task: the task's name, for messages.
        kind: the type.

    Raises:
        OptionError: the type is none that can be turned, or a package is missing; the message names it.
    """

    def __init__(self, task: str, kind: Any) -> None:
        pydantic = _module("pydantic", task)
        try:
            returned: Any = pydantic.TypeAdapter(kind)
            # Within a tuple, as pydantic takes no config of us for a dataclass itself. Models have one of their own.
            stored: Any = pydantic.TypeAdapter(tuple[kind], config=_ANY_BYTES)
        except pydantic.errors.PydanticSchemaGenerationError:
            converter: Any = _module("cattrs.preconf.json", task).make_converter()
            self.plain: Callable[[Any], Any] = lambda value: converter.unstructure(value, kind)
            self.value: Callable[[Any], Any] = lambda plain: converter.structure(plain, kind)
        else:
            self.plain = lambda value: stored.dump_python((returned.validate_python(value),), mode="json")[0]
            self.value = lambda plain: stored.validate_python((plain,))[0]

    @staticmethod
    def check(task: str, function: Callable[..., Any]) -> None:
        """Find out early whether a function says what it returns; what that is may not be defined yet.

        Raises:
            OptionError: it does not.
        """
        if getattr(function, "__annotations__", {}).get("return") in (None, "None"):
            raise OptionError(f"memolock option typed of task {task!r}: its function does not say what it returns")

    @classmethod
    def of(cls, task: str, function: Callable[..., Any]) -> Shape:
        """Return the shape of what a function says it returns.

        Raises:
            OptionError: as above, or it does not say.
        """
        cls.check(task, function)
        try:
            kind = get_type_hints(function)["return"]
        except NameError as error:
            raise OptionError(
                f"memolock option typed of task {task!r}: the types of its function cannot be read ({error}); "
                f"define them at the top of the module"
            ) from None
        return cls(task, kind)


def _module(name: str, task: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise OptionError(
            f"memolock option typed of task {task!r} needs {name.split('.')[0]}: pip install 'celery-memolock[typed]'"
        ) from None
