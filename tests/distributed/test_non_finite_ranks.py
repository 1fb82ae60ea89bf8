"""F23 on two processes: what one of them meets stops both at the same step, before the update, and neither hangs."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on_processes
from training.spoiled import FIRST_WEIGHT, Fault, new_model, trainer

from e2mc_hf.distributed import rank, world_size
from e2mc_hf.errors import NonFiniteError
from e2mc_hf.training.collapse import CollapseWatch

FAULTS = ("image", "loss", "gradient", "teacher")
STEP = 2


def stopped(folder: str, kind: str) -> dict[str, Any]:
    """What this process is left with when the second one is spoiled."""
    # These losses, and statistics of each process, see its own samples alone: nothing tells the other one.
    model = new_model("byol" if kind == "teacher" else "simsiam")
    fault = Fault(model, kind if rank() == 1 else "nothing", STEP)
    alone = {"regularizer": "none", "regularizer_args": {}, "batch_norm": "train", "per_device_train_batch_size": 8}
    run = trainer(Path(folder) / kind, model, **alone)
    try:
        run.train()
    except NonFiniteError as error:
        unchanged = all(torch.equal(p, fault.before[n]) for n, p in model.named_parameters() if p.requires_grad)
        order = list(run.get_train_dataloader().order)
        return {
            "message": str(error),
            "unchanged": unchanged,
            "images": [row.sample_id for row in order[STEP - 1]],
            "last": run.state.log_history[-1],
        }
    return {"message": "trained on"}


def measured() -> dict[str, float]:
    """Spread of this process' share of one batch."""
    z = torch.randn(600, 40, generator=torch.Generator().manual_seed(0))
    share = z.chunk(world_size())[rank()]
    return CollapseWatch(scale_matters=True).measure(share, torch.tensor(-1.0))


def all_of_it(folder: str) -> tuple[dict[str, Any], dict[str, float]]:
    os.environ |= {"RANK": str(rank()), "LOCAL_RANK": str(rank()), "WORLD_SIZE": str(world_size())}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size()), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # not used
    return {kind: stopped(folder, kind) for kind in FAULTS}, measured()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """What each process saw."""
    return run_on_processes(all_of_it, 2, str(folder))


CAUSES = {
    "image": "loss is nan at step 2 (on process 1 of 2); not finite of its terms: cosine",
    "loss": "loss is nan at step 2 (on process 1 of 2)",
    "gradient": f" gradients have no finite norm at step 2, the first that of {FIRST_WEIGHT}",
    "teacher": "loss is nan at step 2 (on process 1 of 2); not finite of its terms: prediction_distance",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_f23_both_processes_stop_before_the_update(folder: Path, outcomes: list[Any], kind: str) -> None:
    first, second = (runs[kind] for runs, _ in outcomes)
    assert first["message"] == second["message"]
    assert CAUSES[kind] in first["message"]
    assert first["unchanged"]
    assert second["unchanged"]
    assert {path.name for path in (folder / kind).iterdir()} == {"checkpoint-1", "non_finite.json"}
    assert f"The newest whole checkpoint is {folder / kind / 'checkpoint-1'}." in first["message"]
    assert not math.isfinite(first["last"]["loss"] + first["last"]["grad_norm"])


@pytest.mark.parametrize("kind", FAULTS)
def test_the_file_tells_the_processes_apart(folder: Path, outcomes: list[Any], kind: str) -> None:
    seen = json.loads((folder / kind / "non_finite.json").read_text())
    own, other = seen["processes"]
    assert (own["rank"], other["rank"]) == (0, 1)
    assert [part["sample_ids"] for part in seen["processes"]] == [runs[kind]["images"] for runs, _ in outcomes]
    assert isinstance(own["loss"], float)
    assert isinstance(other["loss"], float) == (kind == "gradient")
    assert isinstance(seen["grad_norm"], float) == (kind == "loss")


def test_a_collapse_is_measured_over_both_processes(outcomes: list[Any]) -> None:
    (_, first), (_, second) = outcomes
    assert first == second
    assert first["most_rank"] == 40
    alone = measured()
    assert first["embedding_std"] == pytest.approx(alone["embedding_std"], rel=0.05)
    assert first["effective_rank"] == pytest.approx(alone["effective_rank"], rel=0.05)
    assert first["marginal_entropy"] == -1
