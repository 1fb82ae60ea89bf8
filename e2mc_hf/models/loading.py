"""Load a backbone by name, and prove that its weights came from the checkpoint."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel, TimmWrapperConfig

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone, prepare_config
from e2mc_hf.models.image_statistics import settings_of_processor, settings_of_timm

logger = logging.getLogger(__name__)

# Share of a model's numbers that must come from the checkpoint.
MIN_COVERAGE = 0.99


def load_backbone(
    name_or_path: str,
    *,
    revision: str | None = None,
    from_scratch: bool = False,
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> Backbone:
    """Load any timm model or transformers vision model as a `Backbone`, in float32.

    Args:
        name_or_path: Hub id (`facebook/dinov2-small`, `timm/resnet50.a1_in1k`), timm name (`resnet50.a1_in1k`), or
            local folder written by `save_pretrained`, by timm's `save_for_hf`, or by this package.
        revision: Branch, tag or commit on the Hub.
        from_scratch: Random weights on purpose, for a timm name or a configuration.
        backbone_args: Arguments of the timm architecture, such as `dynamic_img_size=True`.
        image_size: Side in pixels that a model from scratch is built for; its usual size when not given.

    Raises:
        UsageError: If nothing loads under that name, or less than 99% of the model's numbers are in the checkpoint.
    """
    name = name_or_path.removeprefix("hf-hub:").removeprefix("local-dir:")
    options = dict(backbone_args or {})
    is_folder = Path(name).is_dir()
    if not is_folder and timm.is_model(name.split(".")[0]):
        if from_scratch:
            return _new_timm_backbone(name, options, image_size)
        name = _hub_id_of_timm(name)
    config = _read_config(name, revision, options)
    if from_scratch:
        model = AutoModel.from_config(prepare_config(config))
    else:
        model = _load_model(name, revision, config)
    return Backbone(model, _settings(name, revision, config))


def assert_coverage(model: PreTrainedModel, missing: Iterable[str], source: str) -> None:
    """Refuse a checkpoint that holds less than 99% of a model's numbers; name what is missing.

    Raises:
        UsageError: If the coverage is too low.
    """
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    absent = [name for name in sizes if any(name == key or name.endswith("." + key) for key in missing)]
    coverage = 1 - sum(sizes[name] for name in absent) / sum(sizes.values())
    named = ", ".join(sorted(absent)[:5]) + (", ..." if len(absent) > 5 else "")
    if coverage < MIN_COVERAGE:
        raise UsageError(
            f"`model` must hold at least {MIN_COVERAGE:.0%} of the encoder's numbers, got {coverage:.1%} from "
            f"{source!r}. Missing: {named}. Is it a checkpoint of this architecture?"
        )
    if absent:
        logger.warning("%s: %.2f%% of the encoder's numbers; random: %s", source, 100 * coverage, named)


def _new_timm_backbone(name: str, options: dict[str, Any], image_size: int | None) -> Backbone:
    pretrained_cfg = timm.get_pretrained_cfg(name, allow_unregistered=False).to_dict(remove_source=True)
    if image_size is not None:
        pretrained_cfg |= {"input_size": (3, image_size, image_size), "crop_pct": 1.0, "pool_size": None}
    described = {"architecture": name.split(".")[0], "num_labels": 0, "pretrained_cfg": pretrained_cfg}
    config = TimmWrapperConfig(model_args=options, **described)
    return Backbone(_build(config), settings_of_timm(pretrained_cfg))


def _build(config: Any) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModel.from_config(config)
    except TypeError as error:
        raise UsageError(f"`backbone_args` do not fit the architecture: {error}. Correct or drop them.") from error
    return model


def _hub_id_of_timm(name: str) -> str:
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is None or not pretrained_cfg.hf_hub_id:
        raise UsageError(
            f"`model` {name!r} has no pretrained weights on the Hub. Pass --from_scratch for random ones, or a folder."
        )
    tag = pretrained_cfg.tag
    hub_id: str = pretrained_cfg.hf_hub_id
    return hub_id if hub_id != "timm/" else f"timm/{name.split('.')[0]}" + (f".{tag}" if tag else "")


def _read_config(name: str, revision: str | None, options: dict[str, Any]) -> Any:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"`model` must be a Hub id, a timm name or a folder with config.json, got {name!r}: {_first_line(error)} "
            "Check the name and, for private or gated repositories, HF_TOKEN."
        ) from error
    if config.model_type != "timm_wrapper":
        if options:
            raise UsageError(
                f"`backbone_args` are for timm architectures, got {options} for {config.model_type}. Drop them."
            )
        return prepare_config(config)
    # timm writes num_classes into model_args as well, and TimmWrapperModel then passes it twice.
    arguments = {key: value for key, value in (config.model_args or {}).items() if key != "num_classes"}
    config.model_args = arguments | options
    return config


def _load_model(name: str, revision: str | None, config: Any) -> PreTrainedModel:
    options: dict[str, Any] = {"revision": revision, "config": config, "dtype": torch.float32}
    model: PreTrainedModel
    try:
        model, report = AutoModel.from_pretrained(name, output_loading_info=True, **options)
        if any(key.startswith("pooler.dense") for key in report["missing_keys"]):
            model, report = AutoModel.from_pretrained(
                name, output_loading_info=True, add_pooling_layer=False, **options
            )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UsageError(
            f"`model` must hold weights that fit its configuration, got {name!r}: {_first_line(error)} "
            "Check the folder, the network and the revision."
        ) from error
    assert_coverage(model, report["missing_keys"], name)
    return model


def _settings(name: str, revision: str | None, config: Any) -> ImageSettings:
    if config.model_type == "timm_wrapper":
        return settings_of_timm(config.pretrained_cfg)
    size = getattr(config, "image_size", None) or 224
    return settings_of_processor(name, revision, size if isinstance(size, int) else size[0])


def _first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith((".", "!", "?")) else line + "."


def is_ssl_folder(path: str) -> bool:
    """Whether a folder holds a whole SSLModel, heads included."""
    config = Path(path) / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "e2mc_ssl"
