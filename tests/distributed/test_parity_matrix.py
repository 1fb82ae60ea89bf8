"""Every objective and every regularizer gives the same training, however the global batch is worked through.

Each run is one of the Trainer. The ways: one process, two of half the batch (four in the slow runs), and on either the
gradient cache in four chunks. Loss and gradient of every parameter are those of one process, and so are all weights and
all state after 20 steps.
"""

import gc
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from processes import run_on_processes
from torch import Tensor, nn
from torch.utils.data import Dataset

from e2mc_hf.distributed import rank, world_size
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.objectives.registry import OBJECTIVES
from e2mc_hf.regularizers.registry import REGULARIZERS
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.gradient_cache import average_gradients
from e2mc_hf.training.trainer import E2MCTrainer

BATCH, CHUNKS, STEPS, STEPS_PER_EPOCH = 16, 4, 20, 5
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
# Without position embeddings, which timm interpolates for small views in float32.
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "pos_embed": "none", "global_pool": "avg"}
OPTIONS: dict[str, dict[str, Any]] = {
    "barlow_twins": {"projector_dim": 12},
    "byol": {"projector_dim": 12, "hidden_dim": 16},
    "dino": {"projector_dim": 12, "hidden_dim": 16, "num_prototypes": 10},
    "mec": {"projector_dim": 12, "predictor_dim": 8, "eps_d_squared": 1.5},
    "simclr": {"projector_dim": 12, "hidden_dim": 16},
    "simsiam": {"projector_dim": 12, "predictor_dim": 8},
    "swav": {"projector_dim": 12, "hidden_dim": 16, "num_prototypes": 10, "queue_length": 2 * BATCH},
    "vicreg": {"projector_dim": 12},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("dino", {"centering": "sinkhorn", "norm": True}),
    ("mec", {"exact": True}),
    ("swav", {"queue_length": 0}),
]
# Moderate steps: with the weights of the paper, this learning rate would amplify rounding from step to step.
MODERATE = {"e2mc": {"entropy_weight": 10, "covariance_weight": 1}}


class Case(NamedTuple):
    """What is trained: objective and options, regularizers and options."""

    objective: str
    options: dict[str, Any]
    regularizer: str | list[str] = "none"
    regularizer_args: Mapping[str, Any] = MappingProxyType({})


class Run(NamedTuple):
    """What a training leaves: losses of this process, gradients of the first step, the state before and after."""

    losses: list[float]
    gradients: dict[str, Tensor]
    start: dict[str, Tensor]
    state: dict[str, Tensor]


OF_OBJECTIVES = {name: Case(name, OPTIONS.get(name, {})) for name in sorted(OBJECTIVES)}
OF_VARIANTS = {f"{name} {more}": Case(name, OPTIONS[name] | more) for name, more in VARIANTS}
OF_REGULARIZERS = {
    f"regularizer {name}": Case("simsiam", OPTIONS["simsiam"], name, MODERATE.get(name, {})) for name in REGULARIZERS
}
TOGETHER = {"regularizers": Case("simsiam", OPTIONS["simsiam"], sorted(REGULARIZERS), MODERATE)}
CASES = OF_OBJECTIVES | OF_REGULARIZERS | TOGETHER
ALL_CASES = CASES | OF_VARIANTS


class Views(Dataset[list[Tensor]]):
    """Random images in two large views, and in a small one for objectives that take it."""

    def __init__(self, dtype: torch.dtype, objective: str) -> None:
        generator = torch.Generator().manual_seed(1)
        sizes = (16, 16, 8) if OBJECTIVES[objective].takes_small_views else (16, 16)
        shapes = [(BATCH * STEPS_PER_EPOCH, 3, size, size) for size in sizes]
        self.views = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, index: int) -> list[Tensor]:
        return [view[index] for view in self.views]


def collate(images: list[list[Tensor]]) -> dict[str, list[Tensor]]:
    return {"views": [torch.stack(view) for view in zip(*images, strict=True)]}


class Recorder(E2MCTrainer):
    """Notes losses and first gradients; takes every other step without its gradient cache when told to."""

    alternating = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        cache = self._gradient_cache
        if self.alternating and self.state.global_step % 2:
            self._gradient_cache = None
        loss = super().training_step(*args, **kwargs)
        self._gradient_cache = cache
        if not self.losses:
            named = self.model.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        self.losses.append(loss.item())
        return loss


