"""What is done once, before any life: all that a fork need not do again."""

import atexit
import gc
import os
import tempfile

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.soaking.lives import start_fork_server
from benchmarks.soaking.training import Setup, digits, model_of


def prepare(setup: Setup, *, uses_workers: bool) -> None:
    """Import, load and compute what every life needs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    disable_progress_bar()
    if uses_workers:
        start_fork_server()
    digits()
    with tempfile.TemporaryDirectory() as folder:
        model_of(setup).save_pretrained(folder)  # transformers makes a large table for its first save
    gc.collect()
    gc.freeze()  # no life looks through all that again
    atexit.register(gc.unfreeze)
