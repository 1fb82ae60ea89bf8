import dataclasses
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from e2mc_hf.arguments import (
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    ObjectiveArguments,
    RegularizerArguments,
    RunArguments,
    ViewArguments,
    option,
    require,
)
from e2mc_hf.errors import UsageError

KINDS = [
    DataArguments,
    EvaluationArguments,
    ModelArguments,
    ObjectiveArguments,
    RegularizerArguments,
    RunArguments,
    ViewArguments,
]
NAN = float("nan")
REFUSED = [
    (DataArguments, "max_samples", 0),
    (DataArguments, "max_samples", -1),
    (ViewArguments, "num_views", 1),
    (ViewArguments, "image_size", 7),
    (ViewArguments, "rotation_degrees", -1.0),
    (ViewArguments, "rotation_degrees", NAN),
    (ViewArguments, "crop_scale", []),
    (ViewArguments, "crop_scale", [0.5]),
    (ViewArguments, "crop_scale", [0.2, 0.5, 1.0]),
    (ViewArguments, "crop_scale", [0.0, 1.0]),
    (ViewArguments, "crop_scale", [0.9, 0.2]),
    (ViewArguments, "crop_scale", [0.5, 1.1]),
    (ViewArguments, "crop_scale", [NAN, 1.0]),
    (ViewArguments, "crop_scale", [0.5, NAN]),
    (ViewArguments, "num_small_views", -1),
    (ViewArguments, "small_image_size", 7),
    (ViewArguments, "interpolation", "nearest"),
    *[
        (ViewArguments, name, value)
        for name in ("small_crop_scale", "blur_sigma")
        for value in ([], [0.5], [0.2, 0.5, 1.0], [0.0, 1.0], [0.9, 0.2], [NAN, 1.0], [0.5, NAN])
    ],
    (ViewArguments, "small_crop_scale", [0.5, 1.1]),
    (ViewArguments, "blur_sigma", [0.5, 101.0]),
    (ViewArguments, "jitter_strength", [0.4, 0.4, 0.2]),
    (ViewArguments, "jitter_strength", [0.4, 0.4, -0.2, 0.1]),
    (ViewArguments, "jitter_strength", [0.4, 0.4, 0.2, 0.6]),
    (ViewArguments, "jitter_strength", [0.4, NAN, 0.2, 0.1]),
    (ViewArguments, "jitter_strength", [0.4, 0.4, 0.2, NAN]),
    (ViewArguments, "blur_prob", []),
    (ViewArguments, "blur_prob", [0.1, 0.2, 0.3]),
    (ViewArguments, "solarize_prob", [0.1, 0.2, 0.3]),
    *[
        (ViewArguments, name, value)
        for name in ("flip_prob", "jitter_prob", "grayscale_prob")
        for value in (-0.1, 1.1, NAN)
    ],
    *[
        (ViewArguments, name, value)
        for name in ("blur_prob", "solarize_prob")
        for value in ([-0.1], [0.5, 1.1], [NAN, 0.5])
    ],
    (EvaluationArguments, "label_fractions", []),
    (EvaluationArguments, "label_fractions", [0.0]),
    (EvaluationArguments, "label_fractions", [0.5, 1.1]),
    (EvaluationArguments, "label_fractions", [NAN]),
    (EvaluationArguments, "num_draws", 0),
    (EvaluationArguments, "num_neighbors", 0),
    (EvaluationArguments, "batch_size", 0),
    (EvaluationArguments, "num_workers", -1),
    (EvaluationArguments, "seed", -1),
    (RunArguments, "optimizer", "adam"),
    (RunArguments, "learning_rate", 0.0),
    (RunArguments, "learning_rate", NAN),
    (RunArguments, "per_device_train_batch_size", 0),
    (RunArguments, "logging_steps", 0.0),
    (RunArguments, "max_steps", 0),
    (RunArguments, "max_steps", -2),
    (RunArguments, "weight_decay", -1e-6),
    (RunArguments, "weight_decay", NAN),
    (RunArguments, "warmup_steps", -1.0),
    (RunArguments, "max_grad_norm", -1.0),
    (RunArguments, "seed", -1),
    (RunArguments, "dataloader_num_workers", -1),
    (RunArguments, "momentum", -0.1),
    (RunArguments, "momentum", 1.0),
    (RunArguments, "momentum", NAN),
]
ACCEPTED = [
    (DataArguments, "max_samples", 1),
    (ViewArguments, "image_size", 8),
    (ViewArguments, "rotation_degrees", 0.0),
    (ViewArguments, "crop_scale", [1.0, 1.0]),
    (ViewArguments, "num_small_views", 0),
    (ViewArguments, "small_image_size", 8),
    (ViewArguments, "small_crop_scale", [0.1, 0.1]),
    (ViewArguments, "interpolation", "bicubic"),
    (ViewArguments, "blur_sigma", [2.0, 100.0]),
    (ViewArguments, "jitter_strength", [0.0, 2.0, 0.0, 0.5]),
    (ViewArguments, "blur_prob", [0.5]),
    (ViewArguments, "solarize_prob", [0.0, 1.0]),
    (ViewArguments, "flip_prob", 1.0),
    (EvaluationArguments, "label_fractions", [1.0]),
    (EvaluationArguments, "num_draws", 1),
    (EvaluationArguments, "num_workers", 0),
    (RunArguments, "max_steps", 1),
    (RunArguments, "max_steps", -1),
    (RunArguments, "warmup_steps", 0.1),
    (RunArguments, "momentum", 0.0),
    (RunArguments, "logging_steps", 0.5),
]


