"""Every family of backbones at its own size and at another, through training, saving and loading."""

from typing import Any

import pytest
import timm
import torch
from models.tiny import TIMM, TRANSFORMERS, randomized, same_state, timm_folder, transformers_model
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone, prepare_config
from e2mc_hf.models.loading import accept_sizes, load_backbone
from e2mc_hf.modes import evaluation_mode
from e2mc_hf.publishing.encoder import export_encoder

OWN, OTHER = 32, 48
VIT: dict[str, Any] = TIMM["vit_tiny_patch16_224"]
FIXED = {"beit_base_patch16_224": VIT, "cait_xxs24_224": VIT}  # no argument makes timm's take another size
FAMILIES: dict[str, dict[str, Any]] = TIMM | {
    "resnetv2_18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8},
    "convnextv2_atto": TIMM["convnext_atto"],
    "deit3_small_patch16_224": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_small_patch16_dinov3": VIT,
    "eva02_tiny_patch14_224": VIT,
    "swinv2_tiny_window8_256": TIMM["swin_tiny_patch4_window7_224"],
    "xcit_nano_12_p16_224": {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32},
    "mobilenetv3_small_050": {},
    "test_efficientnet": {},
    "test_nfnet": {},
    "regnetx_002": {},
    **FIXED,
}
KINDS = [kind for kind in TRANSFORMERS if kind != "swin"]
# The order in which a masked autoencoder shuffles its patches is random, and sums depend on it.
SHUFFLES = {"vit_mae": 1e-5}
DYNAMIC = ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"]
DYNAMIC += ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def family_of_timm(name: str, *sizes: int) -> Backbone:
    options = {"from_scratch": True, "backbone_args": FAMILIES[name], "image_size": OWN, "other_sizes": sizes}
    return randomized(load_backbone(name, **options))


