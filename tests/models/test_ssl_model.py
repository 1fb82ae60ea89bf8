import copy
import json
import pickle

import pytest
import torch
from models.tiny import TIMM, same_state, timm_folder, transformers_model
from torch import nn

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLConfig, SSLModel, SSLOutput

ENCODERS = [
    *TIMM,
    "vit",
    "vit without pooler",
    "vit_mae",
    "dinov2",
    "dinov2_with_registers",
    "resnet",
    "siglip_vision_model",
]
HEADS = {"projector_dim": 16, "projector_layers": 2, "covariance_weight": 2.0}


def backbone_of(encoder, folder):
    """Load a backbone from a folder, as a run does; timm's comes with a classifier there."""
    if encoder in TIMM:
        timm_folder(folder, encoder, num_classes=10)
    else:
        kind, _, without_pooler = encoder.partition(" without ")
        transformers_model(kind, **{"add_pooling_layer": False} if without_pooler else {}).save_pretrained(folder)
    return load_backbone(str(folder))


def ssl_model_of(encoder, folder):
    return SSLModel.from_backbone(backbone_of(encoder, folder), objective_args=HEADS, image_size=32)


def views_of(size=32, count=2):
    return [torch.randn(4, 3, size, size) for _ in range(count)]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_and_loaded_the_model_is_the_same_bit_for_bit(tmp_path, encoder):
    model = ssl_model_of(encoder, tmp_path / "encoder").train()
    views = views_of()
    model(views).loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()  # nothing is as it was built
    model.save_pretrained(tmp_path / "run")
    again, report = SSLModel.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(report.values())
    assert same_state(again, model)
    for (name, buffer), (other, copied) in zip(model.named_buffers(), again.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, copied), name
    assert again.backbone.image_settings == model.backbone.image_settings
    # Rounding depends on how the weights lie in memory; copies lie alike.
    model, again = copy.deepcopy(model).eval(), copy.deepcopy(again).eval()
    with torch.no_grad():
        torch.manual_seed(1)  # a masked autoencoder shuffles its patches
        expected = model(views)
        torch.manual_seed(1)
        found = again(views)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.embeddings, expected.embeddings)
    assert found.terms == expected.terms


@pytest.mark.parametrize("encoder", ["resnet18", "dinov2"])
def test_the_output_folder_holds_no_pickle_and_no_path_of_this_machine(tmp_path, encoder):
    ssl_model_of(encoder, tmp_path / "encoder").save_pretrained(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]
    assert str(tmp_path) not in (tmp_path / "run" / "config.json").read_text()


def test_a_bfloat16_checkpoint_is_trained_and_kept_in_float32(tmp_path):
    transformers_model("vit").to(torch.bfloat16).save_pretrained(tmp_path / "encoder")
    model = SSLModel.from_backbone(load_backbone(str(tmp_path / "encoder")), objective_args=HEADS)
    model.save_pretrained(tmp_path / "run")
    again = SSLModel.from_pretrained(tmp_path / "run")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert same_state(again, model)


@pytest.mark.parametrize("encoder", ["resnet18", "vit"])
def test_the_output_has_the_documented_shapes_and_types(tmp_path, encoder):
    model = ssl_model_of(encoder, tmp_path)
    output = model(views_of())
    assert isinstance(output, SSLOutput)
    assert (output.loss.shape, output.loss.dtype, output.loss.requires_grad) == ((), torch.float32, True)
    assert (output.embeddings.shape, output.embeddings.dtype) == ((2, 4, 16), torch.float32)
    assert set(output.terms) == {"invariance", "variance", "covariance"}
    assert not any(term.requires_grad for term in output.terms.values())
    weights = {"invariance": 25, "variance": 25, "covariance": 2}
    assert output.loss.item() == pytest.approx(sum(weights[name] * term.item() for name, term in output.terms.items()))


