"""Run a function of a test on several gloo processes and bring back what each returns."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_on_processes(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` processes that can talk; results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _process, (function, world_size, folder, args), nprocs=world_size, daemon=True, start_method="spawn"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _process(rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
