"""Runs on a disk that fills up or turns read-only between two saves; a part of `interrupted_saves.py`."""

import ctypes
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.tiny_runs import STEPS, tiny_run
from transformers import TrainerCallback

from e2mc_hf.errors import UsageError
from e2mc_hf.training import checkpointing
from e2mc_hf.training.manifest import problems_of

_NEW_USER, _NEW_MOUNTS, _READ_ONLY, _REMOUNT, _PAGE = 0x10000000, 0x00020000, 1, 32, 4096
_LIBC = ctypes.CDLL(None, use_errno=True)


class Disk:
    """A small disk of this process alone."""

    def __init__(self, folder: Path) -> None:
        user, group = os.getuid(), os.getgid()
        _checked(_LIBC.unshare(_NEW_USER | _NEW_MOUNTS))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.mount("size=64m", 0)

    def mount(self, options: str, flags: int) -> None:
        _checked(_LIBC.mount(b"tmpfs", str(self.folder).encode(), b"tmpfs", flags, options.encode()))

    def leave_free(self, free: int) -> None:
        used = sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in self.folder.rglob("*") if path.is_file())
        self.mount(f"size={-(-(used + free) // _PAGE) * _PAGE}", _REMOUNT)

    def make_read_only(self) -> None:
        self.mount("size=64m", _REMOUNT | _READ_ONLY)


def _checked(result: int) -> None:
    if result:
        raise PermissionError(os.strerror(ctypes.get_errno()))


class Before(TrainerCallback):
    """Does something to the disk before the saves of some steps."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self.actions = actions

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.actions.get(state.global_step, lambda: None)()


def run_on_disks(work: Path, in_a_fork: Callable[[Callable[[], None]], int]) -> None:
    """Report what came of each run."""
    sizes = {path.name: path.stat().st_size for path in (work / "whole" / f"checkpoint-{STEPS}").iterdir()}
    model, optimizer = sizes["model.safetensors"], sizes["optimizer.pt"]
    room = {
        "full within the 1st large file": model // 2,
        "full within the 2nd large file": model + optimizer // 2,
        "full within the 3rd large file": model + optimizer + sizes["rng_state.pth"] // 2 + 3 * _PAGE,
    }
    for name, free in room.items():
        in_a_fork(lambda name=name, free=free: _full(name, work / "disk", free, asks=False))
    in_a_fork(lambda: _full("too full to begin", work / "disk", model + optimizer + (1 << 20), asks=True))
    in_a_fork(lambda: _read_only(work / "disk"))


def _full(name: str, folder: Path, free: int, *, asks: bool) -> None:
    """The disk is full at step 2, and again empty at step 3."""
    if not asks:
        checkpointing._ROOM = 0.0  # the disk fills up after it was asked
    disk = _disk(name, folder)
    if disk is not None:
        _train(name, disk, {2: lambda: disk.leave_free(free), 3: lambda: disk.leave_free(1 << 26)})


def _read_only(folder: Path) -> None:
    disk = _disk("read-only", folder)
    if disk is not None:
        _train("read-only", disk, {2: disk.make_read_only})


def _disk(name: str, folder: Path) -> Disk | None:
    try:
        return Disk(folder)
    except OSError as error:
        print(json.dumps({"name": name, "skipped": f"no disk of one's own here: {error}"}))
        return None


def _train(name: str, disk: Disk, actions: dict[int, Callable[[], None]]) -> None:
    trainer = tiny_run(disk.folder / "run")
    trainer.add_callback(Before(actions))
    trainer.train()
    try:
        trainer.refuse_failed_save()
        refusal = ""
    except UsageError as error:
        refusal = str(error)
    trained = b"".join(tensor.numpy().tobytes() for tensor in trainer.model.state_dict().values())
    report = {
        "name": name,
        "failed": trainer.failed_saves,
        "refusal": refusal,
        "left": sorted(path.name for path in (disk.folder / "run").iterdir()),
        "problems": [problems_of(path) for path in (disk.folder / "run").glob("checkpoint-*")],
        "trained": hashlib.sha256(trained).hexdigest(),
    }
    print(json.dumps(report))
