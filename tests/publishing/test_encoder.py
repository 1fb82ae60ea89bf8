import json

import numpy as np
import pytest
import timm
import torch
from models.tiny import TIMM, randomized, same_state, timm_folder, transformers_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.views import evaluation_transform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.starting_point import load_starting_point
from e2mc_hf.publishing.encoder import export_encoder, feature_difference

SETTINGS = ImageSettings(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 0.8)
TIMM_FILES = ["config.json", "model.safetensors"]
ENCODERS = [*TIMM, "vit", "vit without pooler", "dinov2", "resnet"]


def backbone_of(encoder, folder):
    """Trained backbone whose checkpoint says how its images are prepared; timm's had a classifier there."""
    if encoder in TIMM:
        timm_folder(folder, encoder, num_classes=10)
        config = json.loads((folder / "config.json").read_text())
        cfg = {"input_size": [3, 32, 32], "mean": SETTINGS.mean, "std": SETTINGS.std, "crop_pct": SETTINGS.crop_share}
        config["pretrained_cfg"] |= cfg | {"interpolation": SETTINGS.interpolation}
        (folder / "config.json").write_text(json.dumps(config))
        backbone = load_backbone(str(folder))
        assert backbone.image_settings == SETTINGS
        return randomized(backbone)
    kind, _, without_pooler = encoder.partition(" without ")
    return Backbone(transformers_model(kind, **{"add_pooling_layer": False} if without_pooler else {}), SETTINGS).eval()


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_folder_loads_in_every_promised_way_with_the_same_features(tmp_path, encoder):
    backbone = backbone_of(encoder, tmp_path / "start")
    assert export_encoder(backbone, tmp_path / "encoder") <= 1e-6
    folder = str(tmp_path / "encoder")
    images = torch.randn(3, 3, 32, 32)
    expected = backbone(images)
    assert expected.std(dim=0).mean() > 1e-3

    assert torch.allclose(load_backbone(folder).eval()(images), expected, atol=1e-6)
    output = AutoModel.from_pretrained(folder)(images)
    own = output.last_hidden_state[:, 0] if encoder.split()[0] == "vit" else output.pooler_output.flatten(1)
    assert torch.allclose(own, expected, atol=1e-6)
    if encoder in TIMM:
        for options in ({}, {"num_classes": 0}):
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
            assert torch.allclose(model(images), expected, atol=1e-6)
        assert same_state(model, backbone.model.timm_model)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_folder_holds_the_encoder_and_nothing_else(tmp_path, encoder):
    export_encoder(backbone_of(encoder, tmp_path / "start"), tmp_path / "out" / "encoder")
    files = TIMM_FILES if encoder in TIMM else [*TIMM_FILES, "preprocessor_config.json"]
    assert sorted(path.name for path in (tmp_path / "out" / "encoder").iterdir()) == files
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["encoder"]
    assert str(tmp_path) not in (tmp_path / "out" / "encoder" / "config.json").read_text()


@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny_patch16_224", "vit", "dinov2", "resnet"])
@pytest.mark.parametrize("size", [(60, 40), (32, 90)])
def test_the_image_processor_prepares_images_as_the_evaluation_does(tmp_path, encoder, size):
    backbone = backbone_of(encoder, tmp_path / "start")
    export_encoder(backbone, tmp_path / "encoder")
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "encoder")
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    expected = evaluation_transform(backbone.image_settings)(image)
    assert found.shape == expected.shape == (3, 32, 32)
    grey_levels = (found - expected) * torch.tensor(SETTINGS.std).view(3, 1, 1) * 255
    assert grey_levels.abs().max() <= 2.01
    assert grey_levels.abs().mean() < 0.5


@pytest.mark.parametrize("encoder", TIMM)
def test_the_folder_of_a_timm_encoder_has_no_classifier_left(tmp_path, encoder):
    backbone = backbone_of(encoder, tmp_path / "start")
    export_encoder(backbone, tmp_path / "encoder")
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True)
    assert model.num_classes == 0
    assert model.pretrained_cfg["architecture"] == encoder
    data_config = timm.data.resolve_model_data_config(model)
    assert (tuple(data_config["mean"]), tuple(data_config["std"])) == (SETTINGS.mean, SETTINGS.std)
    assert tuple(data_config["input_size"]) == (3, 32, 32)


