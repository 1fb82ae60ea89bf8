"""Command lines made from the option dataclasses: a YAML recipe, flags that override it, and help on two screens."""

import argparse
import dataclasses
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from e2mc_hf.errors import CollapseError, NonFiniteError, UsageError
from e2mc_hf.options import suggestion

Options = dict[str, Any]
Kind = TypeVar("Kind")
Groups = Mapping[str, type]  # title of the group -> dataclass of its options
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# The core schema of YAML 1.2. PyYAML's 1.1 reads 1e-6 as text, no as false, 0123 as 83 and 2024-01-01 as a date.
_YAML_VALUES = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": "<<",
}


class OneLineParser(argparse.ArgumentParser):
    """Argument parser whose complaints are one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the message alone, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line and exit code 2 on a `UsageError`, 1 on a training that went wrong.

    Any other exception is a bug and stays whole.
    """
    try:
        yield
    except (UsageError, NonFiniteError, CollapseError) as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, UsageError) else 1)


def build_parser(description: str, groups: Groups, epilog: str | None = None) -> OneLineParser:
    """Make a parser with one flag an option, grouped as the dataclasses are."""
    parser = OneLineParser(
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        usage="%(prog)s [options]",
        formatter_class=_Formatter,
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


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=120)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Never break a name at its hyphen."""
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _arity(annotation: Any) -> dict[str, Any]:
    kinds = _kinds(annotation)
    metavar = {bool: "BOOL", int: "N", float: "X"}.get(kinds[0], "NAME")
    if kinds == [bool]:
        return {"nargs": "?", "const": "true", "metavar": metavar}
    origins = [typing.get_origin(kind) for kind in kinds]
    if dict in origins:
        return {"nargs": "*", "metavar": "KEY=VALUE"}
    if list in origins:
        return {"nargs": "+", "metavar": metavar if kinds[0] is str else "X"}
    return {"metavar": metavar}


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
    """Read a YAML 1.2 recipe: a flat mapping from options to values; an empty file gives none.

    Raises:
        UsageError: If there is no such file, or it holds something else.
    """
    import yaml

    try:
        recipe = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"`recipe` must be a YAML file, got {path!r}: {cause}. Check its path and text.") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        got = f"the names {list(recipe)}" if isinstance(recipe, dict) else f"a {type(recipe).__name__}"
        raise UsageError(f"`recipe` must map options to values, got {got} in {path!r}. Write lines `option: value`.")
    return recipe


def recipe_text(options: Options) -> str:
    """Write options as YAML that `read_recipe`, and any reader of YAML 1.1, reads back equal."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes what either version of YAML would not read as text."""

    _add_resolvers(Dumper)
    return yaml.dump(options, Dumper=Dumper, sort_keys=False)


def take(options: Options, kind: Callable[..., Kind]) -> Kind:
    """Build a dataclass from those of the options that are its own, and remove them from `options`.

    Raises:
        UsageError: If a value is not of its option's type, or the dataclass refuses it.
    """
    annotations = {name: annotation for name, (annotation, _) in _options_of(typing.cast(type, kind)).items()}
    own = {name: _convert(name, annotations[name], options.pop(name)) for name in annotations if name in options}
    try:
        return kind(**own)
    except UsageError:
        raise
    except ValueError as error:  # transformers' own checks say neither which option nor in which way
        message = " ".join(str(error).split())
        words = re.findall(r"\w+", message)
        at_fault = [name for word in words for name, value in own.items() if word in (name, str(value))]
        named = f"`{at_fault[0]}` {own[at_fault[0]]!r}" if at_fault else f"one of the {kind.__name__}"
        raise UsageError(f"{named} is refused: {message.rstrip('.')}. Pass another value.") from error


def refuse_unknown(options: Options, kinds: Sequence[type]) -> None:
    """Refuse an option that none of the dataclasses has, with the nearest one there is.

    Raises:
        UsageError: If there is one.
    """
    known = [name for kind in kinds for name in _options_of(kind)]
    for name in options:
        if name not in known:
            raise UsageError(f"`{name}` is not an option. {suggestion(name, known)}")


def _options_of(kind: type) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(kind)
    return {field.name: (hints[field.name], field) for field in dataclasses.fields(kind) if field.init}


def _kinds(annotation: Any) -> list[Any]:
    """Types an option may have, without None."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return [kind for kind in (typing.get_args(annotation) if is_union else [annotation]) if kind is not type(None)]


def _unknown_flags(rest: Sequence[str]) -> Options:
    words_of: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            words = words_of[name] = [value] if separator else []
        elif not words_of:
            raise UsageError(f"{word!r} is not a flag. Flags start with --; anything else comes before them.")
        else:
            words.append(word)
    values = {name: [_read_word(word) for word in words] for name, words in words_of.items()}
    return {name: parts if len(parts) > 1 else (parts or [True])[0] for name, parts in values.items()}


def _convert(name: str, annotation: Any, value: Any) -> Any:
    """Value as its option's type, from YAML or from the words of a flag."""
    kinds = _kinds(annotation)
    if (value is None and annotation not in kinds) or (isinstance(value, str) and str in kinds):
        return value
    for kind in kinds:
        try:
            return _as_kind(kind, value)
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    expected = " or ".join(str(kind) if typing.get_origin(kind) else kind.__name__ for kind in kinds)
    raise UsageError(f"`{name}` must be of type {expected}, got {value!r}. Correct it in the recipe or flag.")


def _as_kind(kind: Any, value: Any) -> Any:
    """Value as one type; any of four exceptions if it is none."""
    origin = typing.get_origin(kind) or kind
    if origin is list:
        (item,) = typing.get_args(kind)
        return [_scalar(item, part) for part in (value if isinstance(value, list) else [value])]
    if origin is dict:
        return _named(value) if isinstance(value, dict) else _key_values(value)
    return _scalar(kind, value)


def _scalar(kind: Any, value: Any) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else _TRUTH[str(value).lower()]
    # A number that reads as another one, or as other text, is refused: 2.7 as 2, a revision 12e45 as 1.2e+46.
    if value is None or isinstance(value, (bool, list, dict)) or (isinstance(value, float) and kind in (int, str)):
        raise TypeError(value)
    scalar = kind(value)
    if isinstance(scalar, float) and not math.isfinite(scalar):
        raise ValueError(value)
    return scalar


def _named(options: dict[Any, Any]) -> Options:
    if not all(isinstance(name, str) for name in options):
        raise TypeError(options)
    return options


def _key_values(words: Any) -> Options:
    if not isinstance(words, list):
        raise TypeError(words)
    pairs = [word.partition("=") for word in words]
    if not all(key and separator for key, separator, _ in pairs):
        raise ValueError(words)
    return {key: _read_word(value) for key, _, value in pairs}


def _read_word(word: str) -> Any:
    """One word of a command line as YAML reads it; text stays as it is."""
    import yaml

    try:
        value = _read_yaml(word)
    except (ValueError, RecursionError, yaml.YAMLError):
        return word
    return word if isinstance(value, str) and word[0] not in "'\"" else value


def _read_yaml(text: str) -> Any:
    import yaml

    return yaml.load(text, Loader=_yaml_loader())


@cache
def _yaml_loader() -> Any:
    """Class of a safe loader for YAML 1.2 that refuses a name given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            for position, name in enumerate(names):
                if name in names[:position]:
                    raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {}
    _add_resolvers(Loader)
    return Loader


def _add_resolvers(kind: Any) -> None:
    for tag, pattern in _YAML_VALUES.items():
        kind.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), None)
