from pathlib import Path
from typing import Any

import pytest
import torch
from models.tiny import TIMM, randomized, transformers_model
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.freezing import freeze_first_blocks
from e2mc_hf.models.layer_order import layer_order
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.optimizers import build_optimizer, parameter_groups

RATE, DECAY = 0.3, 0.5


def test_lars_takes_the_steps_of_the_authors(test_data: Path) -> None:
    golden = test_data.parent / "golden" / "lars.safetensors"
    if not golden.is_file():
        pytest.skip("no golden values beside E2MC_TEST_DATA")
    arrays = load_file(golden)
    model = nn.Linear(5, 7, dtype=torch.float64)
    model.load_state_dict({"weight": arrays["weight0"], "bias": arrays["bias0"]})
    optimizer = build_optimizer(model, "lars", learning_rate=0.3, weight_decay=1e-6, momentum=0.9)
    for step in range(3):
        model.weight.grad, model.bias.grad = arrays[f"grad_weight{step}"], arrays[f"grad_bias{step}"]
        optimizer.step()
        torch.testing.assert_close(model.weight.data, arrays[f"weight{step + 1}"], rtol=0, atol=5e-9)
        torch.testing.assert_close(model.bias.data, arrays[f"bias{step + 1}"], rtol=0, atol=5e-9)


def test_vectors_are_not_decayed_and_frozen_parameters_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[3].weight.requires_grad_(False)
    decayed, others = parameter_groups(model, 0.1, learning_rate=0.3)
    assert decayed.keys() == others.keys() == {"params", "weight_decay"}
    assert [p.shape for p in decayed["params"]] == [torch.Size([4, 3, 3, 3])]
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert {p.dim() for p in others["params"]} == {1}
    assert len(others["params"]) == 4


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_every_optimizer_descends(name: str) -> None:
    model, x = nn.Linear(4, 1), torch.randn(64, 4)
    optimizer = build_optimizer(model, name, learning_rate=0.05, weight_decay=1e-6, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_lars_without_weight_decay_is_refused_since_it_would_adapt_nothing() -> None:
    with pytest.raises(UsageError, match="`weight_decay` must be positive for lars"):
        build_optimizer(nn.Linear(2, 2), "lars", learning_rate=0.1, weight_decay=0.0, momentum=0.9)


def test_unknown_optimizers_are_refused() -> None:
    with pytest.raises(UsageError, match="`optimizer` must be lars, adamw or sgd, got 'adam'"):
        build_optimizer(nn.Linear(2, 2), "adam", learning_rate=0.1, weight_decay=0.0, momentum=0.9)


# Layer-wise rates


def model_on(encoder: str, objective: str = "vicreg") -> SSLModel:
    if encoder in TIMM:
        options = TIMM[encoder] | ({"drop_path_rate": 0.0} if encoder == "convnext_atto" else {})
        backbone = load_backbone(encoder, from_scratch=True, backbone_args=options, image_size=32)
    else:
        backbone = Backbone(transformers_model(encoder), ImageSettings(size=32))
    heads = {"projector_dim": 8} | ({"predictor_dim": 8} if objective == "simsiam" else {})
    return randomized(SSLModel.from_backbone(backbone, objective, heads, image_size=32))


def rates_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group.get("lr", RATE) for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "vit", "convnext", "dinov2"])
def test_each_layer_has_the_rate_of_the_one_above_times_the_decay(encoder: str) -> None:
    model = model_on(encoder)
    groups = parameter_groups(model, 0.1, learning_rate=RATE, layer_decay=DECAY)
    order = layer_order(model.backbone)
    rates = rates_of(model, groups)
    assert rates.keys() == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        if name.startswith("backbone."):
            depth = order.depths[name.removeprefix("backbone.")]
            assert rate == pytest.approx(RATE * DECAY ** (order.num_blocks + 1 - depth), rel=1e-12), name
        else:
            assert rate == RATE
    assert "lr" not in groups[0]  # the rate that the Trainer logs
    assert all(group["weight_decay"] == (0.1 if group["params"][0].dim() > 1 else 0.0) for group in groups)
    assert all(len({parameter.dim() > 1 for parameter in group["params"]}) == 1 for group in groups)


def test_a_decay_of_1_leaves_the_two_groups_as_they_are() -> None:
    model = model_on("resnet18")
    plain = parameter_groups(model, 0.1, learning_rate=RATE)
    groups = parameter_groups(model, 0.1, learning_rate=RATE, layer_decay=1.0, fixed_learning_rates={})
    trained = list(model.parameters())
    assert [p for p in trained if p.dim() > 1] == plain[0]["params"]
    assert [p for p in trained if p.dim() <= 1] == plain[1]["params"]
    assert [group.keys() for group in groups] == [{"params", "weight_decay"}] * 2
    for one, other in zip(groups, plain, strict=True):
        assert all(p is q for p, q in zip(one["params"], other["params"], strict=True))


