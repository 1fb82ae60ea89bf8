import logging

import pytest
import torch
from models.tiny import TIMM, same_state, timm_folder, transformers_model
from safetensors.torch import load_file, save_file

from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.starting_point import load_starting_point

HEADS = {"projector_dim": 16, "projector_layers": 2}


@pytest.fixture
def encoder(tmp_path):
    transformers_model("dinov2").save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def run(encoder, tmp_path):
    """Output folder of a run."""
    model = load_starting_point(str(encoder), objective_args=HEADS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "run")
    return model, tmp_path / "run"


FROZEN = "Frozen, since the features do not depend on them: model.embeddings.mask_token."


def warnings_of(caplog):
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message for message in messages if message.startswith("Frozen")] == [FROZEN]
    return [message for message in messages if message != FROZEN]


def test_an_encoder_gets_new_heads_and_the_log_says_so(encoder, caplog):
    model = load_starting_point(str(encoder), objective_args=HEADS)
    assert warnings_of(caplog) == [f"{encoder} has no heads for vicreg: they start from random weights."]
    assert same_state(model.backbone, load_backbone(str(encoder)))
    assert model.config.objective_args == HEADS


def test_the_output_of_a_run_keeps_its_heads_without_a_warning(run, caplog):
    model, folder = run
    again = load_starting_point(str(folder), objective_args=HEADS)
    assert same_state(again, model)
    assert not warnings_of(caplog)
    assert same_state(load_starting_point(str(folder)), model)


def test_unused_parameters_are_frozen_either_way_and_the_log_names_them(encoder, run, caplog):
    caplog.set_level(logging.INFO, "e2mc_hf")
    for folder in (encoder, run[1]):
        caplog.clear()
        model = load_starting_point(str(folder), objective_args=HEADS)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert frozen == ["backbone.model.embeddings.mask_token"]
        assert "Frozen, since the features do not depend on them: model.embeddings.mask_token." in caplog.text


@pytest.mark.parametrize("other", [{"projector_dim": 32}, {"covariance_weight": 7.0}])
def test_heads_of_another_objective_are_refused(run, other):
    with pytest.raises(UsageError) as refusal:
        load_starting_point(str(run[1]), objective_args=HEADS | other)
    message = str(refusal.value)
    assert f"`objective` must be that of the heads in {str(run[1])!r}, vicreg with {HEADS}" in message
    assert f"got vicreg with {HEADS | other}" in message
    assert "Pass the encoder folder inside it to start with new heads." in message


def test_another_objective_is_refused(run):
    with pytest.raises(UsageError, match=r"got swav with \{\}"):
        load_starting_point(str(run[1]), objective="swav")


def test_the_same_seed_gives_the_same_heads_and_another_seed_others(encoder):
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(load_starting_point(str(encoder), objective_args=HEADS))
    first, second, third = models
    assert same_state(first, second)
    assert same_state(first.backbone, third.backbone)
    weights = [model.objective.projector[0].weight for model in (first, third)]
    assert not torch.equal(*weights)


def test_a_run_whose_heads_are_not_all_there_is_refused(run):
    _, folder = run
    weights = load_file(folder / "model.safetensors")
    del weights["objective.projector.1.running_mean"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"at least 100%.*objective\.projector\.1\.running_mean\. Is it") as refusal:
        load_starting_point(str(folder))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("spoil", ["empty", "absent"])
def test_a_run_without_weights_is_refused(run, spoil):
    weights = run[1] / "model.safetensors"
    if spoil == "empty":
        weights.write_bytes(b"")
    else:
        weights.unlink()
    with pytest.raises(UsageError, match="`model` must hold a whole run, got") as refusal:
        load_starting_point(str(run[1]))
    assert "\n" not in str(refusal.value)


def test_options_without_effect_on_a_run_are_warned_of(run, caplog):
    load_starting_point(str(run[1]), backbone_args={"dynamic_img_size": True})
    assert warnings_of(caplog) == [f"{run[1]} is a whole run: `backbone_args` and `revision` have no effect."]


def test_a_size_that_does_not_fit_is_refused_for_encoders_and_runs(tmp_path):
    timm_folder(tmp_path / "encoder", "vit_tiny_patch16_224")
    load_starting_point(str(tmp_path / "encoder"), objective_args=HEADS).save_pretrained(tmp_path / "run")
    for folder in ("encoder", "run"):
        with pytest.raises(UsageError, match=r"`image_size` must fit the encoder .*, got 40: "):
            load_starting_point(str(tmp_path / folder), objective_args=HEADS, image_size=40)


def test_from_scratch_the_encoder_is_random_and_fits_the_views():
    options = {"from_scratch": True, "objective_args": HEADS, "backbone_args": TIMM["resnet18"], "image_size": 16}
    first, second = load_starting_point("resnet18", **options), load_starting_point("resnet18", **options)
    assert first.backbone.image_settings.size == 16
    assert not same_state(first.backbone, second.backbone)
