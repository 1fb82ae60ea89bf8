import json
import re
from collections import Counter

import pytest
import torch
from data.image_files import encoded, map_source, stream_source

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.loader import ViewLoader
from e2mc_hf.data.unreadable import Unreadable, UnreadableCount
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError

TRANSFORM = ViewTransform(ViewArguments(), ImageSettings(size=8))
BROKEN = {3, 11, 12, 29}
COUNT = 40


def sources(tmp_path, broken=BROKEN, count=COUNT):
    images = encoded(count, broken)
    return {"map": map_source(images), "stream": stream_source(tmp_path / "shards", images, [13, 0, count - 13])}


def batches(source, batch_size=5, rank=0, world_size=1, num_workers=0, **options):
    loader = ViewLoader(
        ViewDataset(source, TRANSFORM, seed=0, shuffle_window=8),
        batch_size,
        rank=rank,
        world_size=world_size,
        seed=0,
        num_workers=num_workers,
        **options,
    )
    return [torch.stack(batch["views"]) for batch in loader], loader.unreadable


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_every_unreadable_image_is_counted_once_and_its_place_refilled(tmp_path, kind, num_workers):
    views, count = batches(sources(tmp_path)[kind], num_workers=num_workers)
    assert [len(batch[0]) for batch in views] == [5] * 8
    assert count.seen == COUNT
    assert count.reasons == Counter({"not an image": len(BROKEN)})
    assert {*count.examples["not an image"]} < BROKEN


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_stand_ins_are_the_same_for_any_number_of_processes_and_workers(tmp_path, kind):
    source = sources(tmp_path)[kind]
    lanes = {"lanes": 2} if kind == "stream" else {}
    alone, _ = batches(source, 8, **lanes)
    ranks = [batches(source, 4, rank=rank, world_size=2, num_workers=rank, **lanes)[0] for rank in (0, 1)]
    together = [torch.cat(halves, dim=1) for halves in zip(*ranks, strict=True)]
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_a_dataset_without_a_readable_image_ends_in_one_clear_error(tmp_path, kind):
    source = sources(tmp_path, broken=range(COUNT))[kind]
    with pytest.raises(UsageError, match=r"`dataset` must hold readable images, .* of 'tiny' .*Repair"):
        batches(source)


def test_a_share_says_nothing_below_a_thousand_images():
    count = UnreadableCount()
    count.add(999, [Unreadable(number, "truncated") for number in range(500)])
    count.check(0.01, "tiny")
    count.add(1, [])
    with pytest.raises(UsageError, match=r"`max_unreadable_share` allows 1.00% .* got 50.00%: 500 of 1,000"):
        count.check(0.01, "tiny")


def test_exactly_the_allowed_share_is_put_up_with():
    count = UnreadableCount()
    count.add(1000, [Unreadable(number, "corrupt") for number in range(10)])
    count.check(0.01, "tiny")
    count.add(0, [Unreadable(11, "corrupt")])
    with pytest.raises(UsageError):
        count.check(0.01, "tiny")


def test_the_report_names_reasons_by_frequency_with_examples():
    count = UnreadableCount()
    count.add(2000, [Unreadable(7, "empty"), *(Unreadable(number, "truncated") for number in range(5))])
    assert count.report() == (
        "6 of 2,000 images could not be read and were replaced: 5 truncated (0, 1, 2, ...); 1 empty (7)"
    )


def test_counts_of_processes_add_up_and_survive_a_checkpoint():
    first, second = UnreadableCount(), UnreadableCount()
    first.add(10, [Unreadable(1, "empty")])
    second.add(20, [Unreadable(2, "empty"), Unreadable(3, "corrupt")])
    first.merge(UnreadableCount.from_state_dict(json.loads(json.dumps(second.state_dict()))))
    assert (first.seen, dict(first.reasons)) == (30, {"empty": 2, "corrupt": 1})
    assert re.search(r"2 empty \(1, 2\)", first.report())
