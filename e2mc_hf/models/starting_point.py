"""Where a run starts: the whole model of an earlier run, or an encoder that gets new heads."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError

from e2mc_hf.distributed import rank
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import (
    accept_sizes,
    assert_coverage,
    first_line,
    is_ssl_folder,
    load_backbone,
    loading_noise_off,
)
from e2mc_hf.models.ssl_model import SSLConfig, SSLModel
from e2mc_hf.objectives.registry import build_objective

logger = logging.getLogger(__name__)

DEFAULT_OBJECTIVE = "vicreg"


def load_starting_point(
    name_or_path: str,
    *,
    revision: str | None = None,
    from_scratch: bool = False,
    backbone_args: Mapping[str, Any] | None = None,
    objective: str | None = None,
    objective_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    other_sizes: Sequence[int] = (),
) -> SSLModel:
    """Load what is to be trained, ready for several processes.

    The output folder of an earlier run or of an import keeps its heads; any other encoder gets new ones, and the log
    says so. Parameters that the features do not depend on are frozen.

    Args:
        name_or_path: As for `load_backbone`, or the output folder of an earlier run.
        revision: Branch, tag or commit on the Hub.
        from_scratch: Random weights on purpose.
        backbone_args: Arguments of the timm architecture.
        objective: Name of the objective; that of the heads that are there, or vicreg, when not given.
        objective_args: Options of the objective.
        image_size: Side of the views in pixels; the encoder's own when not given.
        other_sizes: Sides of small views.

    Raises:
        UsageError: If the encoder does not load, or its heads are those of another objective.
    """
    if has_heads(name_or_path, from_scratch=from_scratch):
        if (backbone_args or revision) and rank() == 0:
            logger.warning("%s is a whole run: `backbone_args` and `revision` have no effect.", name_or_path)
        model = _load_with_heads(
            name_or_path,
            objective,
            dict(objective_args or {}),
            [image_size, *other_sizes] if image_size else other_sizes,
        )
        model.backbone.measure_num_features(image_size or model.backbone.image_settings.size, *other_sizes)
    else:
        name = objective or DEFAULT_OBJECTIVE
        backbone = load_backbone(
            name_or_path,
            revision=revision,
            from_scratch=from_scratch,
            backbone_args=backbone_args,
            image_size=image_size,
            other_sizes=other_sizes,
        )
        model = SSLModel.from_backbone(backbone, name, objective_args, image_size=image_size, other_sizes=other_sizes)
        if rank() == 0:
            logger.warning("%s has no heads for %s: they start from random weights.", name_or_path, name)
    unused = model.backbone.freeze_unused_parameters(image_size or model.backbone.image_settings.size, *other_sizes)
    if unused and rank() == 0:
        logger.warning("Frozen, since the features do not depend on them: %s.", ", ".join(unused))
    return model


def has_heads(name_or_path: str, *, from_scratch: bool = False) -> bool:
    """Whether a run would start with the heads of an earlier run or of an import."""
    return is_ssl_folder(name_or_path) and not from_scratch


def objective_of(name_or_path: str, objective: str | None, *, from_scratch: bool = False) -> str:
    """Name of the objective that a run will have: the one asked for, or that of the heads in a folder, or vicreg."""
    if objective is None and has_heads(name_or_path, from_scratch=from_scratch):
        return str(SSLConfig.from_pretrained(name_or_path).objective)
    return objective or DEFAULT_OBJECTIVE


def _load_with_heads(
    folder: str, objective: str | None, objective_args: dict[str, Any], sizes: Sequence[int]
) -> SSLModel:
    model: SSLModel
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        config = SSLConfig.from_pretrained(folder)
        config.backbone = accept_sizes(config.backbone or {}, sizes)
        with loading_noise_off():
            loaded: Any = SSLModel.from_pretrained(folder, config=config, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"`model` must hold a whole run, got {folder!r}: {first_line(error)}") from error
    model, report = loaded
    assert_coverage(model, report, folder, at_least=1.0)
    stored, stored_args = model.config.objective, dict(model.config.objective_args or {})
    if objective not in (None, stored):
        raise UsageError(
            f"`objective` must be that of the heads in {folder!r}, {stored}, got {objective}. Pass the encoder folder "
            "inside it to start with new heads."
        )
    if stored_args | objective_args != stored_args:
        _change_options(model, stored_args | objective_args, folder)
    return model


def _change_options(model: SSLModel, objective_args: dict[str, Any], folder: str) -> None:
    """Give a loaded model other options, keeping its heads; state of another shape, such as a queue, starts anew."""
    changed = build_objective(model.config.objective, objective_args, model.config.num_features)
    kept, state = model.objective.state_dict(), changed.state_dict()
    fits = {name: tensor for name, tensor in kept.items() if name in state and state[name].shape == tensor.shape}
    lost = sorted(name for name, _ in changed.named_parameters() if name not in fits)
    lost += sorted(name for name, _ in model.objective.named_parameters() if name not in fits and name not in lost)
    if lost:
        raise UsageError(
            f"`objective_args` must leave the heads in {folder!r} as they are ({model.config.objective} with "
            f"{model.config.objective_args}), got {objective_args}: {', '.join(lost[:3])} would not fit. Pass the "
            "encoder folder inside it to start with new heads."
        )
    resized = [name for name in state if name not in fits]
    anew = sorted(name for name in state if name.startswith(tuple(resized)))  # a queue and its count go together
    if anew and rank() == 0:
        logger.warning("Begins empty, since its size is new: %s.", ", ".join(anew))
    changed.load_state_dict({name: tensor for name, tensor in fits.items() if name not in anew}, strict=False)
    model.objective = changed
    model.config.objective_args = objective_args