def test_frozen_blocks_have_no_group() -> None:
    model = model_on("vit_tiny_patch16_224")
    frozen = freeze_first_blocks(model.backbone, 1)
    groups = parameter_groups(model, 0.1, learning_rate=RATE, layer_decay=DECAY)
    assert not {f"backbone.{name}" for name in frozen} & rates_of(model, groups).keys()
    assert min(group.get("lr", RATE) for group in groups) == RATE * DECAY


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_the_rate_of_a_layer_scales_its_step(name: str) -> None:
    steps = []
    for layer_decay in (1.0, DECAY):
        torch.manual_seed(0)
        model = model_on("vit_tiny_patch16_224").double()
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = build_optimizer(
            model, name, learning_rate=RATE, weight_decay=1e-6, momentum=0.9, layer_decay=layer_decay
        )
        generator = torch.Generator().manual_seed(1)
        model([torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]).loss.backward()
        optimizer.step()
        steps.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
    depths = layer_order(model.backbone).depths
    for key, step in steps[0].items():
        scale = DECAY ** (3 - depths[key.removeprefix("backbone.")]) if key.startswith("backbone.") else 1.0
        assert torch.allclose(steps[1][key], scale * step, rtol=1e-6, atol=1e-12), key
    assert steps[0]["backbone.model.timm_model.patch_embed.proj.weight"].abs().max() > 1e-6


@pytest.mark.parametrize("layer_decay", [0.0, 1.1, -1.0])
def test_a_decay_outside_0_to_1_is_refused(layer_decay: float) -> None:
    with pytest.raises(UsageError, match=r"`layer_decay` must lie in \(0, 1\]"):
        parameter_groups(model_on("resnet18"), 0.1, learning_rate=RATE, layer_decay=layer_decay)


def test_a_model_without_a_backbone_has_no_layers_to_decay() -> None:
    with pytest.raises(UsageError, match="`layer_decay` needs a model with a `backbone`, got 'Linear'"):
        parameter_groups(nn.Linear(2, 2), 0.1, learning_rate=RATE, layer_decay=DECAY)


# Fixed rates


def test_fixed_rates_hold_for_the_parameters_they_name_alone() -> None:
    model = model_on("resnet18", "simsiam")
    fixed = {"objective.predictor": 0.1, "objective.projector": 0.2, "objective.predictor.0.weight": 0.4}
    groups = parameter_groups(model, 0.1, learning_rate=RATE, fixed_learning_rates=fixed)
    marked = [group for group in groups if "fixed_lr" in group]
    rates = rates_of(model, groups)
    assert rates.keys() == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        wanted = 0.1 if name.startswith("objective.predictor.") else RATE
        wanted = 0.2 if name.startswith("objective.projector.") else wanted
        assert rate == (0.4 if name == "objective.predictor.0.weight" else wanted), name
    assert all(group["fixed_lr"] is True for group in marked)
    assert {id(p) for group in marked for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if name.startswith(("objective.predictor", "objective.projector"))
    }


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_no_schedule_changes_a_fixed_rate(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    options: dict[str, Any] = {"learning_rate": RATE, "weight_decay": 1e-6, "momentum": 0.0}
    optimizer = build_optimizer(model, name, **options, fixed_learning_rates={"1": 0.1})
    alone = build_optimizer(nn.Linear(1, 1), name, **options)
    assert len(alone._optimizer_step_pre_hooks) == 0
    scheduler = LambdaLR(optimizer, lambda step: 0.0)  # as at the end of a cosine
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)  # as after a resume, which brings groups of its own
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    moved = [not torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]


def test_a_fixed_rate_for_nothing_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"`fixed_learning_rates` must name a module of the model, got 'objective\.pred'"
    ):
        parameter_groups(
            model_on("resnet18", "simsiam"), 0.1, learning_rate=RATE, fixed_learning_rates={"objective.pred": 0.1}
        )


def test_layer_decay_and_fixed_rates_go_together() -> None:
    model = model_on("vit_tiny_patch16_224", "simsiam")
    fixed = {"objective.predictor": 0.1}
    groups = parameter_groups(model, 0.1, learning_rate=RATE, layer_decay=DECAY, fixed_learning_rates=fixed)
    assert rates_of(model, groups).keys() == {name for name, _ in model.named_parameters()}
    assert [group.get("lr", RATE) for group in groups] == [
        RATE,
        RATE,
        *(RATE * s for s in (0.5, 0.5, 0.25, 0.25, 0.125, 0.125)),
        0.1,
        0.1,
    ]
