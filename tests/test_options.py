from typing import Any, Literal

import pytest

from e2mc_hf.errors import UsageError
from e2mc_hf.options import build, suggestion
from e2mc_hf.regularizers.e2mc import E2MCRegularizer


class Head:
    """A class with a positional argument and options of several types."""

    def __init__(
        self,
        width: int,
        depth: int = 3,
        *,
        rate: float = 0.5,
        window: int | None = None,
        kind: Literal["sigmoid", "normal_cdf"] = "sigmoid",
        bias: bool = False,
        name: str = "head",
        anything: Any = None,
        **kwargs: int,
    ) -> None:
        if depth < 1:
            raise ValueError("`depth` must be at least 1, got 0. The paper's is 3.")
        if anything == "a type error":
            raise TypeError("no such thing")
        self.options = (width, depth, rate, window, kind, bias, name, anything, kwargs)


class Bare:
    """A class without options."""

    def __init__(self) -> None:
        pass


def test_options_and_positional_arguments_reach_the_class():
    options = {"depth": 2, "rate": 1, "window": 5, "kind": "normal_cdf", "bias": True, "name": "x", "anything": [1]}
    assert build(Head, options, "head_args", 16).options == (16, 2, 1, 5, "normal_cdf", True, "x", [1], {})


def test_options_that_are_not_given_keep_their_defaults():
    assert build(Head, {}, "head_args", 16).options == (16, 3, 0.5, None, "sigmoid", False, "head", None, {})


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"^`head_args` has no option 'dept'\. Did you mean 'depth'\?$"):
        build(Head, {"dept": 2}, "head_args", 16)


@pytest.mark.parametrize("name", ["width", "self", "args", "kwargs", "other"])
def test_what_is_not_an_option_cannot_be_set(name):
    with pytest.raises(UsageError, match=f"^`head_args` has no option '{name}'"):
        build(Head, {name: 2}, "head_args", 16)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("depth", "2", "int"),
        ("depth", 2.5, "int"),
        ("depth", True, "int"),
        ("depth", None, "int"),
        ("rate", "1e-6", "float"),
        ("rate", True, "float"),
        ("rate", None, "float"),
        ("window", 2.5, r"int \| None"),
        ("kind", "tanh", r".*Literal\['sigmoid', 'normal_cdf'\]"),
        ("bias", 1, "bool"),
        ("name", 1, "str"),
    ],
)
def test_a_value_of_another_type_is_refused_with_option_type_and_value(name, value, kind):
    with pytest.raises(UsageError, match=rf"^`head_args` takes '{name}' of type {kind}, got {value!r}\. Correct it\.$"):
        build(Head, {name: value}, "head_args", 16)


def test_none_and_whole_numbers_are_accepted_where_they_fit():
    assert build(Head, {"window": None, "rate": 2}, "head_args", 16).options[2:4] == (2, None)


@pytest.mark.parametrize(
    ("options", "cause"), [({"depth": 0}, "`depth` must be at least 1, got 0"), ({"anything": "a type error"}, "no su")]
)
def test_a_value_the_class_refuses_is_the_users_error_with_its_cause(options, cause):
    with pytest.raises(UsageError, match=f"^`head_args` does not fit: {cause}") as caught:
        build(Head, options, "head_args", 16)
    assert isinstance(caught.value.__cause__, (TypeError, ValueError))


def test_a_class_without_options_says_so():
    with pytest.raises(UsageError, match=r"^`bare_args` has no option 'x'\. There are none\.$"):
        build(Bare, {"x": 1}, "bare_args")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"eps": "small"}, "takes 'eps' of type float, got 'small'"),
        ({"window": 2.5}, r"takes 'window' of type int \| None, got 2.5"),
        ({"estimator": "histogram"}, "takes 'estimator' of type .*'m_spacings', .*, got 'histogram'"),
        ({"entropy_weight": -1.0}, "does not fit: `entropy_weight` must not be negative, got -1.0"),
    ],
)
def test_the_options_of_the_criterion_are_checked_before_any_training(options, cause):
    with pytest.raises(UsageError, match=f"^`regularizer_args` {cause}"):
        build(E2MCRegularizer, options, "regularizer_args")


def test_a_near_name_is_suggested_and_else_all_are_listed_in_order():
    assert suggestion("e3mc", ["none", "e2mc"]) == "Did you mean 'e2mc'?"
    assert suggestion("zzz", ["none", "e2mc", "none"]) == "There are: e2mc, none."


def test_a_long_list_of_names_is_counted_instead():
    names = [f"option_{number}" for number in range(50)]
    assert suggestion("zzz", names) == "None of the 50 there are is alike."
