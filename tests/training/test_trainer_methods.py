"""What the Trainer does for methods with schedules, teachers, prototypes and learning rates of their own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from e2mc_hf.arguments import DataArguments, ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.sources import load_images
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.continuation import continue_pretraining
from e2mc_hf.training.finishing import finished_model
from e2mc_hf.training.momentum import read_momentum, restore_momentum
from e2mc_hf.training.trainer import E2MCTrainer

SMALL = {
    "byol": {"projector_dim": 16, "hidden_dim": 16},
    "simsiam": {"projector_dim": 16, "predictor_dim": 8, "predictor_learning_rate": 0.05},
    "swav": {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12, "queue_length": 32},
    "vicreg": {"projector_dim": 16},
}
STEPS_PER_EPOCH = 2


def new_model(objective: str) -> SSLModel:
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    return SSLModel.from_backbone(backbone, objective, SMALL[objective], image_size=32)


def trainer(tmp_path: Path, model: SSLModel, **options: Any) -> E2MCTrainer:
    views = ViewArguments(image_size=32, flip_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=[0.0])
    source = load_images(DataArguments(max_samples=16 * STEPS_PER_EPOCH), "train")
    dataset = ViewDataset(source, ViewTransform(views, model.backbone.image_settings), seed=0)
    momentum = options.pop("initial_momentum", None)
    options = {"max_steps": 4, "learning_rate": 0.1, "optimizer": "sgd", "regularizer": "none"} | options
    arguments = E2MCTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=16,
        disable_tqdm=True,
        logging_steps=1,
        **options,
    )
    return E2MCTrainer(model, arguments, dataset, momentum=momentum)


def state(model: SSLModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_teacher_moves_once_a_step_by_the_momentum_of_its_schedule(tmp_path: Path) -> None:
    model = new_model("byol")
    before = state(model)
    trainer(tmp_path, model, max_steps=1).train()
    after = state(model)
    share = model.objective.teacher_momentum()
    assert share == 0.996
    for name in ("backbone.model.timm_model.conv1.0.weight", "objective.projector.0.weight"):
        teachers = name.replace("backbone.", "teacher.", 1).replace("projector", "teacher_projector")
        expected = share * before[teachers] + (1 - share) * after[name]
        assert not torch.equal(after[teachers], before[teachers])
        assert torch.allclose(after[teachers], expected, rtol=0, atol=1e-7)


def test_a_resumed_run_with_a_teacher_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    whole = new_model("byol")
    trainer(tmp_path / "whole", whole).train()
    trainer(tmp_path / "cut", new_model("byol"), save_strategy="steps", save_steps=2).train()
    resumed = new_model("byol")
    trainer(tmp_path / "cut", resumed).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    expected = state(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(resumed).items())


def test_a_resumed_run_goes_on_with_its_queue(tmp_path: Path) -> None:
    whole, resumed = new_model("swav"), new_model("swav")
    trainer(tmp_path / "whole", whole).train()
    trainer(tmp_path / "cut", new_model("swav"), save_strategy="steps", save_steps=3).train()
    trainer(tmp_path / "cut", resumed).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert int(whole.objective.queue_count) == 32
    expected = state(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(resumed).items())


def test_prototypes_stand_still_for_the_first_epoch_of_this_run_and_then_move(tmp_path: Path) -> None:
    model = new_model("swav")
    trainer(tmp_path, model, max_steps=STEPS_PER_EPOCH).train()  # an earlier run does not count
    model.objective.prototypes.weight.data = torch.nn.functional.normalize(model.objective.prototypes.weight.data)
    frozen = model.objective.prototypes.weight.clone()
    trainer(tmp_path, model, max_steps=STEPS_PER_EPOCH).train()
    assert torch.equal(model.objective.prototypes.weight, frozen)
    trainer(tmp_path, model, max_steps=STEPS_PER_EPOCH + 1).train()
    assert not torch.equal(model.objective.prototypes.weight, frozen)


def test_the_predictors_learning_rate_is_its_own_whatever_the_schedule(tmp_path: Path) -> None:
    run = trainer(tmp_path, new_model("simsiam"), lr_scheduler_type="cosine", learning_rate=0.2)
    rates: list[tuple[float, float]] = []
    predictor = {id(parameter) for parameter in run.model.objective.predictor.parameters()}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        fixed = {g["lr"] for g in optimizer.param_groups if any(id(p) in predictor for p in g["params"])}
        others = {g["lr"] for g in optimizer.param_groups if not any(id(p) in predictor for p in g["params"])}
        rates.append((*fixed, *others))

    run.create_optimizer().register_step_post_hook(note)
    run.train()
    assert [fixed for fixed, _ in rates] == [0.05] * 4
    assert [other for _, other in rates] == pytest.approx([0.2, 0.1707, 0.1, 0.0293], abs=1e-4)


def test_the_criterions_weight_grows_over_its_warmup(tmp_path: Path) -> None:
    options = {"regularizer": "e2mc", "regularizer_args": {"entropy_weight": 10.0, "covariance_weight": 1.0}}
    run = trainer(tmp_path, new_model("vicreg"), regularizer_warmup_epochs=1.5, learning_rate=1e-6, **options)
    run.train()
    shares = []
    for log in (entry for entry in run.state.log_history if "loss" in entry):
        criterion = log["off_diagonal_covariance"] - 10 * log["marginal_entropy"]
        shares.append((log["loss"] - log["objective_loss"]) / criterion)
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-4)


def test_a_list_of_regularizers_is_summed_and_every_term_logged(tmp_path: Path) -> None:
    options = {"e2mc.entropy_weight": 10.0, "e2mc.covariance_weight": 1.0, "radial.entropy_weight": 0.5}
    run = trainer(tmp_path, new_model("vicreg"), regularizer=["e2mc", "radial"], regularizer_args=options, max_steps=1)
    run.train()
    log = run.state.log_history[0]
    criterion = log["off_diagonal_covariance"] - 10 * log["marginal_entropy"]
    radial = {name: value for name, value in log.items() if name.startswith("radial_")}
    assert len(radial) == 2
    total = criterion + radial["radial_cross_entropy"] - 0.5 * radial["radial_entropy"]
    assert log["loss"] - log["objective_loss"] == pytest.approx(total, rel=1e-4)


def test_a_batch_that_a_queue_cannot_hold_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    model = SSLModel.from_backbone(backbone, "swav", SMALL["swav"] | {"queue_length": 8}, image_size=32)
    with pytest.raises(
        UsageError, match="`objective_args` does not fit a batch of 16 over all processes: `queue_length`"
    ):
        trainer(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_restored_momentum_drives_the_first_step(tmp_path: Path, optimizer: str) -> None:
    model, name = new_model("vicreg"), "objective.projector.0.weight"
    plain = copy.deepcopy(model)
    momentum = {name: torch.ones_like(model.get_parameter(name))}
    save_file(momentum, tmp_path / "optimizer.safetensors")
    options: dict[str, Any] = {"max_steps": 1, "learning_rate": 0.01, "optimizer": optimizer}
    run = trainer(tmp_path / "a", model, initial_momentum=read_momentum(str(tmp_path)), **options)
    run.train()
    trainer(tmp_path / "b", plain, **options).train()
    difference = plain.get_parameter(name) - model.get_parameter(name)
    assert torch.allclose(difference, torch.full_like(difference, 0.01 * 0.9), rtol=1e-3, atol=1e-6)
    other = "objective.projector.3.weight"
    assert torch.equal(plain.get_parameter(other), model.get_parameter(other))


def test_momentum_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = new_model("vicreg")
    with pytest.raises(UsageError, match=r"`restore_momentum` needs optimizer.safetensors beside the model"):
        read_momentum(str(tmp_path))
    (tmp_path / "optimizer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UsageError, match="`restore_momentum` needs a readable file"):
        read_momentum(str(tmp_path))
    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(UsageError, match="`restore_momentum` needs an optimizer with momentum, got 'AdamW'"):
        restore_momentum(adamw, model, {})
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    with pytest.raises(UsageError, match=r"`restore_momentum` must fit the parameters of the model, got \['nothing'\]"):
        restore_momentum(sgd, model, {"nothing": torch.zeros(1)})


def running_mean(model: SSLModel) -> Tensor:
    return next(b.clone() for name, b in model.backbone.named_buffers() if name.endswith("running_mean"))


def test_frozen_statistics_survive_training_and_recalibrated_ones_are_the_means_of_the_views(tmp_path: Path) -> None:
    frozen, recalibrated = new_model("vicreg"), new_model("vicreg")
    before = running_mean(frozen)
    trainer(tmp_path / "a", frozen, batch_norm="frozen", max_steps=2).train()
    assert torch.equal(running_mean(frozen), before)
    run = trainer(tmp_path / "b", recalibrated, batch_norm="recalibrated", max_steps=2)
    run.train()
    left_by_training = running_mean(recalibrated)
    finished = finished_model(run)
    first_convolution = finished.backbone.model.get_submodule("timm_model").conv1[0]
    with torch.no_grad():
        means = [
            first_convolution(view).mean(dim=(0, 2, 3))
            for batch in run.get_train_dataloader()
            for view in batch["views"]
        ]
    assert torch.allclose(running_mean(finished), torch.stack(means).mean(dim=0), rtol=1e-4, atol=1e-6)
    assert not torch.equal(running_mean(finished), left_by_training)


def test_a_layer_decay_slows_the_first_layers(tmp_path: Path) -> None:
    run = trainer(tmp_path, new_model("vicreg"), layer_decay=0.5)
    rates = {id(p): group["lr"] for group in run.create_optimizer().param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in run.model.named_parameters()}
    assert by_name["objective.projector.0.weight"] == 0.1
    assert min(by_name.values()) == by_name["backbone.model.timm_model.conv1.0.weight"] < 0.1 * 0.5**2


@pytest.mark.parametrize("option", [{"freeze_blocks": 1}, {"lora_rank": 2}, {"restore_momentum": True}])
def test_options_that_only_a_whole_run_carries_out_are_refused_by_the_trainer_alone(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    with pytest.raises(
        UsageError, match=r"is not carried out by the Trainer, got .* Call e2mc_hf\.continue_pretraining"
    ):
        trainer(tmp_path, new_model("vicreg"), **option)


def test_a_whole_run_freezes_blocks_fits_heads_and_trains_the_rest(tmp_path: Path) -> None:
    model = new_model("byol")
    before = state(model)
    run = trainer(tmp_path / "unused", new_model("byol"))
    arguments = E2MCTrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=16,
        max_steps=1,
        optimizer="sgd",
        regularizer="none",
        freeze_blocks=1,
        head_warmup=1,
    )
    finished, done = continue_pretraining(model, arguments, run.train_dataset, new_heads=True)
    assert done.state.global_step == 1
    after = state(finished)
    stem = [name for name in before if name.startswith("backbone.model.timm_model.conv1.")]
    assert stem
    assert all(torch.equal(after[name], before[name]) for name in stem)
    assert not torch.equal(after["objective.projector.0.weight"], before["objective.projector.0.weight"])


def test_momentum_and_adapters_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`restore_momentum` must be off with lora_rank"):
        trainer(tmp_path, new_model("vicreg"), restore_momentum=True, lora_rank=2)
