"""Refuse to train in another world than the one the launcher was asked for."""

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from e2mc_hf.errors import UsageError

_HOW = (
    "For two CPU processes: `torchrun --nproc_per_node 2 SCRIPT ... --use_cpu`, or `accelerate launch --multi_gpu "
    "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no SCRIPT ... --use_cpu`."
)


def check_world(world_size: int) -> None:
    """Compare the processes that train together with those that were asked for.

    `accelerate launch --cpu --num_processes 2` starts one process without a word, and two processes on a machine
    without a GPU train apart unless `--use_cpu` is given. A number of processes that only accelerate's configuration
    file asks for is not seen.

    Args:
        world_size: Processes that train together, as transformers sees them.

    Raises:
        UsageError: If there are fewer than the launcher was asked for.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size < started:
        raise UsageError(
            f"`use_cpu` must be given for several processes on the CPU: {started} processes were started, and each "
            f"would train alone. {_HOW}"
        )
    asked = processes_asked_of_launcher(_ancestors())
    if asked is not None and world_size < asked:
        raise UsageError(f"`num_processes` must be what was asked for: {asked}, got {world_size}. {_HOW}")


def processes_asked_of_launcher(command_lines: Sequence[Sequence[str]]) -> int | None:
    """Number of processes in the command line of the nearest `accelerate launch` or `torchrun`; None if not said."""
    for words in command_lines:
        names = {Path(word).name for word in words}
        if {"accelerate", "launch"} <= names or names & {"accelerate-launch", "accelerate.commands.launch"}:
            return _number_after(words, ("--num_processes", "--num-processes"))
        if "torchrun" in names or "torch.distributed.run" in names:
            per_node = _number_after(words, ("--nproc_per_node", "--nproc-per-node"))
            return per_node and per_node * (_number_after(words, ("--nnodes",)) or 1)
    return None


def _ancestors() -> list[list[str]]:
    command_lines = []
    for process in psutil.Process().parents():
        try:
            command_lines.append(process.cmdline())
        except psutil.Error:
            continue
    return command_lines


def _number_after(words: Sequence[str], flags: Sequence[str]) -> int | None:
    for position, word in enumerate(words):
        flag, separator, value = word.partition("=")
        if flag in flags:
            number = value if separator else (list(words[position + 1 :]) or [""])[0]
            return int(number) if number.isdecimal() else None
    return None
