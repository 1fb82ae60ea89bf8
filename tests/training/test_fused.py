from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2mc_hf.training.fused import fused_option
from e2mc_hf.training.momentum import restore_momentum
from e2mc_hf.training.optimizers import adamw, build_optimizer, parameter_groups

KINDS = ["adamw", "sgd"]


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, bias=False)  # a bias there has a gradient of rounding errors alone
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 4), nn.Linear(4, 2))


def optimizer_of(model: nn.Module, kind: str, fused: bool | None) -> torch.optim.Optimizer:
    return build_optimizer(model, kind, learning_rate=0.05, weight_decay=0.01, momentum=0.9, fused=fused)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def backward(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(x).square().mean()
    loss.backward()
    return loss


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, frozen_until: int = 0) -> Tensor:
    """All weights after some steps; the last layer gets no gradient in the first ones, as frozen prototypes do."""
    for step in numbers:
        optimizer.zero_grad()
        backward(model, step)
        if step < frozen_until:
            model.get_submodule("4").zero_grad()
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen_until", [0, 2])
def test_fused_steps_are_the_plain_ones(kind: str, frozen_until: int) -> None:
    weights = []
    for fused in (None, True):
        model = new_model()
        weights.append(steps(model, optimizer_of(model, kind, fused), range(5), frozen_until))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_cpu_numbers_stay_those_of_torchs_default_bit_for_bit(kind: str) -> None:
    model, other = new_model(), new_model()
    optimizer = optimizer_of(model, kind, None)
    assert {group["fused"] for group in optimizer.param_groups} == {None}
    groups = parameter_groups(other, 0.01, learning_rate=0.05)
    plain = torch.optim.AdamW(groups, 0.05) if kind == "adamw" else torch.optim.SGD(groups, 0.05, 0.9)
    assert torch.equal(steps(model, optimizer, range(3)), steps(other, plain, range(3)))


@pytest.mark.parametrize(("devices", "expected"), [("cuda cuda", True), ("cuda cpu", None), ("cpu", None)])
def test_fused_is_chosen_where_every_parameter_is_on_a_gpu(devices: str, expected: bool | None) -> None:
    class Placed:
        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    groups: list[dict[str, Any]] = [{"params": [Placed(device)]} for device in devices.split()]
    assert fused_option(groups) is expected
    assert fused_option(groups, True) is True
    assert fused_option(groups, False) is None


def test_an_imported_momentum_of_some_parameters_goes_on_as_in_the_plain_optimizer() -> None:
    weights = []
    for fused in (None, True):
        model = new_model()
        optimizer = optimizer_of(model, "sgd", fused)
        restore_momentum(optimizer, model, {"0.weight": torch.ones(8, 3, 3, 3)})
        weights.append(steps(model, optimizer, range(3)))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved_fused", [None, True])
@pytest.mark.parametrize("fused", [None, True])
def test_a_state_goes_on_with_other_kernels_and_another_memory_format(
    kind: str, saved_fused: bool | None, fused: bool | None
) -> None:
    straight = new_model()
    expected = steps(straight, optimizer_of(straight, kind, None), range(6))
    saved = new_model()
    optimizer = optimizer_of(saved, kind, saved_fused)
    steps(saved, optimizer, range(3))
    model = new_model()
    model.load_state_dict(saved.state_dict())
    model.to(memory_format=torch.channels_last)
    resumed = optimizer_of(model, kind, fused)
    resumed.load_state_dict(optimizer.state_dict())
    assert {group["fused"] for group in resumed.param_groups} == {fused}
    torch.testing.assert_close(steps(model, resumed, range(3, 6)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_scaler_unscales_and_skips_what_overflowed(kind: str) -> None:
    weights = []
    for fused in (None, True):
        model = new_model()
        optimizer = optimizer_of(model, kind, fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            scaler.scale(model(x).square().mean()).backward()
            before = weights_of(model)
            if step == 2:
                model.get_submodule("4").weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            moved = not torch.equal(weights_of(model), before)
            assert moved == (step != 2)
        weights.append(weights_of(model))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


def test_the_adamw_of_the_heads_alone_follows_the_same_rule() -> None:
    model = new_model()
    optimizer = adamw(parameter_groups(model, 0.0, learning_rate=0.05), 0.05, fused=True)
    assert {group["fused"] for group in optimizer.param_groups} == {True}
