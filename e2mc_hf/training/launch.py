"""Refuse to train in another world than the one the launcher was asked for."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from e2mc_hf.arguments import require
from e2mc_hf.errors import UsageError

_HOW = (
    "For two CPU processes: `torchrun --nproc_per_node 2 SCRIPT ... --use_cpu`, or `accelerate launch --config_file "
    '"$(python -m e2mc_hf.launch_files cpu-2)" SCRIPT ... --use_cpu`.'
)
_HOW_WITH_SLURM = (
    "Start the workers from one task a node, `srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES "
    "--nproc_per_node GPUS_OF_A_NODE --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500 SCRIPT ...`, or tell every "
    "task of srun its place: docs/scaling.md has both scripts whole."
)
_CONFIG_FLAGS = ("--config_file", "--config-file")


class Asked(NamedTuple):
    """What a launcher was asked for; None where it was not said.

    Attributes:
        num_processes: Processes on all machines together.
        on_cpu: Whether they are to use the CPU.
    """

    num_processes: int | None = None
    on_cpu: bool | None = None


def check_world(world_size: int, *, on_cpu: bool = True) -> None:
    """Compare the processes that train together with those that were asked for.

    `accelerate launch --cpu --num_processes 2` starts one process without a word, two processes on a machine without a
    GPU train apart unless `--use_cpu` is given, and so do the tasks of `srun` that are told nothing of each other.

    Args:
        world_size: Processes that train together, as transformers sees them.
        on_cpu: Whether they train on the CPU.

    Raises:
        UsageError: If there are fewer than the launcher was asked for, or its configuration says CPU and they do not.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size < started:
        raise UsageError(
            f"`use_cpu` must be given for several processes on the CPU: {started} processes were started, and each "
            f"would train alone. {_HOW}"
        )
    asked = asked_of_launcher(_ancestors())
    if asked.num_processes is not None and world_size < asked.num_processes:
        raise UsageError(f"`num_processes` must be what was asked for: {asked.num_processes}, got {world_size}. {_HOW}")
    cpu_rule = "must be given as well: the launcher's configuration asks for the CPU, which it does not pass on"
    require(on_cpu or not asked.on_cpu, "use_cpu", cpu_rule, False, "Pass --use_cpu, or another --config_file.")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))  # set by srun alone, not in the body of a batch script
    if world_size < tasks and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"`srun` started {tasks} tasks that know nothing of each other, got a world of {world_size}: each would "
            f"train alone. {_HOW_WITH_SLURM}"
        )


def asked_of_launcher(command_lines: Sequence[Sequence[str]]) -> Asked:
    """What the nearest `accelerate launch` or `torchrun` among command lines was asked for, in flags or in its file."""
    for words in command_lines:
        names = {Path(word).name for word in words}
        if {"accelerate", "launch"} <= names or names & {"accelerate-launch", "accelerate.commands.launch"}:
            return _asked_of_accelerate(words)
        if "torchrun" in names or "torch.distributed.run" in names:
            per_node = _number(_word_after(words, ("--nproc_per_node", "--nproc-per-node")))
            return Asked(per_node and per_node * (_number(_word_after(words, ("--nnodes",))) or 1))
    return Asked()


def _asked_of_accelerate(words: Sequence[str]) -> Asked:
    """Flags win over the file; the default file counts where none is named, except with `--cpu`, as in accelerate."""
    path = _word_after(words, _CONFIG_FLAGS) or ("" if "--cpu" in words else default_config_file)
    config = load_config_from_file(path) if Path(path).is_file() else None
    in_file = getattr(config, "num_processes", -1)  # -1 is accelerate's sign for none
    number = _number(_word_after(words, ("--num_processes", "--num-processes")))
    return Asked(number or (in_file if in_file > 0 else None), None if config is None else bool(config.use_cpu))


def _ancestors() -> list[list[str]]:
    command_lines = []
    for process in psutil.Process().parents():
        try:
            command_lines.append(process.cmdline())
        except psutil.Error:
            continue
    return command_lines


def _number(word: str) -> int | None:
    return int(word) if word.isdecimal() else None


def _word_after(words: Sequence[str], flags: Sequence[str]) -> str:
    """Value of a flag, after it or after its equals sign; empty if there is none."""
    for position, word in enumerate(words):
        flag, separator, value = word.partition("=")
        if flag in flags:
            return value if separator else (list(words[position + 1 :]) or [""])[0]
    return ""
