import json
import logging
import shutil
from pathlib import Path

import pytest
import timm
import torch
from models.tiny import TIMM, VIT, same_state, timm_folder, timm_model, transformers_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    ConvNextImageProcessor,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTImageProcessor,
)
from transformers.image_utils import PILImageResampling

from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import is_ssl_folder, load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.publishing.encoder import export_encoder

VIT_NAME = "vit_tiny_patch16_224"
FROM_SCRATCH = {"from_scratch": True, "backbone_args": TIMM[VIT_NAME]}


def refusal(name, **options):
    """Message of the `UsageError`: one sentence or two on one line, not a dump."""
    with pytest.raises(UsageError) as error:
        load_backbone(str(name), **options)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


# Folders that load


@pytest.mark.parametrize("kind", ["vit", "resnet", "dinov2", "dinov2_with_registers", "swinv2", "siglip_vision_model"])
def test_folders_of_save_pretrained_load_whole(tmp_path, kind):
    model = transformers_model(kind)
    model.save_pretrained(tmp_path)
    assert same_state(load_backbone(str(tmp_path)).model, model)


def test_a_folder_without_pooler_gets_no_random_pooler_and_no_warning(tmp_path, caplog):
    model = transformers_model("vit", add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.model.pooler is None
    assert same_state(backbone.model, model)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["vit", "dinov2", "resnet"])
def test_classifiers_load_without_their_head(tmp_path, kind):
    classifier = AutoModelForImageClassification.from_config(transformers_model(kind).config)
    classifier.save_pretrained(tmp_path)
    assert same_state(load_backbone(str(tmp_path)).model, classifier.base_model)


def test_the_image_half_of_clip_loads(tmp_path):
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    text |= {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VIT)).eval()
    clip.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone(images), clip.vision_model(images).pooler_output)


@pytest.mark.parametrize("name", TIMM)
def test_folders_of_timm_load_with_and_without_classifier(tmp_path, name):
    for num_classes in (0, 1000):
        model = timm_folder(tmp_path / str(num_classes), name, num_classes=num_classes)
        assert "num_classes" in json.loads((tmp_path / str(num_classes) / "config.json").read_text())["model_args"]
        model.reset_classifier(0)
        for prefix in ("", "local-dir:"):
            assert same_state(load_backbone(f"{prefix}{tmp_path / str(num_classes)}").model.timm_model, model)


def test_folders_of_the_timm_wrapper_load(tmp_path):
    config = TimmWrapperConfig(
        architecture=VIT_NAME, model_args=TIMM[VIT_NAME], num_labels=0, pretrained_cfg={"input_size": (3, 32, 32)}
    )
    model = TimmWrapperModel(config)
    model.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert same_state(backbone.model, model)
    assert backbone.image_settings.size == 32


@pytest.mark.parametrize("name", [*TIMM, "vit", "dinov2"])
def test_our_export_loads(tmp_path, name):
    if name in TIMM:
        timm_folder(tmp_path / "first", name, num_classes=10)
    else:
        transformers_model(name).save_pretrained(tmp_path / "first")
    backbone = load_backbone(str(tmp_path / "first"))
    export_encoder(backbone, tmp_path / "second")
    again = load_backbone(str(tmp_path / "second"))
    assert same_state(again, backbone)
    assert again.image_settings.mean == backbone.image_settings.mean


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_a_bfloat16_checkpoint_loads_as_float32(tmp_path, kind):
    if kind == "vit":
        stored = transformers_model("vit").to(torch.bfloat16)
        stored.save_pretrained(tmp_path)
    else:
        stored = timm_model("resnet18", num_classes=0).to(torch.bfloat16)
        timm.models.save_for_hf(stored, tmp_path, model_args=TIMM["resnet18"], safe_serialization=True)
    loaded = load_backbone(str(tmp_path)).model.state_dict()
    for name, tensor in stored.state_dict().items():
        found = loaded.get(name, loaded.get(f"timm_model.{name}"))
        assert found.dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(found, tensor.to(found.dtype))