def test_embeddings_are_the_projections_of_the_features_without_normalization(tmp_path):
    model = ssl_model_of("vit", tmp_path).eval()
    views = views_of()
    embeddings = model(views).embeddings
    for view, embedding in zip(views, embeddings, strict=True):
        assert torch.equal(embedding, model.objective.projector(model.backbone(view)))
    model.objective.projector[-1].weight.data *= 3
    assert torch.allclose(model(views).embeddings, 3 * embeddings, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoder", ["resnet18", "vit", "dinov2"])
def test_views_of_several_sizes_are_encoded_each_on_its_own(tmp_path, encoder):
    model = ssl_model_of(encoder, tmp_path).eval()
    views = [*views_of(32), *views_of(48, 1)]
    features = model.encode(views)
    assert [tuple(feature.shape) for feature in features] == [(4, model.config.num_features)] * 3
    assert all(torch.equal(feature, model.backbone(view)) for feature, view in zip(features, views, strict=True))


def test_every_view_has_its_own_batch_statistics(tmp_path):
    model = ssl_model_of("resnet18", tmp_path).train()
    first, second = views_of()
    together = model.encode([first, 5 + second])
    assert torch.equal(together[0], model.encode([first])[0])


def test_the_gradient_reaches_every_parameter_that_is_not_frozen(tmp_path):
    model = ssl_model_of("vit", tmp_path).train()
    model.backbone.freeze_unused_parameters(32)
    model(views_of()).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_the_configuration_survives_json_pickle_and_copy(tmp_path):
    config = ssl_model_of("vit_tiny_patch16_224", tmp_path).config
    for copied in (
        SSLConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert copied.to_json_string() == config.to_json_string()
        assert copied.objective_args == HEADS
        assert copied.num_features == 32


def test_a_copy_of_the_model_computes_the_same_apart_from_it(tmp_path):
    model = ssl_model_of("resnet18", tmp_path).eval()
    copied = copy.deepcopy(model)
    views = views_of()
    expected = model(views).loss
    assert torch.equal(copied(views).loss, expected)
    nn.init.zeros_(copied.objective.projector[-1].weight)
    assert torch.equal(model(views).loss, expected)


@pytest.mark.parametrize("encoder", ["resnet18", "vit"])
def test_under_bfloat16_autocast_the_loss_stays_float32(tmp_path, encoder):
    model = ssl_model_of(encoder, tmp_path).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(views_of())
    assert output.embeddings.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.objective.parameters())


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "resnet18", "dinov2"])
def test_activation_checkpointing_changes_no_gradient(tmp_path, encoder):
    model = ssl_model_of(encoder, tmp_path).train()
    views = views_of()
    model(views).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # renamed in 5.23
    model(views).loss.backward()
    assert len(expected) > 20
    assert all(
        torch.allclose(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-6) for name, grad in expected.items()
    )


def test_new_heads_fit_the_width_that_was_measured(tmp_path):
    backbone = backbone_of("resnet", tmp_path)
    model = SSLModel.from_backbone(backbone, objective_args=HEADS, image_size=32)
    assert model.backbone is backbone
    assert model.config.num_features == model.objective.projector[0].in_features == 16


def test_a_size_the_backbone_refuses_and_unknown_options_are_the_users_error(tmp_path):
    backbone = backbone_of("vit_tiny_patch16_224", tmp_path)
    with pytest.raises(UsageError, match="`image_size` must fit the encoder"):
        SSLModel.from_backbone(backbone, image_size=40)
    with pytest.raises(UsageError, match="`objective_args` has no option 'projector_dims'"):
        SSLModel.from_backbone(backbone, objective_args={"projector_dims": 8})


def test_image_settings_are_kept_whole(tmp_path):
    settings = ImageSettings(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 0.875)
    model = SSLModel.from_backbone(Backbone(transformers_model("dinov2"), settings), objective_args=HEADS)
    model.save_pretrained(tmp_path)
    assert SSLModel.from_pretrained(tmp_path).backbone.image_settings == settings


def test_a_backbone_that_could_not_be_saved_is_refused_before_the_training():
    options = {"embed_dims": (16, 16, 16, 16), "serial_depths": (2, 1, 1, 1)}
    backbone = load_backbone("coat_lite_tiny", from_scratch=True, backbone_args=options)
    with pytest.raises(UsageError, match="must not hold a weight under several names"):
        SSLModel.from_backbone(backbone, objective_args=HEADS)


@pytest.mark.parametrize("objective", ["byol", "mec", "dino"])
def test_a_loaded_teacher_is_as_frozen_as_a_new_one(tmp_path, objective):
    heads = {"byol": {"hidden_dim": 8}, "mec": {"predictor_dim": 8}, "dino": {"hidden_dim": 8, "num_prototypes": 8}}
    options = heads[objective] | {"projector_dim": 8}
    model = SSLModel.from_backbone(backbone_of("resnet", tmp_path / "encoder"), objective, options, image_size=32)
    model.save_pretrained(tmp_path / "run")
    loaded, report = SSLModel.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(report.values())
    for one in (model, loaded, SSLModel.from_pretrained(tmp_path / "run")):
        teachers = {name for name, _ in one.named_parameters() if "teacher" in name}
        assert teachers
        assert {name for name, parameter in one.named_parameters() if not parameter.requires_grad} == teachers
