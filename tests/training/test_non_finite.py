"""F23 on one process: what is not finite stops the training before the update, and says where it came from."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training.spoiled import BATCH, FIRST_WEIGHT, Fault, arguments, digits, new_model, trainer

from e2mc_hf.data.loader import ViewLoader
from e2mc_hf.errors import NonFiniteError
from e2mc_hf.objectives.registry import OBJECTIVES
from e2mc_hf.regularizers.entropy import marginal_entropy
from e2mc_hf.training.head_warmup import warm_up_heads
from e2mc_hf.training.non_finite import FiniteWatch
from e2mc_hf.training.trainer import E2MCTrainer


def stopped(run: E2MCTrainer, **options: Any) -> tuple[str, dict[str, Any]]:
    """Message and file of a run that must stop."""
    with pytest.raises(NonFiniteError) as caught:
        run.train(**options)
    return str(caught.value), json.loads((Path(run.args.output_dir) / "non_finite.json").read_text())


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "non_finite.json"}


CAUSES = {
    "image": "loss is nan at step 3; not finite of its terms: ",
    "loss": "loss is nan at step 3; not finite of its terms: objective_loss",
    "column": "loss is nan at step 3; not finite of its terms: ",
    "teacher": "loss is nan at step 3; not finite of its terms: ",
    "gradient": f" gradients have no finite norm at step 3, the first that of {FIRST_WEIGHT}",
    "huge_gradients": "the norm of the gradient is inf at step 3, that of each parameter being finite",
}


@pytest.mark.parametrize(
    ("kind", "max_grad_norm"), [*((kind, 0.0) for kind in CAUSES), ("gradient", 1.0), ("huge_gradients", 1.0)]
)
def test_f23_the_update_and_all_that_follows_is_left_out(tmp_path: Path, kind: str, max_grad_norm: float) -> None:
    model = new_model("byol" if kind == "teacher" else "vicreg")
    fault = Fault(model, kind, step=3)
    run = trainer(tmp_path, model, max_grad_norm=max_grad_norm)
    message, seen = stopped(run)
    assert all(torch.equal(p, fault.before[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert checkpoints(tmp_path) == {"checkpoint-1", "checkpoint-2"}
    assert CAUSES[kind] in message
    assert f"{tmp_path / 'non_finite.json'}. The newest whole checkpoint is {tmp_path / 'checkpoint-2'}." in message
    assert ("--max_grad_norm" in message) == (max_grad_norm == 0)
    last = run.state.log_history[-1]
    assert last["step"] == seen["step"] == 3
    assert not math.isfinite(last["loss"] + last["grad_norm"])
    assert seen["cause"] in message
    assert seen["epoch"] == 0.5
    assert seen["learning_rate"] == 0.01


def test_the_file_names_images_terms_and_gradients(tmp_path: Path) -> None:
    model = new_model("vicreg")
    Fault(model, "gradient", step=3)
    run = trainer(tmp_path, model, max_grad_norm=1.0, save_strategy="no")
    _, seen = stopped(run)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert seen["gradients"] == {"not_finite": 1, "of": trained, "names": [FIRST_WEIGHT]}
    assert math.isfinite(seen["loss"])
    assert seen["grad_norm"] == "nan"
    (process,) = seen["processes"]
    third = list(ViewLoader(run.train_dataset, BATCH, rank=0, world_size=1, seed=0).order)[2]
    assert process["sample_ids"] == [row.sample_id for row in third]
    assert process["loss"] == seen["loss"]
    assert {"objective_loss", "marginal_entropy", "invariance"} <= process["terms"].keys()


def test_f23_a_resumed_run_stops_as_well_and_keeps_the_checkpoints_before(tmp_path: Path) -> None:
    for steps, checkpoint in ((5, None), (1, str(tmp_path / "checkpoint-4"))):
        model = new_model("vicreg")
        Fault(model, "image", step=steps)
        message, seen = stopped(trainer(tmp_path, model, max_steps=6, save_steps=2), resume_from_checkpoint=checkpoint)
        assert "loss is nan at step 5" in message
        assert seen["processes"][0]["loss"] == "nan"
        assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_carries_a_broken_image_on_to_the_loss(tmp_path: Path, objective: str) -> None:
    model = new_model(objective)
    Fault(model, "image", step=1)
    message, seen = stopped(trainer(tmp_path, model, save_strategy="no"))
    assert "loss is nan at step 1" in message
    assert "There is no whole checkpoint." in message
    assert seen["processes"][0]["terms"]["objective_loss"] == "nan"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", [None, "sigmoid", "normal_cdf"])
@pytest.mark.parametrize("estimator", ["m_spacings", "kde"])
def test_p12_nan_stays_in_its_column(dtype: torch.dtype, transform: Any, estimator: Any) -> None:
    x = torch.rand(32, 6, dtype=dtype)
    clean = marginal_entropy(x, transform=transform, estimator=estimator)
    x[4, 2] = math.nan
    x.requires_grad_()
    entropy = marginal_entropy(x, transform=transform, estimator=estimator)
    (gradient,) = torch.autograd.grad(entropy[torch.arange(6) != 2].sum(), x)
    assert entropy[2].isnan()
    others = torch.arange(6) != 2
    assert torch.equal(entropy[others], clean[others])
    assert gradient[:, others].isfinite().all()


class Deferring(E2MCTrainer):
    """Leaves the verdict to the device, as on a GPU."""

    def _begin_to_watch(self) -> None:
        super()._begin_to_watch()
        self._finite = FiniteWatch(self.args.device, deferred=True)


def test_a_verdict_left_to_the_device_ends_with_the_same_error_and_file(tmp_path: Path) -> None:
    outcomes = []
    for folder, kind in ((tmp_path / "here", E2MCTrainer), (tmp_path / "there", Deferring)):
        model = new_model("vicreg")
        fault = Fault(model, "gradient", step=2)
        message, seen = stopped(trainer(folder, model, kind, save_strategy="no"))
        assert all(torch.equal(p, fault.before[name]) for name, p in model.named_parameters() if p.requires_grad)
        outcomes.append((message.replace(str(folder), ""), seen))
    assert outcomes[0] == outcomes[1]


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device, and notes in which order copy and assertion come."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func.__name__)
        return func(*args, **kwargs or {})


def judged(watch: FiniteWatch, loss: float) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    watch.see_loss(torch.tensor(loss), {"term": torch.tensor(2.0)})
    watch.see_gradients([("weight", weight)])
    watch.check(1, torch.tensor(1.0))


def test_the_host_reads_nothing_of_a_step_whose_verdict_is_left_to_the_device() -> None:
    with Reads() as mode:
        judged(FiniteWatch(torch.device("cpu"), deferred=True), 1.0)
    assert not [name for name in mode.operations if "_local_scalar_dense" in name or "is_nonzero" in name]
    copied = mode.operations.index("copy_.default")
    asserted = next(i for i, name in enumerate(mode.operations) if name.startswith("_assert_async"))
    assert copied < asserted


def test_the_device_names_the_step_it_stopped_at_and_no_other_error_is_taken_for_it() -> None:
    watch = FiniteWatch(torch.device("cpu"), deferred=True)
    judged(watch, 1.0)
    assert watch.failed() is None
    with pytest.raises(RuntimeError):
        judged(watch, math.inf)
    record = watch.failed()
    assert record is not None
    assert record.losses == [math.inf]
    assert record.as_json([record.own_part()], [])["cause"] == "loss is inf at step 1"
    assert record.own_part() == {"rank": 0, "loss": "inf", "terms": {"term": 2.0}, "sample_ids": None}


def scaled(folder: Path, overflows: Callable[[int], bool], steps: int) -> E2MCTrainer:
    """A run with a real scaler, whose gradients overflow at some of its steps."""
    model = new_model("vicreg")
    run = trainer(folder, model, max_steps=steps, save_strategy="no", learning_rate=1e-4)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)

    def spoil(parameter: nn.Parameter) -> None:
        if overflows(run.state.global_step + 1):
            parameter.grad[0] = math.inf

    model.get_parameter(FIRST_WEIGHT).register_post_accumulate_grad_hook(spoil)
    return run


def test_steps_that_the_scaler_skips_now_and_then_do_not_stop(tmp_path: Path) -> None:
    run = scaled(tmp_path, lambda step: step % 3 == 0, 7)
    run.train()
    assert run.state.global_step == 7
    assert run.accelerator.scaler.get_scale() == 2.0**38
    assert not (tmp_path / "non_finite.json").exists()


def test_twenty_one_skipped_steps_in_a_row_stop(tmp_path: Path) -> None:
    run = scaled(tmp_path, lambda step: step > 2, 40)
    message, seen = stopped(run)
    assert "float16 gradients overflowed at 21 steps in a row, up to step 23" in message
    assert seen["step"] == run.state.global_step == 23
    assert seen["loss_scale"] == 2.0**19


def test_a_scale_below_one_stops() -> None:
    watch = FiniteWatch(torch.device("cpu"))
    assert watch.scaler_gives_up(4, skipped=True, scale=1.0) is None
    cause = watch.scaler_gives_up(5, skipped=True, scale=0.5)
    assert cause == "the scale of the float16 loss fell to 0.5 at step 5, and gradients still overflow"


def test_a_loss_that_is_not_finite_stops_under_a_scaler_too(tmp_path: Path) -> None:
    run = scaled(tmp_path, lambda step: False, 5)
    Fault(run.model, "loss", step=2)
    message, _ = stopped(run)
    assert "loss is nan at step 2" in message


def test_a_norm_that_only_the_log_knows_stops_there(tmp_path: Path) -> None:
    run = trainer(tmp_path, new_model("vicreg"), max_steps=1, save_strategy="no")
    run.train()
    with pytest.raises(NonFiniteError, match="the norm of the gradient is nan at step 1, after its update"):
        run.log({"loss": 1.0, "grad_norm": math.nan})


def test_heads_that_are_being_fitted_stop_without_a_file(tmp_path: Path) -> None:
    model = new_model()
    Fault(model, "image", step=3)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 3.* while the heads were fitted on the frozen enc"):
        warm_up_heads(model, arguments(tmp_path / "run", head_warmup=5), digits(model), new_heads=True)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_reports_a_loss_that_is_not_finite_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_model("vicreg")
    spoil = Fault(model, "loss", step=0).loss_after
    model.register_forward_hook(lambda _, args, output: spoil(output))
    run = trainer(tmp_path, model, per_device_eval_batch_size=BATCH)
    metrics = run.evaluate(run.train_dataset)
    assert math.isnan(metrics["eval_loss"])
    assert "`eval_loss` is nan at step 0." in caplog.text


def test_the_script_ends_with_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "scripts" / "continue_pretrain.py"
    spec = importlib.util.spec_from_file_location("continue_pretrain_non_finite", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [str(script)])
    options = {"model": "test_resnet", "from_scratch": "true", "image_size": "32", "use_cpu": "true"}
    options |= {"max_samples": "32", "per_device_train_batch_size": "16", "objective_args": "projector_dim=16"}
    options |= {"max_steps": "9", "optimizer": "sgd", "learning_rate": "1e30", "output_dir": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as caught:
        module.main([f"--{name}={value}" for name, value in options.items()])
    assert caught.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]  # behind the progress bar
    assert "continue_pretrain.py: error: Training stopped before an update that is not finite: " in last
    assert not (tmp_path / "out" / "encoder").exists()
    assert (tmp_path / "out" / "non_finite.json").exists()