@pytest.mark.parametrize(("kind", "name", "value"), REFUSED)
def test_a_value_outside_the_rule_is_refused_with_parameter_value_and_remedy(kind, name, value):
    with pytest.raises(UsageError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert re.fullmatch(rf"`{name}` must [^\n]+, got {re.escape(repr(value))}\. [A-Z0-9`k][^\n]+\.", message)


@pytest.mark.parametrize(("kind", "name", "value"), ACCEPTED)
def test_a_value_on_the_border_of_the_rule_is_accepted(kind, name, value):
    assert getattr(kind(**{name: value}), name) == value


@pytest.mark.parametrize("num_views", [2, 3])
def test_a_list_over_views_holds_one_value_or_one_a_view(num_views):
    probs = [0.5] * num_views
    assert ViewArguments(num_views=num_views, blur_prob=probs, solarize_prob=[0.1]).blur_prob == probs
    with pytest.raises(UsageError, match=rf"`solarize_prob` must hold one value, or one for each of the {num_views}"):
        ViewArguments(num_views=num_views, blur_prob=probs, solarize_prob=[0.1] * (num_views + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_are_accepted_and_belong_to_one_object_alone(kind):
    first, second = kind(), kind()
    assert first == second
    for field in dataclasses.fields(kind):
        value = getattr(first, field.name)
        assert not isinstance(value, (list, dict)) or value is not getattr(second, field.name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_a_help_text_that_is_a_sentence(kind):
    for field in dataclasses.fields(kind):
        text = field.metadata["help"].strip()
        assert text.endswith("."), f"{field.name}: {text}"
        assert "\n" not in text
        assert len(text) > 10


@pytest.mark.parametrize("script", ["continue_pretrain", "evaluate"])
def test_no_option_is_defined_by_two_groups_of_a_script(script):
    path = Path(__file__).parents[1] / "scripts" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(script, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [field.name for kind in module.GROUPS.values() for field in dataclasses.fields(kind)]
    assert names
    assert {name: count for name, count in Counter(names).items() if count > 1} == {}


def test_an_option_is_a_dataclass_field_with_its_help():
    scalar, mutable = option(3, "Three."), option([1], "One.")
    assert (scalar.default, scalar.metadata["help"]) == (3, "Three.")
    assert mutable.default_factory() == [1]
    assert mutable.default_factory() is not mutable.default_factory()


def test_a_requirement_that_holds_says_nothing():
    require(True, "size", "must be even", 2, "Pass 2.")


def test_a_requirement_that_does_not_hold_says_rule_value_and_remedy():
    with pytest.raises(UsageError, match=r"^`size` must be even, got '3'\. Pass 2\.$"):
        require(False, "size", "must be even", "3", "Pass 2.")
