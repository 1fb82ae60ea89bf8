"""Gradients in chunks are those of the whole batch, and what would make them others is refused."""

import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.data import Dataset

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.gradient_cache import check_gradient_cache
from e2mc_hf.training.head_warmup import warm_up_heads
from e2mc_hf.training.trainer import E2MCTrainer

BATCH = 16
SMALL: dict[str, dict[str, Any]] = {
    "vicreg": {"projector_dim": 16},
    "byol": {"projector_dim": 16, "hidden_dim": 16},
}
RANDOM = {"drop_path_rate": 0.4, "proj_drop_rate": 0.2}


def new_model(architecture: str = "test_vit", objective: str = "vicreg", **options: Any) -> SSLModel:
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 3, "global_pool": "avg"} | options if architecture == "test_vit" else options
    backbone = load_backbone(architecture, from_scratch=True, image_size=32, backbone_args=options)
    if architecture == "test_vit":
        for parameter in backbone.parameters():
            if parameter.dim() > 1:  # features that differ between images: those of new weights hardly do
                nn.init.normal_(parameter, std=0.1)
    return SSLModel.from_backbone(backbone, objective, SMALL[objective], image_size=32)


def digits(model: SSLModel) -> ViewDataset:
    views = ViewArguments(image_size=32, flip_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=[0.0])
    source = load_images(DataArguments(max_samples=3 * BATCH), "train")
    return ViewDataset(source, ViewTransform(views, model.backbone.image_settings), seed=0)


def arguments(tmp_path: Path, chunk_size: int, **options: Any) -> E2MCTrainingArguments:
    options = {"max_steps": 3, "optimizer": "sgd", "learning_rate": 0.01} | options
    return E2MCTrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        gradient_cache_chunk_size=chunk_size,
        regularizer_args={"entropy_weight": 10, "covariance_weight": 1},
        disable_tqdm=True,
        logging_steps=1,
        **options,
    )


def trainer(tmp_path: Path, model: SSLModel, chunk_size: int, **options: Any) -> E2MCTrainer:
    return E2MCTrainer(model, arguments(tmp_path, chunk_size, **options), digits(model))


def trained(tmp_path: Path, model: SSLModel, chunk_size: int, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """State and log lines after three steps."""
    run = trainer(tmp_path, model, chunk_size, **options)
    run.train()
    return dict(model.state_dict()), [entry for entry in run.state.log_history if "loss" in entry]


def batch(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.randn(2, BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype))


def gradients_of_a_step(run: E2MCTrainer, seed: int = 2) -> dict[str, Tensor]:
    """Gradients that a training step leaves; its random numbers begin at `seed`."""
    run.model.zero_grad()
    run.current_gradient_accumulation_steps = 1  # as `train` sets it
    torch.manual_seed(seed)
    run.training_step(run.model, {"views": batch(run.model.dtype)})
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert gradients.keys() == expected.keys()
    one, other = (torch.cat([g[name].flatten() for name in sorted(g)]).double() for g in (gradients, expected))
    return ((one - other).norm() / other.norm()).item()


def test_a_chunk_as_large_as_the_batch_is_the_plain_step_bit_for_bit_with_stochastic_depth(tmp_path: Path) -> None:
    (plain, logs), (cached, cached_logs) = (trained(tmp_path, new_model(**RANDOM), size) for size in (0, BATCH + 3))
    assert all(torch.equal(cached[name], tensor) for name, tensor in plain.items())
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    assert [{k: v for k, v in log.items() if k not in timed} for log in cached_logs] == logs


@pytest.mark.parametrize("chunk_size", [1, 5, 8])
def test_chunks_that_need_not_divide_the_batch_give_the_gradient_of_the_plain_step(
    tmp_path: Path, chunk_size: int
) -> None:
    sizes = (0, chunk_size)
    plain, cached = (gradients_of_a_step(trainer(tmp_path, new_model().double(), size)) for size in sizes)
    assert error(cached, plain) < 1e-12


def test_random_depth_and_dropout_are_replayed_and_the_random_numbers_go_on_as_after_one_pass(tmp_path: Path) -> None:
    # The plain step draws in another order; this one passes the same chunks with their graphs, which is the exact loss.
    model = new_model(**RANDOM)
    run = trainer(tmp_path, model, 4)
    cached = gradients_of_a_step(run)
    after = torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(2)
    features = [torch.cat([model.backbone(chunk) for chunk in view.split(4)]) for view in batch()]
    outputs = model.score(features, None)
    (outputs.loss + run.regularizer(outputs.embeddings).loss).backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert error(cached, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}) < 1e-6
    other = gradients_of_a_step(run, seed=3)
    assert error(other, cached) > 1e-2  # the random numbers do matter


def test_activation_checkpointing_replays_them_within_a_chunk_too(tmp_path: Path) -> None:
    expected = gradients_of_a_step(trainer(tmp_path, new_model(**RANDOM), 4))
    run = trainer(tmp_path, new_model(**RANDOM), 4)
    run.model.activation_checkpointing_enable()
    assert error(gradients_of_a_step(run), expected) < 1e-6


@pytest.mark.parametrize("chunk_size", [4, BATCH])
def test_bfloat16_gradients_are_those_of_the_plain_step_to_its_rounding(tmp_path: Path, chunk_size: int) -> None:
    # Not bit for bit: chunks add their gradients in float32, the plain step adds those of the views in bfloat16.
    plain, cached = (gradients_of_a_step(prepared(tmp_path, size, bf16=True)) for size in (0, chunk_size))
    exact = gradients_of_a_step(prepared(tmp_path, 0))
    assert all(gradient.dtype == torch.float32 for gradient in cached.values())
    assert error(cached, plain) < 2**-8 < error(plain, exact)


