import pytest
import timm.optim
import torch
from models.tiny import TIMM, TRANSFORMERS, randomized, transformers_model
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import CONFIG_MAPPING, AutoModel

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone, prepare_config
from e2mc_hf.models.freezing import freeze_first_blocks
from e2mc_hf.models.layer_order import layer_order
from e2mc_hf.models.loading import load_backbone

SIZE = 32
VIT = TIMM["vit_tiny_patch16_224"]
BLOCKS_OF_TIMM = {
    "resnet18": (TIMM["resnet18"] | {"layers": [1, 2, 1, 1]}, 5),
    "resnetv2_18": ({"layers": [1, 2, 1, 1], "channels": [8, 8, 16, 16], "stem_chs": 8}, 5),
    "convnext_atto": (TIMM["convnext_atto"] | {"depths": [1, 2, 1, 1]}, 5),
    "vit_tiny_patch16_224": (VIT | {"depth": 3}, 3),
    "vit_small_patch16_dinov3": (VIT, 2),
    "beit_base_patch16_224": (VIT, 2),
    "cait_xxs24_224": (VIT, 2),
    "swin_tiny_patch4_window7_224": (TIMM["swin_tiny_patch4_window7_224"], 3),
    "mobilenetv3_small_050": ({}, 12),
    "test_efficientnet": ({}, 5),
    "regnetx_002": ({}, 13),
}
DEEPER = {"num_hidden_layers": 3, "depths": [1, 2]}
BLOCKS = {kind: 3 for kind in TRANSFORMERS if kind != "swin"}


def of_timm(name: str) -> Backbone:
    arguments, _ = BLOCKS_OF_TIMM[name]
    return load_backbone(name, from_scratch=True, backbone_args=arguments, image_size=SIZE)


def of_transformers(kind: str) -> Backbone:
    options = TRANSFORMERS[kind] | {name: value for name, value in DEEPER.items() if name in TRANSFORMERS[kind]}
    model = AutoModel.from_config(prepare_config(CONFIG_MAPPING[kind](**options)))
    return Backbone(randomized(model), ImageSettings(size=SIZE))


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


# The order of layers


@pytest.mark.parametrize("name", BLOCKS_OF_TIMM)
def test_depths_are_those_of_timm_for_the_model_with_its_classifier(name):
    arguments, num_blocks = BLOCKS_OF_TIMM[name]
    order = layer_order(of_timm(name))
    assert order.num_blocks == num_blocks
    classifier = timm.create_model(name, num_classes=10, **arguments)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    compared = set()
    for group in timm.optim.param_groups_layer_decay(classifier, layer_decay=0.5):
        for parameter in group["params"]:
            own = f"model.timm_model.{names[id(parameter)]}"
            if own in order.depths:
                assert 0.5 ** (num_blocks + 1 - order.depths[own]) == group["lr_scale"], own
                compared.add(own)
    assert compared == {name for name, _ in of_timm(name).named_parameters()}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_transformers_are_told_apart(kind):
    backbone = of_transformers(kind)
    order = layer_order(backbone)
    assert order.num_blocks == BLOCKS[kind]
    assert {name for name, _ in backbone.named_parameters()} <= order.depths.keys()
    assert set(order.depths.values()) >= set(range(BLOCKS[kind] + 1))


@pytest.mark.parametrize("kind", BLOCKS)
def test_depths_of_transformers_follow_the_order_of_computation(kind):
    """What a parameter changes first: modules of lower depth run before any of higher depth is done."""
    backbone = of_transformers(kind).eval()
    depths = layer_order(backbone).depths
    finished: list[int] = []
    for name, module in backbone.named_modules():
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if own and not list(module.children()):
            depth = depths[own[0]]
            module.register_forward_hook(lambda *_, depth=depth: finished.append(depth))
    with torch.no_grad():
        backbone(images())
    assert len(finished) > 4
    assert finished == sorted(finished)


