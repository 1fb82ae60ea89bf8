import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from e2mc_hf.arguments import DataArguments, RunArguments, option
from e2mc_hf.command_line import (
    build_parser,
    one_line_errors,
    read_options,
    read_recipe,
    recipe_text,
    refuse_unknown,
    take,
)
from e2mc_hf.errors import UsageError


@dataclass
class Kinds:
    """One option of every type there is."""

    count: int = option(3, "A number of things.")
    size: int | None = option(None, "A number, or nothing.")
    rate: float = option(1e-6, "100% a rate.")
    name: str = option("vicreg", "A name.")
    active: bool = option(True, "A switch.")
    shares: list[float] = option([0.5, 1.0], "Several rates.")  # noqa: RUF009
    extras: dict[str, Any] = option({}, "Options of something else.")  # noqa: RUF009
    trackers: str | list[str] | None = option("none", "A name or several.")  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.name == "wrong":
            raise ValueError("wrong is not a valid Method\n  Choose another.")
        if self.name == "worse":
            raise ValueError("this cannot be")


@dataclass
class Paths:
    """A second group."""

    output: str | None = option(None, "A file.")


GROUPS = {"kinds": Kinds, "paths": Paths}


def options_of_flags(*words: str, recipe: str | None = None) -> dict[str, Any]:
    namespace, rest = build_parser("A script.", GROUPS).parse_known_args(words)
    return read_options(namespace, GROUPS, recipe, rest)


@pytest.fixture
def options_of_yaml(tmp_path):
    """What a recipe with this text, and the flags after it, give."""

    def read(text: str, *words: str) -> dict[str, Any]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return options_of_flags(*words, recipe=str(path))

    return read


VALUES = [
    ("count", ["7"], "7", 7),
    ("count", ["-1"], "-1", -1),
    ("size", ["96"], "96", 96),
    ("rate", ["1e-6"], "1e-6", 1e-6),
    ("rate", ["1E5"], "1E5", 1e5),
    ("rate", [".5"], ".5", 0.5),
    ("rate", ["3"], "3", 3.0),
    ("name", ["swav"], "swav", "swav"),
    ("name", ["no"], "no", "no"),
    ("name", ["0123"], "0123", "0123"),
    ("name", ["2024-01-01"], "2024-01-01", "2024-01-01"),
    ("name", ["1:30"], "1:30", "1:30"),
    ("name", ["18"], "18", "18"),
    ("active", [], "true", True),
    ("active", ["true"], "True", True),
    ("active", ["false"], "false", False),
    ("active", ["no"], "no", False),
    ("active", ["ON"], "on", True),
    ("active", ["0"], "0", False),
    ("shares", ["0.1", "1e-2"], "[0.1, 1e-2]", [0.1, 0.01]),
    ("shares", ["0.1"], "0.1", [0.1]),
    ("extras", ["a=1", "b=1e-6", "c=true"], "{a: 1, b: 1e-6, c: true}", {"a": 1, "b": 1e-6, "c": True}),
    ("extras", ["a=x=y", "b=", "c=no"], "{a: x=y, b: , c: no}", {"a": "x=y", "b": None, "c": "no"}),
    ("extras", ["a=[1, 2]", "b={c: 1}"], "{a: [1, 2], b: {c: 1}}", {"a": [1, 2], "b": {"c": 1}}),
    ("extras", [], "{}", {}),
    ("trackers", ["wandb", "trackio"], "[wandb, trackio]", ["wandb", "trackio"]),
]


@pytest.mark.parametrize(("name", "words", "text", "value"), VALUES)
def test_a_flag_and_a_recipe_give_the_same_value_of_the_options_type(options_of_yaml, name, words, text, value):
    for options in (options_of_flags(f"--{name}", *words), options_of_yaml(f"{name}: {text}")):
        assert options == {name: value}
        assert type(options[name]) is type(value)


def test_an_option_that_may_be_one_or_several_is_read_as_either():
    assert options_of_flags("--trackers", "none") == {"trackers": ["none"]}


def test_one_or_several_in_a_recipe_stay_as_written(options_of_yaml):
    assert options_of_yaml("trackers: none") == {"trackers": "none"}


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null_is_a_value_of_options_that_may_be_left_out(options_of_yaml, text):
    assert options_of_yaml(f"size: {text}\ntrackers: {text}") == {"size": None, "trackers": None}


