"""Where a run starts: the whole model of an earlier run, or an encoder that gets new heads."""

import logging
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError

from e2mc_hf.distributed import rank
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import assert_coverage, first_line, is_ssl_folder, load_backbone, loading_noise_off
from e2mc_hf.models.ssl_model import SSLModel

logger = logging.getLogger(__name__)


def load_starting_point(
    name_or_path: str,
    *,
    revision: str | None = None,
    from_scratch: bool = False,
    backbone_args: Mapping[str, Any] | None = None,
    objective: str = "vicreg",
    objective_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    num_views: int | None = None,
) -> SSLModel:
    """Load what is to be trained, ready for several processes.

    The output folder of an earlier run keeps its heads; any other encoder gets new ones, and the log says so.
    Parameters that the features do not depend on are frozen.

    Args:
        name_or_path: As for `load_backbone`, or the output folder of an earlier run.
        revision: Branch, tag or commit on the Hub.
        from_scratch: Random weights on purpose.
        backbone_args: Arguments of the timm architecture.
        objective: Name of the objective.
        objective_args: Options of the objective.
        image_size: Side of the views in pixels; the encoder's own when not given.
        num_views: Views of each image; the objective's own number when not given.

    Raises:
        UsageError: If the encoder does not load, or its heads are those of another objective, or the objective wants
            another number of views.
    """
    if is_ssl_folder(name_or_path) and not from_scratch:
        if (backbone_args or revision) and rank() == 0:
            logger.warning("%s is a whole run: `backbone_args` and `revision` have no effect.", name_or_path)
        model = _load_with_heads(name_or_path, objective, dict(objective_args or {}))
        model.backbone.measure_num_features(image_size or model.backbone.image_settings.size)
    else:
        backbone = load_backbone(
            name_or_path,
            revision=revision,
            from_scratch=from_scratch,
            backbone_args=backbone_args,
            image_size=image_size,
        )
        model = SSLModel.from_backbone(backbone, objective, objective_args, image_size=image_size)
        if rank() == 0:
            logger.warning("%s has no heads for %s: they start from random weights.", name_or_path, objective)
    wanted = getattr(model.objective, "num_views", None)
    if wanted is not None and num_views not in (None, wanted):
        raise UsageError(f"`num_views` must be {wanted} for {objective}, got {num_views}. Pass --num_views {wanted}.")
    unused = model.backbone.freeze_unused_parameters(image_size or model.backbone.image_settings.size)
    if unused and rank() == 0:
        logger.warning("Frozen, since the features do not depend on them: %s.", ", ".join(unused))
    return model


def _load_with_heads(folder: str, objective: str, objective_args: dict[str, Any]) -> SSLModel:
    model: SSLModel
    try:
        with loading_noise_off():
            loaded: Any = SSLModel.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"`model` must hold a whole run, got {folder!r}: {first_line(error)}") from error
    model, report = loaded
    assert_coverage(model, report, folder, at_least=1.0)
    stored = (model.config.objective, model.config.objective_args or {})
    wanted = (objective, {**stored[1], **objective_args})
    if stored != wanted:
        raise UsageError(
            f"`objective` must be that of the heads in {folder!r}, {stored[0]} with {stored[1]}, got {objective} with "
            f"{objective_args}. Pass the encoder folder inside it to start with new heads."
        )
    return model
