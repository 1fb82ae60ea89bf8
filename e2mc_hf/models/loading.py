"""Load a backbone by name, and prove that its weights came from the checkpoint."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel, TimmWrapperConfig

from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone, prepare_config
from e2mc_hf.models.image_statistics import settings_of_processor, settings_of_timm

logger = logging.getLogger(__name__)

# Arguments of timm's factory that are not the architecture's: files to unpickle, addresses, other weights.
_NOT_OF_ARCHITECTURE = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")

# Share of a model's numbers that must come from the checkpoint.
MIN_COVERAGE = 0.99


def load_backbone(
    name_or_path: str,
    *,
    revision: str | None = None,
    from_scratch: bool = False,
    backbone_args: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    other_sizes: Sequence[int] = (),
) -> Backbone:
    """Load any timm model or transformers vision model as a `Backbone`, in float32.

    timm's vision transformers that can take images of several sizes are told to (`dynamic_img_size`) as soon as one
    differs from their own.

    Args:
        name_or_path: Hub id (`facebook/dinov2-small`, `timm/resnet50.a1_in1k`), timm name (`resnet50.a1_in1k`), or
            local folder written by `save_pretrained`, by timm's `save_for_hf`, or by this package.
        revision: Branch, tag or commit on the Hub.
        from_scratch: Random weights on purpose, for a timm name or a configuration.
        backbone_args: Arguments of the timm architecture, such as `dynamic_img_size=True`.
        image_size: Side of the images in pixels, the encoder's own when not given; a timm model from scratch is built
            for it.
        other_sizes: Sides of further images that it must take, such as small views.

    Raises:
        UsageError: If nothing loads under that name, less than 99% of the model's numbers are in the checkpoint, one
            has another shape there, or the checkpoint has more blocks than the model.
    """
    name = name_or_path.removeprefix("hf-hub:").removeprefix("local-dir:")
    options = dict(backbone_args or {})
    _refuse_foreign(options)
    sizes = [size for size in (image_size, *other_sizes) if size is not None]
    if not Path(name).is_dir() and timm.is_model(name.split(".")[0]):
        if from_scratch:
            return _new_timm_backbone(name, options, image_size, sizes)
        name = _hub_id_of_timm(name)
    if Path(name).is_file():
        raise UsageError(
            f"`model` must be a folder, a Hub id or a timm name, got the file {name!r}. Turn an author's checkpoint "
            "into a folder with scripts/import_checkpoint.py."
        )
    if is_ssl_folder(name):
        raise UsageError(f"`model` must be an encoder, got {name!r}, the output of a run. Pass {name}/encoder.")
    config = _read_config(name, revision, options, sizes)
    if from_scratch:
        model = _build(config)
    else:
        model = _load_model(name, revision, config)
    return Backbone(model, _settings(name, revision, config))


def assert_coverage(
    model: PreTrainedModel, report: Mapping[str, Any], source: str, *, at_least: float = MIN_COVERAGE
) -> None:
    """Refuse a checkpoint that holds too few of a model's numbers, one in another shape, or more blocks; name them.

    Args:
        model: Model as loaded.
        report: Loading information of transformers' `from_pretrained`.
        source: Where the checkpoint is, for the message.
        at_least: Share of the model's numbers that must be there.

    Raises:
        UsageError: If the coverage is too low, a shape differs, or the model leaves out blocks of the checkpoint.
    """
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    misshapen = {key for key, *_ in report["mismatched_keys"]}
    absent = sorted(set(sizes) & (misshapen | set(report["missing_keys"])))
    coverage = 1 - sum(sizes[name] for name in absent) / sum(sizes.values())
    named = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    if coverage < at_least or misshapen:
        raise UsageError(
            f"`model` must hold at least {at_least:.0%} of the model's numbers, each in its shape, got {coverage:.1%} "
            f"from {source!r}. Missing or of another shape: {named}. Is it a checkpoint of this architecture?"
        )
    layers = {_without_numbers(name) for name in sizes}
    further = sorted(key for key in report.get("unexpected_keys", ()) if _without_numbers(key) in layers)
    if further:
        raise UsageError(
            f"`model` must be built with every block of its checkpoint, got {len(further)} weights of further blocks "
            f"in {source!r}, such as {further[0]}. Correct the number of blocks in its config.json."
        )
    if absent:
        logger.warning("%s: %.2f%% of the model's numbers; random: %s", source, 100 * coverage, named)


# What transformers logs to no use while loading: its table of keys, since `assert_coverage` says in one sentence what
# matters; the layers that tensor parallelism, not asked for, would not shard; the backend of timm's image processor.
_NOISE = {
    "transformers.modeling_utils": "LOAD REPORT",
    "transformers.distributed.tensor_parallel": "were not sharded",
    "transformers.models.auto.image_processing_auto": "backend is not available",
}


@contextmanager
def loading_noise_off() -> Iterator[None]:
    """Keep transformers from logging what says nothing to the user while a checkpoint is loaded."""
    filters = {logging.getLogger(name): _without(text) for name, text in _NOISE.items()}
    for transformers_logger, accepts in filters.items():
        transformers_logger.addFilter(accepts)
    try:
        yield
    finally:
        for transformers_logger, accepts in filters.items():
            transformers_logger.removeFilter(accepts)


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: text not in record.getMessage()


def accept_sizes(description: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
    """Configuration of a backbone, as its `to_dict` gives it, that takes images of all sizes where it can.

    Args:
        description: Configuration of a timm or transformers model; only timm's ever changes.
        sizes: Sides of the images, pixels.

    Returns:
        The configuration, with `dynamic_img_size` for a timm architecture that needs and knows it.
    """
    description = dict(description)
    if description.get("model_type") == "timm_wrapper":
        arguments, pretrained_cfg = description.get("model_args") or {}, description.get("pretrained_cfg") or {}
        description["model_args"] = _for_sizes(description["architecture"], arguments, pretrained_cfg, sizes)
    return description


def _for_sizes(
    architecture: str, arguments: dict[str, Any], pretrained_cfg: Mapping[str, Any], sizes: Sequence[int]
) -> dict[str, Any]:
    """Arguments with which a timm architecture takes images of all sizes, where it can."""
    is_flexible = "dynamic_img_size" in arguments or pretrained_cfg.get("fixed_input_size") is False
    if is_flexible or {*sizes} <= {_own_size(arguments, pretrained_cfg)}:
        return arguments
    dynamic = arguments | {"dynamic_img_size": True}
    kept = {key: value for key, value in dynamic.items() if key != "num_classes"}
    try:
        with torch.device("meta"):  # costs no memory and no random numbers
            timm.create_model(architecture, num_classes=0, **kept)
    except (TypeError, ValueError, AssertionError, RuntimeError):
        return arguments  # does not know it; arguments that are wrong are refused where the model is built
    return dynamic


def _refuse_foreign(arguments: Mapping[str, Any]) -> None:
    foreign = [name for name in _NOT_OF_ARCHITECTURE if name in arguments]
    if foreign:
        raise UsageError(
            "`backbone_args` (and `model_args` in config.json) must describe the architecture, got "
            f"{', '.join(foreign)}. Drop them: weights come from `model` alone."
        )


def _own_size(arguments: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> int:
    """Side of the images that a timm model is built for."""
    size = arguments.get("img_size") or pretrained_cfg.get("input_size", (3, 224, 224))[-1]
    return int(size if isinstance(size, int) else size[-1])


def _new_timm_backbone(name: str, options: dict[str, Any], image_size: int | None, sizes: Sequence[int]) -> Backbone:
    pretrained_cfg = _pretrained_cfg_of_timm(name).to_dict(remove_source=True)
    if image_size is not None or "img_size" in options:
        size = _own_size(options, {"input_size": (3, image_size, image_size)})
        pretrained_cfg |= {"input_size": (3, size, size), "crop_pct": 1.0, "pool_size": None}
        if pretrained_cfg["fixed_input_size"]:  # then, by timm's rule, the architecture takes its size as an argument
            options = options | {"img_size": size}
    options = _for_sizes(name.split(".")[0], options, pretrained_cfg, sizes)
    described = {"architecture": name.split(".")[0], "num_labels": 0, "pretrained_cfg": pretrained_cfg}
    model = _build(TimmWrapperConfig(model_args=options, **described))
    # transformers draws every weight anew, from a normal of std 0.02; those of timm's own initialization are put back.
    drawn_by_timm = timm.create_model(described["architecture"], num_classes=0, **options)
    model.get_submodule("timm_model").load_state_dict(drawn_by_timm.state_dict())
    return Backbone(model, settings_of_timm(pretrained_cfg))


def _build(config: Any) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever an architecture raises on arguments that are none of its own
        raise UsageError(
            f"`backbone_args` must fit the architecture: {first_line(error)} Correct or drop them."
        ) from error
    return model


def _pretrained_cfg_of_timm(name: str) -> Any:
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(name.split(".")[0] + ".*")) or "none"
        raise UsageError(f"`model` must be a timm name with a known tag, got {name!r}. There are: {tags}.") from error


def _hub_id_of_timm(name: str) -> str:
    pretrained_cfg = _pretrained_cfg_of_timm(name)
    if not pretrained_cfg.hf_hub_id:
        raise UsageError(
            f"`model` {name!r} has no pretrained weights on the Hub. Pass --from_scratch for random ones, or a folder."
        )
    tag = pretrained_cfg.tag
    hub_id: str = pretrained_cfg.hf_hub_id
    return hub_id if hub_id != "timm/" else f"timm/{name.split('.')[0]}" + (f".{tag}" if tag else "")


def _read_config(name: str, revision: str | None, options: dict[str, Any], sizes: Sequence[int]) -> Any:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        pretrained_cfg = dict(getattr(config, "pretrained_cfg", None) or {})
    except Exception as error:  # whatever the libraries raise on a broken file or address
        raise UsageError(
            f"`model` must be a Hub id, a timm name or a folder with config.json, got {name!r}: {first_line(error)} "
            "Check the name and, for private or gated repositories, HF_TOKEN."
        ) from error
    if config.model_type != "timm_wrapper":
        if options:
            raise UsageError(
                f"`backbone_args` are for timm architectures, got {options} for {config.model_type}. Drop them."
            )
        return prepare_config(getattr(config, "vision_config", None) or config)  # the image half of CLIP, SigLIP, ...
    config.num_labels = 0  # its head is left out, and timm would look for it in an exported encoder
    # timm writes num_classes into model_args as well, and TimmWrapperModel then passes it twice.
    arguments = {key: value for key, value in (config.model_args or {}).items() if key != "num_classes"}
    _refuse_foreign(arguments)
    arguments |= options
    if "img_size" in arguments:
        size = _own_size(arguments, {})
        pretrained_cfg["input_size"] = (3, size, size)
    config.pretrained_cfg = pretrained_cfg
    config.model_args = _for_sizes(config.architecture, arguments, pretrained_cfg, sizes)
    return config


def _load_model(name: str, revision: str | None, config: Any) -> PreTrainedModel:
    options: dict[str, Any] = {"revision": revision, "config": config, "dtype": torch.float32}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    model: PreTrainedModel
    try:
        with loading_noise_off():
            model, report = AutoModel.from_pretrained(name, **options)
            if any(key.startswith("pooler.dense") for key in report["missing_keys"]):
                model, report = AutoModel.from_pretrained(name, add_pooling_layer=False, **options)
    except Exception as error:  # likewise
        raise UsageError(
            f"`model` must hold weights that fit its configuration, got {name!r}: {first_line(error)} "
            "Check the folder, the network and the revision."
        ) from error
    assert_coverage(model, report, name)
    return model


def _settings(name: str, revision: str | None, config: Any) -> ImageSettings:
    size = getattr(config, "image_size", None) or 224
    described = Path(name) / "preprocessor_config.json"
    try:
        if config.model_type == "timm_wrapper":
            settings = settings_of_timm(config.pretrained_cfg)
        else:
            if described.is_file():
                json.loads(described.read_text())  # transformers takes a broken file for none
            settings = settings_of_processor(name, revision, size if isinstance(size, int) else size[0])
        if settings.size < 1 or min(settings.std) <= 0:
            raise ValueError(f"size {settings.size}, std {settings.std}")
    except Exception as error:  # whatever the libraries raise on a broken file
        raise UsageError(
            f"`model` must say how its images are prepared, got {name!r}: {first_line(error)} Correct its "
            "preprocessor_config.json, or the pretrained_cfg of timm."
        ) from error
    return settings


def first_line(error: Exception) -> str:
    """First line of an exception's message, as a sentence: transformers' go on for a screen."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = shorten(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 250, placeholder=" ...")
    return line if line.endswith((".", "!", "?")) else line + "."


def is_ssl_folder(path: str) -> bool:
    """Whether a folder holds a whole SSLModel, heads included."""
    config = Path(path) / "config.json"
    try:
        described = json.loads(config.read_text()) if config.is_file() else None
    except ValueError:
        return False  # no JSON: loading it as an encoder says so
    return isinstance(described, dict) and described.get("model_type") == "e2mc_ssl"


def _without_numbers(name: str) -> str:
    """Name of a weight with the numbers of its blocks left out: the same for every block."""
    return re.sub(r"\.\d+\.", ".#.", name)
