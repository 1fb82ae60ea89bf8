"""Optimizers of the papers' recipes, with the rule that vectors are neither decayed nor adapted."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from e2mc_hf.arguments import require
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.layer_order import layer_order
from e2mc_hf.training.fused import fused_option, keep_kernels


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    learning_rate: float,
    layer_decay: float = 1.0,
    fixed_learning_rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: tensors of two or more dimensions, and vectors without weight decay.

    Two groups hold what is trained at the full rate. With `layer_decay`, the layers of the backbone follow, the last
    one first, each in two groups of its own rate; then parameters of a fixed rate, in groups marked `fixed_lr`.

    Args:
        model: Model to train; with `layer_decay`, its attribute `backbone` is the one whose layers count.
        weight_decay: Decay of tensors of two or more dimensions.
        learning_rate: Full rate: of the heads and of what timm counts with the classifier.
        layer_decay: Factor from one layer to the one below, beginning with the last block, one layer below the heads.
        fixed_learning_rates: Rates that no schedule changes, by name of a module or parameter.

    Raises:
        UsageError: If the layers of the backbone are not known, or no parameter has a name given.

    Reference:
        Bao et al., "BEiT", 2021, https://arxiv.org/abs/2106.08254, in the form of `timm.optim.param_groups_layer_decay`
        with the heads in the place of the classifier.
    """
    fixed = dict(fixed_learning_rates or {})
    depths, top = _depths(model, layer_decay)
    rates: dict[tuple[int, str], list[nn.Parameter]] = {(top, ""): []}
    names = [name for name, _ in model.named_parameters()]
    for prefix in fixed:
        known = any(_is_inside(name, prefix) for name in names)
        require(known, "fixed_learning_rates", "must name a module of the model", prefix, "Correct the name.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = max((prefix for prefix in fixed if _is_inside(name, prefix)), key=len, default="")
            depth = -1 if prefix else depths.get(name, top)
            rates.setdefault((depth, prefix), []).append(parameter)
    groups = []
    for depth, prefix in sorted(rates, key=lambda key: -key[0]):
        options: dict[str, Any] = {}
        if prefix:
            options = {"lr": fixed[prefix], "fixed_lr": True}
        elif depth < top:
            options = {"lr": learning_rate * layer_decay ** (top - depth)}
        groups += _decayed_and_vectors(rates[depth, prefix], weight_decay, options)
    return [group for group in groups if group["params"] or "lr" not in group]


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    layer_decay: float = 1.0,
    fixed_learning_rates: Mapping[str, float] | None = None,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters of a model.

    Args:
        model: Model to train.
        name: `lars` (trust coefficient 0.001; timm adapts only where there is weight decay, hence never vectors),
            `adamw` (torch's betas) or `sgd`. There is no fused LARS; on a GPU timm's works on all tensors of a group
            together ("foreach"), on the CPU on one after the other.
        learning_rate: Learning rate.
        weight_decay: Decay of matrices and convolutions.
        momentum: Momentum of `lars` and `sgd`.
        layer_decay: Factor of the learning rate from one layer of the backbone to the one below.
        fixed_learning_rates: Learning rates by name of a module, which hold at every step whatever the schedule sets.
        fused: Whether adamw and sgd update all parameters in one kernel; where torch has one for a GPU when not given.

    Raises:
        UsageError: If the name is unknown, LARS gets no weight decay, or the groups cannot be made.

    Reference:
        You et al., "Large Batch Training of Convolutional Networks", 2017, https://arxiv.org/abs/1708.03888; settings
        of VICReg's released code.
    """
    groups = parameter_groups(
        model,
        weight_decay,
        learning_rate=learning_rate,
        layer_decay=layer_decay,
        fixed_learning_rates=fixed_learning_rates,
    )
    optimizer: torch.optim.Optimizer
    if name == "lars":
        require(
            weight_decay > 0,
            "weight_decay",
            "must be positive for lars, which adapts only decayed parameters",
            weight_decay,
            "The paper's is 1e-6.",
        )
        optimizer = Lars(groups, lr=learning_rate, momentum=momentum, trust_coeff=0.001, eps=0.0)
    elif name == "adamw":
        optimizer = adamw(groups, learning_rate, fused=fused)
    else:
        require(name == "sgd", "optimizer", "must be lars, adamw or sgd", name, "Pass one of the three.")
        optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=fused_option(groups, fused))
        keep_kernels(optimizer)
    if fixed_learning_rates:
        _hold_fixed_rates(optimizer)
    return optimizer


def adamw(groups: list[dict[str, Any]], learning_rate: float, *, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW over groups of `parameter_groups`, fused where `build_optimizer` says so."""
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=fused_option(groups, fused))
    keep_kernels(optimizer)
    return optimizer


def _depths(model: nn.Module, layer_decay: float) -> tuple[dict[str, int], int]:
    """Depth of each parameter of the backbone, by its name in the model, and the depth of the heads."""
    require(0 < layer_decay <= 1, "layer_decay", "must lie in (0, 1]", layer_decay, "1 treats layers alike.")
    if layer_decay == 1:
        return {}, 0
    backbone = getattr(model, "backbone", None)
    require(
        isinstance(backbone, Backbone),
        "layer_decay",
        "needs a model with a `backbone`",
        type(model).__name__,
        "Pass 1.",
    )
    assert isinstance(backbone, Backbone)
    order = layer_order(backbone)
    return {f"backbone.{name}": depth for name, depth in order.depths.items()}, order.num_blocks + 1


def _is_inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _decayed_and_vectors(
    parameters: list[nn.Parameter], weight_decay: float, options: dict[str, Any]
) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay, **options},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, **options},
    ]


def _hold_fixed_rates(optimizer: torch.optim.Optimizer) -> None:
    """Set the rates of groups marked `fixed_lr` before each step: every scheduler scales all groups."""
    rates = {index: group["lr"] for index, group in enumerate(optimizer.param_groups) if "fixed_lr" in group}

    def hold(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, rate in rates.items():
            optimizer.param_groups[index]["lr"] = rate

    optimizer.register_step_pre_hook(hold)