# Image settings


def test_settings_of_a_transformers_folder_are_those_of_its_processor(tmp_path):
    transformers_model("dinov2").save_pretrained(tmp_path)
    BitImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        resample=PILImageResampling.BICUBIC,
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    ).save_pretrained(tmp_path)
    settings = load_backbone(str(tmp_path)).image_settings
    assert (settings.size, settings.crop_share, settings.interpolation) == (32, 0.8, "bicubic")
    assert (settings.mean, settings.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_settings_of_a_processor_without_crop_are_its_size(tmp_path):
    transformers_model("vit").save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    settings = load_backbone(str(tmp_path)).image_settings
    assert (settings.size, settings.crop_share, settings.interpolation) == (48, 1.0, "bilinear")
    assert settings.mean == settings.std == (0.5, 0.5, 0.5)


def test_the_hidden_crop_of_convnext_and_resnet_processors_counts(tmp_path):
    transformers_model("resnet").save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875).save_pretrained(tmp_path)
    settings = load_backbone(str(tmp_path)).image_settings
    assert (settings.size, settings.size / settings.crop_share) == (224, 256)


def test_a_processor_that_does_not_normalize_gives_mean_0_and_std_1(tmp_path):
    transformers_model("vit").save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False).save_pretrained(tmp_path)
    settings = load_backbone(str(tmp_path)).image_settings
    assert (settings.mean, settings.std) == ((0, 0, 0), (1, 1, 1))