def test_the_layers_around_the_blocks_have_their_places():
    depths = layer_order(of_transformers("vit")).depths
    assert depths["model.embeddings.cls_token"] == depths["model.embeddings.position_embeddings"] == 0
    assert depths["model.layernorm.weight"] == 3
    assert depths["model.pooler.dense.weight"] == 4
    depths = layer_order(of_transformers("convnext")).depths
    assert depths["model.encoder.stages.1.downsampling_layer.0.weight"] == 2
    depths = layer_order(of_transformers("dinov3_convnext")).depths
    assert depths["model.model.stages.0.downsample_layers.0.weight"] == 0
    assert depths["model.model.stages.1.downsample_layers.0.weight"] == 2
    depths = layer_order(of_transformers("swinv2")).depths
    assert depths["model.encoder.layers.0.downsample.reduction.weight"] == 1
    depths = layer_order(of_transformers("siglip_vision_model")).depths
    assert depths["model.post_layernorm.weight"] == 3
    assert depths["model.head.probe"] == 4


@pytest.mark.parametrize("name", ["pit_ti_224", "poolformerv2_s12"])
def test_an_architecture_that_says_nothing_about_its_layers_is_refused(name):
    backbone = load_backbone(name, from_scratch=True)
    with pytest.raises(UsageError, match=f"whose blocks are known by name, got '{name}'"):
        freeze_first_blocks(backbone, 1)


def test_a_transformers_model_with_names_of_its_own_is_refused():
    backbone = Backbone(AutoModel.from_config(CONFIG_MAPPING["mobilenet_v1"]()), ImageSettings(size=SIZE))
    with pytest.raises(UsageError, match="choose timm's version of it"):
        layer_order(backbone)


# Freezing


def trained_steps(backbone: Backbone) -> None:
    backbone.train()
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        backbone(images(step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "test_efficientnet", "resnet", "vit", "convnext"])
def test_first_blocks_keep_weights_and_statistics_and_the_others_learn(name):
    backbone = of_timm(name) if name in BLOCKS_OF_TIMM else of_transformers(name)
    unused = backbone.freeze_unused_parameters(SIZE)
    depths = layer_order(backbone).depths
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    frozen = freeze_first_blocks(backbone, 2)
    assert list(backbone.state_dict()) == list(before)
    assert set(frozen) == {key for key, _ in backbone.named_parameters() if depths[key] <= 2}
    trained_steps(backbone)
    without_effect = "k_proj.bias"  # the same for every key: softmax takes it away
    for key, tensor in backbone.state_dict().items():
        moved = not torch.equal(tensor, before[key])
        depth = depths[key] if key in depths else depths[key.rpartition(".")[0]]
        assert moved == (depth > 2 and key not in unused) or key.endswith(without_effect), key


def test_only_layers_of_frozen_blocks_keep_their_statistics():
    backbone = of_timm("resnet18")
    freeze_first_blocks(backbone, 1)
    alive = [name for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)]
    assert alive
    assert not any(name.startswith(("model.timm_model.bn1", "model.timm_model.layer1")) for name in alive)
    assert "model.timm_model.layer2.0.bn1" in alive


def test_to_freeze_no_block_freezes_nothing():
    backbone = of_timm("resnet18")
    assert freeze_first_blocks(backbone, 0) == []
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert any(isinstance(module, _BatchNorm) for module in backbone.modules())


def test_every_block_can_be_frozen():
    backbone = of_timm("resnet18")
    assert len(freeze_first_blocks(backbone, 5)) == len(list(backbone.parameters()))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("count", [6, -1])
def test_more_blocks_than_there_are_is_refused_with_their_number(count):
    rule = f"`freeze_blocks` must lie between 0 and 5, the blocks of 'resnet18', got {count}"
    with pytest.raises(UsageError, match=rule):
        freeze_first_blocks(of_timm("resnet18"), count)


def test_transformers_blocks_are_counted_as_well():
    with pytest.raises(UsageError, match="between 0 and 2, the blocks of"):
        freeze_first_blocks(Backbone(transformers_model("dinov2"), ImageSettings(size=SIZE)), 3)
