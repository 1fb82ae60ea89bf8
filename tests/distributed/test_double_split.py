import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from processes import run_on_processes

from e2mc_hf.data.double_split import check_same_on_every_process, refuse_iterable
from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.shards import open_shards
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.distributed import rank
from e2mc_hf.errors import UsageError


def dataset_of(count: int) -> Dataset:
    rows = [{"bytes": bytes([index]) * 9, "path": None} for index in range(count)]
    return Dataset.from_dict({"image": rows}, features=Features({"image": Image()}))


def split_by_node(count):
    return split_dataset_by_node(dataset_of(count), rank=rank(), world_size=2)


def sharded(count):
    return dataset_of(count).shard(2, rank(), contiguous=False)


def whole(count):
    return dataset_of(count)


def outcome(make, count) -> str:
    source = ImageSource(make(count), "image", None, "x", None)
    try:
        check_same_on_every_process(source)
    except UsageError as error:
        return str(error)
    return "same"


def stream_outcome(files: list[str]) -> str:
    own = files if rank() == 0 else files[1:]
    try:
        check_same_on_every_process(StreamSource(open_shards(own, "imagefolder", "image"), "image", "x", None))
    except UsageError as error:
        return str(error)
    return "same"


def outcomes(files: list[str]) -> list[str]:
    cut = [outcome(make, count) for make in (split_by_node, sharded) for count in (10, 9)]
    return [*cut, stream_outcome(files), *(outcome(whole, count) for count in (0, 1, 10))]


def test_a_dataset_cut_by_process_before_is_refused_on_every_process(tmp_path):
    first, second = run_on_processes(outcomes, 2, [str(tmp_path / f"{index}.png") for index in range(3)])
    assert first == second
    for message, lengths in zip(first[:5], ("5, 5", "5, 4", "5, 5", "5, 4", "3, 2"), strict=True):
        assert f"got 2 different ones with {lengths} images" in message
        assert "Leave out split_dataset_by_node" in message
    assert first[5:] == ["same"] * 3


def test_one_process_has_nothing_to_compare():
    assert outcome(whole, 3) == "same"


@pytest.mark.parametrize("split", [False, True])
def test_a_stream_of_datasets_is_refused_with_what_to_use(split):
    stream = IterableDataset.from_generator(lambda: iter([{"x": 0}]), features=Features({"x": Value("int64")}))
    with pytest.raises(UsageError, match=r"got IterableDataset\. .*ViewDataset\(load_images\(.*split_dataset_by_node"):
        refuse_iterable(split_dataset_by_node(stream, rank=0, world_size=2) if split else stream)
