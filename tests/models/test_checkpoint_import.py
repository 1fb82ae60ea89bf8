import json
from dataclasses import asdict

import pytest
import torch
from models.author_files import (
    ARCHITECTURE,
    DIM,
    RESNET,
    VIT,
    VIT_ARCHITECTURE,
    WRITERS,
    dino,
    prefixed,
    resnet,
    swav,
    vicreg,
    vit,
)
from models.hostile_worker import memory, reset_peak
from models.tiny import randomized, same_state, transformers_model
from safetensors.torch import load_file, save_file
from timm import create_model
from torch.nn import functional as F

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.checkpoint_import import import_checkpoint
from e2mc_hf.models.starting_point import load_starting_point
from e2mc_hf.objectives.registry import OBJECTIVES

WITH_HEADS = [name for name in WRITERS if name != "moco"]
TINY_RESNET = {"architecture": ARCHITECTURE, "backbone_args": RESNET}
TINY_VIT = {"architecture": VIT_ARCHITECTURE, "backbone_args": VIT}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Path, author's model and optimizer of each format."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("authors")
    return {name: (folder / f"{name}.pth", *write(folder / f"{name}.pth")) for name, write in WRITERS.items()}


def imported_from(files, name, **options):
    return import_checkpoint(files[name][0], **(TINY_VIT if name == "dino" else TINY_RESNET), **options)


def authors_outputs(name, model, images):
    """Outputs of the author's modules: each of our heads' inputs and outputs in turn."""
    if name in ("vicreg", "barlow_twins"):
        features = model.backbone(images)
        return {"backbone": features, "projector": model.projector(features)}
    if name == "swav":
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        projected = model.projection_head(features)
        return {"backbone": features, "projector": projected, "prototypes": model.prototypes(projected)}
    if name in ("simsiam", "mec"):
        features = model.encoder.forward_head(model.encoder.forward_features(images), pre_logits=True)
        projected = model.encoder(images)
        outputs = {"backbone": features, "projector": projected, "predictor": model.predictor(projected)}
        return outputs | ({"teacher_projector": model.teacher(images)} if name == "mec" else {})
    outputs = {}
    for network, prefix in (("student", ""), ("teacher", "teacher_")):
        features = model[network].backbone(images)
        projected = model[network].head.mlp(features)
        rows = F.normalize(model[network].head.last_layer.weight_v)
        outputs |= {f"{prefix or ''}backbone": features, f"{prefix}projector": projected}
        outputs[f"{prefix}prototypes"] = F.linear(projected, rows)
    return outputs


def our_outputs(model, images):
    features = model.backbone(images)
    outputs = {"backbone": features, "projector": model.objective.projector(features)}
    if hasattr(model.objective, "predictor"):
        outputs["predictor"] = model.objective.predictor(outputs["projector"])
    if hasattr(model.objective, "prototypes"):
        prototypes = model.objective.prototypes.weight
        rows = F.normalize(prototypes) if model.teacher is not None else prototypes
        outputs["prototypes"] = F.linear(outputs["projector"], rows)
    if model.teacher is not None:
        features = model.teacher(images)
        outputs["teacher_projector"] = model.objective.teacher_projector(features)
    if hasattr(model.objective, "teacher_prototypes"):
        outputs["teacher_backbone"] = features
        rows = F.normalize(model.objective.teacher_prototypes.weight)
        outputs["teacher_prototypes"] = F.linear(outputs["teacher_projector"], rows)
    return outputs


@pytest.mark.parametrize("name", WITH_HEADS)
@torch.no_grad()
def test_backbone_and_heads_compute_what_the_authors_modules_compute(files, name):
    _, author, _ = files[name]
    imported = imported_from(files, name)
    assert imported.record.format == imported.model.config.objective == name
    assert (imported.record.coverage, imported.record.missing) == (1.0, [])
    modules = author.values() if name == "dino" else [author]
    for module in modules:
        module.eval()
    images = torch.randn(4, 3, 32, 32)
    wanted, got = authors_outputs(name, author, images), our_outputs(imported.model.eval(), images)
    assert got.keys() == wanted.keys()
    for part in wanted:
        assert wanted[part].std() > 1e-3
        assert torch.allclose(got[part], wanted[part], atol=1e-5), part
    heads = {part for part in wanted if "backbone" not in part} | ({"center"} if name == "dino" else set())
    assert set(imported.record.heads) == heads