def test_settings_without_a_processor_are_the_configured_size_and_imagenet(tmp_path):
    transformers_model("vit").save_pretrained(tmp_path)
    settings = load_backbone(str(tmp_path)).image_settings
    assert (settings.size, settings.mean, settings.std) == (32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_settings_of_a_timm_folder_are_those_of_its_pretrained_cfg(tmp_path):
    timm_folder(tmp_path, "resnet18")
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {
        "input_size": [3, 64, 64],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_pct": 0.9,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = load_backbone(str(tmp_path)).image_settings
    assert (settings.size, settings.interpolation) == (64, "bilinear")
    assert (settings.mean, settings.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert settings.size / settings.crop_share == 71  # timm cuts off: 64 / 0.9 = 71.1


# Weights that do not fit


@pytest.fixture(params=["vit", "resnet18"])
def folder(request, tmp_path):
    """A folder that loads, and whose weights a test then spoils."""
    if request.param == "vit":
        transformers_model("vit", add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    else:
        timm_folder(tmp_path / "encoder", "resnet18", num_classes=0)
    return tmp_path / "encoder"


def spoil(folder: Path, change):
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "encoder_q.", "student.", "model."])
def test_prefixed_weights_are_refused(folder, prefix):
    spoil(folder, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    message = refusal(folder)
    assert "at least 99% of the model's numbers" in message
    assert f"got 0.0% from {str(folder)!r}" in message
    assert "bias" in message
    assert " more." in message


def test_weights_of_other_shapes_are_refused(folder):
    spoil(folder, lambda weights: {name: tensor.flatten().repeat(2) for name, tensor in weights.items()})
    message = refusal(folder)
    assert "each in its shape, got 0.0%" in message
    assert "bias" in message


def test_one_small_weight_of_another_shape_is_refused_and_named(folder):
    name = next(name for name in spoil(folder, lambda weights: weights) if name.endswith("bias"))
    spoil(folder, lambda weights: weights | {name: torch.zeros(3)})
    message = refusal(folder)
    assert "got 99." in message
    assert f"{name}. Is it" in message


@pytest.mark.parametrize("content", [b"", b"no safetensors at all"])
def test_a_weights_file_that_is_none_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert refusal(folder).startswith("`model` must hold weights that fit its configuration")


def test_a_weights_file_without_weights_is_refused(folder):
    spoil(folder, lambda weights: {})
    assert "got 0.0%" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(folder)


def test_weights_of_another_model_are_refused(folder, tmp_path):
    transformers_model("convnext").save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    assert "got 0.0%" in refusal(folder)


def test_half_of_the_weights_are_refused_with_the_share_and_the_missing_names(folder):
    missing = []

    def drop(weights):
        missing.extend(list(weights)[::2])
        return {name: tensor for name, tensor in weights.items() if name not in missing}

    state = load_backbone(str(folder)).model.state_dict()
    kept = spoil(folder, drop)
    named = sorted(name for name in state if name.removeprefix("timm_model.") in missing)
    share = sum(tensor.numel() for tensor in kept.values()) / sum(tensor.numel() for tensor in state.values())
    message = refusal(folder)
    assert f"got {share:.1%} from" in message
    assert f"Missing or of another shape: {named[0]}, " in message
    assert f" and {len(missing) - 5} more." in message


def test_half_of_the_weights_of_a_classifier_are_refused(tmp_path):
    classifier = AutoModelForImageClassification.from_config(transformers_model("vit").config)
    classifier.save_pretrained(tmp_path)
    spoil(tmp_path, lambda weights: {name: weights[name] for name in list(weights)[::2]})
    message = refusal(tmp_path)
    assert "at least 99% of the model's numbers" in message
    assert "layers." in message


def test_less_than_1_percent_missing_loads_with_a_warning_that_names_it(folder, caplog):
    weights = spoil(folder, lambda weights: weights)
    name = "embeddings.cls_token" if "embeddings.cls_token" in weights else "bn1.running_mean"
    spoil(folder, lambda weights: {key: tensor for key, tensor in weights.items() if key != name})
    with caplog.at_level(logging.WARNING):
        load_backbone(str(folder))
    (record,) = caplog.records
    assert record.name == "e2mc_hf.models.loading"
    assert name in record.getMessage()
    assert "% of the model's numbers; random: " in record.getMessage()
    assert record.getMessage().count(",") == 0


@pytest.mark.parametrize("kind", ["vit", "siglip_vision_model", "timm"])
def test_a_checkpoint_with_more_blocks_than_the_model_is_refused(tmp_path, kind):
    if kind == "timm":
        timm_folder(tmp_path, VIT_NAME)
        fewer = {"model_args": TIMM[VIT_NAME] | {"depth": 1}}
    else:
        transformers_model(kind).save_pretrained(tmp_path)
        fewer = {"num_hidden_layers": 1}
    change_config(tmp_path, **fewer)
    message = refusal(tmp_path)
    assert "must be built with every block of its checkpoint, got " in message
    assert "such as " in message


@pytest.mark.parametrize("kind", ["int", "half"])
def test_weights_of_another_kind_of_number_become_float32(tmp_path, kind):
    model = transformers_model("vit")
    model.save_pretrained(tmp_path)
    spoil(tmp_path, lambda weights: {name: tensor.to(getattr(torch, kind)) for name, tensor in weights.items()})
    loaded = load_backbone(str(tmp_path)).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(getattr(torch, kind)).float())


# Configurations and files that are broken or hostile


def change_config(folder: Path, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


BROKEN = {
    "[]": "Unrecognized model",
    "3": "not iterable",
    '{"model_type": "vit", "hidden_size": "wide"}': "Field 'hidden_size' expected int, got str",
    '{"model_type": "vit", "image_size": null}': "Field 'image_size'",
    '{"model_type": "no_such_type"}': "no_such_type",
    '{"architecture": "resnet18", "num_classes": 0, "pretrained_cfg": "none"}': "dictionary",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_configuration_that_is_none_is_refused_with_the_reason(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert not is_ssl_folder(str(tmp_path))
    message = refusal(tmp_path)
    assert message.startswith("`model` must be a Hub id, a timm name or a folder with config.json")
    assert BROKEN[content] in message


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"patch_size": 0}, "division"),
        ({"hidden_act": "no_such"}, "no_such"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "optimum"),
        ({"model_type": "dinat"}, "natten"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_the_reason(tmp_path, entries, reason):
    transformers_model("vit").save_pretrained(tmp_path)
    change_config(tmp_path, **entries)
    message = refusal(tmp_path)
    assert "must hold weights that fit its configuration" in message
    assert reason in message


def test_an_architecture_that_timm_does_not_know_is_refused(tmp_path):
    timm_folder(tmp_path, "resnet18")
    change_config(tmp_path, architecture="no_such_net")
    assert "'no_such_net' is not supported in your version of timm" in refusal(tmp_path)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_no_pickled_code_is_run(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"hostile": Hostile(tmp_path / "done")}, folder / "pytorch_model.bin")
    assert "must hold weights that fit its configuration" in refusal(folder)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir"])
def test_no_file_is_loaded_past_the_checkpoint(tmp_path, argument):
    timm_folder(tmp_path / "encoder", "resnet18")
    torch.save({"hostile": Hostile(tmp_path / "done")}, tmp_path / "hostile.pth")
    value = str(tmp_path / "hostile.pth")
    message = refusal("resnet18", from_scratch=True, backbone_args={argument: value})
    assert f"must describe the architecture, got {argument}. Drop them" in message
    change_config(tmp_path / "encoder", model_args=TIMM["resnet18"] | {argument: value})
    assert f"must describe the architecture, got {argument}. Drop them" in refusal(tmp_path / "encoder")
    assert not (tmp_path / "done").exists()


def test_no_code_of_a_folder_is_run(tmp_path):
    (tmp_path / "hostile.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'done')!r}).touch()")
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "hostile.C", "AutoModel": "hostile.M"}}')
    assert "contains custom code" in refusal(tmp_path)
    model = transformers_model("vit")
    model.save_pretrained(tmp_path)
    change_config(tmp_path, auto_map={"AutoConfig": "hostile.C", "AutoModel": "hostile.M"})
    assert same_state(load_backbone(str(tmp_path)).model, model)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        '{"image_processor_type": "NoSuchProcessor"}',
        '{"image_processor_type": "ViTImageProcessor", "image_std": [0.5, 0.5, 0.0]}',
    ],
)
def test_a_broken_image_processor_is_refused(tmp_path, content):
    transformers_model("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(content)
    assert "must say how its images are prepared" in refusal(tmp_path)


def test_a_file_is_refused_with_the_way_to_import_it(tmp_path):
    path = tmp_path / "swav.pth"
    path.write_bytes(b"")
    message = refusal(path)
    assert f"got the file {str(path)!r}" in message
    assert "scripts/import_checkpoint.py" in message


# From scratch


@pytest.mark.parametrize("dynamic", [False, True])
def test_from_scratch_a_vision_transformer_is_built_for_the_size_of_the_views(dynamic):
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2} | ({"dynamic_img_size": True} if dynamic else {})
    backbone = load_backbone(VIT_NAME, from_scratch=True, backbone_args=options, image_size=64)
    assert backbone.model.timm_model.pos_embed.shape == (1, 1 + 4 * 4, 32)
    assert backbone.measure_num_features(64) == 32
    assert (backbone.image_settings.size, backbone.image_settings.crop_share) == (64, 1.0)


