"""The improved encoder as a folder that transformers and timm load, proven by loading it."""

import copy
import shutil
import tempfile
from pathlib import Path

import timm
import torch
from torch import nn
from transformers import AutoImageProcessor

from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.image_statistics import processor_of_settings
from e2mc_hf.models.loading import load_backbone, loading_noise_off

# Largest absolute difference of any feature between the trained and the reloaded encoder.
TOLERANCE = 1e-5


def export_encoder(backbone: Backbone, folder: str | Path) -> float:
    """Write the backbone as a folder for `AutoModel`, `AutoImageProcessor` and, if it is timm's, `timm.create_model`.

    The folder is written beside its place, loaded back in every way it promises, and put in place only when the
    features agree.

    Args:
        backbone: Trained backbone.
        folder: Where the encoder goes; replaced when there is one.

    Returns:
        Largest absolute difference of a feature after reloading.

    Raises:
        UsageError: If a reloaded encoder differs by more than 1e-5.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        written = Path(scratch) / "encoder"
        is_timm = backbone.model.config.model_type == "timm_wrapper"
        if is_timm:
            # timm reads its own names, which transformers understands as well; the wrapper would add a prefix.
            names_of_timm = backbone.model.get_submodule("timm_model").state_dict()
            backbone.model.save_pretrained(written, state_dict=names_of_timm)
        else:
            backbone.model.save_pretrained(written)
            processor_of_settings(backbone.image_settings).save_pretrained(written)
        with loading_noise_off():
            AutoImageProcessor.from_pretrained(written)
        reloaded: list[nn.Module] = [load_backbone(str(written))]
        if is_timm:
            reloaded.append(timm.create_model(f"local-dir:{written}", pretrained=True))
        differences = [feature_difference(backbone, other) for other in reloaded]
        difference = max(differences)
        if not all(difference <= TOLERANCE for difference in differences):  # a NaN may hide from `max`
            raise UsageError(
                f"`encoder` must give the same features after reloading (to {TOLERANCE:g}), got a difference of "
                f"{difference:g}. Nothing was exported; please report the architecture."
            )
        if folder.exists():
            shutil.rmtree(folder)
        written.rename(folder)
    return difference


@torch.no_grad()
def feature_difference(backbone: Backbone, other: nn.Module) -> float:
    """Largest absolute difference of the features of two encoders on four noise images, in eval mode.

    Copies are compared in float64: in float32 two equal encoders differ by rounding, which large features enlarge.
    """
    size = backbone.image_settings.size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features, others = (copy.deepcopy(encoder).cpu().double().eval()(images) for encoder in (backbone, other))
    difference: float = (features - others).abs().max().item()
    return difference
