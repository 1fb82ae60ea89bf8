"""Small files that would fill the memory: what a worker takes to refuse or to decode them, in a process of its own."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from data.mutations import photo, save
from PIL import Image

from e2mc_hf.data.decoding import COSTS, PIXEL_LIMIT

PHOTO = photo(np.random.default_rng(0))
LIMIT = 10**9  # bytes
PROCESS_STATUS = Path("/proc/self/status")

READ = """
import json, sys
from pathlib import Path
from e2mc_hf.data.decoding import EncodedImage, UnreadableImage

outcomes = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        outcomes[path.name] = list(EncodedImage(path.read_bytes()).pixels().shape)
    except UnreadableImage as unreadable:
        outcomes[path.name] = unreadable.reason
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps([outcomes, 1024 * int(status["VmHWM"].split()[0])]))
"""

pytestmark = pytest.mark.skipif(not PROCESS_STATUS.exists(), reason="the peak of a process is read from Linux")


def outcomes_and_peak(folder):
    """Read all files of a folder in a new process: shape or reason of each, and the peak of its memory in bytes."""
    done = subprocess.run([sys.executable, "-c", READ, folder], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *, extra=b""):
    """A PNG with the pixels of a small one."""
    small = save(PHOTO, "png")
    return small[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + small[24:29]) + extra + small[33:]


def jpeg(width, height, mode="RGB", **options):
    small = save(PHOTO.convert(mode), "jpeg", **options)
    frame = max(small.find(b"\xff\xc0"), small.find(b"\xff\xc2"))
    return small[: frame + 5] + struct.pack(">HH", height, width) + small[frame + 9 :]


def gif(width, height):
    """A GIF whose one frame has these sides."""
    sides = struct.pack("<HH", width, height)
    small = save(Image.new("L", (8, 8)), "gif")
    frame = small.index(b",\0\0\0\0")
    return small[:6] + sides + small[10 : frame + 5] + sides + small[frame + 9 :]


def animation(frames):
    """A GIF of a megapixel a frame."""
    one = save(Image.new("L", (1000, 1000)), "gif")
    return one[:-1] + one[one.index(b",\0\0\0\0") : -1] * (frames - 1) + b";"


def webp(width, height):
    """A lossless WebP, all its pixels in one color."""
    small = save(Image.new("RGB", (8, 8)), "webp", lossless=True)
    sides = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return small[:21] + sides + small[25:]


def tiff(width, height, *, tile=None):
    """A compressed gray TIFF of one strip or one tile."""
    data = zlib.compress(bytes(4_000_000))
    tags = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1}
    places = (273, 278, 279) if tile is None else (324, 322, 325)
    tags |= {322: tile, 323: tile} if tile else {278: height}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {places[0]: start, places[2]: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_files_that_announce_too_many_pixels_are_refused_before_any_is_decoded(tmp_path):
    bombs = {
        "a.png": png(60_000, 60_000), "b.jpg": jpeg(65_000, 65_000), "c.jpg": jpeg(65_000, 65_000, progressive=True),
        "d.gif": gif(65_000, 65_000), "e.webp": webp(16_383, 16_383), "f.tif": tiff(90_000, 90_000),
        "g.tif": tiff(64, 64, tile=40_000), "h.ppm": b"P5 90000 90000 255\n", "i.jpg": jpeg(9_000, 9_000, "CMYK"),
    }  # fmt: skip
    for name, encoded in bombs.items():
        (tmp_path / name).write_bytes(encoded)
    outcomes, peak = outcomes_and_peak(tmp_path)
    assert outcomes == dict.fromkeys(bombs, "too large")
    assert peak < 0.2 * LIMIT


def test_what_is_packed_into_metadata_or_later_frames_stays_packed(tmp_path):
    text = zlib.compress(bytes(300_000_000))
    bombs = {
        "frames.gif": animation(2_000),
        "profile.png": png(*PHOTO.size, extra=chunk(b"iCCP", b"x\0\0" + text)),
        "text.png": png(*PHOTO.size, extra=chunk(b"zTXt", b"x\0\0" + text)),
    }
    for name, encoded in bombs.items():
        (tmp_path / name).write_bytes(encoded)
    outcomes, peak = outcomes_and_peak(tmp_path)
    assert outcomes == {"frames.gif": [1000, 1000, 3], "profile.png": "too large", "text.png": "too large"}
    assert peak < 0.2 * LIMIT


def test_a_jpeg_that_announces_the_most_pixels_allowed_and_has_few_takes_no_more_memory(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(9_459, 9_459)[:-2])
    (tmp_path / "b.jpg").write_bytes(jpeg(9_459, 9_459, progressive=True, subsampling=0)[:-2])
    outcomes, peak = outcomes_and_peak(tmp_path)
    assert set(outcomes.values()) == {"truncated"}
    assert peak < LIMIT


LARGEST = [("RGBA", "png", {}), ("RGB", "jpeg", {"progressive": True, "subsampling": 0}), ("L", "gif", {}),
           ("RGBA", "webp", {"lossless": True, "method": 0, "quality": 0}), ("RGB", "webp", {"method": 0}),
           ("F", "tiff", {"compression": "tiff_deflate", "strip_size": 10**9}),
           ("CMYK", "tiff", {"compression": "tiff_lzw", "strip_size": 10**9}), ("RGBA", "jpeg2000", {}),
           ("I;16", "png", {}), ("CMYK", "jpeg", {"progressive": True, "subsampling": 0})]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind", "options"), LARGEST)
def test_the_largest_image_allowed_is_decoded_within_the_memory(tmp_path, mode, kind, options):
    cost = 2 if mode == "CMYK" else COSTS.get(kind.upper(), 1)  # as `pixel_limit` has it
    side = int((PIXEL_LIMIT // cost) ** 0.5)
    file = io.BytesIO()
    Image.new(mode, (side, side), 7 if mode in ("L", "F", "I;16") else (9, 99, 200, 99)[: len(mode)]).save(
        file, kind, **options
    )
    (tmp_path / "bomb").write_bytes(file.getvalue())
    outcomes, peak = outcomes_and_peak(tmp_path)
    assert outcomes == {"bomb": [side, side, 3]}
    assert peak < LIMIT
