"""Optimizers of the papers' recipes, with the rule that vectors are neither decayed nor adapted."""

from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from e2mc_hf.arguments import require


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: tensors of two or more dimensions, and vectors without weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, name: str, *, learning_rate: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters of a model.

    Args:
        model: Model to train.
        name: `lars` (trust coefficient 0.001; timm adapts only where there is weight decay, hence never vectors),
            `adamw` (torch's betas) or `sgd`.
        learning_rate: Learning rate of both groups.
        weight_decay: Decay of matrices and convolutions.
        momentum: Momentum of `lars` and `sgd`.

    Raises:
        UsageError: If the name is unknown, or LARS gets no weight decay.

    Reference:
        You et al., "Large Batch Training of Convolutional Networks", 2017, https://arxiv.org/abs/1708.03888; settings
        of VICReg's released code.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "lars":
        require(
            weight_decay > 0,
            "weight_decay",
            "must be positive for lars, which adapts only decayed parameters",
            weight_decay,
            "The paper's is 1e-6.",
        )
        lars: torch.optim.Optimizer = Lars(groups, lr=learning_rate, momentum=momentum, trust_coeff=0.001, eps=0.0)
        return lars
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    require(name == "sgd", "optimizer", "must be lars, adamw or sgd", name, "Pass one of the three.")
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum)