def assert_trains_at(backbone: Backbone, *sizes: int) -> None:
    """Features of every size in one backward pass, as multi-crop makes it, reach every parameter in use."""
    width = backbone.measure_num_features(*sizes)
    backbone.freeze_unused_parameters(*sizes)
    backbone.train()
    views = [backbone(images(size, 4)) for size in sizes]
    assert [tuple(view.shape) for view in views] == [(4, width)] * len(sizes)
    torch.stack([view.square().mean() for view in views]).sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    backbone.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_families_train_and_survive_saving_at_two_sizes(kind, tmp_path):
    model = randomized(AutoModel.from_config(prepare_config(CONFIG_MAPPING[kind](**TRANSFORMERS[kind]))))
    backbone = Backbone(model, ImageSettings(size=OWN))
    assert_trains_at(backbone, OWN, OTHER)
    backbone.model.save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path), other_sizes=[OTHER]).eval()
    assert same_state(again.model, backbone.model)
    with torch.no_grad():
        expected = {size: backbone(images(size)) for size in (OWN, OTHER)}
        for size in (OWN, OTHER, OWN):  # views of one size leave nothing behind for those of the other
            assert expected[size].isfinite().all()
            assert (expected[size][0] - expected[size][1]).abs().max() > 1e-3
            assert (again(images(size)) - expected[size]).abs().max() <= SHUFFLES.get(kind, 0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_families_train_and_survive_saving_at_two_sizes(name, tmp_path):
    sizes = (OWN,) if name in FIXED else (OWN, OTHER)
    backbone = family_of_timm(name, *sizes).eval()
    assert_trains_at(backbone, *sizes)
    with torch.no_grad():
        expected = [(size, backbone(images(size))) for size in (*sizes, OWN)]
    export_encoder(backbone, tmp_path / "encoder")
    plain = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    again = load_backbone(str(tmp_path / "encoder"), other_sizes=sizes).eval()
    assert same_state(again, backbone)
    with torch.no_grad():
        for size, features in expected:
            assert features.isfinite().all()
            assert (features[0] - features[1]).abs().max() > 0
            for encoder in (again, plain):
                assert torch.allclose(encoder(images(size)), features, rtol=1e-4, atol=1e-5)


# Sizes


@pytest.mark.parametrize("name", DYNAMIC)
def test_to_take_other_sizes_changes_no_feature_at_the_own_one(name, tmp_path):
    timm_folder(tmp_path, name) if name in TIMM else export_encoder(family_of_timm(name), tmp_path / "x")
    folder = str(tmp_path if name in TIMM else tmp_path / "x")
    fixed, dynamic = load_backbone(folder).eval(), load_backbone(folder, other_sizes=[OTHER]).eval()
    assert "dynamic_img_size" not in fixed.model.config.model_args
    assert dynamic.model.config.model_args["dynamic_img_size"] is True
    assert same_state(fixed, dynamic)
    with torch.no_grad():
        assert torch.allclose(dynamic(images(OWN)), fixed(images(OWN)), rtol=1e-5, atol=1e-6)
    assert dynamic.measure_num_features(OWN, OTHER) == fixed.measure_num_features(OWN)


def test_an_image_size_that_is_not_the_own_one_switches_other_sizes_on(tmp_path):
    timm_folder(tmp_path, "vit_tiny_patch16_224")
    assert load_backbone(str(tmp_path), image_size=OTHER).measure_num_features(OTHER) == 32
    own = load_backbone(str(tmp_path), image_size=OWN, other_sizes=[OWN])
    assert "dynamic_img_size" not in own.model.config.model_args


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", *FIXED])
def test_architectures_without_the_argument_are_left_alone(name):
    backbone = load_backbone(name, from_scratch=True, backbone_args=FAMILIES[name], image_size=OWN, other_sizes=[OTHER])
    assert "dynamic_img_size" not in backbone.model.config.model_args


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_architecture_refuses_another_size_and_says_why(name):
    backbone = family_of_timm(name, OTHER)
    with pytest.raises(UsageError) as refusal:
        backbone.measure_num_features(OWN, OTHER)
    message = str(refusal.value)
    assert (
        f"`image_size` must fit the encoder, got 48 for '{name}': Input height (48) doesn't match model (32)" in message
    )
    assert "Its own size is 32; not every architecture takes others" in message
    assert "dynamic_img_size" not in message


@pytest.mark.parametrize(("size", "nearest"), [(96, "84 and 98"), (50, "42 and 56"), (10, "14")])
def test_a_size_between_patches_is_refused_with_the_nearest_that_fit(size, nearest):
    options = VIT | {"img_size": 42, "patch_size": 14}
    backbone = load_backbone("vit_small_patch14_dinov2", from_scratch=True, backbone_args=options, other_sizes=[98])
    with pytest.raises(UsageError) as refusal:
        backbone.measure_num_features(42, size)
    assert f"must be a multiple of the patch size 14, got {size} for" in str(refusal.value)
    assert f"The nearest: {nearest}." in str(refusal.value)
    assert backbone.measure_num_features(42, 98) == 32


def test_padding_takes_sizes_between_patches():
    options = VIT | {"dynamic_img_size": True, "dynamic_img_pad": True}
    assert (
        load_backbone("vit_tiny_patch16_224", from_scratch=True, backbone_args=options).measure_num_features(44) == 32
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov3_vit"])
def test_transformers_pass_over_the_pixels_beyond_the_last_patch(kind):
    backbone = Backbone(transformers_model(kind), ImageSettings(size=OWN)).eval()
    view = images(44)
    assert torch.equal(backbone(view), backbone(view[:, :, :40, :40]))


def test_the_description_of_a_run_is_made_to_take_other_sizes():
    config = family_of_timm("vit_tiny_patch16_224").model.config.to_dict()
    assert accept_sizes(config, [OWN]) == config
    changed = accept_sizes(config, [OWN, OTHER])
    assert changed["model_args"] == config["model_args"] | {"dynamic_img_size": True}
    assert "dynamic_img_size" not in config["model_args"]
    other = transformers_model("vit").config.to_dict()
    assert accept_sizes(other, [OTHER]) == other


class Odd(PreTrainedModel):
    """Features of a width that follows the size, and a parameter that large images alone use."""

    config_class = CONFIG_MAPPING["vit"]

    def __init__(self, config):
        super().__init__(config)
        self.every_size, self.large_alone = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        self.post_init()

    def forward(self, pixel_values):
        scale = self.every_size * (self.large_alone if pixel_values.shape[-1] > OWN else 1)
        return BaseModelOutputWithPooling(pooler_output=scale * pixel_values.flatten(1))


def odd() -> Backbone:
    return Backbone(Odd(CONFIG_MAPPING["vit"](**TRANSFORMERS["vit"])), ImageSettings(size=OWN))


def test_parameters_are_unused_only_if_no_size_uses_them():
    backbone = odd()
    assert backbone.freeze_unused_parameters(OWN, OTHER) == []
    assert backbone.freeze_unused_parameters(OWN) == ["model.large_alone"]
    assert [parameter.requires_grad for parameter in backbone.parameters()] == [True, False]


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "levit"])
def test_attention_biases_that_evaluation_mode_keeps_are_trained_and_never_stale(name):
    if name == "levit":
        options = {"image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1]}
        options |= {"key_dim": [8, 8, 8], "depths": [1, 1, 1], "attention_ratio": [2, 2, 2]}
        model = AutoModel.from_config(CONFIG_MAPPING["levit"](**options))
        backbone, sizes = Backbone(model, ImageSettings(size=64)), (64,)
    else:
        arguments = {"embed_dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
        backbone, sizes = load_backbone(name, from_scratch=True, backbone_args=arguments), (64, 96)
    for _ in range(2):
        backbone.measure_num_features(*sizes)
        assert backbone.freeze_unused_parameters(*sizes) == []
    backbone.eval()
    with torch.no_grad():
        before = backbone(images(64))  # fills what is kept
        for parameter_name, parameter in backbone.named_parameters():
            if "attention_biases" in parameter_name:
                parameter.add_(torch.randn_like(parameter))
    with evaluation_mode(backbone), torch.no_grad():
        assert not torch.equal(backbone(images(64)), before)


def test_a_backbone_that_is_frozen_already_has_no_unused_parameters():
    backbone = odd().requires_grad_(False)
    assert backbone.freeze_unused_parameters(OWN, OTHER) == []


def test_features_whose_width_depends_on_the_size_are_refused():
    with pytest.raises(UsageError, match=r"one width at every size, got \{32: 3072, 48: 6912\}"):
        odd().measure_num_features(OWN, OTHER)


# What is no vision encoder


def test_a_model_that_needs_more_than_images_is_refused():
    model = AutoModel.from_config(CONFIG_MAPPING["siglip2_vision_model"](**TRANSFORMERS["siglip_vision_model"]))
    with pytest.raises(UsageError, match="which also needs pixel_attention_mask, spatial_shapes"):
        Backbone(model, ImageSettings(size=OWN))


def test_a_model_that_packs_its_images_into_one_sequence_is_refused():
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = AutoModel.from_config(CONFIG_MAPPING["pixtral"](**options, image_size=OWN, patch_size=8))
    with pytest.raises(UsageError, match=r"must give one vector for each image, got \(1, 32\) for 2 images"):
        Backbone(model, ImageSettings(size=OWN)).measure_num_features(OWN)


def test_a_model_without_pooling_is_refused():
    backbone = load_backbone(
        "vit_tiny_patch16_224", from_scratch=True, backbone_args=VIT | {"global_pool": ""}, image_size=OWN
    )
    with pytest.raises(UsageError, match=r"must give one vector for each image, got \(2, 17, 32\) for 2 images"):
        backbone.measure_num_features(OWN)


def test_weights_that_give_no_number_are_refused():
    backbone = Backbone(transformers_model("vit"), ImageSettings(size=OWN))
    with torch.no_grad():
        backbone.model.layernorm.bias.fill_(torch.nan)
    with pytest.raises(UsageError, match="must give finite features"):
        backbone.measure_num_features(OWN)


# Stochastic depth


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_stochastic_depth_is_at_work_in_training_alone(name):
    plain = family_of_timm(name)
    options = FAMILIES[name] | {"drop_path_rate": 0.5}
    backbone = load_backbone(name, from_scratch=True, backbone_args=options, image_size=OWN)
    backbone.load_state_dict(plain.state_dict())
    view = images(OWN, 8)
    with torch.no_grad():
        expected = plain.eval()(view)
        assert torch.equal(backbone.eval()(view), expected)
        first, second = (backbone.train()(view) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, expected)


def test_dropout_of_a_transformers_checkpoint_is_at_work_in_training_alone(tmp_path):
    config = CONFIG_MAPPING["vit"](**TRANSFORMERS["vit"], hidden_dropout_prob=0.5)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    with torch.no_grad():
        evaluated = [backbone.eval()(images(OWN)) for _ in range(2)]
        trained = [backbone.train()(images(OWN)) for _ in range(2)]
    assert torch.equal(*evaluated)
    assert not torch.equal(*trained)