WRONG = [
    ("count", "x", "int", "'x'"),
    ("count", "2.7", "int", "2.7"),
    ("count", "1e3", "int", "1000.0"),
    ("count", "true", "int", "True"),
    ("count", "", "int", "None"),
    ("count", "[1]", "int", r"\[1\]"),
    ("size", "big", "int", "'big'"),
    ("rate", "fast", "float", "'fast'"),
    ("rate", ".inf", "float", "inf"),
    ("rate", "nan", "float", "'nan'"),
    ("rate", "false", "float", "False"),
    ("rate", "1" + "0" * 400, "float", "1000*"),
    ("name", "12e45", "str", r"1\.2e\+46"),
    ("name", "true", "str", "True"),
    ("name", "{a: 1}", "str", r"\{'a': 1\}"),
    ("name", "null", "str", "None"),
    ("active", "maybe", "bool", "'maybe'"),
    ("active", "2", "bool", "2"),
    ("shares", "[0.1, x]", r"list\[float\]", r"\[0.1, 'x'\]"),
    ("shares", "[[0.1]]", r"list\[float\]", r"\[\[0.1\]\]"),
    ("shares", "[null]", r"list\[float\]", r"\[None\]"),
    ("extras", "a=1", r"dict\[str, typing.Any\]", "'a=1'"),
    ("extras", "{1: 2}", r"dict\[str, typing.Any\]", r"\{1: 2\}"),
    ("trackers", "true", r"str or list\[str\]", "True"),
]


@pytest.mark.parametrize(("name", "text", "kind", "got"), WRONG)
def test_a_wrong_type_in_a_recipe_is_refused_with_option_type_and_value(options_of_yaml, name, text, kind, got):
    with pytest.raises(UsageError, match=rf"^`{name}` must be of type {kind}, got {got}\. Correct it"):
        options_of_yaml(f"{name}: {text}")


@pytest.mark.parametrize(
    ("words", "kind", "got"),
    [
        (["--count", "2.7"], "int", "'2.7'"),
        (["--rate", "inf"], "float", "'inf'"),
        (["--active", "maybe"], "bool", "'maybe'"),
        (["--shares", "0.1", "x"], r"list\[float\]", r"\['0.1', 'x'\]"),
        (["--extras", "a=1", "b"], r"dict\[str, typing.Any\]", r"\['a=1', 'b'\]"),
        (["--extras", "=1"], r"dict\[str, typing.Any\]", r"\['=1'\]"),
    ],
)
def test_a_wrong_type_in_a_flag_is_refused_with_option_type_and_value(words, kind, got):
    with pytest.raises(UsageError, match=rf"^`{words[0][2:]}` must be of type {kind}, got {got}\. Correct it"):
        options_of_flags(*words)


def test_flags_override_the_recipe_and_leave_its_other_options(options_of_yaml):
    text = "count: 5\nname: swav\nextras: {a: 1, b: 2}\nmax_grad_norm: 1"
    options = options_of_yaml(text, "--count", "6", "--extras", "b=3", "--max_grad_norm", "2")
    assert options == {"count": 6, "name": "swav", "extras": {"b": 3}, "max_grad_norm": 2}


def test_an_option_that_is_not_given_is_not_there():
    assert options_of_flags() == {}


def test_unknown_flags_are_kept_with_yaml_values():
    words = "--adam_epsilon 1e-6 --torch_compile --eval_steps=5 --run_name= --tf32 false --names a b --strategy no"
    assert options_of_flags(*words.split()) == {
        "adam_epsilon": 1e-6,
        "torch_compile": True,
        "eval_steps": 5,
        "run_name": None,
        "tf32": False,
        "names": ["a", "b"],
        "strategy": "no",
    }


@pytest.mark.parametrize("text", ["@me/model", "[1,", "a #1", "*star", "%d", "{", "!!int x", "'open"])
def test_a_flag_that_is_no_yaml_is_text(text):
    assert options_of_flags("--run_name", text) == {"run_name": text}
    assert options_of_flags("--extras", f"a={text}") == {"extras": {"a": text}}


def test_quotes_make_a_number_text():
    assert options_of_flags("--extras", "a='1e5'", "--run_name", '"7"') == {"extras": {"a": "1e5"}, "run_name": "7"}


def test_a_word_without_a_flag_is_refused():
    with pytest.raises(UsageError, match=r"'recipe.yaml' is not a flag\. Flags start with --"):
        options_of_flags("--count", "3", "recipe.yaml")


def test_flags_may_not_be_abbreviated():
    assert options_of_flags("--coun", "3") == {"coun": 3}


def test_an_unknown_option_is_refused_with_the_nearest_there_is():
    with pytest.raises(UsageError, match=r"^`learning_rat` is not an option\. Did you mean 'learning_rate'\?$"):
        refuse_unknown({"learning_rate": 1, "learning_rat": 1}, [RunArguments])


def test_options_of_any_of_the_groups_are_not_refused():
    refuse_unknown({"learning_rate": 1, "dataset": "digits"}, [RunArguments, DataArguments])


def test_an_empty_recipe_gives_no_options(options_of_yaml):
    assert options_of_yaml("") == options_of_yaml("# nothing yet\n") == options_of_yaml("---\n") == {}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"- count\n- 3\n", "must map options to values, got a list"),
        (b"count 3", "must map options to values, got a str"),
        (b"1: 2", r"must map options to values, got the names \[1\]"),
        (b"count: [1", "must be a YAML file, .*expected ',' or ']'"),
        (b"count: 1\n count: 2", "must be a YAML file"),
        (b"count: 1\ncount: 2", "must be a YAML file, .*'count' is given twice"),
        (b"{[1]: 2}", "must be a YAML file, .*unhashable"),
        (b"count: !!int x", "must be a YAML file, .*invalid literal"),
        (b"count: !!python/object:os.system x", "must be a YAML file, .*could not determine a constructor"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "must be a YAML file, .*can't decode"),
        (b"a\x00b", "must be a YAML file, .*special characters"),
        (b"[" * 5000, "must be a YAML file"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_one_line_with_its_path(tmp_path, content, cause):
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"^`recipe` {cause}.*") as caught:
        read_recipe(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match=f"^`recipe` must be a YAML file, got '{path}'"):
            read_recipe(str(path))


