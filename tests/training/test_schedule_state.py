"""F30: a resumed run has the schedule, the optimizer and the loss of the interrupted one, or says what changes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny_runs import learning_rates, same, tiny_run, weights

from e2mc_hf.errors import UsageError
from e2mc_hf.training.schedule_state import changed_schedule, schedule_state, take_up_schedule
from e2mc_hf.training.trainer import E2MCTrainer

COSINE: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_steps": 8,
    "optimizer": "sgd",
    "learning_rate": 0.01,
    "weight_decay": 1e-4,
    "save_total_limit": None,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> E2MCTrainer:
    trainer = tiny_run(tmp_path_factory.mktemp("whole"), **COSINE)
    trainer.train()
    return trainer


@pytest.fixture
def cut(whole: E2MCTrainer, tmp_path: Path) -> Path:
    """Output folder of the run, cut after its third step, in warm-up's wake."""
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    return tmp_path / "cut"


def test_a_resumed_run_has_the_learning_rates_of_the_unbroken_one(whole: E2MCTrainer, cut: Path) -> None:
    resumed = tiny_run(cut, **COSINE)
    resumed.train("auto")
    expected, rates = learning_rates(whole), learning_rates(resumed)
    assert len(set(expected.values())) > 5
    assert rates.keys() == expected.keys() == set(range(1, 9))
    assert all(rates[step] == pytest.approx(rate, rel=1e-12, abs=0) for step, rate in expected.items())
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_steps": 9}, "max_steps (then 8, now 9)"),
        (
            {"max_steps": -1, "num_train_epochs": 3.0},
            "max_steps (then 8, now -1), num_train_epochs (then 10.0, now 3.0)",
        ),
        ({"learning_rate": 0.02}, "learning_rate (then 0.01, now 0.02)"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type (then cosine, now linear)"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs (then None, now {'num_cycles': 2})"),
        ({"warmup_steps": 0}, "warmup_steps (then 2, now 0)"),
        ({"weight_decay": 0.1}, "weight_decay (then 0.0001, now 0.1)"),
        ({"momentum": 0.5}, "momentum (then 0.9, now 0.5)"),
        ({"layer_decay": 0.5}, "layer_decay (then 1.0, now 0.5)"),
        ({"max_grad_norm": 1.0}, "max_grad_norm (then 0.0, now 1.0)"),
        ({"regularizer_warmup_epochs": 1.0}, "regularizer_warmup_epochs (then 0.0, now 1.0)"),
    ],
)
def test_another_schedule_is_refused_with_both_values(cut: Path, options: dict[str, Any], named: str) -> None:
    trainer = tiny_run(cut, **COSINE | options)
    before = weights(trainer)
    with pytest.raises(UsageError) as refused:
        trainer.train("auto")
    assert str(refused.value) == (
        f"`resume_from_checkpoint` must go on with the schedule of the interrupted run, got another {named}. Resume"
        " with the old options, or pass --new_schedule to go on from its step with those given now."
    )
    assert same(before, weights(trainer))


