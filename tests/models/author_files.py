"""Checkpoints in the layouts of the methods' authors, with seeded weights: none of their own could be had here."""

import argparse
import copy
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from models.tiny import randomized
from torch import Tensor, nn

ARCHITECTURE = "resnet18"
RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
VIT_ARCHITECTURE = "vit_tiny_patch16_224"
VIT: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}
WIDTH = 16  # of the ResNet's features
DIM, HIDDEN, PROTOTYPES = 16, 24, 20


def resnet() -> nn.Module:
    """The tiny ResNet under torchvision's names, without a classifier."""
    return randomized(timm.create_model(ARCHITECTURE, num_classes=0, **RESNET))


def vit() -> nn.Module:
    """The tiny vision transformer under DINO's names, without a classifier."""
    return randomized(timm.create_model(VIT_ARCHITECTURE, num_classes=0, **VIT))


def mlp(widths: list[int], *, bias: bool, last_bias: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths[:-1]):
        layers += [nn.Linear(a, b, bias=bias), nn.BatchNorm1d(b), nn.ReLU()]
    return randomized(nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=last_bias)))


class Author(nn.Module):
    """An author's model: parts by name, in the order they were assigned."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def vicreg() -> Author:
    return Author(backbone=resnet(), projector=mlp([WIDTH, DIM, DIM, DIM], bias=True))


def barlow_twins() -> Author:
    normalization = randomized(nn.BatchNorm1d(DIM, affine=False))
    return Author(backbone=resnet(), projector=mlp([WIDTH, DIM, DIM, DIM], bias=False), bn=normalization)


def swav() -> nn.Module:
    """The ResNet itself holds projection_head and prototypes."""
    model = resnet()
    model.projection_head = mlp([WIDTH, HIDDEN, DIM], bias=True, last_bias=True)
    model.prototypes = nn.Linear(DIM, PROTOTYPES, bias=False)
    return model


def _with_projector() -> nn.Module:
    """A ResNet whose fc is SimSiam's projector: its last linear layer has a frozen bias before the normalization."""
    model = resnet()
    layers = mlp([WIDTH, DIM, DIM, DIM], bias=False, last_bias=True)
    layers[6].bias.requires_grad_(False)
    model.fc = nn.Sequential(*layers, randomized(nn.BatchNorm1d(DIM, affine=False)))
    return model


def simsiam() -> Author:
    return Author(encoder=_with_projector(), predictor=mlp([DIM, 8, DIM], bias=False, last_bias=True))


def mec() -> Author:
    model = simsiam()
    model.teacher = randomized(copy.deepcopy(model.encoder)).requires_grad_(False)
    return model


def moco() -> Author:
    """MoCo v2: query and key encoders whose fc has two layers."""
    query, key = resnet(), resnet()
    for encoder in (query, key):
        encoder.fc = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, DIM))
    model = Author(encoder_q=query, encoder_k=key.requires_grad_(False))
    model.register_buffer("queue", torch.randn(DIM, 32))
    model.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    return model


class DINOHead(nn.Module):
    """DINO's head: three layers with GELU, then a layer with weight normalization whose norms are 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = randomized(
            nn.Sequential(
                nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)
            )
        )
        self.last_layer = nn.Module()
        self.last_layer.weight_g = nn.Parameter(torch.ones(PROTOTYPES, 1), requires_grad=False)
        self.last_layer.weight_v = nn.Parameter(torch.randn(PROTOTYPES, DIM))


def dino() -> dict[str, Author]:
    return {name: Author(backbone=vit(), head=DINOHead(32)) for name in ("student", "teacher")}


class LARS(torch.optim.Optimizer):
    """The optimizer of VICReg and Barlow Twins as its state dict shows it: `mu`, and a function among the options."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 0.2, "weight_decay": 1e-6, "momentum": 0.9, "eta": 0.001, **options})

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["mu"] = torch.randn_like(parameter)


@contextmanager
def function_of_main(module: str = "__main__") -> Any:
    """The function that the authors' scripts keep in their optimizer, as one of the main module."""

    def exclude_bias_and_norm(p: Tensor) -> bool:
        return p.ndim == 1

    exclude_bias_and_norm.__module__, exclude_bias_and_norm.__qualname__ = module, "exclude_bias_and_norm"
    main = sys.modules["__main__"]
    main.exclude_bias_and_norm = exclude_bias_and_norm
    try:
        yield exclude_bias_and_norm
    finally:
        del main.exclude_bias_and_norm


def prefixed(model: nn.Module, prefix: str = "module.") -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def write_lars(path: Path, model: nn.Module, groups: Iterable[Any]) -> LARS:
    """VICReg's and Barlow Twins' file, with random momentum."""
    with function_of_main() as function:
        optimizer = LARS(groups, weight_decay_filter=function, lars_adaptation_filter=function)
        optimizer.step()
        torch.save({"epoch": 1000, "model": prefixed(model), "optimizer": optimizer.state_dict()}, path)
    return optimizer


def write_vicreg(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = vicreg()
    return model, write_lars(path, model, model.parameters())


def write_barlow_twins(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = barlow_twins()
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim != 1]
    return model, write_lars(path, model, [{"params": matrices}, {"params": vectors}])


def trained_sgd(groups: Any) -> torch.optim.SGD:
    """SGD after one step with random gradients, so that every trainable parameter has momentum."""
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    return optimizer


def write_swav(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = swav()
    optimizer = trained_sgd(model.parameters())
    torch.save({"epoch": 400, "state_dict": prefixed(model), "optimizer": optimizer.state_dict()}, path)
    return model, optimizer


def write_simsiam(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = simsiam()
    optimizer = trained_sgd([{"params": model.encoder.parameters()}, {"params": model.predictor.parameters()}])
    content = {"epoch": 100, "arch": "resnet18", "state_dict": prefixed(model), "optimizer": optimizer.state_dict()}
    torch.save(content, path)
    return model, optimizer


def write_mec(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = mec()
    optimizer = trained_sgd(model.parameters())
    content = {"epoch": 100, "arch": "resnet18", "state_dict": prefixed(model), "optimizer": optimizer.state_dict()}
    torch.save(content, path)
    return model, optimizer


def write_moco(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = moco()
    optimizer = trained_sgd(model.parameters())
    content = {"epoch": 200, "arch": "resnet18", "state_dict": prefixed(model), "optimizer": optimizer.state_dict()}
    torch.save(content, path)
    return model, optimizer


def write_dino(path: Path) -> tuple[dict[str, Author], torch.optim.Optimizer]:
    """The student was wrapped for several processes, the teacher, without batch normalization, was not."""
    models = dino()
    optimizer = torch.optim.AdamW([p for p in models["student"].parameters() if p.requires_grad])
    content = {
        "student": prefixed(models["student"]),
        "teacher": models["teacher"].state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", global_crops_scale=(0.4, 1.0), lr=0.0005),
        "dino_loss": {"center": torch.randn(1, PROTOTYPES)},
    }
    torch.save(content, path)
    return models, optimizer


WRITERS = {
    "vicreg": write_vicreg,
    "swav": write_swav,
    "simsiam": write_simsiam,
    "mec": write_mec,
    "dino": write_dino,
    "moco": write_moco,
    "barlow_twins": write_barlow_twins,
}
