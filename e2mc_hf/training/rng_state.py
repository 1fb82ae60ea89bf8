"""Random states for a run that goes on with another number of processes than it was saved with."""

import random
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed
from transformers.trainer_pt_utils import safe_globals


def load_rng_of_other_world(checkpoint: Path | str, process: int, saved_processes: int, seed: int) -> None:
    """Give a process the random state that the process of its number had, or that of a fresh start if there was none.

    Generators of accelerators begin as at a fresh start in any case: how many of them a process had may differ too.

    Args:
        checkpoint: Verified checkpoint.
        process: This process.
        saved_processes: Processes that wrote the checkpoint.
        seed: Seed of the run.
    """
    set_seed(seed)
    if process >= saved_processes:
        return
    name = "rng_state.pth" if saved_processes == 1 else f"rng_state_{process}.pth"
    with safe_globals():
        states = torch.load(Path(checkpoint) / name, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