@pytest.mark.parametrize("name", WITH_HEADS)
def test_a_saved_import_is_a_starting_point_with_the_same_heads(files, tmp_path, name):
    imported = imported_from(files, name)
    imported.save(tmp_path / "out")
    start = load_starting_point(str(tmp_path / "out"))
    assert start.config.objective == name
    assert same_state(start, imported.model)
    momentum = tmp_path / "out" / "optimizer.safetensors"
    assert momentum.is_file() == (name != "dino")
    if name != "dino":
        stored = load_file(momentum)
        parameters = dict(start.named_parameters())
        assert all(parameters[key].shape == buffer.shape for key, buffer in stored.items())
        assert stored.keys() == {key for key in parameters if "teacher" not in key}


def test_dinos_center_and_prototypes_are_kept_and_its_adam_is_not(files):
    imported = imported_from(files, "dino")
    center = torch.load(files["dino"][0], weights_only=False)["dino_loss"]["center"]
    assert torch.equal(imported.model.objective.center, center[0])
    assert imported.record.momentum_note == "its optimizer keeps no momentum of SGD or LARS"


@pytest.mark.parametrize("name", ["vicreg", "swav", "simsiam"])
def test_momentum_has_the_names_of_our_parameters(files, name):
    _, author, optimizer = files[name]
    imported = imported_from(files, name)
    parameters = dict(imported.model.named_parameters())
    theirs = dict(author.named_parameters())
    key = "mu" if name == "vicreg" else "momentum_buffer"
    by_values = {
        tuple(p.flatten().tolist()): optimizer.state[p].get(key) for p in theirs.values() if optimizer.state[p]
    }
    assert len(imported.momentum) == len(by_values)
    for own, buffer in imported.momentum.items():
        assert torch.equal(buffer, by_values[tuple(parameters[own].flatten().tolist())])


def test_moco_gives_the_query_encoder_alone_and_names_what_it_left_out(files):
    _, author, _ = files["moco"]
    imported = imported_from(files, "moco")
    assert imported.model is None
    assert (imported.record.objective, imported.record.heads) == (None, [])
    left = set(imported.record.dropped)
    assert {"queue", "queue_ptr", "encoder_q.fc.0.weight", "encoder_k.conv1.weight"} <= left
    assert not any(key.startswith("encoder_q.") and ".fc." not in key for key in left)
    images = torch.randn(2, 3, 32, 32)
    features = author.encoder_q.eval().forward_head(author.encoder_q.forward_features(images), pre_logits=True)
    assert torch.allclose(imported.backbone.eval()(images), features, atol=1e-5)


def test_a_format_without_an_objective_here_gives_the_encoder_and_names_the_heads(files, monkeypatch):
    monkeypatch.delitem(OBJECTIVES, "swav")
    imported = imported_from(files, "swav")
    assert imported.model is None
    assert "prototypes.weight" in imported.record.dropped


def test_the_encoder_of_dino_alone_is_the_teachers(files):
    _, author, _ = files["dino"]
    imported = imported_from(files, "dino", encoder_only=True)
    assert imported.model is None
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(imported.backbone.eval()(images), author["teacher"].eval().backbone(images), atol=1e-5)
    assert "student.backbone.cls_token" in imported.record.dropped


