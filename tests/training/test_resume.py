"""F7: an interrupted run, resumed however often, with any workers, from any source, ends as the unbroken one."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data.image_files import BROKEN, encoded, map_source, stream_source
from torch import Tensor
from training.tiny_runs import differences, state_of
from transformers import TrainerCallback

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.retrying import RemoteFileUnreachableError
from e2mc_hf.data.shards import Shard
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.errors import UsageError
from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.finishing import finished_model
from e2mc_hf.training.manifest import write_manifest
from e2mc_hf.training.trainer import E2MCTrainer

IMAGES, BATCH, STEPS = 44, 8, 12  # five steps an epoch, four images left over


class Recording(E2MCTrainer):
    """Keeps a digest of each batch it trains on."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not hasattr(self, "seen"):
            self.seen: dict[int, list[Tensor]] = {}
        self.seen[self.state.global_step] = [view.clone() for view in inputs["views"]]
        return super().training_step(model, inputs, *args, **kwargs)


def source(kind: str, folder: Path, images: list[bytes] | None = None) -> Any:
    images = images or encoded(IMAGES)
    return map_source(images) if kind == "map" else stream_source(folder, images, [20, 0, 7, len(images) - 27])


def run(
    folder: Path, own: Any, *, window: int = 10, lanes: int | None = None, small_views: int = 0, **options: Any
) -> Recording:
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", from_scratch=True, image_size=32)
    heads = {"projector_dim": 16, "hidden_dim": 16, "num_prototypes": 12, "queue_length": 16}
    model = SSLModel.from_backbone(backbone, "swav", heads, image_size=32)
    recipe = ViewArguments(image_size=32, num_small_views=small_views, small_image_size=16)
    dataset = ViewDataset(
        own, ViewTransform(recipe, backbone.image_settings), seed=0, shuffle_window=window, lanes=lanes
    )
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "save_strategy": "steps",
        "save_steps": 1,
    } | options
    arguments = E2MCTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=0.05,
        regularizer="none",
        **options,
    )
    return Recording(model, arguments, dataset)


@dataclass
class CountedShard:
    """A shard that notes how many rows were read of it."""

    shard: Shard
    reads: list[int]

    @property
    def rows(self) -> int:
        return self.shard.rows

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        for image in self.shard.read(start, stop):
            self.reads.append(1)
            yield image


@dataclass
class BreakingShard(CountedShard):
    """A shard whose server is out of reach after some rows."""

    most: int = 30

    def read(self, start: int, stop: int) -> Iterator[bytes | None]:
        for image in super().read(start, stop):
            if len(self.reads) > self.most:
                raise RemoteFileUnreachableError("http://server/0.parquet cannot be reached.")
            yield image


