"""Two processes with two workers each stream shards, are killed within an epoch, and end as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from data.image_files import encoded, write_parquet
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TORCHRUN = [
    str(Path(sys.executable).parent / "torchrun"),
    *("--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
    str(ROOT / "scripts" / "continue_pretrain.py"),
]
COMMON = [
    *("--streaming", "true", "--use_cpu", "--dataloader_num_workers", "2", "--from_scratch", "--disable_tqdm", "true"),
    *("--save_strategy", "steps", "--logging_steps", "1", "--learning_rate", "0.1"),
]


def start(*words: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *COMMON, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*words: str) -> None:
    process = start(*words)
    _, errors = process.communicate(timeout=550)
    assert process.returncode == 0, errors


def checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoints by step."""
    return {
        int(path.parent.name.removeprefix("checkpoint-")): path.parent
        for path in folder.glob("checkpoint-*/trainer_state.json")
    }


def kill_after(step: int, folder: Path, *words: str) -> None:
    """Kill every process of a run once a checkpoint is there."""
    process = start(*words, "--output_dir", str(folder))
    end = time.monotonic() + 400
    while step not in checkpoints(folder):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.05)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.communicate()
    assert not (folder / "model.safetensors").exists(), "the run was over before it was killed"


def assert_killed_run_ends_as_the_whole_one(folder: Path, kill_at: int, *words: str) -> None:
    finish(*words, "--output_dir", str(folder / "whole"))
    kill_after(kill_at, folder / "cut", *words)
    finish(*words, "--output_dir", str(folder / "cut"), "--resume_from_checkpoint", "auto")
    whole, cut = (load_file(folder / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(cut[name], weight) for name, weight in whole.items())


def test_a_killed_stream_resumes_to_the_same_weights(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    images = encoded(130)
    for number, (begin, stop) in enumerate([(0, 50), (50, 57), (57, 130)]):
        write_parquet(shards / f"train-{number}.parquet", images[begin:stop], row_group_size=10)
    assert_killed_run_ends_as_the_whole_one(
        tmp_path,
        9,
        *("--model", "test_resnet", "--image_size", "32", "--objective_args", "projector_dim=32"),
        *("--dataset", str(shards), "--shuffle_window", "24", "--per_device_train_batch_size", "8"),
        *("--max_steps", "40", "--save_steps", "3"),
    )


@pytest.mark.slow
def test_a_killed_vit_on_photographs_resumes_to_the_same_weights(tmp_path: Path, test_data: Path) -> None:
    assert_killed_run_ends_as_the_whole_one(
        tmp_path,
        4,
        *("--model", "vit_tiny_patch16_224", "--backbone_args", "dynamic_img_size=true", "--image_size", "96"),
        *("--dataset", str(test_data / "imagenette160"), "--objective_args", "projector_dim=512"),
        *("--per_device_train_batch_size", "16", "--max_steps", "10", "--save_steps", "2"),
    )
