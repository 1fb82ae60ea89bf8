import json
from typing import Any

import pytest
import torch
from torch import nn

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.continuation import continue_pretraining
from e2mc_hf.training.sharded_model import block_classes, check_block_classes
from e2mc_hf.training.sharding import (
    check_head_warmup,
    check_sharded_model,
    check_sharding,
    deepspeed_stage,
    sharding_of,
)

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FULL = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
ZERO2 = {"zero_optimization": {"stage": 2}}


class TwoGpus(E2MCTrainingArguments):
    """Arguments as two processes with a GPU each see them."""

    world_size = property(lambda self: 2)
    device = property(lambda self: torch.device("cuda"))


def digits(model: SSLModel) -> ViewDataset:
    source = load_images(DataArguments(dataset="digits", max_samples=32), "train")
    return ViewDataset(source, ViewTransform(ViewArguments(image_size=32), model.backbone.image_settings), seed=0)


def arguments(folder: Any, kind: type[E2MCTrainingArguments] = E2MCTrainingArguments, **options: Any) -> Any:
    return kind(output_dir=str(folder), use_cpu=True, **options)


def on_two_gpus(folder: Any, sharding: str, plugin: dict[str, Any] | None = None, **options: Any) -> Any:
    """Completed arguments of a sharded run."""
    args = arguments(folder, TwoGpus, **{"optimizer": "adamw"} | options)
    args.fsdp = sharding == "fsdp"
    args.deepspeed = ZERO2 if sharding == "deepspeed" else None
    args.fsdp_plugin_args = FULL | (plugin or {})
    return args


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """transformers and accelerate write into it."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")


@pytest.fixture
def deepspeed_is_there(tmp_path, monkeypatch):
    """A package of that name, as far as its being installed is asked."""
    (tmp_path / "packages" / "deepspeed").mkdir(parents=True)
    (tmp_path / "packages" / "deepspeed" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))


def test_without_a_request_nothing_is_sharded(tmp_path):
    assert sharding_of(arguments(tmp_path)) == "none"


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"fsdp": True}, {}, r"^`fsdp` has no effect without a GPU, got 'cpu'\. Leave it out; cpu-2"),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, {}, "^`fsdp` has no effect without a GPU"),
        ({}, FSDP2, "^`fsdp` has no effect without a GPU"),
        (
            {"fsdp": True, "fsdp_config": {"version": 1}},
            {},
            "^`fsdp_version` must be 2: FSDP1 was never tried here, got 1",
        ),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, {}, "^`fsdp_version` must be 2"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "^`fsdp_version` must be 2"),  # 1 is accelerate's default
        ({}, FSDP2 | {"FSDP_VERSION": "1"}, "^`fsdp_version` must be 2"),
        ({"fsdp_config": {"version": 2}}, {}, "^`fsdp_config` has no effect without fsdp"),
        ({"deepspeed": ZERO2}, {}, "^`deepspeed` needs DeepSpeed, which is not installed"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "^`deepspeed` needs DeepSpeed, which is not installed"),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "^`ACCELERATE_USE_PARALLELISM_CONFIG` must be off"),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "^`ACCELERATE_USE_MEGATRON_LM` must be off"),
        ({"fsdp": True, "deepspeed": ZERO2}, {}, "^`fsdp` excludes deepspeed"),
        ({"deepspeed": ZERO2}, FSDP2, "^`fsdp` excludes deepspeed"),
    ],
)
def test_sharding_that_would_be_ignored_or_is_not_supported_is_refused(
    tmp_path, monkeypatch, options, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        arguments(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_version_in_a_file_counts(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps({"version": 1}))
    with pytest.raises(UsageError, match=r"^`fsdp_version` must be 2"):
        arguments(tmp_path, fsdp=True, fsdp_config=str(path))
    with pytest.raises(UsageError, match=r"^`fsdp_config` must be a JSON file, got '/nowhere\.json'"):
        arguments(tmp_path, fsdp=True, fsdp_config="/nowhere.json")


@pytest.mark.parametrize("environment", [{}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}])
@pytest.mark.usefixtures("deepspeed_is_there")
def test_zero_3_is_refused(tmp_path, monkeypatch, environment):
    options = {} if environment else {"deepspeed": {"zero_optimization": {"stage": 3}}}
    for name, value in (environment | {"ACCELERATE_USE_DEEPSPEED": "true"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"^`zero_stage` must be 0, 1 or 2: stage 3 .*, got 3\."):
        arguments(tmp_path, **options)


def test_the_stage_is_that_of_the_argument_or_the_file_or_the_launcher(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    launched = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert deepspeed_stage(ZERO2, launched) == 2
    assert deepspeed_stage(str(path), launched) == 1
    assert deepspeed_stage(None, launched | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}) == 1
    assert deepspeed_stage(None, launched | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}) == 3
    assert deepspeed_stage(None, {}) == 2
    assert deepspeed_stage({"train_batch_size": 8}, launched) == 0


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed"])
def test_what_goes_with_sharding_is_accepted(tmp_path, sharding):
    check_sharding(on_two_gpus(tmp_path, sharding))


def test_bfloat16_adapters_and_any_optimizer_go_with_fsdp(tmp_path):
    for optimizer in ("lars", "sgd", "adamw"):
        check_sharding(on_two_gpus(tmp_path, "fsdp", optimizer=optimizer, bf16=True, lora_rank=2))


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed"])
@pytest.mark.parametrize(
    "option",
    ["torch_compile", "channels_last", "load_best_model_at_end", "fp16"],
)
def test_options_that_do_not_go_with_sharding_are_refused(tmp_path, sharding, option):
    args = on_two_gpus(tmp_path, sharding)
    setattr(args, option, True)
    with pytest.raises(UsageError, match=rf"^`{option}` does not go with {sharding}: .*, got True\. Use --config"):
        check_sharding(args)


@pytest.mark.parametrize(
    ("plugin", "name"),
    [
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 10}, "fsdp_auto_wrap_policy"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading"),
        ({"cpu_offload": True}, "fsdp_offload_params"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing"),
        ({"ignored_modules": "objective"}, "fsdp_ignored_modules"),
    ],
)
def test_settings_of_fsdp_that_break_a_run_or_were_never_tried_are_refused(tmp_path, plugin, name):
    with pytest.raises(UsageError, match=f"^`{name}` must be "):
        check_sharding(on_two_gpus(tmp_path, "fsdp", plugin))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"bf16": True},
            "^`bf16` does not go with DeepSpeed, which would keep the teacher",
        ),
        ({"optimizer": "lars"}, "^`optimizer` does not go with DeepSpeed, which flattens"),
    ],
)
def test_deepspeed_refuses_what_it_would_compute_otherwise(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        check_sharding(on_two_gpus(tmp_path, "deepspeed", **options))


class Heads(nn.Module):
    """A model with an objective and nothing else."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("swav", {}, "^`objective` must not be swav with DeepSpeed: its prototypes"),
        ("dino", {}, r"^`objective_args` must have freeze_prototypes_epochs=0 with DeepSpeed.*got 1\.0"),
        ("dino", {"freeze_prototypes_epochs": 0}, None),
        ("vicreg", {}, None),
    ],
)
def test_deepspeed_refuses_objectives_that_work_on_weights_or_gradients_themselves(
    tmp_path, objective, options, message
):
    from e2mc_hf.objectives.registry import build_objective

    small = {"projector_dim": 4} | ({} if objective == "vicreg" else {"hidden_dim": 4, "num_prototypes": 4})
    model = Heads(build_objective(objective, small | options, 4))
    check_sharded_model(model, on_two_gpus(tmp_path, "fsdp"))
    if message is None:
        check_sharded_model(model, on_two_gpus(tmp_path, "deepspeed"))
        return
    with pytest.raises(UsageError, match=message):
        check_sharded_model(model, on_two_gpus(tmp_path, "deepspeed"))


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed"])
def test_momentum_of_a_checkpoint_does_not_go_with_sharding(tmp_path, sharding):
    args = on_two_gpus(tmp_path, sharding)
    check_sharded_model(nn.Identity(), arguments(tmp_path), {"weight": torch.zeros(1)})
    with pytest.raises(UsageError, match=f"^`restore_momentum` does not go with {sharding}: the optimizer loses it"):
        check_sharded_model(nn.Identity(), args, {"weight": torch.zeros(1)})


