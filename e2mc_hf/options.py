"""Options given by name, matched to what a class takes, with the near miss named."""

import difflib
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from e2mc_hf.errors import UsageError

_MOST_NAMED = 20


def build(kind: type[Any], options: Mapping[str, Any], parameter: str, *args: Any) -> Any:
    """Build `kind(*args, **options)`; an unknown or unfit option is the user's error.

    Args:
        kind: Class to build; its signature says which options there are.
        options: Options by name.
        parameter: Name under which the user gave them, for the message.
        *args: Positional arguments that are not the user's.

    Raises:
        UsageError: If an option is unknown, its value is not of its type, or the class refuses it.
    """
    parameters = list(inspect.signature(kind).parameters.values())[len(args) :]
    annotations = {own.name: own.annotation for own in parameters if own.name not in ("args", "kwargs")}
    for name, value in options.items():
        if name not in annotations:
            raise UsageError(f"`{parameter}` has no option {name!r}. {suggestion(name, annotations)}")
        if not _is_of(annotations[name], value):
            expected = inspect.formatannotation(annotations[name])
            raise UsageError(f"`{parameter}` takes {name!r} of type {expected}, got {value!r}. Correct it.")
    try:
        return kind(*args, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"`{parameter}` does not fit: {error}") from error


def suggestion(name: str, names: Iterable[str]) -> str:
    """Say which known names come near an unknown one."""
    names = sorted(set(names))
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    if len(names) > _MOST_NAMED:
        return f"None of the {len(names)} there are is alike."
    return f"There are: {', '.join(names)}." if names else "There are none."


def _is_of(annotation: Any, value: Any) -> bool:
    """Whether a value is of a plain type, a literal or a union of them; any other annotation accepts everything."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of(part, value) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation) if annotation in (bool, str, type(None)) else True
