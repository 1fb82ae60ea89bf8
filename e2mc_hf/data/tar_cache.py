"""Where the images of tar files on the Hub are, kept on this disk: to find out, such a file is read from end to end."""

import hashlib
import os
import re
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from e2mc_hf.data.tar_shards import TarShard, index_tar

# A file of a named commit never changes; of any other it is not known whether it did.
COMMIT = re.compile(r"@([0-9a-f]{40})/")


def open_tar(file: str, image_column: str) -> TarShard:
    """Find the images of a tar file; of a commit on the Hub only once, for all processes of a machine and all runs.

    Raises:
        UsageError: If the file is compressed, broken, or not in the layout of webdataset.
    """
    if not COMMIT.search(file):
        return index_tar(file, image_column)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "tar_indexes"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{hashlib.sha256(f'{file} {image_column}'.encode()).hexdigest()}.npy"
    with WeakFileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            _write(kept, index_tar(file, image_column))
    table = np.load(kept)
    return TarShard(file, int(table[0, 0]), table[1:, 0].copy(), table[1:, 1].copy())


def _write(path: Path, shard: TarShard) -> None:
    """Write the size of the file, then offset and size of each image."""
    table = np.array([(shard.size, 0), *zip(shard.offsets, shard.sizes, strict=True)], dtype=np.int64)
    unfinished = path.with_suffix(f".{os.getpid()}.npy")
    np.save(unfinished, table)
    unfinished.replace(path)
