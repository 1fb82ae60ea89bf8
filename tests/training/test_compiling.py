import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import torch._dynamo
from accelerate.utils import DynamoBackend
from models.tiny import TIMM
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from transformers import TrainerCallback

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.compiling import compiled_backbones
from e2mc_hf.training.continuation import continue_pretraining
from e2mc_hf.training.trainer import E2MCTrainer

BATCH, SIZE, SMALL_SIZE, STEPS = 8, 32, 16, 12
HEADS: dict[str, dict[str, Any]] = {
    "vicreg": {"projector_dim": 16},
    "swav": {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12},
    "dino": {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12},
}
graphs: Counter[int] = Counter()  # graphs made since the test began, by side of the images


@torch._dynamo.register_backend(name="counted")
def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Backend without code of its own, whose numbers are those of uncompiled training, that counts graphs."""
    (side,) = {value.shape[-1] for value in inputs if value.dim() == 4 and value.shape[1] == 3} & {SIZE, SMALL_SIZE}
    graphs[side] += 1
    return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    graphs.clear()
    jaxtyping.config.update("jaxtyping_disable", True)  # checks of annotations cannot be compiled
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class NothingNew(TrainerCallback):
    """From step 10 on, whatever would be compiled is an error."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch._dynamo.config.error_on_recompile = state.global_step >= 10

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch._dynamo.config.error_on_recompile = False


def new_model(encoder: str, objective: str) -> SSLModel:
    torch.manual_seed(0)
    options = TIMM[encoder] | (
        {"depth": 1, "dynamic_img_size": True, "proj_drop_rate": 0.2} if "vit" in encoder else {}
    )
    backbone = load_backbone(encoder, from_scratch=True, backbone_args=options, image_size=SIZE)
    other_sizes = [] if objective == "vicreg" else [SMALL_SIZE]
    return SSLModel.from_backbone(backbone, objective, HEADS[objective], image_size=SIZE, other_sizes=other_sizes)


def views(model: SSLModel, num_images: int = 48) -> ViewDataset:
    num_small = 0 if model.config.objective == "vicreg" else 4
    arguments = ViewArguments(image_size=SIZE, num_small_views=num_small, small_image_size=SMALL_SIZE)
    source = load_images(DataArguments(max_samples=num_images), "train")
    return ViewDataset(source, ViewTransform(arguments, model.backbone.image_settings), seed=0)


def arguments(folder: Path, **options: Any) -> E2MCTrainingArguments:
    defaults = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 0.1, "per_device_train_batch_size": BATCH}
    return E2MCTrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **(defaults | options))


def trained(folder: Path, model: SSLModel, checkpoint: Path | None = None, **options: Any) -> E2MCTrainer:
    dataset = views(model)
    trainer = E2MCTrainer(model, arguments(folder, **options), dataset, dataset, callbacks=[NothingNew()])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def losses(trainer: E2MCTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 24}


def test_multi_crop_makes_one_graph_for_each_size_and_changes_no_number(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", new_model("resnet18", "swav"), **EVALUATED)
    compiled = trained(
        tmp_path / "compiled", new_model("resnet18", "swav"), torch_compile_backend="counted", **EVALUATED
    )
    assert graphs == {SIZE: 1, SMALL_SIZE: 1}
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses(compiled) == losses(plain)
    assert losses(compiled, "eval_loss") == losses(plain, "eval_loss")
    assert same_weights(compiled.model, plain.model)


def test_a_teacher_adds_one_graph_and_a_checkpoint_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 6}
    plain = trained(tmp_path / "plain", new_model("vit_tiny_patch16_224", "dino"), **options)
    options["torch_compile_backend"] = "counted"
    compiled = trained(tmp_path / "compiled", new_model("vit_tiny_patch16_224", "dino"), **options)
    assert graphs == {SIZE: 2, SMALL_SIZE: 1}
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses(compiled) == losses(plain)
    assert same_weights(compiled.model, plain.model)
    checkpoint = tmp_path / "compiled" / "checkpoint-6"
    resumed = trained(tmp_path / "plain", new_model("vit_tiny_patch16_224", "dino"), checkpoint)
    assert same_weights(resumed.model, plain.model)


def test_heads_are_fitted_first_without_making_a_graph(tmp_path: Path) -> None:
    models = [new_model("vit_tiny_patch16_224", "vicreg") for _ in range(2)]
    for model, backend in zip(models, (None, "counted"), strict=True):
        options = arguments(tmp_path, torch_compile_backend=backend, head_warmup=3, max_steps=2)
        continue_pretraining(model, options, views(model), new_heads=True)
    assert graphs == {SIZE: 1}
    assert same_weights(*models)