def new_model(case: Case, dtype: torch.dtype) -> SSLModel:
    torch.manual_seed(0)
    backbone = load_backbone("test_vit", from_scratch=True, image_size=16, backbone_args=TINY)
    for parameter in backbone.parameters():
        if parameter.dim() > 1:  # features that differ between images: those of new weights hardly do
            nn.init.normal_(parameter, std=0.3)
    return SSLModel.from_backbone(backbone, case.objective, case.options, image_size=16).to(dtype)


def train(case: Case, dtype: torch.dtype, steps: int, chunks: int = 0, **options: Any) -> Run:
    """Train on this process' share of each batch, in chunks when there are any."""
    model, share = new_model(case, dtype), BATCH // world_size()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alternating = options.pop("alternating", False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = E2MCTrainingArguments(
            output_dir=folder,
            use_cpu=True,
            disable_tqdm=True,
            max_steps=steps,
            per_device_train_batch_size=share,
            gradient_cache_chunk_size=share // chunks if chunks else 0,
            regularizer=case.regularizer,
            regularizer_args=dict(case.regularizer_args),
            optimizer="sgd",
            learning_rate=1e-3,
            logging_steps=1000,
            **options,
        )
        run = Recorder(model, arguments, Views(dtype, case.objective), data_collator=collate)
        run.alternating = alternating
        run.train()
    return Run(run.losses, run.gradients, start, dict(model.state_dict()))


def steps_of(name: str, dtype: torch.dtype, *, thorough: bool) -> int:
    """Whole runs in float64, and one in float32; of a regularizer alone, the first step unless thorough."""
    if dtype == torch.float32:
        return STEPS if name == "vicreg" else 1
    return 1 if name in OF_REGULARIZERS and not thorough else STEPS


def every_case(thorough: bool) -> dict[Any, Run]:
    gc.collect()
    gc.freeze()  # the Trainer collects garbage at its start: not what was there before, each time anew
    cases = ALL_CASES if thorough else CASES
    kinds = [(name, dtype, chunks) for name in cases for dtype in TOLERANCES for chunks in (0, CHUNKS)]
    runs = {kind: train(cases[kind[0]], kind[1], steps_of(*kind[:2], thorough=thorough), kind[2]) for kind in kinds}
    gc.unfreeze()
    return runs


def on_each_process(thorough: bool) -> dict[Any, Any]:
    """All that is asked of several processes, in one start of them."""
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": str(world_size())}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size()), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # not used
    results: dict[Any, Any] = dict(every_case(thorough))
    for chunks in (0, CHUNKS):
        results["in turns", chunks] = train(CASES["byol"], torch.float64, 4, chunks, alternating=True)
        results["own statistics", chunks] = train(CASES["vicreg"], torch.float64, 3, chunks, batch_norm="train")
    results["averages"] = averages()
    return results


def averages() -> list[Tensor | None]:
    """Gradients after averaging: 1 and 2 on the first two processes, one of them on the first alone, others nowhere."""
    kinds = [(2, torch.float32), (3, torch.float64), (4, torch.float64), (5, torch.float32)]
    parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in kinds]
    parameters[3].requires_grad_(False)
    parameters[0].grad = torch.full_like(parameters[0], float(rank() + 1))
    if rank() == 0:
        parameters[1].grad = torch.ones_like(parameters[1])
    average_gradients(parameters)
    return [parameter.grad for parameter in parameters]


@cache
def one(thorough: bool) -> dict[Any, Run]:
    return every_case(thorough)


@cache
def several(num_processes: int, thorough: bool) -> list[dict[Any, Any]]:
    return run_on_processes(on_each_process, num_processes, thorough)


def runs_of(processes: int, chunks: int, name: str, dtype: torch.dtype, *, thorough: bool) -> list[Run]:
    """Run of each process."""
    results: list[dict[Any, Any]] = [one(thorough)] if processes == 1 else several(processes, thorough)
    return [result[name, dtype, chunks] for result in results]


def gradient_error(run: Run, expected: Run) -> float:
    """Largest error of a parameter's gradient, relative to it, or to a thousandth of the whole where it is smaller."""
    assert run.gradients.keys() == expected.gradients.keys()
    norms = {name: gradient.double().norm().item() for name, gradient in expected.gradients.items()}
    least = 1e-3 * sum(norm**2 for norm in norms.values()) ** 0.5
    errors = {name: run.gradients[name].double() - expected.gradients[name].double() for name in norms}
    return max(error.norm().item() / max(norms[name], least) for name, error in errors.items())