PREFIXES = [
    "",
    "module.",
    "backbone.",
    "encoder.",
    "module.encoder.",
    "module.encoder_q.",
    "student.",
    "teacher.",
    "teacher.backbone.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_encoder_alone_loads_under_any_of_the_prefixes(tmp_path, prefix):
    model = resnet()
    torch.save({"epoch": 3, "state_dict": prefixed(model, prefix)}, tmp_path / "encoder.pth")
    imported = import_checkpoint(tmp_path / "encoder.pth", **TINY_RESNET)
    assert imported.model is None
    assert same_state(imported.backbone.model.timm_model, model)
    assert (imported.record.coverage, imported.record.dropped) == (1.0, [])


@pytest.mark.parametrize("name", WRITERS)
def test_an_encoder_alone_loads_when_its_method_is_given(tmp_path, name):
    model, options = (vit(), TINY_VIT) if name == "dino" else (resnet(), TINY_RESNET)
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    imported = import_checkpoint(tmp_path / "encoder.pth", format=name, **options)
    assert imported.model is None
    assert (imported.record.format, imported.record.heads) == (name, [])
    assert same_state(imported.backbone.model.timm_model, model)


def test_safetensors_of_an_authors_layout_load(tmp_path):
    model = vicreg()
    save_file(prefixed(model), tmp_path / "model.safetensors")
    imported = import_checkpoint(tmp_path / "model.safetensors", **TINY_RESNET)
    assert imported.record.file.container == "safetensors"
    assert torch.equal(imported.model.objective.projector[0].weight, model.projector[0].weight)
    assert imported.record.momentum_note == "the file has no optimizer"


def test_numbers_in_half_precision_are_read_as_float32(tmp_path):
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in resnet().state_dict().items()
    }
    torch.save(state, tmp_path / "half.pth")
    imported = import_checkpoint(tmp_path / "half.pth", **TINY_RESNET)
    weight = imported.backbone.model.timm_model.conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["conv1.weight"].float())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_an_architecture_that_is_recognized_need_not_be_given(tmp_path, name):
    model = randomized(create_model(name, num_classes=0))
    torch.save(prefixed(model, "module.backbone."), tmp_path / "encoder.pth")
    imported = import_checkpoint(tmp_path / "encoder.pth")
    assert imported.record.architecture == name
    assert same_state(imported.backbone.model.timm_model, model)
    settings = imported.backbone.image_settings
    assert (settings.size, settings.mean, settings.crop_share) == (224, (0.485, 0.456, 0.406), 224 / 256)
    assert settings.interpolation == ("bilinear" if name == "resnet18" else "bicubic")


def test_swavs_images_are_normalized_as_its_authors_did(files):
    assert imported_from(files, "swav").backbone.image_settings.std == (0.228, 0.224, 0.225)
    assert imported_from(files, "vicreg").backbone.image_settings.std == (0.229, 0.224, 0.225)


def test_nothing_of_timms_own_weights_is_claimed(files):
    described = imported_from(files, "vicreg").backbone.model.config.pretrained_cfg
    assert not {"tag", "license", "origin_url", "paper_ids", "url", "hf_hub_id"} & described.keys()


def test_a_backbone_of_transformers_takes_the_numbers_under_its_own_names(tmp_path):
    source = transformers_model("resnet")
    torch.save({"model": prefixed(source, "module.encoder_q.")}, tmp_path / "encoder.pth")
    empty = Backbone(transformers_model("resnet"), ImageSettings(32))
    imported = import_checkpoint(tmp_path / "encoder.pth", backbone=empty)
    assert imported.backbone is empty
    assert same_state(empty.model, source)
    assert imported.record.architecture == "resnet"


