"""The encoder of an author's checkpoint: its architecture, its place in the file, its numbers."""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.checkpoint_formats import Layout, detect_format
from e2mc_hf.models.image_statistics import settings_of_timm
from e2mc_hf.models.loading import MIN_COVERAGE, load_backbone
from e2mc_hf.models.torchvision_names import Architecture, encoder_prefixes, infer_architecture

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SWAV_STD = (0.228, 0.224, 0.225)  # as its authors trained
# Of timm's description of an architecture; the rest is about weights of timm's.
_KEPT_OF_TIMM = ("architecture", "fixed_input_size", "pool_size", "first_conv", "classifier")


def is_timm(backbone: Backbone) -> bool:
    """Whether the backbone is an architecture of timm."""
    return bool(backbone.model.config.model_type == "timm_wrapper")


def build_backbone(layout: Layout, architecture: str | None, arguments: dict[str, Any], source: str) -> Backbone:
    """Make the architecture with random weights and the image statistics of the method's authors.

    One that is recognized is made only when the file holds it: names alone, of a large model, cost nothing.

    Args:
        layout: Checkpoint whose shapes tell the architecture.
        architecture: timm name or folder, in place of that.
        arguments: Arguments of the timm architecture.
        source: Name of the file, for the message.

    Raises:
        UsageError: If the shapes do not tell, the file holds too little, or nothing is built under that name.
    """
    found = Architecture(architecture) if architecture else _recognize(layout)
    if found is None:
        shown = ", ".join(f"{name[:60]!r} {tuple(tensor.shape)}" for name, tensor in list(layout.tensors.items())[:3])
        raise UsageError(
            f"`architecture` must be given for a file that is no ResNet-18 to -152 or ViT-Ti to -L, got {shown}, ... "
            "Pass its timm name, or the backbone itself to e2mc_hf's import_checkpoint."
        )
    if architecture is None:
        with torch.device("meta"):
            outline = timm.create_model(found.name, num_classes=0, **found.arguments)
        place_encoder(layout, outline)
        check_coverage(outline, layout, source)
    backbone = load_backbone(found.name, from_scratch=True, backbone_args=found.arguments | arguments)
    if not is_timm(backbone):
        return backbone
    description = backbone.model.config.pretrained_cfg
    kept = {name: description[name] for name in _KEPT_OF_TIMM if name in description}
    is_transformer = bool(description.get("fixed_input_size"))
    size = description["input_size"][-1] if is_transformer else 224
    kept |= {"input_size": (3, size, size), "num_classes": 0, "crop_pct": 0.875 if size == 224 else 1.0, **IMAGENET}
    kept |= {"interpolation": "bicubic" if is_transformer else "bilinear"}
    kept |= {"std": SWAV_STD} if layout.format == "swav" else {}
    backbone.model.config.pretrained_cfg = kept
    return Backbone(backbone.model, settings_of_timm(kept))


def _recognize(layout: Layout) -> Architecture | None:
    candidates = [layout.part("backbone."), *(_under(layout, prefix) for prefix in encoder_prefixes(layout.tensors))]
    found = (infer_architecture({name: tuple(tensor.shape) for name, tensor in own.items()}) for own in candidates)
    return next((architecture for architecture in found if architecture is not None), None)


def _under(layout: Layout, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in layout.tensors.items() if name.startswith(prefix)}


def place_encoder(layout: Layout, plain: nn.Module) -> None:
    """Give places to the tensors of an encoder alone, and take those away that the architecture does not have."""
    state = plain.state_dict()
    if not layout.places:
        prefixes = encoder_prefixes(layout.tensors)
        shares = [sum(state[name].numel() for name in _under(layout, prefix) if name in state) for prefix in prefixes]
        prefix = prefixes[shares.index(max(shares))]
        layout.places = {
            name: f"backbone.{name.removeprefix(prefix)}" for name in layout.tensors if name.startswith(prefix)
        }
    layout.places = {
        name: place
        for name, place in layout.places.items()
        if not place.startswith(("backbone.", "teacher.")) or place.split(".", 1)[1] in state
    }


def check_coverage(plain: nn.Module, layout: Layout, source: str) -> tuple[list[str], float]:
    """Compare what a file holds with what the encoder has.

    Args:
        plain: Module whose names are those of the file.
        layout: Checkpoint in which the encoder has its places.
        source: Name of the file, for the message.

    Returns:
        Names that are missing, and the share of the numbers that is there.

    Raises:
        UsageError: If the share is below 99%, or a shape or kind differs.
    """
    state, given = plain.state_dict(), layout.part("backbone.")
    missing = [name for name in state if name not in given]
    total = sum(tensor.numel() for tensor in state.values())
    coverage = 1 - sum(state[name].numel() for name in missing) / total
    if coverage < MIN_COVERAGE:
        looks = detect_format(layout.tensors)
        hint = f" Its names look like those of {looks}." if looks not in (None, layout.format) else ""
        raise UsageError(
            f"`file` must hold at least {MIN_COVERAGE:.0%} of the encoder's numbers, got {coverage:.1%} from "
            f"{source!r}.{hint} {_nearest(missing, layout)} Is it a checkpoint of this architecture?"
        )
    _check_shapes(state, given, "")
    return missing, coverage


def _nearest(missing: list[str], layout: Layout) -> str:
    """Name the missing tensors that come closest to one of the file, with it."""
    names = [name for name in layout.dropped if len(name) <= 200][:1000]
    pairs = []
    for name in missing[:20]:
        for other in difflib.get_close_matches(name, names, n=1, cutoff=0.5):
            pairs.append((difflib.SequenceMatcher(None, name, other).ratio(), f"{name} (near: {other!r})"))
    named = [text for _, text in sorted(pairs, reverse=True)[:3]] or missing[:3]
    return f"Missing: {', '.join(named)}" + (f" and {len(missing) - len(named)} more." if len(missing) > 3 else ".")


@torch.no_grad()
def copy_tensors(state: Mapping[str, Tensor], given: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy the tensors that both have, all or none.

    Args:
        state: Where to.
        given: Where from.
        prefix: Of the names, for the message.

    Raises:
        UsageError: If a shape or kind differs, or a number is not finite.
    """
    _check_shapes(state, given, prefix)
    names = [name for name in given if name in state]
    for name in names:
        if given[name].is_floating_point() and not given[name].isfinite().all():
            raise _wrong_tensor(f"{prefix}{name} with numbers that are not finite")
    for name in names:
        state[name].copy_(given[name])


def _check_shapes(state: Mapping[str, Tensor], given: Mapping[str, Tensor], prefix: str) -> None:
    for name in (name for name in given if name in state):
        ours, theirs = state[name], given[name]
        if ours.shape != theirs.shape:
            raise _wrong_tensor(f"{prefix}{name} with shape {tuple(theirs.shape)} where it is {tuple(ours.shape)}")
        if ours.is_floating_point() != theirs.is_floating_point():
            raise _wrong_tensor(f"{prefix}{name} with {theirs.dtype} where it is {ours.dtype}")


def _wrong_tensor(got: str) -> UsageError:
    return UsageError(
        f"`file` must hold each tensor in its shape and kind, and finite, got {got}. Is it a checkpoint of this "
        "architecture?"
    )
