"""Images packed in files of each format: map-style and streamed they are the same, in the same order."""

import functools
import io
import pickle
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.shard_files import write_tar
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage

from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.resolving import find_files
from e2mc_hf.data.sources import load_images, load_test_images
from e2mc_hf.errors import UsageError


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def packed(tmp_path) -> dict[str, tuple[Path, list[bytes]]]:
    """Folders of seven images in two files for each format, and the images in order."""
    images = [jpeg(seed) for seed in range(7)]
    folders = {name: tmp_path / name for name in ("parquet", "webdataset", "imagefolder", "table")}
    for folder in folders.values():
        (folder / "train").mkdir(parents=True)
    for number, (start, stop) in enumerate([(0, 4), (4, 7)]):
        rows = [{"bytes": image, "path": f"{start + i}.jpg"} for i, image in enumerate(images[start:stop])]
        columns = {"photo": rows, "label": list(range(start, stop))}
        features = Features({"photo": Image(), "label": ClassLabel(num_classes=7)})
        Dataset.from_dict(columns, features=features).to_parquet(folders["parquet"] / f"train/{number}.parquet")
        pq.write_table(
            pa.table({"photo": rows, "count": columns["label"]}), folders["table"] / f"train/{number}.parquet"
        )
        members = [
            (f"{start + i}.{kind}", content)
            for i, image in enumerate(images[start:stop])
            for kind, content in (("cls", str(start + i).encode()), ("jpg", image), ("json", b'{"a": 1}'))
        ]
        write_tar(folders["webdataset"] / f"train/{number}.tar", members)
    for number, image in enumerate(images):
        folder = folders["imagefolder"] / "train" / ("cat" if number < 4 else "dog")
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(image)
    return {name: (folder, images) for name, folder in folders.items()}


FORMATS = ["parquet", "webdataset", "imagefolder", "table"]


def read_stream(source):
    return [content for shard in source.shards for content in shard.read(0, shard.rows)]


@pytest.mark.parametrize("format", FORMATS)
def test_the_bytes_of_an_image_are_those_of_its_file(packed, format):
    folder, images = packed[format]
    source = load_images(DataArguments(dataset=str(folder)), "train")
    assert [source.encoded(index) for index in range(len(source))] == images
    assert source.image(3).tobytes() == PillowImage.open(io.BytesIO(images[3])).convert("RGB").tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_a_stream_has_the_images_of_the_folder_in_the_same_order(packed, format):
    folder, images = packed[format]
    source = load_images(DataArguments(dataset=str(folder), streaming=True), "train")
    assert (len(source), source.name, source.revision, source.split) == (7, format, None, "train")
    assert read_stream(source) == images