def test_a_backbone_and_an_architecture_are_not_given_together(tmp_path):
    torch.save(resnet().state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(UsageError, match="`backbone` must not be given with `architecture`"):
        import_checkpoint(
            tmp_path / "encoder.pth",
            architecture="resnet18",
            backbone=Backbone(transformers_model("vit"), ImageSettings(32)),
        )


def test_the_record_says_what_came_from_where_and_nothing_of_this_machine(files, tmp_path):
    path = files["vicreg"][0]
    imported = imported_from(files, "vicreg")
    imported.save(tmp_path / "out")
    text = (tmp_path / "out" / "import.json").read_text()
    record = json.loads(text)
    assert record == asdict(imported.record)
    assert record["file"]["name"] == "vicreg.pth"
    assert record["file"]["size"] == path.stat().st_size
    assert record["num_momentum"] == len(imported.momentum)
    assert str(path.parent) not in text + (tmp_path / "out" / "config.json").read_text()


def test_the_fingerprint_is_that_of_the_numbers(tmp_path):
    models = [resnet(), resnet()]
    prints = []
    for number, model in enumerate([*models, models[0]]):
        torch.save({"epoch": number, "model": model.state_dict()}, tmp_path / f"{number}.pth")
        prints.append(import_checkpoint(tmp_path / f"{number}.pth", **TINY_RESNET).record.fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_a_file_that_changes_nothing_is_refused(tmp_path):
    torch.save(resnet().state_dict(), tmp_path / "encoder.pth")
    backbone = import_checkpoint(tmp_path / "encoder.pth", **TINY_RESNET).backbone
    with pytest.raises(UsageError, match=r"must change the encoder, got 'encoder\.pth' with its initial numbers"):
        import_checkpoint(tmp_path / "encoder.pth", backbone=backbone)


def refusal_of(tmp_path, state, **options):
    torch.save(state, tmp_path / "encoder.pth")
    with pytest.raises(UsageError) as refusal:
        import_checkpoint(tmp_path / "encoder.pth", **(options or TINY_RESNET))
    return str(refusal.value)


def test_half_a_file_is_refused_with_the_share(tmp_path):
    state = dict(list(resnet().state_dict().items())[:60])
    message = refusal_of(tmp_path, state)
    present, total = (sum(t.numel() for t in own.values()) for own in (state, resnet().state_dict()))
    assert 0.3 < present / total < 0.99
    assert f"must hold at least 99% of the encoder's numbers, got {present / total:.1%} from 'encoder.pth'" in message


def test_other_names_are_refused_with_the_three_nearest(tmp_path):
    state = {name.replace("layer1.0.conv", "stage1.0.convolution"): t for name, t in resnet().state_dict().items()}
    state = {name.replace("layer4.0.conv2.weight", "layer4.0.conv2.kernel"): t for name, t in state.items()}
    message = refusal_of(tmp_path, state)
    assert "layer4.0.conv2.weight (near: 'layer4.0.conv2.kernel')" in message
    assert "layer1.0.conv1.weight (near: 'stage1.0.convolution1.weight')" in message
    assert "layer1.0.conv2.weight (near: 'stage1.0.convolution2.weight')" in message
    assert message.count("(near: ") == 3


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda t: t[:, :, :3, :3], r"conv1.weight with shape (64, 3, 3, 3) where it is (64, 3, 7, 7)"),
        (lambda t: t.long(), "conv1.weight with torch.int64 where it is torch.float32"),
        (lambda t: t / 0, "conv1.weight with numbers that are not finite"),
    ],
)
def test_a_tensor_of_another_shape_or_kind_is_refused(tmp_path, change, got):
    state = resnet().state_dict()
    assert got in refusal_of(tmp_path, state | {"conv1.weight": change(state["conv1.weight"])})