def test_from_scratch_img_size_is_the_image_size():
    assert load_backbone(VIT_NAME, **FROM_SCRATCH).image_settings.size == TIMM[VIT_NAME]["img_size"] == 32


def test_the_size_that_a_loaded_architecture_is_built_for_is_its_own(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    timm_folder(tmp_path / "first", name)
    backbone = load_backbone(str(tmp_path / "first"), backbone_args={"img_size": 64})
    assert backbone.image_settings.size == 64
    assert backbone.measure_num_features(64) == 16
    export_encoder(backbone, tmp_path / "second")
    assert load_backbone(str(tmp_path / "second")).image_settings.size == 64


@pytest.mark.parametrize("img_size", [32, [32, 32]])
def test_a_size_may_be_given_as_height_and_width(img_size):
    backbone = load_backbone(VIT_NAME, from_scratch=True, backbone_args=TIMM[VIT_NAME] | {"img_size": img_size})
    assert backbone.measure_num_features(backbone.image_settings.size) == 32
    assert backbone.image_settings.size == 32


def test_from_scratch_a_convolutional_network_takes_the_size_of_the_views():
    backbone = load_backbone("resnet18", from_scratch=True, backbone_args=TIMM["resnet18"], image_size=16)
    assert backbone.image_settings.size == 16
    assert backbone.measure_num_features(16) == 16
    assert load_backbone("resnet18", from_scratch=True, backbone_args=TIMM["resnet18"]).image_settings.size == 224


def test_from_scratch_weights_differ_from_the_folder_and_are_float32(tmp_path):
    transformers_model("vit").to(torch.bfloat16).save_pretrained(tmp_path)
    scratch, loaded = load_backbone(str(tmp_path), from_scratch=True), load_backbone(str(tmp_path))
    weight = "model.embeddings.patch_embeddings.projection.weight"
    assert {parameter.dtype for parameter in scratch.parameters()} == {torch.float32}
    assert not torch.equal(scratch.get_parameter(weight), loaded.get_parameter(weight))


@pytest.mark.parametrize("options", [{"no_such": 1}, {"embed_dim": 33, "num_heads": 2}])
def test_arguments_that_do_not_fit_the_architecture_are_refused(options):
    assert refusal(VIT_NAME, from_scratch=True, backbone_args=options).startswith("`backbone_args` must fit the arch")


def test_arguments_of_an_architecture_are_refused_for_transformers_models(tmp_path):
    transformers_model("vit").save_pretrained(tmp_path)
    message = refusal(tmp_path, backbone_args={"dynamic_img_size": True})
    assert "`backbone_args` are for timm architectures, got {'dynamic_img_size': True} for vit" in message


def test_arguments_of_an_architecture_apply_to_a_timm_folder(tmp_path):
    timm_folder(tmp_path, VIT_NAME)
    backbone = load_backbone(str(tmp_path), backbone_args={"dynamic_img_size": True})
    assert backbone.measure_num_features(48) == 32
    assert "must hold weights" in refusal(tmp_path, backbone_args={"no_such": 1})


# Names


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "resnet18", "timm/resnet18.a1_in1k", "a b"])
def test_names_that_do_not_load_are_refused(name):
    message = refusal(name)
    assert "`model` must be a Hub id, a timm name or a folder with config.json, got " in message
    assert name in message