@pytest.mark.parametrize("new_schedule", [False, True])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": "adamw"}, "optimizer (then sgd, now adamw)"),
        ({"regularizer": "vcreg"}, "regularizer (then none, now vcreg)"),
        ({"batch_norm": "frozen"}, "batch_norm (then synchronized, now frozen)"),
        ({"bf16": True}, "bf16 (then False, now True)"),
        ({"freeze_blocks": 1}, "freeze_blocks (then 0, now 1)"),
        ({"objective": "vicreg"}, "objective (then swav, now vicreg), objective_args"),
        ({"heads": {"temperature": 0.2}}, "objective_args (then {'projector_dim': 8,"),
    ],
)
def test_another_loss_is_refused_whatever_the_schedule(
    cut: Path, options: dict[str, Any], named: str, new_schedule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What prepares a model for these options is not asked for here.
    monkeypatch.setattr("e2mc_hf.training.trainer._check_prepared", lambda *args: None)
    trainer = tiny_run(cut, **COSINE | {"new_schedule": new_schedule} | options)
    with pytest.raises(UsageError) as refused:
        trainer.train("auto")
    assert f"must go on with the loss of the interrupted run, got another {named}" in str(refused.value)


def test_options_that_change_no_number_may_change(cut: Path) -> None:
    options = {"num_train_epochs": 3, "save_steps": 4, "logging_steps": 2, "dataloader_pin_memory": False}
    trainer = tiny_run(cut, **COSINE | options)
    trainer.train("auto")
    assert trainer.state.global_step == 8


def test_the_same_length_in_epochs_and_in_steps_is_the_same(tmp_path: Path) -> None:
    options = {"lr_scheduler_type": "linear", "save_strategy": "epoch"}
    whole = tiny_run(tmp_path, **options, max_steps=-1, num_train_epochs=2)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-10")
    resumed = tiny_run(tmp_path, **options, max_steps=10)
    resumed.train("auto")
    assert learning_rates(resumed) == learning_rates(whole)
    assert same(weights(resumed), weights(whole))


def test_a_new_schedule_holds_from_the_step_on_as_a_function_of_the_step(
    whole: E2MCTrainer, cut: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    longer = COSINE | {"max_steps": 12, "learning_rate": 0.02, "momentum": 0.5, "weight_decay": 0.1, "warmup_steps": 0}
    resumed = tiny_run(cut, **longer, new_schedule=True)
    resumed.train("auto")
    fresh = tiny_run(tmp_path / "fresh", **longer, save_strategy="no")
    fresh.train()
    old, new, expected = learning_rates(whole), learning_rates(resumed), learning_rates(fresh)
    assert {step: new[step] for step in range(1, 4)} == {step: old[step] for step in range(1, 4)}
    assert {step: new[step] for step in range(4, 13)} == {step: expected[step] for step in range(4, 13)}
    assert resumed.optimizer is not None
    assert [group["momentum"] for group in resumed.optimizer.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.1, 0.0]
    assert "A new schedule from step 3 on: max_steps (then 8, now 12), learning_rate" in caplog.text
    # A restart with the very same command goes on from the new schedule, and it has nothing new to take up.
    shutil.rmtree(cut / "checkpoint-12")
    again = tiny_run(cut, **longer, new_schedule=True)
    again.train("auto")
    assert learning_rates(again) == new
    assert same(weights(again), weights(resumed))


def test_only_the_schedule_is_new(whole: E2MCTrainer, cut: Path, tmp_path: Path) -> None:
    """Momentum is kept: with the old rates under a new name, the run is the old one."""
    renamed = tiny_run(cut, **COSINE | {"max_grad_norm": 1e9}, new_schedule=True)
    renamed.train("auto")
    assert same(weights(renamed), weights(whole))


def test_other_parameter_groups_are_refused_though_a_new_schedule_is_asked_for(cut: Path) -> None:
    trainer = tiny_run(cut, **COSINE | {"layer_decay": 0.5}, new_schedule=True)
    with pytest.raises(UsageError, match=r"must hold the state of this run's optimizer, got .*layer_decay makes other"):
        trainer.train("auto")


def test_a_new_schedule_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^`new_schedule` only has an effect on a resumed run"):
        tiny_run(tmp_path, new_schedule=True).train()
    trainer = tiny_run(tmp_path, new_schedule=True, resume_from_checkpoint="auto", max_steps=1)
    trainer.train(trainer.checkpoint_to_resume("auto"))  # the command line of a run that may have to be restarted
    assert trainer.state.global_step == 1


def test_a_schedule_that_depends_on_more_than_the_step_cannot_be_new() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(
        UsageError, match=r"^`new_schedule` needs a schedule that is a function of the step, got Reduce"
    ):
        take_up_schedule(optimizer, scheduler, [{}], [1.0])


def test_weights_that_another_writer_wrote_are_refused() -> None:
    saved, now = ({"max_steps": 5, "total_steps": 5, "sharding": kind} for kind in ("none", "fsdp"))
    with pytest.raises(UsageError, match=r"got another sharding \(then none, now fsdp\)"):
        changed_schedule(saved, now, new_schedule=True)


def test_options_with_secrets_are_compared_without_them() -> None:
    class Args:
        max_steps = 5
        lr_scheduler_kwargs: dict[str, Any] = {"api_key": "s3cr3t", "power": 2.0}  # noqa: RUF012

    state = schedule_state(Args(), None, 5)
    assert state["lr_scheduler_kwargs"] == {"power": 2.0}
    assert "s3cr3t" not in str(state)
    assert changed_schedule(state, schedule_state(Args(), None, None), new_schedule=False) == []
