"""Resume within an epoch without reading what was trained on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers.trainer

from e2mc_hf.data.loader import ViewLoader

_NAME = "skip_first_batches"


@contextmanager
def batches_skipped_by_the_loader() -> Iterator[None]:
    """Have a `ViewLoader` itself skip the batches of a resumed epoch.

    transformers (5.23, `Trainer._run_epoch`) calls accelerate's `skip_first_batches`, which puts a plain DataLoader in
    the place of ours and draws every batch only to drop it: a stream would be read again from the start of the epoch.
    To be removed once the Trainer asks its loader to skip.
    """
    original = vars(transformers.trainer)[_NAME]

    def skip(loader: Any, num_batches: int = 0) -> Any:
        if not isinstance(loader, ViewLoader):
            return original(loader, num_batches)
        loader.skip(num_batches)
        return loader

    vars(transformers.trainer)[_NAME] = skip
    try:
        yield
    finally:
        vars(transformers.trainer)[_NAME] = original