def test_labels_of_a_webdataset_are_its_cls(packed):
    source = load_images(DataArguments(dataset=str(packed["webdataset"][0])), "train")
    assert (source.image_column, source.label_column, source.labels().tolist()) == ("jpg", "cls", list(range(7)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("format", "pattern"), [("parquet", "*.parquet"), ("webdataset", "*.tar"), ("imagefolder", "**/*.jpg")]
)
def test_files_are_loaded_by_the_name_of_their_format(packed, format, pattern, streaming):
    folder, images = packed[format]
    for files in (f"{folder}/train/{pattern}", sorted(map(str, (folder / "train").glob(pattern)))):
        source = load_images(DataArguments(dataset=format, data_files=files, streaming=streaming), "train")
        assert (read_stream(source) if streaming else [source.encoded(i) for i in range(len(source))]) == images
        assert source.name.startswith(f"{format}:")


@pytest.fixture
def served(packed):
    """Address of the folders on a web server, and the requests it got."""
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            requests.append(self.path)

        def log_error(self, *_):
            pass

    folder = packed["parquet"][0].parent
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()
    thread.join()


def test_files_that_a_server_does_not_have_are_refused_with_their_url(served):
    arguments = DataArguments(dataset="parquet", data_files=f"{served[0]}/none.parquet", streaming=True)
    with pytest.raises(UsageError, match=r"file http://127\.0\.0\.1:\d+/none\.parquet .*404"):
        load_images(arguments, "train")
    assert len(served[1]) == 1


def test_files_on_a_server_are_found_without_asking_it(served):
    found = find_files(DataArguments(dataset="parquet", data_files=[f"{served[0]}/a.parquet?key=1"]), "train")
    assert (found.files, found.format, served[1]) == ([f"{served[0]}/a.parquet?key=1"], "parquet", [])
    with pytest.raises(UsageError, match=r"must name a split of 'parquet' \(train\), got 'test'"):
        find_files(DataArguments(dataset="parquet", data_files=f"{served[0]}/a.parquet"), "test")


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_joined_by_a_plus_are_one_after_the_other(image_folder, streaming):
    arguments = DataArguments(dataset=str(image_folder), streaming=streaming)
    both, train, validation = (load_images(arguments, split) for split in ("train+validation", "train", "validation"))
    assert (len(both), both.split) == (len(train) + len(validation), "train+validation")
    if streaming:
        assert read_stream(both) == read_stream(train) + read_stream(validation)
    else:
        assert both.encoded(7) == validation.encoded(1)
        assert both.labels().tolist() == [*train.labels(), *validation.labels()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["test", "train+test", "train+train", "train+", ""])
def test_a_split_that_is_not_there_or_twice_is_refused(image_folder, split, streaming):
    with pytest.raises(UsageError, match=r"must name a split of .*\(train, validation\), got '.*'\. Pass one"):
        load_images(DataArguments(dataset=str(image_folder), streaming=streaming), split)


def test_files_of_another_format_are_read_but_not_streamed(tmp_path):
    path = tmp_path / "train.arrow"
    image = {"bytes": jpeg(0), "path": None}
    Dataset.from_dict({"image": [image]}, features=Features({"image": Image()})).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(path)
    for leftover in (tmp_path / "saved").iterdir():
        leftover.unlink()
    (tmp_path / "saved").rmdir()
    assert load_images(DataArguments(dataset=str(tmp_path)), "train").encoded(0) == jpeg(0)
    with pytest.raises(UsageError, match=r"`streaming` must be left out for files of format arrow"):
        load_images(DataArguments(dataset=str(tmp_path), streaming=True), "train")


def test_streaming_is_refused_for_evaluation(image_folder):
    with pytest.raises(UsageError, match=r"`streaming` must be left out in evaluation"):
        load_test_images(DataArguments(dataset=str(image_folder), streaming=True), None)


@pytest.mark.parametrize("name", ["0.parquet", "0.tar", "0.jpg"])
def test_a_stream_of_broken_files_is_refused_in_one_line_or_left_to_the_decoder(tmp_path, name):
    (tmp_path / name).write_bytes(b"broken")
    arguments = DataArguments(dataset=str(tmp_path), streaming=True)
    if name == "0.jpg":
        assert read_stream(load_images(arguments, "train")) == [b"broken"]
        return
    with pytest.raises(UsageError, match=r"`dataset` must be") as caught:
        load_images(arguments, "train")
    assert "\n" not in str(caught.value)


def test_an_empty_folder_cannot_be_streamed(tmp_path):
    with pytest.raises(UsageError, match="which holds none"):
        load_images(DataArguments(dataset=str(tmp_path), streaming=True), "train")


def test_a_source_travels_without_what_it_has_cached(image_folder):
    source = load_images(DataArguments(dataset=str(image_folder)), "train")
    before = len(pickle.dumps(source))
    content = source.encoded(4)
    assert len(pickle.dumps(source)) == before
    assert pickle.loads(pickle.dumps(source)).encoded(4) == content


def test_a_file_list_picks_its_images_for_training_only(image_folder, tmp_path):
    (tmp_path / "list.txt").write_text("dog/1.png\ncat/2.png\n")
    arguments = DataArguments(dataset=str(image_folder), file_list=str(tmp_path / "list.txt"))
    source, whole = (load_images(a, "train") for a in (arguments, DataArguments(dataset=str(image_folder))))
    assert [source.encoded(index) for index in range(len(source))] == [whole.encoded(2), whole.encoded(4)]
    assert source.labels().tolist() == [0, 1]
    assert len(load_test_images(arguments, None)) == 4


def test_max_samples_are_those_of_the_file_list(packed, tmp_path):
    (tmp_path / "list.txt").write_text("1.jpg\n3.jpg\n5.jpg\n")
    folder, images = packed["parquet"]
    arguments = DataArguments(dataset=str(folder), file_list=str(tmp_path / "list.txt"), max_samples=2)
    source = load_images(arguments, "train")
    assert len(source) == 2
    assert {source.encoded(0), source.encoded(1)} < {images[1], images[3], images[5]}


def test_digits_have_no_file_names_to_pick():
    with pytest.raises(UsageError, match="`file_list` must be left out for a dataset that stores no file names"):
        load_images(DataArguments(file_list=__file__), "train")


def test_real_photographs_stream_as_they_are_stored(photo_folder):
    arguments = DataArguments(dataset=str(photo_folder))
    whole = load_images(arguments, "validation")
    stream = load_images(DataArguments(dataset=str(photo_folder), streaming=True), "validation")
    assert len(stream) == len(whole) == 3925
    (shard,) = stream.shards
    assert list(shard.read(3000, 3010)) == [whole.encoded(index) for index in range(3000, 3010)]


REFUSED = [
    ({"streaming": True}, "streaming"),
    ({"dataset": "photos", "streaming": True, "max_samples": 3}, "max_samples"),
    ({"dataset": "photos", "streaming": True, "file_list": "list.txt"}, "file_list"),
    ({"dataset": "parquet"}, "dataset"),
    ({"dataset": "webdataset", "streaming": True}, "dataset"),
    ({"dataset": "parquet", "data_files": []}, "data_files"),
    ({"data_files": "a.parquet"}, "data_files"),
    ({"shuffle_window": 0}, "shuffle_window"),
    ({"max_unreadable_share": 1.01}, "max_unreadable_share"),
    ({"max_unreadable_share": float("nan")}, "max_unreadable_share"),
]


@pytest.mark.parametrize(("options", "name"), REFUSED)
def test_options_that_do_not_go_together_are_refused_with_the_remedy(options, name):
    with pytest.raises(UsageError, match=rf"^`{name}` must .*, got .*\. [A-Z0-9].*\.$"):
        DataArguments(**options)
