"""FSDP2 on two processes is one process with whole weights, for every objective: losses, gradients, weights.

accelerate shards on GPUs only. Here it is told that gloo processes on the CPU are GPUs, with the settings that its
launcher makes of the package's fsdp2.yaml; the rest is what runs on GPUs: the Trainer, accelerate, torch's fully_shard.
"""

import gc
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import run_on_processes
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from e2mc_hf.distributed import rank, world_size
from e2mc_hf.launch_files import find_launch_file
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training import sharding
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.continuation import prepare
from e2mc_hf.training.finishing import finished_model
from e2mc_hf.training.trainer import E2MCTrainer

BATCH, STEPS, SIZE = 16, 3, 16
TINY = {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "global_pool": "avg"}
# Frozen for the first two of the three steps.
PROTOTYPES = {"projector_dim": 8, "hidden_dim": 16, "num_prototypes": 12, "freeze_prototypes_epochs": 1}


class Case(NamedTuple):
    """A run: objective, its options, and what else is given."""

    objective: str
    objective_args: dict[str, Any]
    options: dict[str, Any]
    architecture: str = "test_vit"
    dtype: torch.dtype = torch.float64


LARS, SGD, ADAMW = (
    {"optimizer": name, "learning_rate": rate} for name, rate in [("lars", 0.2), ("sgd", 1e-3), ("adamw", 1e-3)]
)
SAVED = {"save_strategy": "steps", "save_steps": 1}
CASES = {
    "barlow_twins": Case("barlow_twins", {"projector_dim": 8}, SGD | {"layer_decay": 0.7}),
    "byol": Case("byol", {"projector_dim": 8, "hidden_dim": 16}, ADAMW | SAVED),
    "dino": Case("dino", PROTOTYPES | {"norm": True}, LARS | {"max_grad_norm": 1e-2}),
    "mec": Case("mec", {"projector_dim": 8, "predictor_dim": 4}, SGD),
    "simclr": Case("simclr", {"projector_dim": 8, "hidden_dim": 16}, ADAMW | {"freeze_blocks": 1}),
    "simsiam": Case("simsiam", {"projector_dim": 8, "predictor_dim": 4}, LARS),
    "swav": Case("swav", PROTOTYPES | {"queue_length": 32}, ADAMW),
    "vicreg": Case("vicreg", {"projector_dim": 8}, LARS),
    "vicreg, adapters": Case("vicreg", {"projector_dim": 8}, ADAMW | {"lora_rank": 2}),
    "vicreg, convolutions": Case("vicreg", {"projector_dim": 8}, SGD | {"batch_norm": "recalibrated"}, "test_resnet"),
}
HALF = CASES["vicreg"]._replace(options=SGD | {"bf16": True}, dtype=torch.float32)
LAUNCHED = ["--config_file", str(find_launch_file("fsdp2")), "--num_processes", "2", "script.py"]


class Run(NamedTuple):
    """What a run leaves: losses, the gradient of its first step, and the finished model; and how it was divided."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    num_shards: int
    num_groups: int


class Views(Dataset[Any]):
    """Two views of random images."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(2, 2 * BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)

    def __len__(self) -> int:
        return 2 * BATCH

    def __getitem__(self, index: int) -> Tensor:
        return self.images[:, index]


def collate(images: list[Tensor]) -> dict[str, list[Tensor]]:
    return {"views": list(torch.stack(images, dim=1))}


class Recorder(E2MCTrainer):
    """Notes losses and first gradients, these put together from the parts of all processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in optimizer.param_groups:
            group["foreach"] = self.sharded_model is not None  # the kernels of a GPU
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not self.losses:
            named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
            self.gradients = {name: (g.full_tensor() if isinstance(g, DTensor) else g.clone()) for name, g in named}
        self.losses.append(loss.item())
        return loss


def trainer(case: Case, folder: str, *, is_sharded: bool = True) -> Recorder:
    """Trainer on this process' share of each batch."""
    torch.manual_seed(0)
    backbone_args = TINY if "vit" in case.architecture else {}
    backbone = load_backbone(case.architecture, from_scratch=True, image_size=SIZE, backbone_args=backbone_args)
    model = SSLModel.from_backbone(backbone, case.objective, case.objective_args, image_size=SIZE).to(case.dtype)
    model.backbone.freeze_unused_parameters(SIZE)
    if world_size() > 1:
        os.environ["ACCELERATE_USE_FSDP"] = "true" if is_sharded else "false"
    arguments = E2MCTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        weight_decay=1e-2,
        regularizer_args={"entropy_weight": 10, "covariance_weight": 1},
        per_device_train_batch_size=BATCH // world_size(),
        **{"max_steps": STEPS, "save_strategy": "no", **case.options},
    )
    if is_sharded and world_size() > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    prepare(model, arguments)
    return Recorder(model, arguments, Views(case.dtype), data_collator=collate)


