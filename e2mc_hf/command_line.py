"""Command lines made from the option dataclasses: a YAML recipe, flags that override it, and help on two screens."""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from e2mc_hf.errors import UsageError
from e2mc_hf.options import suggestion

Options = dict[str, Any]
Kind = TypeVar("Kind")
Groups = Mapping[str, type]  # title of the group -> dataclass of its options
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class OneLineParser(argparse.ArgumentParser):
    """Argument parser whose complaints are one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message alone, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with exit code 2 and one line on a `UsageError`; any other exception is a bug and stays whole."""
    try:
        yield
    except UsageError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}\n")
        sys.exit(2)


def build_parser(description: str, groups: Groups, epilog: str | None = None) -> OneLineParser:
    """Make a parser with one flag an option, grouped as the dataclasses are."""
    parser = OneLineParser(
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        usage="%(prog)s [options]",
        formatter_class=_formatter,
    )
    for title, kind in groups.items():
        group = parser.add_argument_group(title)
        for name, (annotation, field) in _options_of(kind).items():
            group.add_argument(
                f"--{name}",
                help=f"{field.metadata['help']}{_shown_default(field)}".replace("%", "%%"),
                default=argparse.SUPPRESS,
                **_arity(annotation),
            )
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=120)


def _arity(annotation: Any) -> dict[str, Any]:
    if annotation is bool:
        return {"nargs": "?", "const": "true", "metavar": "BOOL"}
    if typing.get_origin(annotation) is list:
        return {"nargs": "+", "metavar": "X"}
    if typing.get_origin(annotation) is dict:
        return {"nargs": "*", "metavar": "KEY=VALUE"}
    return {"metavar": {int: "N", float: "X"}.get(annotation, "NAME")}


def _shown_default(field: Any) -> str:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if default is None or default == {}:
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default).lower()
    return f" [{shown}]"


def read_options(namespace: argparse.Namespace, groups: Groups, recipe: str | None, rest: Sequence[str]) -> Options:
    """Options given by the recipe and by the flags; the flags win.

    Args:
        namespace: What the parser understood.
        groups: Groups of the parser.
        recipe: Path of a YAML file with options by name, or None.
        rest: Flags the parser does not know: fields of transformers.TrainingArguments, kept with YAML values.

    Raises:
        UsageError: If the recipe cannot be read, or a value is not of its option's type.
    """
    given: Options = (read_recipe(recipe) if recipe else {}) | vars(namespace) | _unknown_flags(rest)
    annotations = {name: annotation for kind in groups.values() for name, (annotation, _) in _options_of(kind).items()}
    return {
        name: _convert(name, annotations[name], value) if name in annotations else value
        for name, value in given.items()
    }


def read_recipe(path: str) -> Options:
    """Read a YAML recipe: a flat mapping from options to values.

    Raises:
        UsageError: If there is no such file, or it holds something else.
    """
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"`recipe` must be a YAML file, got {path!r}: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise UsageError(f"`recipe` must map options to values, got {type(recipe).__name__} in {path!r}.")
    return recipe


def take(options: Options, kind: Callable[..., Kind]) -> Kind:
    """Build a dataclass from those of the options that are its own, and remove them from `options`."""
    own = [field.name for field in dataclasses.fields(typing.cast(Any, kind)) if field.name in options]
    return kind(**{name: options.pop(name) for name in own})


def refuse_unknown(options: Options, known: Sequence[str]) -> None:
    """Raise a `UsageError` that names an option nobody took, and the nearest one there is."""
    for name in options:
        raise UsageError(f"`{name}` is not an option. {suggestion(name, known)}")


def _options_of(kind: type) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(kind)
    return {field.name: (_required(hints[field.name]), field) for field in dataclasses.fields(kind)}


def _required(annotation: Any) -> Any:
    """Annotation without its `| None`."""
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _unknown_flags(rest: Sequence[str]) -> Options:
    import yaml

    options: Options = {}
    name = None
    for word in rest:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            options[name] = yaml.safe_load(value) if value else True
        elif name is None:
            raise UsageError(f"{word!r} is not a flag. Flags start with --; the recipe comes first.")
        else:
            options[name] = yaml.safe_load(word)
    return options


def _convert(name: str, annotation: Any, value: Any) -> Any:
    """Value as its option's type, from YAML or from the words of a flag."""
    if value is None:
        return None
    origin = typing.get_origin(annotation)
    try:
        if origin is list:
            (item,) = typing.get_args(annotation)
            return [_scalar(item, part) for part in (value if isinstance(value, list) else [value])]
        if origin is dict:
            return value if isinstance(value, dict) else _key_values(value)
        return _scalar(annotation, value)
    except (KeyError, TypeError, ValueError) as error:
        kind = getattr(annotation, "__name__", str(annotation)) if origin is None else str(annotation)
        raise UsageError(
            f"`{name}` must be of type {kind}, got {value!r}. Correct it in the recipe or flag."
        ) from error


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else _TRUTH[str(value).lower()]
    if isinstance(value, (bool, list, dict)):
        raise TypeError(value)
    return kind(value)


def _key_values(words: Sequence[str]) -> Options:
    import yaml

    pairs = [word.partition("=") for word in words]
    if not all(separator for _, separator, _ in pairs):
        raise ValueError(words)
    return {key: yaml.safe_load(value) for key, _, value in pairs}
