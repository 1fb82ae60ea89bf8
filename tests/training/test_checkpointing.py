import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from e2mc_hf.errors import UsageError
from e2mc_hf.training import saving
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.checkpointing import (
    check_shared,
    checkpoints_of,
    find_checkpoint,
    newest_whole_checkpoint,
    refuse_full_disk,
    remove,
    rotate,
    sweep,
)
from e2mc_hf.training.manifest import write_manifest
from e2mc_hf.training.saving import SaveFailedError, save_together


def write(folder: Path, *steps: int) -> list[Path]:
    """Whole checkpoints of these steps."""
    made = []
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(f"weights of step {step}".encode())
        write_manifest(checkpoint, step)
        made.append(checkpoint)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_that_of_the_highest_step(tmp_path: Path) -> None:
    write(tmp_path, 90, 100, 8)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / ".saving-checkpoint-200").mkdir()
    (tmp_path / "checkpoint-300").touch()  # no folder
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-8", "checkpoint-90", "checkpoint-100"]
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", [])


def test_a_folder_without_checkpoints_begins_a_run_under_auto_and_is_refused_under_true(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "not_there"):
        assert find_checkpoint("auto", folder) == (None, [])
        with pytest.raises(UsageError, match=r"`resume_from_checkpoint` True must find a checkpoint in '.*', got none"):
            find_checkpoint(True, folder)


def test_a_checkpoint_may_lie_anywhere(tmp_path: Path) -> None:
    (checkpoint,) = write(tmp_path / "other", 3)
    renamed = checkpoint.rename(tmp_path / "kept")
    assert find_checkpoint(str(renamed), tmp_path / "run") == (renamed, [])
    with pytest.raises(UsageError, match=r"`resume_from_checkpoint` must be a checkpoint folder, got '.*not_there'"):
        find_checkpoint(str(tmp_path / "not_there"), tmp_path)


def test_a_damaged_one_without_a_whole_one_beside_it_says_so(tmp_path: Path) -> None:
    (checkpoint,) = write(tmp_path, 3)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors is missing\. There is no whole one beside it\."):
        find_checkpoint(str(checkpoint), tmp_path)


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, [9], [1, 2, 9, 11]),
        (0, [9], [1, 2, 9, 11]),
        (4, [9], [1, 2, 9, 11]),
        (2, [11], [9, 11]),
        (1, [11], [11]),
        (1, [11, 1], [1, 11]),  # the best one stays beside the newest
        (2, [11, 1], [1, 11]),
        (2, [9], [9, 11]),  # 11 is of an earlier run
        (1, [9], [9]),
    ],
)
def test_rotation_removes_the_oldest_beyond_the_limit_and_never_what_is_kept(
    tmp_path: Path, limit: int | None, keep: list[int], left: list[int]
) -> None:
    write(tmp_path, 1, 2, 9, 11)
    rotate(tmp_path, limit, keep=[tmp_path / f"checkpoint-{step}" for step in keep])
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_a_checkpoint_is_removed_though_an_earlier_removal_of_its_name_was_killed(tmp_path: Path) -> None:
    (checkpoint,) = write(tmp_path, 5)
    (tmp_path / ".removing-checkpoint-5" / "part").mkdir(parents=True)
    remove(checkpoint)
    assert names(tmp_path) == []


def test_a_sweep_leaves_everything_that_is_not_a_leftover(tmp_path: Path) -> None:
    write(tmp_path, 5)
    for name in (".saving-checkpoint-6", ".removing-checkpoint-4", ".git", "encoder"):
        (tmp_path / name).mkdir()
    (tmp_path / ".seen-by-all-00").touch()
    (tmp_path / ".gitignore").touch()
    sweep(tmp_path)
    assert names(tmp_path) == [".git", ".gitignore", "checkpoint-5", "encoder"]
    sweep(tmp_path / "not_there")


def test_less_than_one_and_a_half_times_the_size_is_too_little_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1500))
    refuse_full_disk(tmp_path, 1000)
    with pytest.raises(OSError, match=r"0\.0 MB are free, 1\.5 times") as refused:
        refuse_full_disk(tmp_path, 1001)
    assert refused.value.errno == errno.ENOSPC


def test_a_folder_that_cannot_be_written_is_refused_when_the_training_begins(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"`output_dir` must be a folder that can be written, got '.*file/run'"):
        check_shared(tmp_path / "file" / "run")
    check_shared(tmp_path / "run")
    assert names(tmp_path / "run") == []


def test_a_stage_that_fails_leaves_the_checkpoint_that_was_there(tmp_path: Path) -> None:
    write(tmp_path, 5)

    def fails(making: str) -> None:
        (Path(making) / "half").touch()
        raise OSError(errno.EDQUOT, "Disk quota exceeded", making)

    with pytest.raises(SaveFailedError, match=r"^OSError: .*Disk quota exceeded"):
        save_together(tmp_path / "checkpoint-5", 5, [fails], expected_bytes=0, required=[])
    assert names(tmp_path) == ["checkpoint-5"]
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "checkpoint-5", [])