def test_sharding_over_one_process_is_refused(tmp_path, monkeypatch):
    args = on_two_gpus(tmp_path, "fsdp")
    monkeypatch.setattr(TwoGpus, "world_size", property(lambda self: 1))
    with pytest.raises(UsageError, match=r"^`fsdp` has no effect on one process, got 1\. Leave it out"):
        check_sharding(args)


def test_a_timeout_that_the_cpu_does_not_read_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"^`ddp_timeout` has no effect with use_cpu, .*, got 60\. Leave it out"):
        arguments(tmp_path, ddp_timeout=60)


def test_heads_are_not_fitted_on_sharded_weights(tmp_path):
    args = on_two_gpus(tmp_path, "fsdp")
    check_head_warmup(args, is_due=False)
    check_head_warmup(arguments(tmp_path), is_due=True)
    with pytest.raises(UsageError, match=r"^`head_warmup` must be none with fsdp: .*, got 'auto'\. Pass --head_warmup"):
        check_head_warmup(args, is_due=True)


def test_a_run_whose_heads_would_be_fitted_on_shards_ends_before_anything_is_removed(tmp_path):
    def removed() -> None:
        raise AssertionError

    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    model = SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": 8}, image_size=32)
    args = on_two_gpus(tmp_path, "fsdp")
    with pytest.raises(UsageError, match=r"^`head_warmup` must be none with fsdp"):
        continue_pretraining(model, args, digits(model), new_heads=True, before_training=removed)


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("test_vit", {"Block"}),
        ("test_resnet", set()),
        ("resnet18", {"BasicBlock"}),
        ("convnext_atto", {"ConvNeXtStage"}),
    ],
)
def test_blocks_of_an_encoder_are_found(architecture, names):
    with torch.device("meta"):
        from timm import create_model

        assert block_classes(create_model(architecture)) == names


def test_a_class_that_the_heads_use_too_is_not_gathered_by_itself():
    backbone = load_backbone("test_vit", from_scratch=True, image_size=32, backbone_args={"img_size": 32})
    model = SSLModel.from_backbone(backbone, "vicreg", {"projector_dim": 8}, image_size=32)
    check_block_classes(model, ["Block"])
    for name in ("Linear", "ViTLayer"):
        with pytest.raises(UsageError, match=f"^`fsdp_transformer_layer_cls_to_wrap` must be classes .*got '{name}'"):
            check_block_classes(model, [name])
