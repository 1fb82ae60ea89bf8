"""Tiny backbones of every family, with random weights in every parameter and buffer."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4, "image_size": 32}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
TRANSFORMERS = {
    "vit": VIT,
    "deit": VIT,
    "dinov2": VIT,
    "dinov2_with_registers": VIT | {"num_register_tokens": 2},
    "ijepa": VIT,
    "vit_mae": VIT,
    "siglip_vision_model": VIT,
    "clip_vision_model": VIT,
    "beit": VIT | {"use_relative_position_bias": True},
    "data2vec-vision": VIT,
    "dinov3_vit": VIT | {"num_register_tokens": 2},
    "resnet": RESNET,
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "dinov3_convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32},
    "swin": SWIN,
    "swinv2": SWIN,
}
TIMM: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8},
    "swin_tiny_patch4_window7_224": {
        "depths": [1, 2],
        "embed_dim": 8,
        "num_heads": [1, 2],
        "img_size": 32,
        "window_size": 4,
    },
}


def transformers_model(kind: str, **options: Any) -> PreTrainedModel:
    config = CONFIG_MAPPING[kind](**TRANSFORMERS[kind])
    return randomized(AutoModel.from_config(config, **options))


def timm_model(name: str, **options: Any) -> nn.Module:
    return randomized(timm.create_model(name, **TIMM[name] | options))


def timm_folder(folder: Path, name: str, **options: Any) -> nn.Module:
    """Save a new timm model with a classifier as timm does, and return it."""
    model = timm_model(name, **options)
    save_for_hf(model, folder, model_args=TIMM[name] | options, safe_serialization=True)
    return model


@torch.no_grad()
def randomized(model: Any) -> Any:
    """Move every stored number away from the value that constructors give it; positive ones stay positive."""
    persistent = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in persistent and tensor.is_floating_point():
            noise = torch.randn_like(tensor)
            tensor.add_(0.1 * noise.abs() if name.endswith("running_var") else 0.1 * noise)
    return model.eval()


def same_state(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules hold the same names, and the same bits under each."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
