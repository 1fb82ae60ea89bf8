"""Which architecture of timm a file's tensors are of, by their names and shapes.

timm's ResNet names its layers as torchvision does (conv1, bn1, layer1.0.downsample.0, ...), and so do VICReg, SwAV,
SimSiam, MEC, MoCo and Barlow Twins; its vision transformer names them as DINO does. Nothing is to be renamed: only the
architecture is to be found out.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import timm

# Blocks in each stage, and whether they are bottlenecks.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
# Width and depth; the number of attention heads, which leaves no trace in the shapes, is width / 64.
_VISION_TRANSFORMERS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
# Levels under which authors keep an encoder.
_WRAPPERS = {"backbone", "encoder", "encoder_q", "student", "teacher", "model", "net"}
_MOST_PREFIXES = 32


@dataclass(frozen=True)
class Architecture:
    """A timm architecture by name, and its arguments."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def infer_architecture(shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """Recognize a ResNet-18, -34, -50, -101 or -152, or a ViT-Ti, -S, -B or -L of DINO or DINOv2; None for any other.

    Args:
        shapes: Shape of each tensor by name, without prefixes; further tensors do not matter.
    """
    return _infer_resnet(shapes) or _infer_vision_transformer(shapes)


def _infer_resnet(shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    is_bottleneck = "layer1.0.conv3.weight" in shapes
    widths = (shapes.get("conv1.weight"), shapes.get(f"layer1.0.conv{1 + is_bottleneck}.weight"))
    blocks = tuple(_count(rf"layer{stage}\.(\d+)\.conv1\.weight", shapes) for stage in range(1, 5))
    if widths != ((64, 3, 7, 7), (64, 64, 3, 3)) or (blocks, is_bottleneck) not in _RESNETS:
        return None
    return Architecture(_RESNETS[blocks, is_bottleneck])


def _infer_vision_transformer(shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    patches, positions = shapes.get("patch_embed.proj.weight", ()), shapes.get("pos_embed", ())
    depth = _count(r"blocks\.(\d+)\.attn\.qkv\.weight", shapes)
    if len(patches) != 4 or len(positions) != 3 or "cls_token" not in shapes:
        return None
    width, patch_size, side = patches[0], patches[2], isqrt(max(0, positions[1] - 1))
    size = _VISION_TRANSFORMERS.get((width, depth))
    is_dinov2 = "blocks.0.ls1.gamma" in shapes
    if size is None or side * side + 1 != positions[1] or "register_tokens" in shapes:
        return None
    name = f"vit_{size}_patch{patch_size}_{'dinov2' if is_dinov2 else '224'}"
    if not timm.is_model(name):
        return None
    # Trained with crops of two sizes, and to be continued so.
    return Architecture(name, {"img_size": side * patch_size, "dynamic_img_size": True})


def _count(pattern: str, names: Collection[str]) -> int:
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


def encoder_prefixes(names: Collection[str]) -> list[str]:
    """Prefixes under which an encoder may lie, such as `teacher.backbone.`: none first, teacher before student.

    At most three levels count, and 32 prefixes: a hostile file may have any number.
    """
    prefixes = {""}
    for name in names:
        prefix = ""
        for part in name.split(".", 4)[:-1][:3]:
            if part not in _WRAPPERS:
                break
            prefix += part + "."
            prefixes.add(prefix)
    return sorted(prefixes, key=lambda prefix: ("student" in prefix, prefix.count("."), prefix))[:_MOST_PREFIXES]