def prepared(tmp_path: Path, chunk_size: int, **options: Any) -> E2MCTrainer:
    """A Trainer whose model accelerate has made ready for mixed precision, as `train` does."""
    run = trainer(tmp_path, new_model(), chunk_size, **options)
    run.model = run.accelerator.prepare_model(run.model)
    return run


def test_a_gradient_scaler_scales_every_gradient(tmp_path: Path) -> None:
    expected = gradients_of_a_step(trainer(tmp_path, new_model(), 4))
    run = trainer(tmp_path, new_model(), 4)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled = gradients_of_a_step(run)
    assert all(torch.equal(scaled[name], 2.0**10 * gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("objective", SMALL)
def test_frozen_batch_normalization_gives_the_gradient_of_the_plain_step(tmp_path: Path, objective: str) -> None:
    plain, cached = (
        gradients_of_a_step(trainer(tmp_path, new_model("test_resnet", objective).double(), size, batch_norm="frozen"))
        for size in (0, 4)
    )
    assert error(cached, plain) < 1e-12


@pytest.mark.parametrize("policy", ["train", "synchronized", "recalibrated"])
def test_other_batch_normalization_is_refused_before_anything_is_written(tmp_path: Path, policy: str) -> None:
    rule = f"`gradient_cache_chunk_size` must be 0 with --batch_norm {policy} for an encoder with batch normalization"
    with pytest.raises(UsageError, match=rule) as refusal:
        trainer(tmp_path, new_model("test_resnet"), 4, batch_norm=policy)
    assert "Pass --batch_norm frozen: the encoder then normalizes by the running statistics" in str(refusal.value)
    assert not (tmp_path / "run").exists()


class Points(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.ones(2, 6)}


def test_a_model_without_backbone_and_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`gradient_cache_chunk_size` needs an SSLModel, .* not a Linear, got 4"):
        E2MCTrainer(nn.Linear(6, 8), arguments(tmp_path, 4), Points())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights_are_refused(tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(tmp_path, 4)
    monkeypatch.setenv(flag, "true")
    with pytest.raises(UsageError, match="`gradient_cache_chunk_size` must be 0 with FSDP and DeepSpeed"):
        check_gradient_cache(new_model(), given)


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`gradient_cache_chunk_size` must not be negative, got -1"):
        arguments(tmp_path, -1)


def test_gradient_accumulation_is_refused_by_naming_the_gradient_cache(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`gradient_accumulation_steps` must be 1: .*--gradient_cache_chunk_size 32"):
        arguments(tmp_path, 0, gradient_accumulation_steps=2)


def test_heads_are_fitted_on_a_frozen_encoder_without_a_second_pass(tmp_path: Path) -> None:
    states, passes = [], []
    for chunk_size in (0, 4):
        model = new_model()
        model.backbone.register_forward_hook(lambda *_: passes.append(1))
        warm_up_heads(model, arguments(tmp_path, chunk_size, head_warmup="2"), digits(model), new_heads=True)
        states.append(model.state_dict())
    assert len(passes) == 2 * 2 * 1 + 2 * 2 * BATCH // 4  # steps x views x passes, without the cache and with it
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_evaluation_passes_whole_batches(tmp_path: Path) -> None:
    model = new_model()
    plain, cached = trainer(tmp_path, model, 0), trainer(tmp_path, model, 4)
    for run in (plain, cached):
        run.args.per_device_eval_batch_size = BATCH
    assert cached.evaluate(digits(model))["eval_loss"] == plain.evaluate(digits(model))["eval_loss"]


def most_bytes_saved(run: E2MCTrainer) -> int:
    """Most bytes that backward passes wait for at one time within a step, weights left out."""
    alive: dict[int, int] = {}
    most = 0
    weights = {parameter.data_ptr() for parameter in run.model.parameters()}

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # or an operation that saves its own output would keep itself

    def save(tensor: Tensor) -> Saved:
        nonlocal most
        saved = Saved(tensor)
        if tensor.data_ptr() not in weights:
            alive[id(saved)] = tensor.numel() * tensor.element_size()
            weakref.finalize(saved, alive.pop, id(saved))
            most = max(most, sum(alive.values()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        gradients_of_a_step(run)
    return most


def test_no_more_than_a_chunk_of_the_encoder_waits_for_a_backward_pass(tmp_path: Path) -> None:
    plain, cached, half = (most_bytes_saved(trainer(tmp_path, new_model(), size)) for size in (0, 2, 8))
    assert cached < plain / 8
    assert half < plain / 3  # one of two views, and half of it


@pytest.fixture
def compilation() -> Iterator[Counter[str]]:
    """Statistics of what torch compiles during a test, without checks of annotations, which cannot be compiled."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield torch._dynamo.utils.counters["stats"]
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_compiled_encoder_gives_the_same_training_with_one_graph_for_both_passes(
    tmp_path: Path, compilation: Counter[str]
) -> None:
    plain, _ = trained(tmp_path, new_model(**RANDOM), 8)
    compiled, _ = trained(tmp_path, new_model(**RANDOM), 8, torch_compile_backend="aot_eager")
    assert all(torch.equal(compiled[name], tensor) for name, tensor in plain.items())
    assert compilation["unique_graphs"] == 1


@pytest.mark.slow
def test_generated_code_gives_the_same_training(tmp_path: Path, compilation: Counter[str]) -> None:
    plain, _ = trained(tmp_path, new_model(**RANDOM), 8)
    compiled, _ = trained(tmp_path, new_model(**RANDOM), 8, torch_compile=True)
    assert compilation["unique_graphs"] == 1
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-4)