def test_an_imagenet_classifier_of_timm_leaves_no_class_names_behind(tmp_path):
    timm_folder(tmp_path / "start", "resnet18", num_classes=1000)
    backbone = load_backbone(str(tmp_path / "start"))
    export_encoder(backbone, tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    assert config["num_classes"] == 0
    assert not config.get("label_names")
    assert timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).num_classes == 0


@pytest.mark.parametrize("origin", ["new", "run"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_timm_encoder_that_came_from_no_folder_of_timm_loads_in_timm(tmp_path, name, origin):
    options = {"from_scratch": True, "backbone_args": TIMM[name], "image_size": 32}
    model = load_starting_point(name, objective_args={"projector_dim": 8}, **options)
    if origin == "run":
        model.save_pretrained(tmp_path / "run")
        model = load_starting_point(str(tmp_path / "run"))
    export_encoder(model.backbone, tmp_path / "encoder")
    exported = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True)
    assert same_state(exported, model.backbone.model.timm_model)
    assert load_file(tmp_path / "encoder" / "model.safetensors").keys() == exported.state_dict().keys()
    assert same_state(AutoModel.from_pretrained(tmp_path / "encoder"), model.backbone.model)


def test_a_trained_model_is_exported_without_its_heads_and_stays_in_training(tmp_path):
    transformers_model("dinov2").save_pretrained(tmp_path / "start")
    model = load_starting_point(str(tmp_path / "start"), objective_args={"projector_dim": 8}).train()
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    model(views).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    export_encoder(model.backbone, tmp_path / "encoder")
    assert all(module.training for module in model.modules())
    assert same_state(load_backbone(str(tmp_path / "encoder")).model, model.backbone.model)
    assert not same_state(load_backbone(str(tmp_path / "start")).model, model.backbone.model)


class Shift(nn.Module):
    """Adds a number that is in no checkpoint."""

    def __init__(self, layer, amount):
        super().__init__()
        self.layer = [layer]
        self.weight, self.bias = layer.weight, layer.bias
        self.amount = amount

    def forward(self, x):
        return self.layer[0](x) + self.amount


def altered(encoder, folder, amount):
    backbone = backbone_of(encoder, folder)
    if encoder in TIMM:
        backbone.model.timm_model.norm = Shift(backbone.model.timm_model.norm, amount)
    else:
        backbone.model.layernorm = Shift(backbone.model.layernorm, amount)
    return backbone


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "dinov2"])
@pytest.mark.parametrize("amount", [2e-5, float("nan")])
def test_an_encoder_that_its_weights_do_not_give_back_is_refused_and_nothing_is_left(tmp_path, encoder, amount):
    backbone = altered(encoder, tmp_path / "start", amount)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="must give the same features after reloading") as refusal:
        export_encoder(backbone, tmp_path / "out" / "encoder")
    assert "Nothing was exported" in str(refusal.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_folder_is_replaced_on_success_and_kept_on_refusal(tmp_path):
    folder = tmp_path / "out" / "encoder"
    first = backbone_of("dinov2", tmp_path)
    export_encoder(first, folder)
    (folder / "stale.txt").write_text("of an earlier run")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError):
        export_encoder(altered("dinov2", tmp_path, 1.0), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]

    second = backbone_of("vit", tmp_path)
    export_encoder(second, folder)
    assert sorted(path.name for path in folder.iterdir()) == [*TIMM_FILES, "preprocessor_config.json"]
    assert same_state(load_backbone(str(folder)).model, second.model)


def test_a_difference_of_features_is_found_wherever_it_is():
    backbone = Backbone(transformers_model("resnet"), SETTINGS)
    other = Backbone(transformers_model("resnet"), SETTINGS)
    other.load_state_dict(backbone.state_dict())
    assert feature_difference(backbone, other) == 0
    with torch.no_grad():
        other.model.get_parameter("embedder.embedder.convolution.weight")[0, 0, 0, 0] += 0.5
    assert feature_difference(backbone, other) > 1e-5
