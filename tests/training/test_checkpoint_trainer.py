import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from training.tiny_runs import STEPS, differences, same, state_of, tiny_run, weights
from transformers import TrainerCallback

from e2mc_hf.errors import UsageError
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.head_warmup import _HeadTrainer
from e2mc_hf.training.manifest import read_manifest, verify, write_manifest
from e2mc_hf.training.saving import SaveFailedError
from e2mc_hf.training.stopping import TrainingStopped
from e2mc_hf.training.trainer import E2MCTrainer

BY_LOSS = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "loss",
    "per_device_eval_batch_size": 4,
}


class Before(TrainerCallback):
    """Does something before the save of a step."""

    def __init__(self, **actions: Callable[[], Any]) -> None:
        self.actions = {int(name.removeprefix("step_")): action for name, action in actions.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.actions.get(state.global_step, lambda: None)()


class Told(TrainerCallback):
    """What a tracker is told of checkpoints."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()
        self.steps.append(state.global_step)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def allow_files_of(size: int) -> None:
    """A quota: no file may grow larger; -1 lifts it."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))


@pytest.fixture
def quota() -> Any:
    yield allow_files_of
    allow_files_of(resource.RLIM_INFINITY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> E2MCTrainer:
    """An unbroken run."""
    trainer = tiny_run(tmp_path_factory.mktemp("whole"), save_total_limit=None)
    trainer.train()
    return trainer


@pytest.fixture
def cut(whole: E2MCTrainer, tmp_path: Path) -> Path:
    """Output folder of a run that was cut after its second checkpoint."""
    for step in (1, 2):
        shutil.copytree(f"{whole.args.output_dir}/checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    return tmp_path / "cut"


@pytest.mark.parametrize("request_", ["auto", True, "folder", "path"])
def test_every_way_to_ask_for_the_newest_checkpoint_resumes_it(whole: E2MCTrainer, cut: Path, request_: Any) -> None:
    wanted = {"folder": f"{cut}/checkpoint-2/", "path": cut / "checkpoint-2"}.get(request_, request_)
    resumed = tiny_run(cut)
    resumed.train(wanted)
    assert same(weights(resumed), weights(whole))
    assert differences(state_of(cut / "checkpoint-4"), state_of(Path(f"{whole.args.output_dir}/checkpoint-4"))) == []
    assert steps(cut) == ["checkpoint-3", "checkpoint-4"]


def test_the_command_line_that_begins_a_run_goes_on_with_it(whole: E2MCTrainer, tmp_path: Path) -> None:
    for _ in range(4):
        trainer = tiny_run(tmp_path, resume_from_checkpoint="auto")
        begun = trainer.checkpoint_to_resume(trainer.args.resume_from_checkpoint)
        trainer.add_callback(Before(**{f"step_{(0 if begun is None else int(begun[-1])) + 1}": stop(trainer)}))
        trainer.train(begun)
    assert trainer.state.global_step == STEPS
    assert same(weights(trainer), weights(whole))


def stop(trainer: E2MCTrainer) -> Callable[[], None]:
    def ask() -> None:
        trainer.control.should_training_stop = True

    return ask


def test_a_checkpoint_is_verified_for_each_training(cut: Path) -> None:
    trainer = tiny_run(cut, stop_after=3, save_total_limit=None)
    begun = trainer.checkpoint_to_resume("auto")
    trainer.train(begun)
    (cut / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(
        UsageError, match=r"optimizer\.pt is missing\. The newest whole one beside it is .*checkpoint-3"
    ):
        trainer.train(begun)


def test_a_moving_teacher_and_the_moments_of_adam_are_resumed(tmp_path: Path) -> None:
    options = {"objective": "byol", "heads": {"projector_dim": 8, "hidden_dim": 8}, "optimizer": "adamw"}
    options |= {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    whole, first, second = (
        tiny_run(tmp_path / name, **options, stop_after=after)  # type: ignore[arg-type]
        for name, after in (("whole", None), ("cut", 2), ("cut", None))
    )
    whole.train()
    first.train()
    second.train("auto")
    assert any(name.startswith("teacher.") for name in weights(whole))
    assert same(weights(second), weights(whole))
    ends = [state_of(tmp_path / name / "checkpoint-4") for name in ("whole", "cut")]
    assert differences(*ends) == []


def with_scaler(trainer: E2MCTrainer) -> E2MCTrainer:
    """The loss scaling of fp16, on a CPU: the scale doubles every other step."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)  # type: ignore[attr-defined]
    return trainer


def test_the_scale_of_fp16_is_resumed_and_must_be_there(cut: Path, tmp_path: Path) -> None:
    whole = with_scaler(tiny_run(tmp_path / "whole", save_total_limit=None))
    whole.train()
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = with_scaler(tiny_run(tmp_path / "resumed"))
    resumed.train("auto")
    ends = [state_of(tmp_path / name / "checkpoint-4") for name in ("whole", "resumed")]
    assert ends[0]["scaler.pt"]["scale"] == 32.0
    assert differences(*ends) == []
    with pytest.raises(UsageError, match=r"must hold all that this run needs, got .* without scaler\.pt"):
        with_scaler(tiny_run(cut)).train("auto")


def test_a_failed_save_is_tried_again_at_the_next_interval(
    whole: E2MCTrainer, tmp_path: Path, quota: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    trainer, told = tiny_run(tmp_path), Told()
    trainer.add_callback(Before(step_2=lambda: quota(1 << 20), step_3=lambda: quota(resource.RLIM_INFINITY)))
    trainer.add_callback(told)
    trainer.train()
    (failed,) = trainer.failed_saves
    assert failed.startswith("checkpoint-2: SafetensorError: ")
    assert "File too large" in failed
    assert f"{tmp_path / 'checkpoint-2'} WAS NOT SAVED: SafetensorError" in caplog.text
    assert f"(newest: {tmp_path / 'checkpoint-1'}). The training goes on" in caplog.text
    assert "1 of 4 saves failed: checkpoint-2" in caplog.text
    assert steps(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert told.steps == [1, 3, 4]
    assert same(weights(trainer), weights(whole))
    trainer.refuse_failed_save()  # the last one is there


def test_the_exit_tells_of_a_last_save_that_failed_and_the_model_is_not_lost(
    whole: E2MCTrainer, tmp_path: Path, quota: Callable[[int], None]
) -> None:
    trainer = tiny_run(tmp_path)
    full = Before(step_4=lambda: quota(1 << 20))
    trainer.add_callback(full)
    trainer.train()
    trainer.remove_callback(full)
    quota(resource.RLIM_INFINITY)
    assert steps(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    trainer.save_model(str(tmp_path / "kept"))
    assert same(safetensors.torch.load_file(tmp_path / "kept" / "model.safetensors"), weights(whole))
    with pytest.raises(UsageError, match=r"`output_dir` must take the checkpoints, got 1 of 4 .*: checkpoint-4: Safe"):
        trainer.refuse_failed_save()
    trainer.train("auto")  # a training of its own counts anew
    assert trainer.failed_saves == []
    trainer.refuse_failed_save()


def test_a_checkpoint_that_is_due_twice_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_run(tmp_path, stop_after=1)
    trainer.train()
    before = (tmp_path / "checkpoint-1" / "manifest.json").stat().st_mtime_ns
    trainer._save_checkpoint(trainer.model, None)
    assert (tmp_path / "checkpoint-1" / "manifest.json").stat().st_mtime_ns == before


def test_the_estimate_of_a_first_checkpoint_is_its_size_but_for_the_small_files(tmp_path: Path) -> None:
    trainer = tiny_run(tmp_path, stop_after=1)
    trainer.train()
    size = sum(entry["bytes"] for entry in read_manifest(tmp_path / "checkpoint-1")["files"].values())
    assert trainer._expected_bytes() == size
    trainer._newest_bytes = None
    assert 0.97 * size < trainer._expected_bytes() <= size


def test_the_best_checkpoint_is_named_by_its_final_place_and_kept(tmp_path: Path) -> None:
    trainer = tiny_run(tmp_path, save_total_limit=1, **BY_LOSS)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}
    trainer.evaluate = lambda **kwargs: {"eval_loss": losses[trainer.state.global_step]}  # type: ignore[assignment,method-assign]
    trainer.train()
    assert steps(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    for step in (2, 4):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
        assert state["stateful_callbacks"]["TrainerControl"]["args"]["should_save"] is True


def test_the_best_checkpoint_is_the_best_of_those_that_were_saved(tmp_path: Path, quota: Callable[[int], None]) -> None:
    trainer = tiny_run(tmp_path, **BY_LOSS)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}
    trainer.evaluate = lambda **kwargs: {"eval_loss": losses[trainer.state.global_step]}  # type: ignore[assignment,method-assign]
    trainer.add_callback(Before(step_2=lambda: quota(1 << 20), step_3=lambda: quota(resource.RLIM_INFINITY)))
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert steps(tmp_path) == ["checkpoint-3", "checkpoint-4"]


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    trainer = tiny_run(tmp_path, stop_after=1)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    (tmp_path / "checkpoint-1" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        trainer._load_best_model()


def rewrite(checkpoint: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the weights of a checkpoint, and its manifest with them."""
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_manifest(checkpoint, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("objective.queue"), r"missing \['objective.queue'\], unexpected \[\]"),
        (lambda tensors: tensors.update(more=torch.ones(1)), r"missing \[\], unexpected \['more'\]"),
        (lambda tensors: tensors.update({"objective.queue": torch.ones(2, 2, 8)}), "size mismatch for objective.queue"),
    ],
)
def test_weights_of_another_model_are_refused(cut: Path, change: Any, message: str) -> None:
    rewrite(cut / "checkpoint-2", change)
    with pytest.raises(UsageError, match=rf"`resume_from_checkpoint` must hold the weights of this .*{message}"):
        tiny_run(cut).train("auto")


def test_a_whole_checkpoint_without_what_the_run_needs_is_refused(cut: Path) -> None:
    for name in ("optimizer.pt", "rng_state.pth"):
        (cut / "checkpoint-2" / name).unlink()
    write_manifest(cut / "checkpoint-2", 2)
    with pytest.raises(UsageError, match=r"must hold all that this run needs, got .* without optimizer.pt, rng_state"):
        tiny_run(cut).train("auto")


def test_the_intervals_given_now_hold(cut: Path) -> None:
    tiny_run(cut, save_steps=2, save_total_limit=None).train("auto")
    assert steps(cut) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]


def test_other_versions_and_newer_checkpoints_are_told(
    cut: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    versions = {"torch": "9", "transformers": "9", "e2mc-hf": "9"}
    monkeypatch.setattr("e2mc_hf.training.checkpoint_trainer.current_versions", lambda: versions)
    tiny_run(cut, stop_after=2).train(cut / "checkpoint-1")
    assert f"this is {versions}: the run may not go on bit for bit" in caplog.text
    assert f"Newer than where this run begins: {cut / 'checkpoint-2'}." in caplog.text


class Regression(nn.Module):
    """A model that is not of transformers, with a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        embeddings = self.linear(x).transpose(0, 1)
        return {"loss": embeddings.square().mean(), "embeddings": embeddings}


class Rows(Dataset[Tensor]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(2, 6, generator=torch.Generator().manual_seed(index))


def test_any_model_on_any_dataset_is_resumed(tmp_path: Path) -> None:
    def run(name: str, **options: Any) -> E2MCTrainer:
        torch.manual_seed(0)
        arguments = E2MCTrainingArguments(
            output_dir=str(tmp_path / name),
            use_cpu=True,
            disable_tqdm=True,
            max_steps=6,
            per_device_train_batch_size=8,
            save_strategy="steps",
            save_steps=3,
            **options,
        )
        return E2MCTrainer(Regression(), arguments, Rows(), data_collator=lambda rows: {"x": torch.stack(rows)})

    whole, cut = run("whole"), run("cut")
    whole.train()
    cut.train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    resumed = run("cut")
    resumed.train("auto")
    assert steps(tmp_path / "cut" / "checkpoint-3") == [
        "manifest.json",
        "model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "schedule_state.json",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.json",
    ]
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_a_signal_saves_a_run_that_saves_nothing_else(whole: E2MCTrainer, tmp_path: Path) -> None:
    trainer = tiny_run(tmp_path, save_strategy="no")
    trainer.add_callback(Before(step_2=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert stopped.value.code == 143
    assert stopped.value.checkpoint == tmp_path / "checkpoint-2"
    verify(tmp_path / "checkpoint-2")
    resumed = tiny_run(tmp_path, save_strategy="no")
    resumed.train("auto")
    assert same(weights(resumed), weights(whole))


def test_a_signal_after_the_last_step_saves_it_and_ends_the_process(whole: E2MCTrainer, tmp_path: Path) -> None:
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = tiny_run(tmp_path, save_strategy="no")
    trainer.add_callback(AtTheEnd())
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert steps(tmp_path) == [f"checkpoint-{STEPS}"]
    resumed = tiny_run(tmp_path, save_strategy="no")
    resumed.train("auto")
    assert resumed.state.global_step == STEPS
    assert same(weights(resumed), weights(whole))


def test_a_signal_ends_the_process_though_its_checkpoint_could_not_be_written(
    tmp_path: Path, quota: Callable[[int], None]
) -> None:
    def full_disk_and_signal() -> None:
        quota(1 << 20)
        os.kill(os.getpid(), signal.SIGINT)

    trainer = tiny_run(tmp_path)
    trainer.add_callback(Before(step_2=full_disk_and_signal))
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert stopped.value.code == 130
    assert stopped.value.checkpoint == tmp_path / "checkpoint-1"  # the newest that there is
    assert steps(tmp_path) == ["checkpoint-1"]


def test_a_signal_while_heads_are_fitted_leaves_nothing_to_resume(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    assert isinstance(run.model, nn.Module)
    heads = _HeadTrainer(run.model, run.args, run.train_dataset)
    heads.add_callback(Before(step_2=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(TrainingStopped) as stopped:
        heads.train()
    assert stopped.value.checkpoint is None
    assert steps(tmp_path) == []


def test_a_run_that_stops_for_lack_of_images_on_a_full_disk_says_both(
    tmp_path: Path, quota: Callable[[int], None]
) -> None:
    trainer = tiny_run(tmp_path, stop_after=1)
    trainer.train()
    trainer.state.global_step = 2
    quota(1 << 20)
    told = trainer._save_where_it_stopped()
    quota(resource.RLIM_INFINITY)
    assert told.startswith("The run could not be saved: SafetensorError: ")
    quota(1 << 20)
    with pytest.raises(SaveFailedError):
        trainer._save_checkpoint(trainer.model, None)
