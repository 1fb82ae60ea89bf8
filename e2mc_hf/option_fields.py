"""How an option is declared and checked: a dataclass field with its help text, and the form of every refusal."""

from dataclasses import field
from typing import Any

from e2mc_hf.errors import UsageError


def option(default: Any, help: str) -> Any:
    """Declare a dataclass field with its default and its help text."""
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, name: str, rule: str, got: object, remedy: str) -> None:
    """Raise a `UsageError` that names the parameter, the rule, the value got, and what to do."""
    if not condition:
        raise UsageError(f"`{name}` {rule}, got {got!r}. {remedy}")
