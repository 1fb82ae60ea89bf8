import copy
import sys

import pytest
import torch
from models.tiny import TIMM, TRANSFORMERS, randomized, same_state, transformers_model

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone, prepare_config
from e2mc_hf.models.freezing import freeze_first_blocks
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.lora import add_lora, merge_lora
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.objectives.teacher import update_teacher
from e2mc_hf.publishing.encoder import export_encoder

SIZE = 32
VIT = TIMM["vit_tiny_patch16_224"]
OF_TIMM = {"vit_tiny_patch16_224": VIT, "deit3_small_patch16_224": VIT, "vit_small_patch16_dinov3": VIT}
OF_TIMM |= {"swin_tiny_patch4_window7_224": TIMM["swin_tiny_patch4_window7_224"]}
CONVOLUTIONAL = {"resnet", "convnext", "convnextv2", "dinov3_convnext"}
TRANSFORMER_KINDS = [kind for kind in TRANSFORMERS if kind not in CONVOLUTIONAL | {"swin"}]


def encoder(name: str) -> Backbone:
    if name in TRANSFORMERS:
        model = transformers_model(name)
        prepare_config(model.config)
        return Backbone(model, ImageSettings(size=SIZE)).eval()
    options = OF_TIMM.get(name, TIMM.get(name, VIT))
    return randomized(load_backbone(name, from_scratch=True, backbone_args=options, image_size=SIZE))


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def moved(backbone: Backbone) -> None:
    """As if the adapters had been trained."""
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", [*OF_TIMM, *TRANSFORMER_KINDS])
def test_adapters_begin_without_effect_learn_and_are_merged(name):
    pytest.importorskip("peft")
    backbone = encoder(name)
    state = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        plain = backbone(images())
    layers = add_lora(backbone, 2)
    assert len(layers) >= 2 * 2
    with torch.no_grad():
        assert torch.allclose(backbone(images()), plain, rtol=1e-5, atol=1e-5)
    trained = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    backbone(images()).sum().backward()
    assert all(backbone.get_parameter(key).grad is not None for key in trained)
    moved(backbone)
    with torch.no_grad():
        adapted = backbone(images())
        assert merge_lora(backbone) == layers
        merged = backbone(images())
    assert (adapted - plain).abs().max() > 1e-4
    assert (merged - adapted).abs().max() <= 1e-5
    assert list(backbone.state_dict()) == list(state)
    changed = {
        key.rpartition(".")[0] for key, tensor in backbone.state_dict().items() if not torch.equal(tensor, state[key])
    }
    assert changed == set(layers)
    assert merge_lora(backbone) == []


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "dinov2"])
def test_a_merged_encoder_is_exported_as_a_plain_one(name, tmp_path):
    pytest.importorskip("peft")
    backbone = encoder(name)
    add_lora(backbone, 4, alpha=8)
    moved(backbone)
    with torch.no_grad():
        expected = backbone(images())
    merge_lora(backbone)
    export_encoder(backbone, tmp_path / "encoder")
    with torch.no_grad():
        again = load_backbone(str(tmp_path / "encoder")).eval()(images())
    assert (again - expected).abs().max() <= 1e-5


def test_first_blocks_frozen_after_the_adapters_came_keep_theirs_as_they_are():
    pytest.importorskip("peft")
    backbone = encoder("vit_tiny_patch16_224")
    layers = add_lora(backbone, 2)
    freeze_first_blocks(backbone, 1)
    trained = {name.rpartition(".lora_")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {name for name in layers if ".blocks.1." in name}


def test_alpha_scales_the_adapters():
    pytest.importorskip("peft")
    effects = []
    for alpha in (2, 4):
        torch.manual_seed(0)
        backbone = encoder("vit_tiny_patch16_224").double()
        weight = backbone.model.timm_model.blocks[0].attn.qkv.weight.clone()
        add_lora(backbone, 2, alpha=alpha)
        moved(backbone)
        merge_lora(backbone)
        effects.append(backbone.model.timm_model.blocks[0].attn.qkv.weight - weight)
    assert torch.linalg.matrix_rank(effects[0]) == 2
    assert torch.allclose(2 * effects[0], effects[1])


def test_training_moves_adapters_and_heads_alone():
    pytest.importorskip("peft")
    backbone = encoder("vit_tiny_patch16_224")
    add_lora(backbone, 2, dropout=0.1)
    model = SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": 8}, image_size=SIZE).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(2):  # the first step moves B alone, since B is 0
        optimizer.zero_grad()
        model([images(step), images(step + 10)]).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name or name.startswith("objective.")}
    assert merge_lora(model) == [
        f"backbone.model.timm_model.blocks.{i}.attn.{x}" for i in (0, 1) for x in ("qkv", "proj")
    ]


def test_a_teacher_gets_the_same_adapters_and_follows():
    pytest.importorskip("peft")
    student = encoder("vit_tiny_patch16_224")
    teacher = copy.deepcopy(student).requires_grad_(False)
    add_lora(student, 2, teacher=teacher)
    assert same_state(student, teacher)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    moved(student)
    update_teacher(student, teacher, 0.5)
    key = "model.timm_model.blocks.0.attn.qkv.lora_B.default.weight"
    assert torch.equal(teacher.get_parameter(key), 0.5 * student.get_parameter(key))
    late = copy.deepcopy(student)
    with torch.no_grad():
        assert torch.equal(late(images()), student(images()))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3_qkvb"])
def test_layers_whose_weight_is_used_past_the_module_are_refused(name):
    pytest.importorskip("peft")
    backbone = encoder(name)
    with pytest.raises(UsageError, match=r"multiplies with the weight of model.timm_model.blocks.0.attn.qkv itself"):
        add_lora(backbone, 2)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module._forward_pre_hooks for module in backbone.modules())


@pytest.mark.parametrize("name", ["resnet18", "convnext"])
def test_a_network_without_attention_is_refused(name):
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match="needs a vision transformer"):
        add_lora(encoder(name), 2)


def test_a_rank_below_1_is_refused():
    with pytest.raises(UsageError, match="`lora_rank` must be at least 1, got 0"):
        add_lora(encoder("vit_tiny_patch16_224"), 0)


def test_without_peft_the_extra_is_named_and_merging_needs_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    backbone = encoder("vit_tiny_patch16_224")
    with pytest.raises(UsageError, match=r'pip install "e2mc-hf\[lora\]"'):
        add_lora(backbone, 2)
    assert merge_lora(backbone) == []
