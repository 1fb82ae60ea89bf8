"""Backbones that neither timm nor transformers has, under the names of their authors' files."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.models.backbone import Backbone


class Conv4Config(PreTrainedConfig):
    """Four blocks of 64 channels, for images of `num_channels`."""

    model_type = "conv4"
    num_channels: int = 3


class Conv4(PreTrainedModel):
    """Convolution, batch normalization, ReLU, pooling by 2, four times; the map is flattened: 1600 numbers at 84 px."""

    config_class = Conv4Config
    main_input_name = "pixel_values"

    def __init__(self, config: Conv4Config) -> None:
        super().__init__(config)
        widths = [config.num_channels, 64, 64, 64, 64]
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in pairwise(widths)
        ]
        self.encoder = nn.Sequential(*blocks)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        hidden = self.encoder(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.flatten(1))


class CifarResNetConfig(PreTrainedConfig):
    """Three stages of `num_blocks` blocks with 16, 32 and 64 channels."""

    model_type = "cifar_resnet"
    num_blocks: int = 3


class Block(nn.Module):
    """Two convolutions with a shortcut that drops every other pixel and pads the channels with zeros."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.stride, self.padding = (1, 0) if in_dim == out_dim else (2, out_dim // 4)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class CifarResNet(PreTrainedModel):
    """ResNet-20 (3 blocks a stage), -32 (5), -56 (9) for images of 32 pixels."""

    config_class = CifarResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (in_dim, out_dim) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            blocks = [Block(in_dim if number == 0 else out_dim, out_dim) for number in range(config.num_blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        hidden = F.relu(self.bn1(self.conv1(pixel_values)))
        for stage in (self.layer1, self.layer2, self.layer3):
            hidden = stage(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.mean(dim=(2, 3)))


for config, model in ((Conv4Config, Conv4), (CifarResNetConfig, CifarResNet)):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)


def conv4_backbone(num_channels: int = 3) -> Backbone:
    """Takes pixels in [0, 1] as they are."""
    settings = ImageSettings(84, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Backbone(Conv4(Conv4Config(num_channels=num_channels)), settings)


def cifar_resnet_backbone(num_blocks: int) -> Backbone:
    return Backbone(CifarResNet(CifarResNetConfig(num_blocks=num_blocks)), ImageSettings(32))


@torch.inference_mode()
def features_of(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Features of uint8 images in evaluation mode, 64 at a time: that many fit into the cache."""
    return torch.cat([backbone.eval()(chunk.float() / 255) for chunk in pixels.split(64)])
