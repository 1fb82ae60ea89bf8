"""F3 and F4: whatever is altered, missing or added in a checkpoint is found before a tensor is read, and named."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training.tiny_runs import same, tiny_run, weights

from e2mc_hf.training.checkpointing import newest_whole_checkpoint
from e2mc_hf.training.manifest import (
    DamagedCheckpointError,
    current_versions,
    problems_of,
    read_manifest,
    verify,
    write_manifest,
)

MEMBERS = {
    "config.json",
    "data_state.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "schedule_state.json",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.json",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run that was cut after its second checkpoint."""
    folder = tmp_path_factory.mktemp("written")
    tiny_run(folder, stop_after=2).train()
    return folder


@pytest.fixture
def output_dir(written: Path, tmp_path: Path) -> Path:
    """Copy of it to spoil."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def test_a_checkpoint_as_it_was_written_is_whole(written: Path) -> None:
    verify(written / "checkpoint-2")
    assert newest_whole_checkpoint(written) == (written / "checkpoint-2", [])
    manifest = read_manifest(written / "checkpoint-2")
    assert manifest["format"] == 1
    assert manifest["step"] == 2
    assert manifest["processes"] == 1
    assert manifest["versions"] == current_versions()
    assert manifest["files"].keys() == MEMBERS
    assert all((written / "checkpoint-2" / name).stat().st_size == f["bytes"] for name, f in manifest["files"].items())


def test_each_of_100_flipped_bits_is_found_and_its_file_named(output_dir: Path) -> None:
    draw = random.Random(0)
    files = sorted(path for path in (output_dir / "checkpoint-2").iterdir())
    for number in range(100):
        path = files[number % len(files)]
        good = path.read_bytes()
        place, bit = draw.randrange(len(good)), draw.randrange(8)
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        found, problems = newest_whole_checkpoint(output_dir)
        assert found == output_dir / "checkpoint-1", (path.name, place, bit)
        assert problems == [f"{output_dir / 'checkpoint-2'}: {path.name} is altered"]
        path.write_bytes(good)
    assert newest_whole_checkpoint(output_dir) == (output_dir / "checkpoint-2", [])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeroed(path: Path) -> None:
    """A block that the disk lost, of a length that stays."""
    content = path.read_bytes()
    middle = len(content) // 2
    block = min(4096, len(content) - middle)
    path.write_bytes(content[:middle] + bytes(block) + content[middle + block :])


def removed(path: Path) -> None:
    path.unlink()


def unreadable(path: Path) -> None:
    """A folder under the name of a file."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", [*sorted(MEMBERS), "manifest.json"])
@pytest.mark.parametrize("spoil", [truncated, zeroed, removed, unreadable])
def test_a_spoiled_member_is_named(written: Path, tmp_path: Path, name: str, spoil: Callable[[Path], None]) -> None:
    checkpoint = Path(shutil.copytree(written / "checkpoint-2", tmp_path / "checkpoint-2"))
    spoil(checkpoint / name)
    (problem,) = problems_of(checkpoint)
    assert problem.startswith(f"{name} ")
    with pytest.raises(DamagedCheckpointError, match=rf"must be a whole checkpoint, got: {name} "):
        verify(checkpoint)


def test_a_file_that_was_added_is_named(output_dir: Path) -> None:
    (output_dir / "checkpoint-2" / "scaler.pt").touch()
    assert problems_of(output_dir / "checkpoint-2") == ["scaler.pt is not in the manifest"]


def test_all_that_is_wrong_is_named_at_once(output_dir: Path) -> None:
    checkpoint = output_dir / "checkpoint-2"
    removed(checkpoint / "optimizer.pt")
    truncated(checkpoint / "model.safetensors")
    zeroed(checkpoint / "rng_state.pth")
    half = (checkpoint / "model.safetensors").stat().st_size
    size = read_manifest(checkpoint)["files"]["model.safetensors"]["bytes"]
    assert problems_of(checkpoint) == [
        "optimizer.pt is missing",
        f"model.safetensors has {half:,} bytes in place of {size:,}",
        "rng_state.pth is altered",
    ]


def test_a_manifest_of_a_format_to_come_is_told_from_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr("e2mc_hf.training.manifest.FORMAT", 2)
        write_manifest(tmp_path, 1)
    assert problems_of(tmp_path) == ["manifest.json has format 2, this version reads 1"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"sha256": 1}', "\ud800", "[" * 100_000])
def test_a_manifest_that_is_none_is_altered(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    assert problems_of(tmp_path) == ["manifest.json is altered"]


def test_files_in_folders_of_a_checkpoint_are_verified_too(tmp_path: Path) -> None:
    (tmp_path / "global_step2").mkdir()
    part = tmp_path / "global_step2" / "part.pt"
    part.write_bytes(b"1234")
    assert write_manifest(tmp_path, 2, processes=2) == 4
    assert json.loads((tmp_path / "manifest.json").read_text())["files"].keys() == {"global_step2/part.pt"}
    verify(tmp_path)
    part.write_bytes(b"1235")
    assert problems_of(tmp_path) == ["global_step2/part.pt is altered"]


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_auto_falls_back_to_the_newest_whole_one_and_ends_with_the_same_weights(
    output_dir: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tiny_run(tmp_path / "whole", save_strategy="no")
    whole.train()
    zeroed(output_dir / "checkpoint-2" / name)
    resumed = tiny_run(output_dir)
    resumed.train("auto")
    assert f"Passed over, for it is not whole: {output_dir / 'checkpoint-2'}: {name} is altered" in caplog.text
    assert f"The run goes on from {output_dir / 'checkpoint-1'}." in caplog.text
    assert same(weights(whole), weights(resumed))
    verify(output_dir / "checkpoint-4")


def test_a_damaged_checkpoint_that_was_asked_for_is_refused_before_a_tensor_is_read(output_dir: Path) -> None:
    zeroed(output_dir / "checkpoint-2" / "rng_state.pth")
    trainer = tiny_run(output_dir)
    before = weights(trainer)
    with pytest.raises(DamagedCheckpointError) as refused:
        trainer.train(output_dir / "checkpoint-2")
    assert str(refused.value) == (
        f"`resume_from_checkpoint` must be a whole checkpoint, got '{output_dir / 'checkpoint-2'}': rng_state.pth is"
        f" altered. The newest whole one beside it is {output_dir / 'checkpoint-1'}."
    )
    assert same(before, weights(trainer))


def test_auto_does_not_start_anew_where_every_checkpoint_is_damaged(output_dir: Path) -> None:
    removed(output_dir / "checkpoint-1" / "optimizer.pt")
    removed(output_dir / "checkpoint-2" / "manifest.json")
    for request in ("auto", True):
        with pytest.raises(
            DamagedCheckpointError, match=r"only damaged ones: .*-2: manifest.*\. .*-1: optimizer\.pt is"
        ):
            tiny_run(output_dir).train(request)
