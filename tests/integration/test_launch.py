"""scripts/continue_pretrain.py as users start it: python, torchrun, accelerate launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

from e2mc_hf.launch_files import find_launch_file

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "scripts" / "continue_pretrain.py")
TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--config_file", str(find_launch_file("cpu-2"))]
TINY = [
    *("--model", "test_resnet", "--from_scratch", "--image_size", "32", "--objective_args", "projector_dim=32"),
    *(
        "--max_samples",
        "64",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--learning_rate",
        "0.1",
        "--disable_tqdm",
        "true",
    ),
    *("--flip_prob", "0", "--jitter_prob", "0", "--grayscale_prob", "0", "--blur_prob", "0"),
]


def launch(launcher: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=500, check=False
    )


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def assert_same_run(one: Path, two: Path) -> None:
    """Same losses, same terms, and the same gradient at the first step, to float32 rounding.

    The weights are compared in float64 by tests/distributed: in float32 a step of a network with ReLU amplifies
    rounding too much to say anything.
    """
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    first, other = (json.loads((folder / "log.json").read_text())[0] for folder in (one, two))
    assert other.pop("grad_norm") == pytest.approx(first.pop("grad_norm"), rel=1e-3)
    assert other == pytest.approx(first, rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    result = launch(
        [sys.executable], *TINY, "--use_cpu", "--per_device_train_batch_size", "32", "--output_dir", str(folder)
    )
    assert result.returncode == 0, result.stderr
    assert "its features differ by at most" in result.stdout
    return folder


def test_run_leaves_encoder_heads_log_and_recipe(one_process: Path) -> None:
    assert {path.name for path in one_process.iterdir()} == {
        "config.json",
        "encoder",
        "log.json",
        "model.safetensors",
        "recipe.yaml",
    }
    assert AutoModel.from_pretrained(one_process / "encoder").config.architecture == "test_resnet"
    assert AutoImageProcessor.from_pretrained(one_process / "encoder")
    assert len(losses(one_process)) == 2


def test_written_recipe_repeats_the_run_bit_for_bit(one_process: Path, tmp_path: Path) -> None:
    recipe, folder = str(one_process / "recipe.yaml"), tmp_path / "again"
    result = launch([sys.executable], recipe, "--output_dir", str(folder))
    assert result.returncode == 0, result.stderr
    weights, others = (load_file(path / "model.safetensors") for path in (one_process, folder))
    assert all(torch.equal(others[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_of_half_a_batch_are_one_of_the_whole(
    one_process: Path, tmp_path: Path, launcher: list[str]
) -> None:
    folder = tmp_path / "two"
    result = launch(launcher, *TINY, "--use_cpu", "--per_device_train_batch_size", "16", "--output_dir", str(folder))
    assert result.returncode == 0, result.stderr
    assert_same_run(one_process, folder)


def test_accelerate_launch_on_one_process_trains(one_process: Path, tmp_path: Path) -> None:
    single = [
        *(str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ]
    folder = tmp_path / "single"
    result = launch(single, *TINY, "--use_cpu", "--per_device_train_batch_size", "32", "--output_dir", str(folder))
    assert result.returncode == 0, result.stderr
    assert losses(folder) == losses(one_process)


def test_two_processes_that_would_train_apart_are_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU two processes train together without --use_cpu")
    folder = tmp_path / "apart"
    result = launch(TORCHRUN, *TINY, "--output_dir", str(folder))
    assert result.returncode != 0
    assert "`use_cpu` must be given for several processes on the CPU: 2 processes were started" in result.stderr
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "model"),
    [
        (TORCHRUN, ["--model", "vit_tiny_patch16_224", "--backbone_args", "dynamic_img_size=true"]),
        (ACCELERATE, ["--model", "resnet18"]),
    ],
    ids=["vit_tiny", "resnet18"],
)
def test_photographs_train_on_two_processes(
    test_data: Path, tmp_path: Path, launcher: list[str], model: list[str]
) -> None:
    folder = tmp_path / "run"
    result = launch(
        launcher,
        *model,
        *("--from_scratch", "--dataset", str(test_data / "imagenette160"), "--image_size", "96", "--use_cpu"),
        *("--objective_args", "projector_dim=512", "--per_device_train_batch_size", "32", "--max_steps", "3"),
        *("--logging_steps", "1", "--output_dir", str(folder)),
    )
    assert result.returncode == 0, result.stderr
    assert len(losses(folder)) == 3
    assert AutoModel.from_pretrained(folder / "encoder").config.architecture == model[1]


def test_small_crops_a_teacher_and_fitted_heads_are_the_same_on_two_processes(tmp_path: Path) -> None:
    words = [word for word in TINY if word != "projector_dim=32"]
    heads = ["projector_dim=16", "hidden_dim=32", "num_prototypes=12", "norm=true", "freeze_prototypes_epochs=0"]
    words[words.index("--objective_args") + 1 : words.index("--objective_args") + 1] = heads
    words += ["--objective", "dino", "--num_small_views", "2", "--small_image_size", "24", "--head_warmup", "1"]
    words += ["--regularizer_args", "entropy_weight=1", "covariance_weight=1", "transform=normal_cdf", "--use_cpu"]
    folders = {1: tmp_path / "one", 2: tmp_path / "two"}
    for processes, folder in folders.items():
        launcher = [sys.executable] if processes == 1 else TORCHRUN
        batch = ["--per_device_train_batch_size", str(32 // processes), "--optimizer", "sgd"]
        result = launch(launcher, *words, *batch, "--output_dir", str(folder))
        assert result.returncode == 0, result.stderr
        assert "The heads were fitted for 1 steps" in result.stderr
    first, other = (json.loads((folder / "log.json").read_text())[0] for folder in folders.values())
    # The warm-up's AdamW step turns rounding of small gradients into steps of the learning rate.
    assert other["loss"] == pytest.approx(first["loss"], rel=1e-3)
    assert other["marginal_entropy"] == pytest.approx(first["marginal_entropy"], abs=1e-3)