def test_a_last_smaller_chunk_of_the_gradient_cache_makes_no_graph(tmp_path: Path) -> None:
    options = {"gradient_cache_chunk_size": 3, "max_steps": 2}
    plain = trained(tmp_path / "plain", new_model("vit_tiny_patch16_224", "vicreg"), **options)
    compiled = trained(
        tmp_path / "compiled", new_model("vit_tiny_patch16_224", "vicreg"), torch_compile_backend="counted", **options
    )
    assert graphs == {SIZE: 1}
    assert same_weights(compiled.model, plain.model)


def test_only_training_batches_of_the_first_size_run_compiled_code() -> None:
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten())
    names = list(model.state_dict())
    images, others = torch.randn(6, 3, SIZE, SIZE), torch.randn(5, 3, SIZE, SIZE)
    with compiled_backbones(model, arguments(Path("unused"), torch_compile_backend="counted")):
        model.eval().backbone(images)
        assert not graphs
        for _ in range(3):
            model.train().backbone(images)
            model.backbone(others)
            model.eval().backbone(others)
        assert graphs == {SIZE: 1}
        with torch.no_grad():
            model.train().backbone(images)
        assert graphs == {SIZE: 2}
        copy.deepcopy(model).backbone(torch.randn(4, 3, SIZE, SIZE))
        assert list(model.state_dict()) == names
    model.train().backbone(torch.randn(4, 3, SIZE, SIZE))
    assert graphs == {SIZE: 2}


def test_accelerate_compiles_nothing_and_the_arguments_say_what_was_done(tmp_path: Path) -> None:
    model = new_model("resnet18", "vicreg")
    trainer = E2MCTrainer(model, arguments(tmp_path, torch_compile=True), views(model))
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert trainer.args.to_dict()["torch_compile"] is True
    assert trainer.args.torch_compile_backend == "inductor"
    assert trainer.args.tf32 is False  # transformers would turn it on


def test_what_accelerate_launch_was_asked_to_compile_is_compiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune-no-cudagraphs")
    options = arguments(tmp_path)
    assert options.torch_compile
    assert (options.torch_compile_backend, options.torch_compile_mode) == ("inductor", "max-autotune-no-cudagraphs")
    model = new_model("resnet18", "vicreg")
    trainer = E2MCTrainer(model, options, views(model))
    assert trainer.accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    own = arguments(tmp_path, torch_compile_backend="aot_eager")
    assert (own.torch_compile_backend, own.torch_compile_mode) == ("aot_eager", None)


def test_a_way_of_compiling_that_has_no_effect_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "True")
    with pytest.raises(UsageError, match="`dynamo_use_dynamic` has no effect: the encoder is compiled whole"):
        arguments(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"torch_compile_backend": "inductr"}, "`torch_compile_backend` must be inductor, or another .* got 'inductr'"),
        (
            {"torch_compile_backend": "cudagraphs"},
            "`torch_compile_backend` must be another: CUDA graphs would overwrit",
        ),
        ({"torch_compile_mode": "reduce-overhead"}, "`torch_compile_mode` must be default or max-autotune-no-cudagr"),
        (
            {"torch_compile_mode": "max-autotune-no-cudagraphs", "torch_compile_backend": "aot_eager"},
            "`torch_compile_mode` needs the backend inductor",
        ),
    ],
)
def test_backends_and_modes_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        arguments(tmp_path, **options)


def test_a_machine_without_a_compiler_is_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"`torch_compile` needs a C.. compiler on the CPU, got 'no no-such-compiler'"):
        arguments(tmp_path, torch_compile=True)


def test_a_model_without_a_backbone_is_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`torch_compile` needs a model with a `backbone`.* got 'Linear'"):
        E2MCTrainer(nn.Linear(2, 2), arguments(tmp_path, torch_compile=True))


def test_running_statistics_do_not_go_with_activations_that_are_computed_twice(tmp_path: Path) -> None:
    name = "activation_checkpointing"
    if name not in {field.name for field in dataclasses.fields(E2MCTrainingArguments)}:
        name = "gradient_checkpointing"  # before transformers 5.22 or so
    options = arguments(tmp_path, torch_compile_backend="aot_eager", **{name: True})
    with pytest.raises(UsageError, match=f"does not go with activation checkpointing for an encoder .*{name}"):
        E2MCTrainer(new_model("resnet18", "vicreg"), options)
    E2MCTrainer(new_model("vit_tiny_patch16_224", "vicreg"), options)


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "objective"), [("resnet18", "swav"), ("vit_tiny_patch16_224", "dino")])
def test_generated_code_gives_the_losses_of_uncompiled_training(tmp_path: Path, encoder: str, objective: str) -> None:
    options = {"learning_rate": 1e-3, "regularizer": "none"}  # entropies at this size amplify rounding
    plain = trained(tmp_path / "plain", new_model(encoder, objective), **options)
    compiled = trained(tmp_path / "compiled", new_model(encoder, objective), torch_compile=True, **options)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == (3 if objective == "dino" else 2)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert losses(compiled)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
