"""Kills a process at every change that a save makes to its files, and says what is left. Run by its test.

One run is trained to its second save. There the process forks once for each point: the fork, in a copy of the output
folder, saves, and ends without another word at its point. What is left is then looked at, and resumed, in a fork again.
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
from faults.full_disks import run_on_disks
from training.tiny_runs import STEPS, tiny_run
from transformers import TrainerCallback

from e2mc_hf.training.checkpointing import newest_whole_checkpoint, sweep

CUT = 2
KILLED = 77
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Points:
    """Ends the process at the n-th point of those that change files below a folder."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.left = str(folder), number
        sys.addaudithook(self._event)
        for module, name in ((torch, "save"), (safetensors.torch, "save_file")):
            setattr(module, name, self._around(getattr(module, name)))
        transformers.modeling_utils.safe_save_file = self._around(transformers.modeling_utils.safe_save_file)
        os.fsync = self._around(os.fsync)

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A point before a function, and one after."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._point()
            result = function(*args, **kwargs)
            self._point()
            return result

        return call

    def _event(self, event: str, args: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if changes or (event == "open" and isinstance(args[2], int) and args[2] & _WRITES):
            names = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
            if event in ("os.remove", "os.rmdir") or names.startswith(
                self.folder
            ):  # rmtree removes relative to a folder
                self._point()

    def _point(self) -> None:
        if self.left == 0:
            os._exit(KILLED)
        self.left -= 1


def kill_in_the_middle_of(name: str, size: int) -> None:
    """Have the kernel kill the process once it has written half of a file of that name."""

    def arm(path: object) -> None:
        if isinstance(path, (str, os.PathLike)) and Path(os.fsdecode(path)).name == name:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    def armed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(value: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            arm(path)
            return function(value, path, *args, **kwargs)

        return call

    torch.save = armed(torch.save)
    transformers.modeling_utils.safe_save_file = armed(transformers.modeling_utils.safe_save_file)
    sys.addaudithook(lambda event, args: arm(args[0]) if event == "open" and args[2] and args[2] & _WRITES else None)


def in_a_fork(action: Callable[[], None]) -> int:
    """Exit code of a fork that does something; negative for a signal."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            action()
            code = 0
        except SystemExit:
            pass
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def visible(folder: Path) -> str:
    """Digest of every checkpoint that a scan sees."""
    files = [path for path in sorted(folder.glob("checkpoint-*/**/*")) if path.is_file()]
    content = [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def weights_of(folder: Path) -> str:
    return hashlib.sha256((folder / f"checkpoint-{STEPS}" / "model.safetensors").read_bytes()).hexdigest()


class AtTheCut(TrainerCallback):
    """Tries every point of the save that is due after a step."""

    def __init__(self, work: Path, *, resume_each: bool) -> None:
        self.work, self.resume_each = work, resume_each
        self.trainer: Any = None
        self.resumed: dict[str, str] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != CUT:
            return
        number = 0
        while self.try_save(f"point {number}", lambda number=number: Points(self.work / "cut", number)) == KILLED:
            number += 1
        first = Path(args.output_dir) / "checkpoint-1"
        for path in sorted(first.iterdir()):
            kill = lambda path=path: kill_in_the_middle_of(path.name, path.stat().st_size)  # noqa: E731
            self.try_save(f"middle of {path.name}", kill)
        self.try_sweep()

    def try_save(self, name: str, arm: Callable[[], None]) -> int:
        def save() -> None:
            trainer = self.trainer
            trainer.args.output_dir = str(folder)
            arm()
            trainer._save_checkpoint(trainer.model, None)

        folder = self.copy_of(self.trainer.args.output_dir)
        code = in_a_fork(save)
        self.report(name, folder, code)
        return code

    def try_sweep(self) -> None:
        """Kills while what a killed save left is swept."""
        number, code = 0, KILLED
        while code == KILLED:
            folder = self.copy_of(self.trainer.args.output_dir)
            for left in (".saving-checkpoint-2", ".removing-checkpoint-0"):
                (folder / left).mkdir()
                shutil.copy(folder / "checkpoint-1" / "manifest.json", folder / left)
            (folder / ".seen-by-all-0123456789abcdef").touch()

            def killed_sweep(folder: Path = folder, number: int = number) -> None:
                Points(folder, number)
                sweep(folder)

            code = in_a_fork(killed_sweep)
            self.report(f"sweep {number}", folder, code)
            number += 1

    def copy_of(self, output_dir: str) -> Path:
        folder = self.work / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(output_dir, folder, copy_function=os.link)  # nothing may be changed in place
        return folder

    def report(self, name: str, folder: Path, code: int) -> None:
        found, problems = newest_whole_checkpoint(folder)
        left = sorted(path.name for path in folder.iterdir())
        state = visible(folder)
        if self.resume_each or state not in self.resumed:
            self.resumed[state] = self.resume(folder)
        says = {"name": name, "code": code, "left": left, "whole": found and found.name, "problems": problems}
        print(json.dumps(says | {"weights": self.resumed[state], "swept": self.swept(folder)}))

    def resume(self, folder: Path) -> str:
        """Digest of the weights that the resumed run ends with."""
        code = in_a_fork(lambda: tiny_run(folder, save_total_limit=1).train("auto"))
        return weights_of(folder) if code == 0 else f"exit code {code}"

    def swept(self, folder: Path) -> list[str]:
        """What beginning with a dot is left after the next start."""
        sweep(folder)
        return [path.name for path in folder.glob(".*")]


def main(work: Path, *, resume_each: bool) -> None:
    torch.set_num_threads(1)
    trainer = tiny_run(work / "whole", save_total_limit=1)
    callback = AtTheCut(work, resume_each=resume_each)
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    trained = b"".join(tensor.numpy().tobytes() for tensor in trainer.model.state_dict().values())
    unbroken = {"weights": weights_of(work / "whole"), "trained": hashlib.sha256(trained).hexdigest()}
    print(json.dumps({"name": "unbroken"} | unbroken))
    run_on_disks(work, in_a_fork)


if __name__ == "__main__":
    main(Path(sys.argv[1]), resume_each=sys.argv[2:] == ["--resume_each"])