def check_first_step(processes: int, chunks: int, name: str, *, thorough: bool = False) -> None:
    exact = one(thorough)[name, torch.float64, 0]
    for dtype, tolerance in TOLERANCES.items():
        whole, runs = one(thorough)[name, dtype, 0], runs_of(processes, chunks, name, dtype, thorough=thorough)
        loss = sum(run.losses[0] for run in runs) / processes
        assert abs(loss - whole.losses[0]) <= tolerance * abs(exact.losses[0])
        # Batch normalization of few samples amplifies the rounding of float32 to more than 1e-5 on one process already:
        # then the error against float64 is what counts.
        rounding = gradient_error(whole, exact)
        for run in runs:
            is_equal = gradient_error(run, whole) <= tolerance
            assert is_equal or (dtype == torch.float32 and gradient_error(run, exact) <= 2 * rounding)


def check_training(expected: Run, runs: list[Run], tolerance: float = 1e-10) -> None:
    """State as expected, by how far it has moved, or by a thousandth of the whole's; the same on every process."""
    moved = {name: (tensor - expected.start[name]).double().norm().item() for name, tensor in expected.state.items()}
    least = 1e-3 * sum(distance**2 for distance in moved.values()) ** 0.5
    assert least > 0
    for name, tensor in expected.state.items():
        for run in runs:
            assert torch.equal(run.state[name], runs[0].state[name]), name
            if tensor.is_floating_point():
                assert (run.state[name] - tensor).norm() <= tolerance * max(moved[name], least), name
            else:
                assert torch.equal(run.state[name], tensor), name


WAYS = pytest.mark.parametrize(("processes", "chunks"), [(1, CHUNKS), (2, 0), (2, CHUNKS)])


@WAYS
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_those_of_one_process(name: str, processes: int, chunks: int) -> None:
    check_first_step(processes, chunks, name)


@WAYS
@pytest.mark.parametrize("name", OF_OBJECTIVES | TOGETHER)
def test_weights_and_state_after_twenty_steps_are_those_of_one_process(name: str, processes: int, chunks: int) -> None:
    check_training(one(False)[name, torch.float64, 0], runs_of(processes, chunks, name, torch.float64, thorough=False))


@WAYS
def test_float32_weights_after_twenty_steps_are_those_of_one_process(processes: int, chunks: int) -> None:
    expected = one(False)["vicreg", torch.float32, 0].state
    for run in runs_of(processes, chunks, "vicreg", torch.float32, thorough=False):
        for name, tensor in expected.items():
            assert (run.state[name] - tensor).abs().max() <= 1e-5 * max(1, tensor.abs().max()), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "chunks"), [(1, CHUNKS), (4, 0), (4, CHUNKS)])
@pytest.mark.parametrize("name", ALL_CASES)
def test_four_processes_are_one(name: str, processes: int, chunks: int) -> None:
    check_first_step(processes, chunks, name, thorough=True)
    runs = runs_of(processes, chunks, name, torch.float64, thorough=True)
    check_training(one(True)[name, torch.float64, 0], runs)


def test_state_that_must_move_once_a_step_does_move() -> None:
    state = one(False)["swav", torch.float64, CHUNKS].state
    assert state["objective.queue_count"] == 2 * BATCH
    assert one(False)["vicreg", torch.float64, CHUNKS].state["objective.projector.1.num_batches_tracked"] == 2 * STEPS
    center = one(False)["dino", torch.float64, CHUNKS].state["objective.center"]
    assert (center != 0).all()


def test_steps_with_and_without_gradient_cache_can_take_turns_on_two_processes() -> None:
    plain, cached = ([result["in turns", chunks] for result in several(2, False)] for chunks in (0, CHUNKS))
    check_training(plain[0], cached)


def test_statistics_that_are_not_synchronized_are_the_first_process_own_with_the_gradient_cache_too() -> None:
    first, second = ([result["own statistics", chunks].state for chunks in (0, CHUNKS)] for result in several(2, False))
    name = "objective.projector.1.running_mean"
    assert not torch.equal(first[0][name], second[0][name])  # of the last batch, after the first's were taken over
    for plain, cached in (first, second):
        for name, tensor in plain.items():
            torch.testing.assert_close(cached[name], tensor, rtol=1e-10, atol=1e-12)


def test_gradients_are_averaged_by_a_list_that_is_the_same_on_every_process() -> None:
    for both, on_first, nowhere, frozen in (result["averages"] for result in several(2, False)):
        assert torch.equal(both, torch.full((2,), 1.5))
        assert torch.equal(on_first, torch.full((3,), 0.5, dtype=torch.float64))
        assert nowhere is None
        assert frozen is None