def test_a_bug_in_a_stage_is_no_failed_save(tmp_path: Path) -> None:
    def has_a_bug(making: str) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        save_together(tmp_path / "checkpoint-5", 5, [has_a_bug], expected_bytes=0, required=[])
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_a_member_that_no_stage_wrote_fails_the_save(tmp_path: Path) -> None:
    with pytest.raises(SaveFailedError, match=r"not written, or not to a folder that process 0 sees: rng_state_1\.pth"):
        save_together(tmp_path / "checkpoint-5", 5, [], expected_bytes=0, required=["rng_state_1.pth"])
    assert names(tmp_path) == []


def test_a_checkpoint_takes_the_place_of_a_damaged_one_of_its_step(tmp_path: Path) -> None:
    (damaged,) = write(tmp_path, 5)
    (damaged / "model.safetensors").write_bytes(b"other")
    (tmp_path / ".saving-checkpoint-5" / "left").mkdir(parents=True)
    size = save_together(
        damaged, 5, [lambda making: (Path(making) / "new").write_text("12")], expected_bytes=0, required=["new"]
    )
    assert size == 2
    assert names(tmp_path) == ["checkpoint-5"]
    assert names(damaged) == ["manifest.json", "new"]
    assert newest_whole_checkpoint(tmp_path) == (damaged, [])


def test_a_kill_between_the_two_renames_of_a_replacement_loses_neither(tmp_path: Path) -> None:
    (old,) = write(tmp_path, 5)
    old.rename(tmp_path / ".replaced-checkpoint-5")
    assert find_checkpoint("auto", tmp_path) == (old, [])
    assert names(tmp_path) == ["checkpoint-5"]


def test_what_was_replaced_goes_once_the_new_one_is_there(tmp_path: Path) -> None:
    (new,) = write(tmp_path, 5)
    (tmp_path / ".replaced-checkpoint-5" / "part").mkdir(parents=True)
    assert find_checkpoint("auto", tmp_path) == (new, [])
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_checkpoint_whose_place_cannot_be_taken_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = write(tmp_path, 5)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.startswith(".saving-"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SaveFailedError, match="Input/output error"):
        save_together(old, 5, [], expected_bytes=0, required=[])
    assert names(tmp_path) == ["checkpoint-5"]
    assert newest_whole_checkpoint(tmp_path) == (old, [])


def test_what_is_written_is_synced_before_the_manifest_and_the_manifest_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        order.append(f"rename {path.name}")
        return rename(path, target)

    sync = saving.sync_tree
    monkeypatch.setattr(saving, "sync_tree", lambda folder: (order.append("sync files"), sync(folder)))
    write_it, sync_it = saving.write_manifest, saving.sync_folder
    monkeypatch.setattr(
        saving, "write_manifest", lambda *args, **kwargs: (order.append("manifest"), write_it(*args, **kwargs))[1]
    )
    monkeypatch.setattr(
        saving, "sync_folder", lambda folder: (order.append(f"sync {Path(folder).name}"), sync_it(folder))
    )
    monkeypatch.setattr(Path, "rename", renamed)
    save_together(tmp_path / "run" / "checkpoint-1", 1, [], expected_bytes=0, required=[])
    assert order == [
        "sync files",
        "manifest",
        "sync .saving-checkpoint-1",
        "rename .saving-checkpoint-1",
        "sync run",
    ]


@pytest.mark.parametrize(
    "option", ["save_on_each_node", "save_only_model", "ignore_data_skip", "enable_jit_checkpoint", "push_to_hub"]
)
def test_an_option_that_breaks_a_promise_of_checkpoints_is_refused(tmp_path: Path, option: str) -> None:
    options: dict[str, Any] = {option: True}
    with pytest.raises(UsageError, match=rf"^`{option}` must be off: .*, got True\."):
        E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_a_token_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^`hub_token` must not be an argument.*got 'a token'\. Set HF_TOKEN") as told:
        E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, hub_token="hf_abcdefghijklmnopqrstuvwxyz")
    assert "abcdef" not in str(told.value)


@pytest.mark.parametrize("request_", ["auto", "checkpoint"])
def test_the_output_folder_may_hold_the_run_that_is_resumed(tmp_path: Path, request_: str) -> None:
    (checkpoint,) = write(tmp_path, 5)
    wanted = str(checkpoint) if request_ == "checkpoint" else request_
    arguments = E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint=wanted)
    assert arguments.checked_output_dir() == tmp_path


def test_a_new_run_among_the_checkpoints_of_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 5, 10)
    with pytest.raises(UsageError, match=r"`output_dir` holds checkpoint-5, checkpoint-10, got .*checkpoint auto"):
        E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True).checked_output_dir()
    E2MCTrainingArguments(output_dir=str(tmp_path), use_cpu=True, overwrite=True).checked_output_dir()
