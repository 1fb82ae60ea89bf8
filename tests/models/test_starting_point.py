import logging

import pytest
import torch
from models.tiny import TIMM, same_state, timm_folder, transformers_model
from safetensors.torch import load_file, save_file

from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.starting_point import has_heads, load_starting_point, objective_of

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


def test_options_that_would_need_other_heads_are_refused(run):
    with pytest.raises(UsageError) as refusal:
        load_starting_point(str(run[1]), objective_args=HEADS | {"projector_dim": 32})
    message = str(refusal.value)
    assert f"`objective_args` must leave the heads in {str(run[1])!r} as they are (vicreg with {HEADS})" in message
    assert f"got {HEADS | {'projector_dim': 32}}: projector.0.bias, projector.0.weight" in message
    assert "Pass the encoder folder inside it to start with new heads." in message


def test_other_options_change_the_loss_and_keep_the_heads(run):
    model, folder = run
    again = load_starting_point(str(folder), objective_args={"covariance_weight": 7.0})
    assert same_state(again, model)
    assert again.objective.covariance_weight == 7
    assert again.config.objective_args == HEADS | {"covariance_weight": 7.0}
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    with torch.no_grad():
        one, other = model.eval()(views), again.eval()(views)
    expected = one.loss + 6 * one.terms["covariance"]
    assert other.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_queue_of_another_length_begins_empty_and_the_log_says_so(encoder, tmp_path, caplog):
    options = {"projector_dim": 8, "hidden_dim": 8, "num_prototypes": 6}
    model = load_starting_point(str(encoder), objective="swav", objective_args=options | {"queue_length": 8})
    model.train()(views := [torch.randn(8, 3, 32, 32) for _ in range(2)])
    model.save_pretrained(tmp_path / "run")
    assert model.objective.queue.abs().sum() > 0
    kept = load_starting_point(str(tmp_path / "run"))
    assert torch.equal(kept.objective.queue, model.objective.queue)
    caplog.clear()
    changed = load_starting_point(str(tmp_path / "run"), objective_args={"queue_length": 16})
    assert "Begins empty, since its size is new: queue" in caplog.text
    assert changed.objective.queue.shape == (2, 16, 8)
    assert changed.objective.queue.abs().sum() == changed.objective.queue_count == 0
    assert torch.equal(changed.objective.prototypes.weight, model.objective.prototypes.weight)
    assert changed.train()(views).loss.isfinite()


def test_another_objective_is_refused(run):
    with pytest.raises(UsageError, match=r"`objective` must be that of the heads in .*, vicreg, got swav"):
        load_starting_point(str(run[1]), objective="swav")


def test_the_objective_of_a_run_is_the_one_asked_for_or_that_of_its_heads(encoder, tmp_path):
    load_starting_point(str(encoder), objective="simsiam", objective_args={"projector_dim": 8}).save_pretrained(
        tmp_path / "run"
    )
    assert objective_of(str(tmp_path / "run"), None) == "simsiam"
    assert objective_of(str(tmp_path / "run"), "byol") == "byol"
    assert objective_of(str(encoder), None) == objective_of(str(tmp_path / "run"), None, from_scratch=True) == "vicreg"


def test_only_whole_runs_bring_heads(run, encoder):
    assert has_heads(str(run[1]))
    assert not has_heads(str(run[1]), from_scratch=True)
    assert not has_heads(str(encoder))
    assert not has_heads("resnet18")


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
        with pytest.raises(
            UsageError, match=r"`image_size` must be a multiple of the patch size 8, got 44 .* The nearest: 40 and 48"
        ):
            load_starting_point(str(tmp_path / folder), objective_args=HEADS, image_size=44)


def test_from_scratch_the_encoder_is_random_and_fits_the_views():
    options = {"from_scratch": True, "objective_args": HEADS, "backbone_args": TIMM["resnet18"], "image_size": 16}
    first, second = load_starting_point("resnet18", **options), load_starting_point("resnet18", **options)
    assert first.backbone.image_settings.size == 16
    assert not same_state(first.backbone, second.backbone)
