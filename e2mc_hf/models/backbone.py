"""Any timm or transformers vision model as a map from images to pooled features."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError

# Vision transformers without a class token: their tokens are averaged when the model itself does not pool.
_NO_CLASS_TOKEN = {"ijepa", "swinv2", "hiera", "focalnet", "siglip_vision_model"}


class Backbone(nn.Module):
    """Backbone and pooling: (B, 3, H, W) images to (B, F) features.

    The model's own pooled output is used when it has one; a pooler that is a dense layer with tanh (ViT, DeiT: trained
    for another task, or random in many checkpoints) gives way to the class token. Feature maps are averaged over their
    area, tokens without a class token over their number.

    Args:
        model: transformers vision model; timm models come as `TimmWrapperModel`.
        image_settings: What the checkpoint expects of its images.

    Raises:
        UsageError: If the model does not take images, or is transformers' Swin.
    """

    def __init__(self, model: PreTrainedModel, image_settings: ImageSettings) -> None:
        super().__init__()
        if model.config.model_type == "swin":
            raise UsageError(
                "`model` must not be transformers' Swin, which breaks after one view of another size, got "
                f"{_name(model)!r}. Use swinv2, or the same architecture from timm."
            )
        self.model = model
        self.image_settings = image_settings
        parameters = inspect.signature(model.forward).parameters
        if "pixel_values" not in parameters:
            raise UsageError(
                f"`model` must be a vision model, got {_name(model)!r} of type {model.config.model_type}. "
                "Choose an encoder of images."
            )
        self._any_size = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        self._skip_pooler = hasattr(getattr(model, "pooler", None), "dense")

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Encode images that are normalized by `image_settings`."""
        output = self.model(pixel_values=pixel_values, **self._any_size)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and not self._skip_pooler:
            return _average_area(pooled)
        hidden = output.last_hidden_state
        if hidden.dim() == 4:
            return _average_area(hidden)
        if self.model.config.model_type in _NO_CLASS_TOKEN:
            return torch.as_tensor(hidden.mean(dim=1))
        return torch.as_tensor(hidden[:, 0])

    @torch.no_grad()
    def measure_num_features(self, image_size: int) -> int:
        """Width F of the features, seen on one black image: configurations state it wrongly or not at all.

        Raises:
            UsageError: If the model cannot take images of `image_size` pixels.
        """
        try:
            with _evaluation_mode(self):
                features: Tensor = self(self._black_image(image_size))
            return features.shape[1]
        except (AssertionError, RuntimeError, ValueError) as error:
            cause = " ".join(str(error).split()).rstrip(".")
            raise UsageError(
                f"`image_size` must fit the encoder {_name(self.model)!r}, got {image_size}: {cause}. "
                f"Its own size is {self.image_settings.size}; timm's vision transformers take others with "
                "--backbone_args dynamic_img_size=true."
            ) from error

    def freeze_unused_parameters(self, image_size: int) -> list[str]:
        """Freeze the parameters that the features do not depend on, and return their names.

        DistributedDataParallel waits for the gradient of every parameter that is not frozen; a mask token or a pooler
        that is passed over never gets one.
        """
        with _evaluation_mode(self), torch.enable_grad():
            self(self._black_image(image_size)).sum().backward()
        unused = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.requires_grad_(False)
                unused.append(name)
            parameter.grad = None
        return unused

    def _black_image(self, image_size: int) -> Tensor:
        parameter = next(self.parameters())
        return parameter.new_zeros(1, 3, image_size, image_size)


def _name(model: PreTrainedModel) -> str:
    return str(model.config.name_or_path or getattr(model.config, "architecture", model.config.model_type))


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, then give each the mode it had."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def _average_area(pooled: Tensor) -> Tensor:
    return pooled if pooled.dim() == 2 else pooled.mean(dim=(-2, -1))


def prepare_config(config: Any) -> Any:
    """Adjust a configuration so that the model sees every patch: masked autoencoders otherwise drop 75% of them."""
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    return config