class StopAt(TrainerCallback):
    """Ends a run after a step, as an interruption right after a checkpoint does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def cut_at(step: int, folder: Path, own: Any, **options: Any) -> Path:
    """Checkpoint of a run that was interrupted after a step."""
    trainer = run(folder, own, **options)
    trainer.add_callback(StopAt(step))
    trainer.train()
    return folder / f"checkpoint-{step}"


def end(trainer: Recording) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first: Recording, second: Recording) -> None:
    for step, views in second.seen.items():
        assert all(map(torch.equal, first.seen[step], views)), step
    assert all(torch.equal(tensor, end(second)[name]) for name, tensor in end(first).items())


@pytest.mark.parametrize(
    ("kind", "num_workers", "small_views", "cuts"),
    [
        # Cut within an epoch, at its end, at the last step, and several times.
        ("map", 0, 0, (5,)),
        ("map", 0, 0, (2, 7)),
        ("stream", 0, 0, (5,)),
        ("stream", 0, 0, (11,)),
        ("stream", 0, 0, (1, 6, 9)),
        ("stream", 2, 2, (3,)),
        ("map", 2, 2, (3,)),
        ("map", 4, 2, (1, 6, 9)),
        ("stream", 4, 2, (1, 6, 9)),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_a_run_resumed_at_any_step_sees_and_becomes_the_same(
    tmp_path: Path, kind: str, num_workers: int, small_views: int, cuts: tuple[int, ...]
) -> None:
    own = source(kind, tmp_path / "shards")
    options = {"small_views": small_views, "dataloader_num_workers": num_workers}
    whole = run(tmp_path / "whole", own, save_steps=STEPS, **options)
    whole.train()
    assert sorted(whole.seen) == list(range(STEPS))
    checkpoint, begin = None, 0
    for cut in (*cuts, STEPS):
        part = run(tmp_path / "cut", own, **options)
        stop = tmp_path / "cut" / f"checkpoint-{cut}"
        part.add_callback(StopAt(cut))
        part.train(resume_from_checkpoint=checkpoint)
        checkpoint = str(stop)
        assert min(part.seen) == begin
        begin = cut
    assert_same(whole, part)
    first, second = (state_of(tmp_path / name / f"checkpoint-{STEPS}") for name in ("whole", "cut"))
    assert {"model", "optimizer.pt", "scheduler.pt", "rng_state.pth", "data_state.json"} < first.keys()
    assert differences(first, second) == []


def test_a_resumed_stream_reads_only_what_it_needs(tmp_path: Path) -> None:
    own = source("stream", tmp_path / "shards")
    run(tmp_path / "cut", own, max_steps=9).train()
    reads: list[int] = []
    counted = replace(own, shards=[CountedShard(shard, reads) for shard in own.shards])
    resumed = run(tmp_path / "cut", counted, max_steps=9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    begun, next_one = 13, 14  # the 40 rows of the epoch in blocks that hold a batch and its spares at least
    assert sum(reads) == begun + next_one  # no more than the block it was in, and the one that is read ahead


def test_unreadable_images_are_counted_on_over_an_interruption(tmp_path: Path) -> None:
    images = encoded(40, {2, 5, 21, 30})
    whole, cut = (run(tmp_path / name, source("map", tmp_path, images), max_steps=5) for name in ("whole", "cut"))
    whole.train()
    cut.train()
    resumed = run(tmp_path / "cut", source("map", tmp_path, images), max_steps=5)
    resumed.train(resume_from_checkpoint=tmp_path / "cut" / "checkpoint-3")
    states = [json.loads((tmp_path / n / "checkpoint-4" / "data_state.json").read_text()) for n in ("whole", "cut")]
    assert states[0] == states[1]
    assert states[0]["unreadable"]["seen"] == 32


def test_a_run_resumed_at_the_end_of_an_epoch_counts_the_next_one_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = encoded(40, {2, 5, 21, 30})
    runs = [run(tmp_path / "run", source("map", tmp_path, images), max_steps=10) for _ in range(2)]
    runs[0].train()
    whole = json.loads((tmp_path / "run" / "checkpoint-9" / "data_state.json").read_text())
    caplog.clear()
    runs[1].train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-5")
    (report,) = [record.message for record in caplog.records if "could not be read" in record.message]
    assert report.startswith("Epoch 2: 4 of 40 images")
    assert json.loads((tmp_path / "run" / "checkpoint-9" / "data_state.json").read_text()) == whole
    assert whole["unreadable_earlier"]["seen"] == 40
    assert whole["unreadable"]["seen"] == 32


@pytest.mark.parametrize("steps", [5, 7])
def test_a_run_resumed_at_its_end_takes_no_step_more(tmp_path: Path, steps: int) -> None:
    whole, resumed = (run(tmp_path / "run", source("map", tmp_path), max_steps=steps) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{steps}"))
    assert resumed.state.global_step == steps
    assert all(torch.equal(tensor, end(whole)[name]) for name, tensor in end(resumed).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 4}, r"batch over all processes \(then 8, now 4\)"),
        ({"seed": 1}, r"seed \(then 0, now 1\)"),
        ({"window": 20}, r"shuffle_window \(then 10, now 20\)"),
    ],
)
def test_a_resume_that_would_see_other_batches_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    own = source("stream", tmp_path / "shards")
    checkpoint = cut_at(2, tmp_path / "cut", own)
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "cut", own, **options).train(resume_from_checkpoint=checkpoint)


def test_a_resume_goes_on_with_the_lanes_of_the_interrupted_run(tmp_path: Path) -> None:
    own = source("stream", tmp_path / "shards")
    whole, cut = (run(tmp_path / name, own, lanes=4, max_steps=8) for name in ("whole", "cut"))
    whole.train()
    cut.add_callback(StopAt(3))
    cut.train()
    resumed = run(tmp_path / "cut", own, max_steps=8)  # lanes left to the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert_same(whole, resumed)


def test_a_resume_on_other_images_is_refused(tmp_path: Path) -> None:
    checkpoint = cut_at(2, tmp_path / "cut", source("map", tmp_path))
    other = run(tmp_path / "cut", source("map", tmp_path, encoded(IMAGES + 1)))
    with pytest.raises(UsageError, match=r"images \(then 44, now 45\)"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_resume_on_the_same_images_in_other_shards_is_refused(tmp_path: Path) -> None:
    images = encoded(IMAGES)
    checkpoint = cut_at(2, tmp_path / "cut", stream_source(tmp_path / "a", images, [20, 24]))
    other = run(tmp_path / "cut", stream_source(tmp_path / "b", images, [24, 20]))
    with pytest.raises(UsageError, match=r"another shards \(then 2 shards \w+, now 2 shards \w+\)"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_resume_on_another_revision_is_refused(tmp_path: Path) -> None:
    then, now = (replace(source("map", tmp_path), revision=commit) for commit in ("a1", "b2"))
    checkpoint = cut_at(2, tmp_path / "cut", then)
    with pytest.raises(UsageError, match=r"another revision \(then a1, now b2\)"):
        run(tmp_path / "cut", now).train(resume_from_checkpoint=checkpoint)


def test_a_resume_on_as_many_other_images_is_refused(tmp_path: Path) -> None:
    checkpoint = cut_at(2, tmp_path / "cut", source("map", tmp_path))
    other = run(tmp_path / "cut", source("map", tmp_path, encoded(IMAGES)[::-1]))
    with pytest.raises(UsageError, match=r"another first, middle and last image \(then \w{8}, now \w{8}\)"):
        other.train(resume_from_checkpoint=checkpoint)


def test_a_run_whose_images_stop_coming_before_its_statistics_are_recalibrated_is_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = source("stream", tmp_path / "shards")
    trainer = run(tmp_path / "run", own, max_steps=2, save_strategy="no", batch_norm="recalibrated")
    trainer.train()
    trained = end(trainer)
    gone = replace(own, shards=[BreakingShard(shard, [], most=0) for shard in own.shards])
    assert isinstance(trainer.train_dataset, ViewDataset)
    trainer.train_dataset.source = gone
    model = finished_model(trainer)
    assert "the statistics stay as trained, for no images came" in caplog.text
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_training_stops_when_too_many_images_cannot_be_read(tmp_path: Path) -> None:
    images = [BROKEN if number % 50 == 0 else image for number, image in enumerate(encoded(100))]
    options = {"max_steps": 100, "per_device_train_batch_size": 16, "save_strategy": "no"}
    trainer = run(tmp_path / "run", map_source(images), **options)
    with pytest.raises(UsageError, match=r"`max_unreadable_share` allows 1.00% .* got 1\.98%: 20 of 1,008 .*an image"):
        trainer.train()
    assert trainer.state.global_step == 63


def test_skipped_images_are_reported_at_the_end_of_each_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "run", map_source(encoded(40, {2, 5})), max_steps=10, save_strategy="no").train()
    reports = [record.message for record in caplog.records if "could not be read" in record.message]
    assert [report.split(":")[0] for report in reports] == ["Epoch 1", "Epoch 2"]
    assert all("2 of 40 images could not be read and were replaced: 2 not an image (" in report for report in reports)


def test_a_run_whose_images_stop_coming_is_saved_and_can_go_on(tmp_path: Path) -> None:
    own = source("stream", tmp_path / "shards")
    whole = run(tmp_path / "whole", own, save_strategy="no")
    whole.train()
    reads: list[int] = []
    broken = replace(own, shards=[BreakingShard(shard, reads) for shard in own.shards])
    cut = run(tmp_path / "cut", broken, save_strategy="no")
    with pytest.raises(UsageError, match=r"cannot be reached\. The run was saved: go on with --resume"):
        cut.train()
    (checkpoint,) = (tmp_path / "cut").iterdir()
    assert 0 < cut.state.global_step < STEPS
    resumed = run(tmp_path / "cut", own, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(whole, resumed)


def test_a_checkpoint_that_does_not_tell_its_images_is_refused(tmp_path: Path) -> None:
    own = source("map", tmp_path)
    checkpoint = cut_at(2, tmp_path / "cut", own)
    (checkpoint / "data_state.json").unlink()
    with pytest.raises(UsageError, match=r"`resume_from_checkpoint` must be a whole .*data_state\.json is missing"):
        run(tmp_path / "cut", own).train(resume_from_checkpoint=checkpoint)
    write_manifest(checkpoint, 2)  # whole, but of a run on something else
    with pytest.raises(UsageError, match=r"`resume_from_checkpoint` must be .* holds data_state\.json, got '.*2'"):
        run(tmp_path / "cut", own).train(resume_from_checkpoint=checkpoint)