@given(st.binary(max_size=40) | st.text("ab01.:-[]{}#!&*?|>'\"%@`,<=~ \t\n", max_size=40).map(str.encode))
def test_any_file_is_a_recipe_or_a_usage_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    names, complaint = [], ""
    try:
        names = list(read_recipe(str(path)))
    except UsageError as error:
        complaint = str(error)
    assert all(isinstance(name, str) for name in names)
    assert "\n" not in complaint


def finite_floats() -> st.SearchStrategy[float]:
    return st.floats(allow_nan=False, allow_infinity=False)


def plain_values() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | finite_floats() | st.text(max_size=8)
    return scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=4), scalars, max_size=3)


ALL_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(),
        "size": st.none() | st.integers(),
        "rate": finite_floats(),
        "name": st.text()
        | st.sampled_from(["no", "1e5", "0123", "1:30", "null", "<<", "=", "2024-01-01", "0x1F", "~"]),
        "active": st.booleans(),
        "shares": st.lists(finite_floats(), max_size=3),
        "extras": st.dictionaries(st.text(max_size=8), plain_values(), max_size=3),
        "trackers": st.none() | st.text() | st.lists(st.text(), max_size=3),
        "output": st.none() | st.text(),
        "unknown_to_the_parser": plain_values(),
    },
)


@given(ALL_OPTIONS)
def test_any_options_written_as_a_recipe_are_read_back_equal(tmp_path_factory, options):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(recipe_text(options), encoding="utf-8")
    read = read_options(argparse.Namespace(), GROUPS, str(path), [])
    assert read == options
    assert {name: type(value) for name, value in read.items()} == {name: type(options[name]) for name in options}


@given(ALL_OPTIONS)
@settings(max_examples=100)
def test_a_written_recipe_reads_the_same_in_other_programs(options):
    assert yaml.safe_load(recipe_text(options)) == options


def test_a_written_recipe_keeps_the_order_of_the_options():
    assert list(yaml.safe_load(recipe_text({"rate": 1, "count": 2}))) == ["rate", "count"]


def test_a_dataclass_takes_its_own_options_and_leaves_the_others():
    options = {"count": 4, "output": "x", "other": 1}
    assert take(options, Kinds) == Kinds(count=4)
    assert options == {"output": "x", "other": 1}


def test_a_dataclass_takes_values_as_its_types():
    assert take({"rate": "1e-3", "active": "off", "shares": 1}, Kinds) == Kinds(rate=1e-3, active=False, shares=[1.0])


def test_a_dataclass_refuses_a_wrong_type_of_an_option_the_parser_did_not_know():
    with pytest.raises(UsageError, match=r"^`count` must be of type int, got 'x'\."):
        take({"count": "x"}, Kinds)


def test_a_value_that_a_dataclass_refuses_is_a_usage_error_in_one_line_with_the_option():
    with pytest.raises(UsageError, match=r"^`name` 'wrong' is refused: wrong is not a valid Method Choose another\. P"):
        take({"count": 3, "name": "wrong"}, Kinds)


def test_a_refusal_that_names_no_option_says_whose_options_were_refused():
    with pytest.raises(UsageError, match=r"^one of the Kinds is refused: this cannot be\. Pass another value\.$"):
        take({"count": 3, "name": "worse"}, Kinds)


def test_help_shows_every_option_its_help_and_its_default():
    text = " ".join(build_parser("A script.", GROUPS, "The end.").format_help().split())
    for kind in GROUPS.values():
        for field in dataclasses.fields(kind):
            assert f"--{field.name}" in text
            assert field.metadata["help"] in text
    for shown in ("[3]", "[1e-06]", "[true]", "[0.5 1.0]", "[vicreg]", "--extras [KEY=VALUE ...]", "The end."):
        assert shown in text
    assert "[none]" in text
    assert "[{}]" not in text


def test_a_flag_without_its_value_is_refused_in_one_line_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser("A script.", GROUPS).parse_known_args(["--count"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--count: expected one argument" in error


def test_a_usage_error_ends_with_exit_code_2_and_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise UsageError("`rate` is\n  wrong.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "script.py: error: `rate` is wrong.\n"


def test_any_other_exception_stays_whole():
    with pytest.raises(ValueError, match="a bug"), one_line_errors():
        raise ValueError("a bug")


def test_a_number_near_the_largest_is_still_finite(options_of_yaml):
    assert math.isfinite(options_of_yaml("rate: 1.7e+308")["rate"])
