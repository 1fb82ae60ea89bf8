"""Read and write what a checkpoint expects of its images."""

import math
from typing import Any

from transformers import AutoImageProcessor, BitImageProcessor
from transformers.image_utils import PILImageResampling

from e2mc_hf.data.image_settings import ImageSettings

_INTERPOLATIONS = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


def settings_of_timm(pretrained_cfg: dict[str, Any]) -> ImageSettings:
    """Settings in timm's `pretrained_cfg`; timm's own defaults where it is silent."""
    from timm.data import resolve_data_config

    resolved = resolve_data_config({}, pretrained_cfg=pretrained_cfg)
    interpolation = resolved["interpolation"]
    size = resolved["input_size"][-1]
    return ImageSettings(
        size=size,
        mean=tuple(resolved["mean"]),
        std=tuple(resolved["std"]),
        interpolation=interpolation if interpolation in ("bilinear", "bicubic") else "bicubic",
        crop_share=size / math.floor(size / resolved["crop_pct"]),
    )


def settings_of_processor(name_or_path: str, revision: str | None, fallback_size: int) -> ImageSettings:
    """Settings of a transformers image processor; ImageNet's statistics when the checkpoint has none."""
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except OSError:
        return ImageSettings(size=fallback_size)
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    resize = dict(getattr(processor, "size", None) or {})
    resized = resize.get("shortest_edge") or resize.get("height") or fallback_size
    size = dict(crop)["height"] if crop else resized
    # ConvNext's processor, which ResNet has as well, resizes small images to more than `size` by itself.
    crop_pct = getattr(processor, "crop_pct", None)
    if crop_pct and size < 384:
        resized = int(size / crop_pct)
    normalize = getattr(processor, "do_normalize", True)
    return ImageSettings(
        size=size,
        mean=tuple(processor.image_mean) if normalize else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normalize else (1.0, 1.0, 1.0),
        interpolation=_INTERPOLATIONS.get(getattr(processor, "resample", PILImageResampling.BILINEAR), "bilinear"),
        crop_share=size / resized,
    )


def processor_of_settings(settings: ImageSettings) -> BitImageProcessor:
    """Image processor that prepares images as `settings` say: resize, center crop, normalize."""
    resample = next(mode for mode, name in _INTERPOLATIONS.items() if name == settings.interpolation)
    return BitImageProcessor(
        size={"shortest_edge": round(settings.size / settings.crop_share)},
        crop_size={"height": settings.size, "width": settings.size},
        resample=resample,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )
