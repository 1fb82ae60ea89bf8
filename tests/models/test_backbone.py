import pytest
import timm
import torch
from models.tiny import TIMM, timm_model, transformers_model
from transformers import AutoModel, BertConfig

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone, prepare_config
from e2mc_hf.models.loading import load_backbone

SETTINGS = ImageSettings(size=32)


def backbone_of(kind, **options):
    model = transformers_model(kind, **options)
    prepare_config(model.config)
    return Backbone(model, SETTINGS).eval()


def class_token(model, hidden):
    return hidden[:, 0]


def mean_token(model, hidden):
    return hidden.mean(dim=1)


def mean_patch(model, hidden):
    return model.pooler.layernorm(hidden[:, 1:].mean(dim=1))


def mean_area(model, hidden):
    return hidden.flatten(2).mean(dim=2)


def normalized_mean_area(model, hidden):
    return model.layernorm(mean_area(model, hidden))


def normalized_class_token(model, hidden):
    return model.post_layernorm(hidden[:, 0])


def attention_pool(model, hidden):
    query = model.head.probe.expand(len(hidden), -1, -1)
    pooled = model.head.attention(query, hidden, hidden, need_weights=False)[0]
    return (pooled + model.head.mlp(model.head.layernorm(pooled)))[:, 0]


POOLINGS = {
    "vit": class_token,
    "deit": class_token,
    "dinov2": class_token,
    "dinov2_with_registers": class_token,
    "data2vec-vision": class_token,
    "ijepa": mean_token,
    "swinv2": mean_token,
    "beit": mean_patch,
    "clip_vision_model": normalized_class_token,
    "siglip_vision_model": attention_pool,
    "resnet": mean_area,
    "convnext": normalized_mean_area,
}
FIXED_GRID = {"vit", "deit", "ijepa", "siglip_vision_model", "clip_vision_model"}


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("kind", POOLINGS)
@torch.no_grad()
def test_features_of_transformers_models_are_pooled_as_their_family_does(kind, size):
    backbone = backbone_of(kind)
    images = torch.randn(2, 3, size, size)
    model = backbone.model
    options = {"interpolate_pos_encoding": True} if kind in FIXED_GRID else {}
    expected = POOLINGS[kind](model, model(pixel_values=images, **options).last_hidden_state)
    features = backbone(images)
    assert features.shape == (2, backbone.measure_num_features(size)) == expected.shape
    assert torch.allclose(features, expected, rtol=1e-5, atol=1e-6)
    assert (features[0] - features[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["vit", "deit"])
@torch.no_grad()
def test_the_tanh_pooler_is_passed_over(kind):
    backbone = backbone_of(kind)
    images = torch.randn(2, 3, 32, 32)
    pooled = backbone.model(pixel_values=images).pooler_output
    assert (backbone(images) - pooled).abs().max() > 0.1


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_features_of_timm_models_are_those_of_the_plain_model_without_classifier(name):
    plain = timm_model(name, num_classes=0)
    backbone = load_backbone(name, from_scratch=True, backbone_args=TIMM[name]).eval()
    backbone.model.timm_model.load_state_dict(plain.state_dict())
    for size in (32, 48) if name in ("resnet18", "convnext_atto") else (32,):
        images = torch.randn(2, 3, size, size)
        assert torch.equal(backbone(images), plain(images))
        assert backbone.measure_num_features(size) == plain.num_features


def test_timm_features_go_through_the_layers_that_timm_puts_after_pooling():
    backbone = load_backbone("mobilenetv3_small_050", from_scratch=True).eval()
    plain = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    plain.load_state_dict(backbone.model.timm_model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images), plain(images))
    assert backbone.measure_num_features(32) == plain.head_hidden_size != plain.num_features


def test_a_masked_autoencoder_sees_every_patch(tmp_path):
    transformers_model("vit_mae").save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path)).eval()
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    features = backbone(images)
    (gradient,) = torch.autograd.grad(features.square().sum(), images)
    assert gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax(dim=(0, 1, 4, 5)).min() > 1e-6
    assert torch.allclose(backbone(images), features, atol=1e-5)
    assert backbone.model(images).last_hidden_state.shape == (1, 1 + 16, 32)


def test_transformers_swin_is_refused_and_its_replacements_named():
    with pytest.raises(UsageError, match=r"transformers' Swin.*Use swinv2, or the same architecture from timm"):
        Backbone(transformers_model("swin"), SETTINGS)


def test_a_model_of_text_is_refused():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    with pytest.raises(UsageError, match="must be a vision model, got 'bert' of type bert"):
        Backbone(AutoModel.from_config(config), SETTINGS)


def test_a_size_that_does_not_fit_is_refused_with_advice_that_helps():
    name = "vit_tiny_patch16_224"
    backbone = load_backbone(name, from_scratch=True, backbone_args=TIMM[name])
    with pytest.raises(UsageError) as refusal:
        backbone.measure_num_features(48)
    assert "`image_size` must fit the encoder" in str(refusal.value)
    assert "got 48 for 'vit_tiny_patch16_224': Input height (48) doesn't match model (32)." in str(refusal.value)
    assert "Its own size is 32" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    advice = "dynamic_img_size"
    assert f"--backbone_args {advice}=true" in str(refusal.value)
    dynamic = load_backbone(name, from_scratch=True, backbone_args=TIMM[name] | {advice: True})
    assert dynamic.measure_num_features(48) == dynamic.measure_num_features(32) == 32


UNUSED = {
    "vit": ["model.pooler.dense.weight", "model.pooler.dense.bias"],
    "dinov2": ["model.embeddings.mask_token"],
    "resnet": [],
}


@pytest.mark.parametrize("kind", UNUSED)
def test_only_parameters_without_gradient_are_frozen(kind):
    backbone = backbone_of(kind)
    assert sorted(backbone.freeze_unused_parameters(32)) == sorted(UNUSED[kind])
    frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == sorted(UNUSED[kind])
    assert all(parameter.grad is None for parameter in backbone.parameters())
    backbone.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters() if parameter.requires_grad)
    assert backbone.freeze_unused_parameters(32) == []


def test_modes_and_statistics_are_as_before_after_a_probe():
    backbone = backbone_of("resnet").train()
    backbone.model.embedder.eval()
    modes = [module.training for module in backbone.modules()]
    statistics = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone.measure_num_features(32)
    backbone.freeze_unused_parameters(32)
    with pytest.raises(UsageError):
        backbone.measure_num_features(0)
    assert {True, False} == set(modes)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in backbone.named_buffers())
