import io
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from processes import run_on_processes

from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.sources import load_images
from e2mc_hf.distributed import rank
from e2mc_hf.errors import UsageError


def write_images(folder: Path) -> None:
    for number in range(5):
        pixels = np.full((4, 4, 3), number, dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / f"{number}.png").write_bytes(buffer.getvalue())


def load(folder: str) -> list[bytes]:
    """Load a split that is there and one that is not, where only the first process sees the files."""
    own = folder if rank() == 0 else f"{folder}-not-here"
    found = []
    for split in ("train", "test"):
        try:
            found.append(pickle.dumps(load_images(DataArguments(dataset=own, streaming=True), split)))
        except UsageError as error:
            found.append(str(error).encode())
    return found


def test_one_process_finds_the_files_of_a_stream_or_what_is_wrong_for_all(tmp_path):
    write_images(tmp_path)
    (first, first_error), (second, second_error) = run_on_processes(load, 2, str(tmp_path))
    assert pickle.loads(second) == pickle.loads(first)
    assert len(pickle.loads(second)) == 5
    assert b"must name a split of" in first_error
    assert second_error == first_error