def outcome(run: Recorder, checkpoint: str | None = None) -> Run:
    run.train(resume_from_checkpoint=checkpoint)
    num_shards = sum(isinstance(parameter, DTensor) for parameter in run.model.parameters())
    num_groups = sum(isinstance(module, FSDPModule) for module in run.model.modules())
    weights = {name: tensor.clone() for name, tensor in finished_model(run).state_dict().items()}
    return Run(run.losses, run.gradients, weights, num_shards, num_groups)


def sharded_runs(folder: str) -> dict[str, Run]:
    """All cases with sharded weights; one resumed from its first step; and bfloat16, both ways."""
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": str(world_size())}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size()), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # not used
    launched, *_ = _validate_launch_command(launch_command_parser().parse_args(LAUNCHED))
    os.environ |= {name: value for name, value in prepare_multi_gpu_env(launched).items() if "FSDP" in name}
    sharding._DEVICES = ("cuda", "cpu")
    gc.freeze()  # accelerate collects garbage after every run
    runs = {name: outcome(trainer(case, f"{folder}/{name}")) for name, case in CASES.items()}
    runs["resumed"] = outcome(trainer(CASES["byol"], f"{folder}/byol"), f"{folder}/byol/checkpoint-1")
    runs["half"] = outcome(trainer(HALF, folder))
    runs["half, whole weights"] = outcome(trainer(HALF, folder, is_sharded=False))
    return runs


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Run]]:
    return run_on_processes(sharded_runs, 2, str(tmp_path_factory.mktemp("sharded")))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("name", CASES)
def test_sharded_weights_train_as_whole_ones_do(two_processes: list[dict[str, Run]], tmp_path: Path, name: str) -> None:
    one = outcome(trainer(CASES[name], str(tmp_path)))
    first, second = (runs[name] for runs in two_processes)
    losses = [(a + b) / 2 for a, b in zip(first.losses, second.losses, strict=True)]
    assert losses[0] == pytest.approx(one.losses[0], rel=1e-14)
    assert losses == pytest.approx(one.losses, rel=1e-10)
    assert first.gradients.keys() == one.gradients.keys()
    expected = flat(one.gradients)
    assert (flat(first.gradients) - expected).norm() <= 1e-12 * expected.norm()
    assert first.weights.keys() == one.weights.keys()
    # AdamW makes steps of the learning rate of gradients that are 0 but for rounding: biases before normalization.
    tolerance = 1e-8 if CASES[name].options["optimizer"] == "adamw" else 1e-11
    for key, weight in one.weights.items():
        assert (first.weights[key] - weight).abs().max() <= tolerance * max(1.0, weight.abs().max().item()), key


@pytest.mark.parametrize("name", CASES)
def test_every_process_divides_its_weights_and_finishes_with_the_same_whole_ones(
    two_processes: list[dict[str, Run]], name: str
) -> None:
    first, second = (runs[name] for runs in two_processes)
    assert first.num_shards >= len(first.gradients) > 0
    blocks = 2 * (2 if any("teacher.model" in key for key in first.weights) else 1)
    assert first.num_groups == (1 + blocks if CASES[name].architecture == "test_vit" else 1)
    assert all(torch.equal(second.weights[key], weight) for key, weight in first.weights.items())
    assert not any("lora" in key for key in first.weights)


def test_a_sharded_run_resumes_bit_for_bit(two_processes: list[dict[str, Run]]) -> None:
    saved, resumed = two_processes[0]["byol"], two_processes[0]["resumed"]
    assert resumed.losses == saved.losses[1:]
    assert all(torch.equal(resumed.weights[key], weight) for key, weight in saved.weights.items())


def test_bfloat16_of_sharded_weights_is_that_of_whole_ones(two_processes: list[dict[str, Run]]) -> None:
    for runs in two_processes:
        sharded, whole = runs["half"], runs["half, whole weights"]
        assert whole.num_shards == 0
        assert sharded.losses[0] == whole.losses[0]
        assert sharded.losses == pytest.approx(whole.losses, rel=1e-3)
        assert (flat(sharded.gradients) - flat(whole.gradients)).norm() <= 1e-6 * flat(whole.gradients).norm()
        assert {weight.dtype for weight in sharded.weights.values()} == {
            weight.dtype for weight in whole.weights.values()
        }
