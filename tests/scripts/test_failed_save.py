"""A checkpoint that could not be written costs the script its exit code, not the encoder."""

import importlib.util
import resource
from pathlib import Path
from typing import Any

import datasets
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "continue_pretrain.py"
FLAGS = [
    *("--model", "test_resnet", "--from_scratch", "--image_size", "32", "--use_cpu", "--max_steps", "2"),
    *("--max_samples", "16", "--per_device_train_batch_size", "8", "--objective_args", "projector_dim=16"),
    *("--save_strategy", "steps", "--save_steps", "1", "--optimizer", "adamw", "--output_dir", "out"),
    *("--resume_from_checkpoint", "auto", "--disable_tqdm"),
]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's entry point, in an empty folder and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    spec = importlib.util.spec_from_file_location("continue_pretrain", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_encoder_is_exported_and_the_exit_code_tells(
    main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The model fits, the moments of AdamW beside it do not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 19, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            main(FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "Encoder: out/encoder; reloaded" in said.out
    assert "`output_dir` must take the checkpoints, got 2 of 2 that could not be written" in said.err.splitlines()[-1]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"encoder", "config.json", "model.safetensors", "log.json", "recipe.yaml"} == names
    # The same command again, with room: it goes on where there is something, and begins anew where there is nothing.
    main(FLAGS)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    main(FLAGS)
    assert "There is no checkpoint yet." in caplog.text
    assert "The run goes on from out/checkpoint-2." in caplog.text
