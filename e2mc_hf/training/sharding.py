"""Weights, gradients and optimizer state divided among GPUs (FSDP2, DeepSpeed ZeRO): what that does not go with.

Refused is what would be ignored, what was seen or read to give other numbers than whole weights on every process, and
what nobody has tried. docs/scaling.md says which is which.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

from e2mc_hf.arguments import require
from e2mc_hf.objectives.dino import DINO
from e2mc_hf.objectives.swav import SwAV

if TYPE_CHECKING:
    from e2mc_hf.training.arguments import E2MCTrainingArguments

Sharding = Literal["none", "fsdp", "deepspeed"]

# Devices on which accelerate shards; on others it trains unsharded without a word.
_DEVICES = ("cuda",)

# Options of the run that do not go with sharding, the value that does, and why.
_ALONE: dict[str, tuple[Any, str]] = {
    "torch_compile": (False, "the two were never tried together"),
    "channels_last": (False, "shards are cut from weights in the default order"),
    "load_best_model_at_end": (False, "the two were never tried together"),
    "fp16": (False, "the two were never tried together"),
}
_WHOLE = "Use --config_file ddp.yaml: every GPU then holds the whole model."


def sharding_of(args: "E2MCTrainingArguments") -> Sharding:
    """How a run is sharded, as its arguments or the environment of `accelerate launch` ask."""
    if args.deepspeed or _is_on("ACCELERATE_USE_DEEPSPEED"):
        return "deepspeed"
    return "fsdp" if args.fsdp or _is_on("ACCELERATE_USE_FSDP") else "none"


def check_sharding_request(args: "E2MCTrainingArguments") -> None:
    """Refuse a kind of sharding that is not supported, before transformers acts on it.

    Raises:
        UsageError: If it is FSDP1, ZeRO-3, both at once, half a request, or DeepSpeed is not installed.
    """
    kind = sharding_of(args)
    for variable in ("ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_MEGATRON_LM"):
        require(not _is_on(variable), variable, "must be off: it was never tried here", True, _WHOLE)
    wants_fsdp = bool(args.fsdp) or _is_on("ACCELERATE_USE_FSDP")
    require(
        wants_fsdp or not args.fsdp_config,
        "fsdp_config",
        "has no effect without fsdp",
        args.fsdp_config,
        "Pass --fsdp.",
    )
    require(not (wants_fsdp and kind == "deepspeed"), "fsdp", "excludes deepspeed", args.fsdp, "Choose one of the two.")
    if kind == "fsdp":
        version = _fsdp_version(args)
        remedy = "Use --config_file fsdp2.yaml, or set fsdp_version: 2 in yours."
        require(version == 2, "fsdp_version", "must be 2: FSDP1 was never tried here", version, remedy)
    if kind == "deepspeed":
        installed = importlib.util.find_spec("deepspeed") is not None
        require(installed, "deepspeed", "needs DeepSpeed, which is not installed", installed, "pip install deepspeed.")
        stage = deepspeed_stage(args.deepspeed, os.environ)
        rule = "must be 0, 1 or 2: stage 3 divides the teacher's weights too, and exports would hold shards"
        require(stage in (0, 1, 2), "zero_stage", rule, stage, "Use --config_file deepspeed-zero2.yaml.")


def check_sharding(args: "E2MCTrainingArguments") -> None:
    """Refuse sharding that would have no effect, or options that do not go with it.

    Args:
        args: Arguments that transformers has completed.

    Raises:
        UsageError: If there is one.
    """
    kind = sharding_of(args)
    if kind == "none":
        return
    device = args.device.type
    remedy = "Leave it out; cpu-2.yaml starts two processes with the whole model each."
    require(device in _DEVICES, kind, "has no effect without a GPU", device, remedy)
    require(args.world_size > 1, kind, "has no effect on one process", args.world_size, "Leave it out.")
    for name, (fine, why) in _ALONE.items():
        value = getattr(args, name, fine)
        require(value == fine, name, f"does not go with {kind}: {why}", value, _WHOLE)
    require(args.mixed_precision != "fp16", "mixed_precision", f"must not be fp16 with {kind}", "fp16", "Pass --bf16.")
    if kind == "fsdp":
        _check_fsdp_plugin(FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {})))
        return
    rule = "does not go with DeepSpeed, which would keep the teacher and running statistics in 16 bits as well"
    require(args.mixed_precision == "no", "bf16", rule, args.mixed_precision, "Leave it out, or use fsdp2.yaml.")
    rule = "does not go with DeepSpeed, which flattens the weights whose single norms LARS needs"
    require(args.optimizer != "lars", "optimizer", rule, args.optimizer, "Pass --optimizer adamw or sgd.")


def check_sharded_model(model: nn.Module, args: "E2MCTrainingArguments", momentum: object = None) -> None:
    """Refuse a model, or a momentum, with which a sharded run would be another one than on whole weights.

    Every objective keeps its numbers under FSDP2: tests/distributed/test_fully_shard.py. With DeepSpeed, accelerate
    takes the optimizer step within the backward pass, on copies of the weights of its own.

    Raises:
        UsageError: If there is one.
    """
    kind = sharding_of(args)
    rule = f"does not go with {kind}: the optimizer loses it when it takes over sharded weights"
    require(momentum is None or kind == "none", "restore_momentum", rule, True, _WHOLE)
    if kind != "deepspeed":
        return
    objective = getattr(model, "objective", None)
    rule = "must not be swav with DeepSpeed: its prototypes are brought to unit norm in place, which DeepSpeed undoes"
    require(not isinstance(objective, SwAV), "objective", rule, "swav", _WHOLE)
    frozen = objective.freeze_prototypes_epochs if isinstance(objective, DINO) else 0
    rule = "must have freeze_prototypes_epochs=0 with DeepSpeed, which steps before their gradients can be dropped"
    require(frozen == 0, "objective_args", rule, frozen, "Pass it, or use ddp.yaml or fsdp2.yaml.")


def check_head_warmup(args: "E2MCTrainingArguments", *, is_due: bool) -> None:
    """Refuse to fit heads first on sharded weights: the encoder would then never get a gradient, without a word.

    Args:
        args: Arguments of the run.
        is_due: Whether the heads would be fitted.

    Raises:
        UsageError: If they would, in a sharded run.
    """
    rule = f"must be none with {sharding_of(args)}: weights frozen when they are divided stay frozen"
    remedy = (
        "Pass --head_warmup none; to fit the heads all the same, do that in a run of its own on whole weights and pass "
        "its folder as --model."
    )
    require(not is_due or sharding_of(args) == "none", "head_warmup", rule, args.head_warmup, remedy)


def deepspeed_stage(config: Mapping[str, Any] | str | None, environment: Mapping[str, str]) -> int:
    """Stage of ZeRO in the argument `deepspeed`, or else in what `accelerate launch` left in the environment.

    Raises:
        UsageError: If the configuration is a text that is no file of JSON.
    """
    source = config or environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if source == "none":
        return int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    settings: Mapping[str, Any]
    if isinstance(source, str):
        settings = _read_json(source, "deepspeed")
    else:
        settings = source
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def _fsdp_version(args: "E2MCTrainingArguments") -> int:
    """Version of FSDP: `fsdp_config` of the arguments counts, with transformers' default, else accelerate's."""
    if not args.fsdp:
        return int(os.environ.get("FSDP_VERSION", "1"))
    config = args.fsdp_config or {}
    settings = _read_json(config, "fsdp_config") if isinstance(config, str) else config
    return int(settings.get("version", settings.get("fsdp_version", 2)))


def _check_fsdp_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse settings of FSDP2 that break a run, or were never tried."""
    kind = plugin.state_dict_type.name
    rule = "must be FULL_STATE_DICT: a checkpoint is one whole model"
    require(kind == "FULL_STATE_DICT", "fsdp_state_dict_type", rule, kind, "Set it in your file.")
    policy = getattr(plugin.auto_wrap_policy, "__name__", "none")
    rule = "must be TRANSFORMER_BASED_WRAP or NO_WRAP: objectives read weights of their heads past the modules"
    require(policy != "size_based_auto_wrap_policy", "fsdp_auto_wrap_policy", rule, policy, "Set it in your file.")
    rule = "must be off: accelerate then fails on running statistics, which are not sharded"
    name = "fsdp_cpu_ram_efficient_loading"
    require(not plugin.cpu_ram_efficient_loading, name, rule, True, "Set it to false.")
    offloads = "CPU" in type(plugin.cpu_offload).__name__
    untried = {
        "fsdp_offload_params": offloads,
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
    }
    for name, is_set in untried.items():
        require(not is_set, name, "must be off: it was never tried here", is_set, "Leave it out.")


def _read_json(path: str, name: str) -> dict[str, Any]:
    require(Path(path).is_file(), name, "must be a JSON file", path, "Correct the path.")
    settings: dict[str, Any] = json.loads(Path(path).read_text())
    return settings


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on", "y", "t")
