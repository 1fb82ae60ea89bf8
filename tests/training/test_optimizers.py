from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from e2mc_hf.errors import UsageError
from e2mc_hf.training.optimizers import build_optimizer, parameter_groups


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
    decayed, others = parameter_groups(model, 0.1)
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
