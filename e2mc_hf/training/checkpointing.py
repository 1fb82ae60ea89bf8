"""The checkpoints of an output folder: which of them are whole, which one to resume from, and which ones go."""

import errno
import re
import secrets
import shutil
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from e2mc_hf.arguments import require
from e2mc_hf.distributed import all_gather_object, run_on_first, world_size
from e2mc_hf.errors import UsageError
from e2mc_hf.training.durable_files import sync_folder
from e2mc_hf.training.manifest import DamagedCheckpointError, problems_of

# What begins with a dot is not a checkpoint: still being written, already being removed, or about to be replaced.
SAVING, _REMOVING, _REPLACED, _TOKEN = ".saving-", ".removing-", ".replaced-", ".seen-by-all-"
AUTO = "auto"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Room that must be free, in sizes of the checkpoint to come.
_ROOM = 1.5
# Seconds that a shared file system gets to show the other processes a new file.
_PATIENCE = 10.0


def checkpoints_of(output_dir: Path | str) -> list[Path]:
    """Folders named `checkpoint-N`, by N."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of a folder named `checkpoint-N`."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def newest_whole_checkpoint(output_dir: Path | str) -> tuple[Path | None, list[str]]:
    """Newest checkpoint, by its step, every byte of which is as it was written.

    Args:
        output_dir: Folder of a run; need not exist.

    Returns:
        The checkpoint, or None, and what is wrong with each newer one: a line for each.
    """
    problems: list[str] = []
    for checkpoint in reversed(checkpoints_of(output_dir)):
        damage = problems_of(checkpoint)
        if not damage:
            return checkpoint, problems
        problems.append(f"{checkpoint}: {'; '.join(damage)}")
    return None, problems


def find_checkpoint(request: str | bool, output_dir: Path | str) -> tuple[Path | None, list[str]]:
    """Verified checkpoint that a user asks for.

    Args:
        request: A checkpoint folder; True for the newest whole one of `output_dir`, which must exist; `auto` for the
            same, or None where no checkpoint was ever written.
        output_dir: Folder of the run.

    Returns:
        The checkpoint, and what is wrong with those that were passed over.

    Raises:
        UsageError: If there is none, or what there is is damaged; names each missing, altered or unlisted file.
    """
    if request is True or request == AUTO:
        put_back(output_dir)
        found, problems = newest_whole_checkpoint(output_dir)
        if found is None and problems:
            raise DamagedCheckpointError(
                f"`resume_from_checkpoint` {request} must find a whole checkpoint in {str(output_dir)!r}, got only"
                f" damaged ones: {'. '.join(problems)}. Restore one, or move them away to start from the beginning."
            )
        if found is None and request is True:
            raise UsageError(
                f"`resume_from_checkpoint` True must find a checkpoint in {str(output_dir)!r}, got none. Leave it out,"
                " or pass 'auto', which then starts from the beginning."
            )
        return found, problems
    folder = Path(str(request))
    if not folder.is_dir():
        raise UsageError(
            f"`resume_from_checkpoint` must be a checkpoint folder, got {str(request)!r}."
            " Pass output_dir/checkpoint-N of the interrupted run, or auto."
        )
    damage = problems_of(folder)
    if damage:
        other, _ = newest_whole_checkpoint(folder.parent)
        remedy = f"The newest whole one beside it is {other}" if other else "There is no whole one beside it"
        raise DamagedCheckpointError(
            f"`resume_from_checkpoint` must be a whole checkpoint, got {str(folder)!r}: {'; '.join(damage)}. {remedy}."
        )
    return folder, []


def remove(folder: Path) -> None:
    """Remove a checkpoint, so that at no time a part of it looks like one.

    Raises:
        OSError: If it cannot even be renamed.
    """
    shutil.rmtree(_set_aside(folder, _REMOVING), ignore_errors=True)


def replace(folder: Path, by: Path) -> None:
    """Put a whole checkpoint in the place of another; a kill in between loses neither: `put_back`.

    Raises:
        OSError: If that fails; the other is then where it was.
    """
    aside = _set_aside(folder, _REPLACED)
    try:
        by.rename(folder)
        sync_folder(folder.parent)
    except OSError:
        put_back(folder.parent)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def put_back(output_dir: Path | str) -> None:
    """Undo replacements that a kill cut short: the old checkpoint has its name again, unless a new one has it."""
    for aside in Path(output_dir).glob(f"{_REPLACED}*"):
        folder = aside.with_name(aside.name.removeprefix(_REPLACED))
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)


def _set_aside(folder: Path, prefix: str) -> Path:
    """Give a checkpoint a name that no scan finds; what was left under it goes first."""
    aside = folder.with_name(f"{prefix}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return aside


def rotate(output_dir: Path, limit: int | None, *, keep: Collection[Path]) -> None:
    """Remove the oldest checkpoints beyond a limit; call it once the newest one is whole.

    Args:
        output_dir: Folder of the run.
        limit: Checkpoints to leave; None or 0 leaves all.
        keep: Checkpoints that stay whatever the limit: the newest, and the best.

    Raises:
        OSError: If one cannot be renamed.
    """
    if not limit or limit < 0:
        return
    found = checkpoints_of(output_dir)
    kept = {path.resolve() for path in keep}
    spare = [path for path in found if path.resolve() not in kept]
    for path in spare[: max(0, len(found) - limit)]:
        remove(path)
    sync_folder(output_dir)


def sweep(output_dir: Path | str) -> None:
    """Remove what a killed save or removal left behind."""
    put_back(output_dir)
    for path in Path(output_dir).glob(".*"):
        if path.name.startswith((SAVING, _REMOVING)) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(_TOKEN):
            path.unlink(missing_ok=True)


def refuse_full_disk(folder: Path, expected_bytes: int) -> None:
    """Refuse to begin a checkpoint that may not fit.

    Args:
        folder: Existing folder on the disk in question.
        expected_bytes: Size of the checkpoint.

    Raises:
        OSError: If less than 1.5 times that is free.
    """
    free = shutil.disk_usage(folder).free
    if free < _ROOM * expected_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{free / 1e6:,.1f} MB are free, {_ROOM} times the checkpoint of {expected_bytes / 1e6:,.1f} MB are needed",
            str(folder),
        )


def check_shared(output_dir: Path) -> None:
    """Refuse to train where a process cannot see what the first one writes; every process calls it.

    Raises:
        UsageError: If `output_dir` cannot be written, or is another folder to one of the processes.
    """
    token = output_dir / run_on_first(partial(_leave_token, output_dir))
    if world_size() == 1:
        token.unlink(missing_ok=True)
        return
    seen = all_gather_object(appears(token))
    run_on_first(partial(token.unlink, missing_ok=True))
    blind = [str(process) for process, sees in enumerate(seen) if not sees]
    if blind:
        raise UsageError(
            f"`output_dir` must be one folder that all processes share, got {str(output_dir)!r}, where processes"
            f" {', '.join(blind)} do not see what process 0 writes. Pass a path on a file system that all nodes mount."
        )


def appears(path: Path) -> bool:
    """Whether this process sees a path that another one has just made."""
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _leave_token(output_dir: Path) -> str:
    """Name of a file that is made in the folder."""
    token = output_dir / f"{_TOKEN}{secrets.token_hex(8)}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise UsageError(
            f"`output_dir` must be a folder that can be written, got {str(output_dir)!r}: {error}. Pass another path."
        ) from error
    return token.name


def check_options(args: Any) -> None:
    """Refuse options under which a checkpoint could not be resumed, or would show what must not be shown.

    Args:
        args: Training arguments, before transformers acts on them.

    Raises:
        UsageError: If one of them is set.
    """
    rules = {
        "save_on_each_node": ("all nodes share one output_dir", "Leave it out."),
        "save_only_model": ("a checkpoint is what a run goes on from", "The model alone is saved at the end."),
        "ignore_data_skip": ("a resumed run goes on with the very next batch", "Leave it out."),
        "enable_jit_checkpoint": ("SIGTERM and SIGINT save a checkpoint anyway", "Leave it out."),
        "push_to_hub": (
            "transformers would upload whatever is in output_dir, and a pickle of the arguments",
            "Upload output_dir/encoder after the training.",
        ),
    }
    for name, (reason, remedy) in rules.items():
        require(not getattr(args, name), name, f"must be off: {reason}", getattr(args, name), remedy)
    require(
        args.hub_token is None,
        "hub_token",
        "must not be an argument, which logs, trackers and process lists show",
        "a token",  # not the value
        "Set HF_TOKEN, or log in with `hf auth login`.",
    )
