"""How all processes write one checkpoint: it appears under its name whole, or not at all, and none of them hangs."""

import errno
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from e2mc_hf.distributed import all_gather_object, rank, world_size
from e2mc_hf.training.checkpointing import SAVING, appears, refuse_full_disk, replace
from e2mc_hf.training.durable_files import sync_folder, sync_tree
from e2mc_hf.training.manifest import write_manifest

# What a disk that is full, gone or read-only raises: torch's writer gives a RuntimeError. Anything else is a bug.
_PASSING = (OSError, RuntimeError, SafetensorError, MemoryError)

Stage = Callable[[str], Any]


class SaveFailedError(RuntimeError):
    """No checkpoint was written; raised on every process, and the training can go on."""


def save_together(
    folder: Path, step: int, stages: Sequence[Stage], *, expected_bytes: int, required: Collection[str]
) -> int:
    """Write a checkpoint beside its place, sync it, and rename it into its place; every process calls it.

    A process whose stage fails still takes part in the stages after it, so that none waits for it in vain.

    Args:
        folder: Where the checkpoint is to be; one that is there is replaced.
        step: Optimizer steps taken.
        stages: What each process writes, given the folder to write to. A stage may talk to other processes before it
            writes, not after.
        expected_bytes: Size to come, for the check of the free space.
        required: Files that must be there in the end, whichever process writes them.

    Returns:
        Bytes written, by all processes together; 0 on all but the first.

    Raises:
        SaveFailedError: On every process, if any could not write; what was there before is untouched.
    """
    making = folder.with_name(f"{SAVING}{folder.name}")
    sizes: list[int] = []
    try:
        _together([partial(_begin, making, expected_bytes)] if rank() == 0 else [])
        _together([partial(_check_visible, making)])
        _together([*(partial(stage, str(making)) for stage in stages), partial(sync_tree, making)])
        _together([lambda: sizes.append(_finish(making, folder, step, required))] if rank() == 0 else [])
    except SaveFailedError:
        if rank() == 0:
            shutil.rmtree(making, ignore_errors=True)
        raise
    return sum(sizes)


def _begin(making: Path, expected_bytes: int) -> None:
    shutil.rmtree(making, ignore_errors=True)
    making.parent.mkdir(parents=True, exist_ok=True)
    refuse_full_disk(making.parent, expected_bytes)
    making.mkdir()


def _check_visible(making: Path) -> None:
    if not appears(making):
        raise OSError(errno.ENOENT, "process 0 made it, this process does not see it: share `output_dir`", str(making))


def _finish(making: Path, folder: Path, step: int, required: Collection[str]) -> int:
    missing = [name for name in required if not (making / name).is_file()]
    if missing:
        raise OSError(errno.ENOENT, f"not written, or not to a folder that process 0 sees: {', '.join(missing)}")
    size = write_manifest(making, step, processes=world_size())
    sync_folder(making)
    _rename(making, folder)
    return size


def _rename(making: Path, folder: Path) -> None:
    """Put a whole checkpoint in its place; one that is there stays if that fails."""
    if folder.exists():
        replace(folder, making)
        return
    making.rename(folder)
    sync_folder(folder.parent)


def _told(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    # What torch's writer says of a disk that took less than it was given.
    return f"the disk did not take a file ({text})" if "inline_container.cc" in text else text


def _together(actions: Sequence[Callable[[], Any]]) -> None:
    """Run this process's actions to the last, then learn whether those of all processes were done.

    Raises:
        SaveFailedError: If any was not, for a reason that may pass.
    """
    errors: list[Exception] = []
    for action in actions:
        try:
            action()
        except Exception as error:
            errors.append(error)
    bugs = [error for error in errors if not isinstance(error, _PASSING)]
    outcomes = all_gather_object((bool(bugs), [_told(error) for error in errors]))
    if bugs:
        raise bugs[0]
    told = [f"process {process}: {text}" for process, (_, texts) in enumerate(outcomes) for text in texts[:1]]
    if any(is_bug for is_bug, _ in outcomes):
        raise RuntimeError(f"Another process ran into a bug while saving: {'; '.join(told)}")
    if told:
        raise SaveFailedError("; ".join(told if world_size() > 1 else [told[0].removeprefix("process 0: ")])) from (
            errors[0] if errors else None
        )
