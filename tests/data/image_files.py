"""Small images and datasets of them, some of which cannot be read."""

import io
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image
from PIL import Image as PillowImage

from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.shards import open_shards
from e2mc_hf.data.stream import StreamSource

BROKEN = b"this is no image"


def png(number: int, side: int = 12) -> bytes:
    """An image like no other."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def encoded(count: int, broken: Collection[int] = ()) -> list[bytes]:
    return [BROKEN if number in broken else png(number) for number in range(count)]


def map_source(images: Sequence[bytes]) -> ImageSource:
    rows = [{"bytes": image, "path": None} for image in images]
    dataset = Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))
    return ImageSource(dataset, "image", None, "tiny", None)


def write_parquet(path: Path, images: Sequence[bytes], row_group_size: int = 4) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": image, "path": None} for image in images], type=kind)
    pq.write_table(pa.table({"image": column}), path, row_group_size=row_group_size)


def stream_source(folder: Path, images: Sequence[bytes], shard_rows: Sequence[int]) -> StreamSource:
    """Stream of parquet files of so many rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    files, start = [], 0
    for number, rows in enumerate(shard_rows):
        files.append(str(folder / f"{number:03}.parquet"))
        write_parquet(Path(files[-1]), images[start : start + rows])
        start += rows
    assert start == len(images)
    return StreamSource(open_shards(files, "parquet", "image"), "image", "tiny", None, "train")
