"""A signal at any moment of a training: its exit code, a whole checkpoint, a run that goes on as if it had not come."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data.image_files import encoded, map_source
from transformers import TrainerCallback

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training import head_warmup
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.continuation import continue_pretraining
from e2mc_hf.training.manifest import verify
from e2mc_hf.training.stopping import TrainingStopped, undisturbed_exit
from e2mc_hf.training.trainer import E2MCTrainer

STEPS = 5


@pytest.fixture(autouse=True)
def as_started_from_a_shell() -> Iterator[None]:
    """Processes in the background of a shell ignore SIGINT."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class SignalAt(TrainerCallback):
    """Sends this process a signal at an event of a step."""

    def __init__(self, event: str, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum = step, signum
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def parts(folder: Path, **options: Any) -> tuple[SSLModel, E2MCTrainingArguments, ViewDataset]:
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=16)
    heads = {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12, "queue_length": 16}
    model = SSLModel.from_backbone(backbone, "swav", heads, image_size=16)
    views = ViewArguments(image_size=16, num_small_views=0)
    dataset = ViewDataset(map_source(encoded(24)), ViewTransform(views, backbone.image_settings), seed=0)
    options = {"max_steps": STEPS, "save_steps": 2, "save_strategy": "steps", "eval_strategy": "no"} | options
    arguments = E2MCTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=0.05,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        **options,
    )
    return model, arguments, dataset


def trainer(folder: Path, **options: Any) -> E2MCTrainer:
    model, arguments, dataset = parts(folder, **options)
    return E2MCTrainer(model, arguments, dataset, eval_dataset=dataset)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    whole = trainer(tmp_path_factory.mktemp("whole") / "run")
    whole.train()
    return {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize(
    ("event", "step", "signum", "saved", "options"),
    [
        ("on_pre_optimizer_step", 0, signal.SIGTERM, 1, {}),
        ("on_save", 2, signal.SIGTERM, 3, {}),
        ("on_pre_optimizer_step", 4, signal.SIGINT, 5, {}),  # the last step
        ("on_train_end", 5, signal.SIGINT, 5, {}),
        ("on_prediction_step", 2, signal.SIGTERM, 2, EVALUATED),
        ("on_pre_optimizer_step", 1, signal.SIGTERM, 2, EVALUATED),  # the evaluation is left out
        ("on_step_begin", 2, signal.SIGTERM, 3, {"save_strategy": "no"}),
    ],
)
def test_a_signal_at_any_moment_costs_nothing(
    tmp_path: Path,
    unbroken: dict[str, torch.Tensor],
    event: str,
    step: int,
    signum: signal.Signals,
    saved: int,
    options: dict[str, Any],
) -> None:
    cut = trainer(tmp_path / "run", **options)
    cut.add_callback(SignalAt(event, step, signum))
    with pytest.raises(TrainingStopped) as stopped:
        cut.train()
    assert stopped.value.code == 128 + signum
    assert stopped.value.checkpoint == tmp_path / "run" / f"checkpoint-{saved}"
    verify(stopped.value.checkpoint)
    assert cut.state.global_step == saved
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []
    resumed = trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == STEPS
    assert all(torch.equal(tensor, unbroken[name]) for name, tensor in resumed.model.state_dict().items())


def test_a_signal_while_the_heads_are_fitted_ends_the_run_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Signaled(head_warmup._HeadTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(SignalAt("on_step_begin", 3))

    monkeypatch.setattr(head_warmup, "_HeadTrainer", Signaled)
    model, arguments, dataset = parts(tmp_path / "run", head_warmup="20")
    with pytest.raises(TrainingStopped) as stopped, undisturbed_exit():
        continue_pretraining(model, arguments, dataset, new_heads=True)
    assert (stopped.value.code, stopped.value.checkpoint) == (143, None)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())
    assert "SIGTERM was received: the run ends." in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # while the process exits
