"""Options given by name, matched to what a class takes, with the near miss named."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from e2mc_hf.errors import UsageError


def build(kind: type[Any], options: Mapping[str, Any], parameter: str, *args: Any) -> Any:
    """Build `kind(*args, **options)`; an unknown or unfit option is the user's error.

    Args:
        kind: Class to build; its signature says which options there are.
        options: Options by name.
        parameter: Name under which the user gave them, for the message.
        *args: Positional arguments that are not the user's.

    Raises:
        UsageError: If an option is unknown, or the class refuses its value.
    """
    names = [name for name in list(inspect.signature(kind).parameters)[len(args) :] if name not in ("args", "kwargs")]
    for name in options:
        if name not in names:
            raise UsageError(f"`{parameter}` has no option {name!r}. {suggestion(name, names)}")
    try:
        return kind(*args, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"`{parameter}` does not fit: {error}") from error


def suggestion(name: str, names: Iterable[str]) -> str:
    """Say which known names come near an unknown one."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names)}."