def test_nothing_is_copied_when_one_tensor_is_refused(tmp_path):
    backbone = import_checkpoint_of(tmp_path, resnet())
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    state = resnet().state_dict()
    state["layer4.0.conv2.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UsageError):
        import_checkpoint(tmp_path / "bad.pth", backbone=backbone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())


def import_checkpoint_of(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "good.pth")
    return import_checkpoint(tmp_path / "good.pth", **TINY_RESNET).backbone


def test_a_file_of_another_model_is_refused(tmp_path):
    assert "got 0.0% from 'encoder.pth'" in refusal_of(tmp_path, vit().state_dict())


def test_the_wrong_format_is_refused_with_the_likely_one(tmp_path):
    message = refusal_of(tmp_path, prefixed(vicreg()), format="simsiam", **TINY_RESNET)
    assert message == "`format` must be that of the file, whose names are vicreg's, got simsiam. Pass auto."
    message = refusal_of(tmp_path, prefixed(vicreg()), format="swav", **TINY_RESNET)
    assert "got 0.0% from 'encoder.pth'. Its names look like those of vicreg." in message


def test_an_architecture_that_is_not_recognized_must_be_given(tmp_path):
    message = refusal_of(tmp_path, resnet().state_dict(), format="auto")
    assert message.startswith(
        "`architecture` must be given for a file that is no ResNet-18 to -152 or ViT-Ti to -L, got "
    )
    assert "'conv1.weight' (64, 3, 7, 7)" in message


@pytest.fixture
def peak():
    """Bytes that this process needed on top of those in use at first."""
    before = reset_peak()
    return lambda: memory("VmHWM") - before


def test_the_names_of_a_large_model_alone_cost_no_memory(tmp_path, peak):
    state = {f"blocks.{number}.attn.qkv.weight": torch.ones(1) for number in range(24)}
    state |= {"patch_embed.proj.weight": torch.ones(1024, 3, 16, 16), "pos_embed": torch.ones(1, 197, 1024)}
    message = refusal_of(tmp_path, state | {"cls_token": torch.ones(1, 1, 1024)}, format="auto")
    assert "must hold at least 99% of the encoder's numbers, got " in message
    assert peak() < 100 << 20  # a ViT-L has 1,200 MB


def test_a_narrow_matrix_does_not_make_wide_heads(tmp_path, peak):
    state = vicreg().state_dict()
    state |= {"projector.0.weight": torch.ones(100_000, 16), "projector.3.weight": torch.ones(100_000, 16)}
    assert "projector.3.weight of shape (100000, 16), where it takes 100000" in refusal_of(tmp_path, state)
    assert peak() < 200 << 20  # its square has 40 GB


PARTIAL = [
    (vicreg, "projector.3.weight", "without projector.3.weight"),
    (vicreg, "projector.6.weight", "without projector.6.weight"),
    (vicreg, "projector.4.running_mean", "without projector.4.running_mean"),
    (swav, "prototypes.weight", "without prototypes.weight"),
    (swav, "projection_head.1.weight", "without projector.1.weight"),
]


@pytest.mark.parametrize(("model", "missing", "named"), PARTIAL)
def test_heads_that_are_there_in_part_are_refused_unless_left_out(tmp_path, model, missing, named):
    state = model().state_dict()
    del state[missing]
    message = refusal_of(tmp_path, state)
    assert message.startswith("`file` must hold its heads whole or not at all, got them ")
    assert named in message
    assert "Pass --encoder_only to leave the heads out." in message
    imported = import_checkpoint(tmp_path / "encoder.pth", encoder_only=True, **TINY_RESNET)
    assert imported.model is None


def test_further_heads_are_refused_too(tmp_path):
    state = vicreg().state_dict() | {"projector.extra.weight": torch.ones(DIM)}
    assert "with 'projector.extra.weight'" in refusal_of(tmp_path, state)


def test_a_teacher_without_a_backbone_is_refused(tmp_path):
    models = dino()
    teacher = {name: t for name, t in models["teacher"].state_dict().items() if "blocks.1." not in name}
    message = refusal_of(tmp_path, {"student": models["student"].state_dict(), "teacher": teacher}, **TINY_VIT)
    assert "without teacher.blocks.1.norm1.weight" in message


def test_counters_that_older_versions_of_torch_did_not_write_may_be_missing(tmp_path):
    model = vicreg()
    state = {name: t for name, t in prefixed(model).items() if not name.endswith("num_batches_tracked")}
    torch.save({"model": state}, tmp_path / "old.pth")
    imported = import_checkpoint(tmp_path / "old.pth", **TINY_RESNET)
    assert torch.equal(imported.model.objective.projector[1].running_mean, model.projector[1].running_mean)
    assert imported.record.coverage > 0.99
    assert all(name.endswith("num_batches_tracked") for name in imported.record.missing)
