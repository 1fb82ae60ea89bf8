"""F25: embeddings that collapse raise an alarm within 50 steps; healthy ones never do."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset
from training.spoiled import arguments, digits, new_model, trainer

from e2mc_hf.errors import CollapseError
from e2mc_hf.training.collapse import CollapseWatch, effective_rank, signs_of_collapse, spread, tiny_spacings
from e2mc_hf.training.head_warmup import warm_up_heads
from e2mc_hf.training.trainer import E2MCTrainer

N, D = 64, 32


def orthogonal(rows: int, columns: int) -> Tensor:
    """Columns of mean 0 that are orthogonal, of norm 1."""
    basis = torch.linalg.qr(torch.cat([torch.ones(rows, 1), torch.randn(rows, columns)], dim=1).double()).Q
    return basis[:, 1:]


def test_the_effective_rank_of_known_singular_values() -> None:
    singular = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(9, 9).double()).Q[:4]
    z = orthogonal(20, 4) * singular @ rotation + 100.0
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert effective_rank(z) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert effective_rank(orthogonal(8, 5)) == pytest.approx(5, rel=1e-6)
    assert effective_rank(torch.ones(8, 5)) == 1


def test_normal_samples_have_ten_percent_of_tiny_spacings() -> None:
    for dtype, most in ((torch.float64, 0.11), (torch.float32, 0.11), (torch.float16, 0.12), (torch.bfloat16, 0.2)):
        assert 0.08 < tiny_spacings(torch.randn(256, 256).to(dtype)) < most
    assert tiny_spacings(torch.ones(16, 3)) == 1


def test_clusters_of_tied_values_have_only_the_spacings_between_them() -> None:
    centers = torch.linspace(-2, 2, 8)[:, None].expand(8, D)
    assert tiny_spacings(centers.repeat(8, 1)) == pytest.approx(1 - 7 / 56)  # of the lowest cluster one value counts


def test_zeros_behind_a_relu_are_no_cluster() -> None:
    z = torch.randn(256, D, generator=torch.Generator().manual_seed(0)).relu()
    assert tiny_spacings(z) < 0.35
    assert tiny_spacings(torch.zeros(256, D)) == 1


@settings(max_examples=50)
@given(scale=st.floats(1e-4, 1e3), offset=st.floats(-10, 10), seed=st.integers(0, 1000))
def test_tiny_spacings_and_rank_see_neither_offset_nor_scale(scale: float, offset: float, seed: int) -> None:
    z = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = scale * (z + offset)
    assert tiny_spacings(moved) == pytest.approx(tiny_spacings(z), abs=2 / 39 / 12)
    assert effective_rank(moved) == pytest.approx(effective_rank(z), rel=1e-6)


def test_the_scale_counts_where_the_objective_sees_it_and_directions_elsewhere() -> None:
    z = torch.randn(N, D)
    (raw, _, _), (small, _, _) = spread(z, scale_matters=True), spread(1e-3 * z, scale_matters=True)
    assert (raw, small) == pytest.approx((1, 1e-3), rel=0.05)
    (own, *_), (other, *_) = spread(z, scale_matters=False), spread(1e-3 * z, scale_matters=False)
    assert own == pytest.approx(other, rel=1e-6)
    assert own == pytest.approx(1, rel=0.05)
    assert spread(z + 300, scale_matters=False)[0] == pytest.approx(1 / 300, rel=0.1)


def test_an_embedding_that_is_not_finite_is_no_sign_of_collapse() -> None:
    z = torch.randn(N, D)
    z[0, 0] = math.nan
    values = CollapseWatch(scale_matters=True).measure(z)
    assert math.isnan(values["effective_rank"])
    assert signs_of_collapse(values) == []


def test_an_alarm_needs_a_sign_that_lasts_and_comes_back_only_after_it_was_gone() -> None:
    watch = CollapseWatch(scale_matters=True)
    healthy, collapsed = watch.measure(torch.randn(N, D)), watch.measure(torch.zeros(N, D))
    alarms = {}
    for step in range(10, 200, 10):
        values = collapsed if 20 <= step <= 30 or 50 <= step <= 90 or step > 150 else healthy
        alarms[step] = {sign.name for sign in watch.alarm(step, values)}
    every = {"embedding_std", "effective_rank", "tiny_spacings"}
    assert {step: names for step, names in alarms.items() if names} == {70: every, 180: every}


class Points(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.points = torch.randn(N, 2, D, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.points[index]}


class Collapsing(nn.Module):
    """A linear encoder whose embeddings collapse after so many steps."""

    def __init__(self, kind: str, after: int) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.kind, self.after, self.count = kind, after, 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.linear(x).transpose(0, 1)
        self.count += self.training
        if self.count > self.after:
            z = getattr(self, f"_{self.kind}")(z)
        return {"loss": (z[0] - z[1]).square().mean(), "embeddings": z}

    def _constant(self, z: Tensor) -> Tensor:
        return z.mean(dim=1, keepdim=True).expand_as(z)

    def _line(self, z: Tensor) -> Tensor:
        return z[:, :, :1] * torch.linspace(1, 2, D)

    def _clusters(self, z: Tensor) -> Tensor:
        """Each coordinate tied in eight clusters of eight, as gradient ascent on the entropy can end."""
        rank = z.argsort(dim=1).argsort(dim=1) // 8
        return z * 0 + torch.linspace(-1.5, 1.5, 8)[rank]

    def _shrunken(self, z: Tensor) -> Tensor:
        return 1e-4 * z


def collapsing(folder: Path, kind: str, after: int, **options: Any) -> E2MCTrainer:
    options = {"save_strategy": "no", "per_device_train_batch_size": N, "learning_rate": 1e-4} | options
    return E2MCTrainer(Collapsing(kind, after), arguments(folder, **options), Points())


def alarms(run: E2MCTrainer) -> list[dict[str, float]]:
    return [entry for entry in run.state.log_history if "collapse_alarm" in entry]


SIGNS = {
    "constant": {"embedding_std", "effective_rank", "tiny_spacings", "marginal_entropy"},
    "line": {"effective_rank"},
    "clusters": {"tiny_spacings"},
    "shrunken": {"marginal_entropy"},
}


@pytest.mark.parametrize(
    ("kind", "after", "logging_steps"),
    [("constant", 0, 10), ("line", 13, 1), ("line", 26, 1000), ("clusters", 26, 1000), ("shrunken", 0, 1000)],
)
def test_f25_a_collapse_raises_one_alarm_within_fifty_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, after: int, logging_steps: int
) -> None:
    run = collapsing(tmp_path, kind, after, logging_steps=logging_steps, max_steps=after + 50)
    run.train()
    (alarm,) = alarms(run)
    assert after < alarm["step"] <= after + 50
    assert set(alarm) - {"collapse_alarm", "epoch", "step"} == SIGNS[kind]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert f"The embeddings have collapsed at step {alarm['step']}: " in warning
    assert "--learning_rate" in warning
    for name in SIGNS[kind]:
        assert f"`{name}` is {alarm[name]:.3g}, " in warning


def test_a_run_that_is_to_stop_on_collapse_stops_and_saves_nothing_for_it(tmp_path: Path) -> None:
    run = collapsing(tmp_path, "line", 5, max_steps=60, save_strategy="steps", save_steps=4, stop_on_collapse=True)
    with pytest.raises(CollapseError, match="`effective_rank` is 1"):
        run.train()
    assert run.state.global_step == 26
    assert "checkpoint-24" in {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "checkpoint-26").exists()


def test_log_lines_hold_what_was_measured_at_their_step(tmp_path: Path) -> None:
    run = collapsing(tmp_path, "constant", 12, logging_steps=10, max_steps=20)
    run.train()
    healthy, collapsed = (entry for entry in run.state.log_history if "loss" in entry)
    assert healthy["embedding_std"] == pytest.approx(1, rel=0.2)
    assert healthy["effective_rank"] > 20
    assert collapsed["embedding_std"] < 1e-6
    assert collapsed["tiny_spacings"] == 1
    assert "most_rank" not in collapsed


class Unwatched(E2MCTrainer):
    watches_collapse = False


def test_watching_changes_no_weight(tmp_path: Path) -> None:
    models = []
    for kind in (E2MCTrainer, Unwatched):
        models.append(new_model("simsiam"))
        run = trainer(tmp_path, models[-1], kind, save_strategy="no", max_steps=2)
        run.train()
        assert ("effective_rank" in run.state.log_history[0]) == (kind is E2MCTrainer)
    watched, plain = (model.state_dict() for model in models)
    assert all(torch.equal(watched[name], weight) for name, weight in plain.items())


def test_heads_that_are_being_fitted_raise_no_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = new_model("vicreg")
    for parameter in model.objective.projector.parameters():
        parameter.data.zero_()
    run = arguments(tmp_path / "run", head_warmup=23, head_warmup_learning_rate=1e-12)
    warm_up_heads(model, run, digits(model), new_heads=True)
    assert "collapsed" not in caplog.text


def healthy(folder: Path, objective: str, steps: int) -> list[dict[str, float]]:
    """Log of a short training on digits, from random weights."""
    # DINO's head starts with weights of 0.02: the width of the paper's makes its outputs large enough for E2MC.
    wide = {"hidden_dim": 2048} if objective == "dino" else {}
    run = trainer(folder, new_model(objective, **wide), save_strategy="no", max_steps=steps, logging_steps=5)
    run.train()
    assert alarms(run) == []
    return [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("objective", ["vicreg", "simsiam"])
def test_f25_healthy_runs_raise_no_alarm(tmp_path: Path, objective: str) -> None:
    logs = healthy(tmp_path, objective, 25)
    assert len(logs) == 5
    assert min(entry["embedding_std"] for entry in logs) > 0.1
    assert max(entry["tiny_spacings"] for entry in logs) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["barlow_twins", "byol", "dino", "mec", "simclr", "simsiam", "swav", "vicreg"])
def test_f25_no_objective_raises_an_alarm_in_a_healthy_run(tmp_path: Path, objective: str) -> None:
    healthy(tmp_path, objective, 100)