def test_a_timm_name_without_pretrained_weights_is_refused():
    assert "'coatnet_0_224' has no pretrained weights on the Hub. Pass --from_scratch" in refusal("coatnet_0_224")


@pytest.mark.parametrize("from_scratch", [False, True])
def test_an_unknown_tag_is_refused_with_the_known_ones(from_scratch):
    message = refusal("resnet18.no_such_tag", from_scratch=from_scratch)
    assert "got 'resnet18.no_such_tag'. There are: " in message
    assert "resnet18.a1_in1k" in message


def test_a_folder_without_configuration_is_refused(tmp_path):
    assert "folder with config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{ no json")
    assert not is_ssl_folder(str(tmp_path))
    assert "folder with config.json" in refusal(tmp_path)


def test_the_output_of_a_run_is_refused_with_its_encoder_named(tmp_path):
    SSLModel.from_backbone(
        load_backbone(VIT_NAME, **FROM_SCRATCH), objective_args={"projector_dim": 8}
    ).save_pretrained(tmp_path)
    assert f"Pass {tmp_path}/encoder" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_a_timm_model_from_scratch_is_initialized_as_timm_does(name: str) -> None:
    backbone = load_backbone(name, from_scratch=True, image_size=224)
    wanted = timm.create_model(name, num_classes=0).state_dict()
    for key, tensor in backbone.model.get_submodule("timm_model").state_dict().items():
        if tensor.dim() > 1:
            assert tensor.std().item() == pytest.approx(wanted[key].std().item(), rel=0.1), key
        else:
            assert torch.equal(tensor, wanted[key]) or tensor.std() > 0, key


def test_new_heads_leave_the_weights_of_the_backbone_alone() -> None:
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": 16})
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
