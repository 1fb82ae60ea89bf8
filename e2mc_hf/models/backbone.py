"""Any timm or transformers vision model as a map from images to pooled features."""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.modes import evaluation_mode

# Vision transformers without a class token: their tokens are averaged when the model itself does not pool.
_NO_CLASS_TOKEN = {"ijepa", "swinv2", "hiera", "focalnet", "siglip_vision_model"}

# What a model raises that cannot take images of some size, or whose output is not that of a vision encoder.
_MISFITS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class Backbone(nn.Module):
    """Backbone and pooling: (B, 3, H, W) images to (B, F) features.

    The model's own pooled output is used when it has one; a pooler that is a dense layer with tanh (ViT, DeiT: trained
    for another task, or random in many checkpoints) gives way to the class token. Feature maps are averaged over their
    area, tokens without a class token over their number.

    Images of other sizes than the model's own: transformers' models interpolate their position embeddings, and pass
    over the pixels beyond the last whole patch (98 of 100 at patch size 14) without a word; timm's refuse such sizes.

    Args:
        model: transformers vision model; timm models come as `TimmWrapperModel`.
        image_settings: What the checkpoint expects of its images.

    Raises:
        UsageError: If the model does not take images alone, or is transformers' Swin.
    """

    def __init__(self, model: PreTrainedModel, image_settings: ImageSettings) -> None:
        super().__init__()
        if model.config.model_type == "swin":
            raise UsageError(
                "`model` must not be transformers' Swin, which breaks after one view of another size, got "
                f"{name_of(model)!r}. Use swinv2, or the same architecture from timm."
            )
        self.model = model
        self.image_settings = image_settings
        parameters = inspect.signature(model.forward).parameters
        if "pixel_values" not in parameters:
            raise UsageError(
                f"`model` must be a vision model, got {name_of(model)!r} of type {model.config.model_type}. "
                "Choose an encoder of images."
            )
        needed = [name for name in parameters if name != "pixel_values" and _is_required(parameters[name])]
        if needed:
            raise UsageError(
                f"`model` must need nothing but images, got {name_of(model)!r} of type {model.config.model_type}, "
                f"which also needs {', '.join(needed)}. Choose another architecture."
            )
        self._any_size = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        self._skip_pooler = hasattr(getattr(model, "pooler", None), "dense")

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """Encode images that are normalized by `image_settings`."""
        return self._encode(pixel_values)

    @torch.no_grad()
    def measure_num_features(self, image_size: int, *other_sizes: int) -> int:
        """Width F of the features, seen on two black images: configurations state it wrongly or not at all.

        Args:
            image_size: Side of the images, pixels.
            *other_sizes: Sides of further views; the features must have the same width there.

        Raises:
            UsageError: If the model cannot take images of one of the sizes, or its output is not one finite vector for
                each image.
        """
        widths = {size: self._measure(size) for size in (image_size, *other_sizes)}
        if len(set(widths.values())) > 1:
            raise UsageError(
                f"`model` must give features of one width at every size, got {widths} from {name_of(self.model)!r}. "
                "Use views of one size, or choose another architecture."
            )
        return widths[image_size]

    def freeze_unused_parameters(self, image_size: int, *other_sizes: int) -> list[str]:
        """Freeze the parameters that the features do not depend on at any of the sizes, and return their names.

        DistributedDataParallel waits for the gradient of every parameter that is not frozen; a mask token or a pooler
        that is passed over never gets one.
        """
        with evaluation_mode(self), torch.enable_grad():
            features = [self(self._black_images(size)).sum() for size in (image_size, *other_sizes)]
            total: Any = torch.stack(features).sum()
            if total.requires_grad:  # not if every parameter is frozen already
                total.backward()
        unused = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.requires_grad_(False)
                unused.append(name)
            parameter.grad = None
        return unused

    def _encode(self, pixel_values: Tensor) -> Tensor:
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

    def _measure(self, image_size: int) -> int:
        """Width of the features of images of one size."""
        images = self._black_images(image_size)
        try:
            with evaluation_mode(self):
                features = self._encode(images)
        except _MISFITS as error:
            raise UsageError(self._refusal(image_size, error)) from error
        if features.dim() != 2 or len(features) != len(images):
            raise UsageError(
                f"`model` must give one vector for each image, got {tuple(features.shape)} for {len(images)} images "
                f"from {name_of(self.model)!r}. Choose an architecture that pools."
            )
        if not features.isfinite().all():
            raise UsageError(
                f"`model` must give finite features, got infinite ones or NaN for black images from "
                f"{name_of(self.model)!r}. Its weights are broken: choose another checkpoint."
            )
        return features.shape[1]

    def _refusal(self, image_size: int, error: Exception) -> str:
        """Why the model does not take images of some size, and what it takes."""
        got = f"got {image_size} for {name_of(self.model)!r}"
        patch_size = _patch_size(self.model)
        if patch_size and image_size % patch_size:
            below = image_size - image_size % patch_size
            fitting = " and ".join(str(size) for size in (below, below + patch_size) if size)
            return f"`image_size` must be a multiple of the patch size {patch_size}, {got}. The nearest: {fitting}."
        cause = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        rule = f"`image_size` must fit the encoder, {got}: {cause}. Its own size is {self.image_settings.size}"
        if getattr(getattr(self.model, "timm_model", None), "dynamic_img_size", None) is False:
            return f"{rule}; it takes others with --backbone_args dynamic_img_size=true."
        return (
            f"{rule}; not every architecture takes others. Convolutional networks take multiples of 32, timm's vit, "
            "deit, eva and swin and transformers' vision transformers those of their patch."
        )

    def _black_images(self, image_size: int) -> Tensor:
        parameter = next(self.parameters())
        return parameter.new_zeros(2, 3, image_size, image_size)


def name_of(model: PreTrainedModel) -> str:
    """Name of a model for messages: where it came from, its timm architecture, or its type."""
    return str(model.config.name_or_path or getattr(model.config, "architecture", model.config.model_type))


def prepare_config(config: Any) -> Any:
    """Adjust a configuration so that the model sees every patch: masked autoencoders otherwise drop 75% of them."""
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    return config


def _average_area(pooled: Tensor) -> Tensor:
    return pooled.mean(dim=(-2, -1)) if pooled.dim() == 4 else pooled


def _is_required(parameter: inspect.Parameter) -> bool:
    named = parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return named and parameter.default is inspect.Parameter.empty


def _patch_size(model: PreTrainedModel) -> int | None:
    """Side of a patch of a timm vision transformer that takes whole patches only."""
    embedding = getattr(getattr(model, "timm_model", None), "patch_embed", None)
    if getattr(embedding, "dynamic_img_pad", False):
        return None
    patch_size = getattr(embedding, "patch_size", None)
    return patch_size[0] if isinstance(patch_size, tuple) else patch_size
