"""A worker that dies or freezes: noticed, started again at the very batch, given up on in the end."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from data.deadly_source import DeadlySource
from data.image_files import encoded, map_source
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data import loader as loader_module
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.loader import ViewLoader
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.views import ViewTransform
from e2mc_hf.data.worker_watch import WorkerWatch
from e2mc_hf.data.workers import UnusableWorkersError, next_batch, stop_workers

IMAGES = 48
TRANSFORM = ViewTransform(ViewArguments(), ImageSettings(size=8))


@pytest.fixture(autouse=True)
def impatient_loaders(monkeypatch):
    """Torch looks for dead workers every five seconds; here it does ten times as often."""
    look = _MultiProcessingDataLoaderIter._try_get_data
    assert look.__defaults__ == (5.0,)
    monkeypatch.setattr(look, "__defaults__", (0.5,))


@pytest.fixture(autouse=True, scope="module")
def warm_fork_server():
    """The first workers wait for their libraries, which takes many seconds on a busy machine: not those of a test."""
    dataset = ViewDataset(map_source(encoded(4)), TRANSFORM, seed=0)
    assert len(views(ViewLoader(dataset, 4, rank=0, world_size=1, seed=0, num_workers=1))) == 1


def loader(tmp_path: Path, charges: int, kind: int = signal.SIGKILL, **options) -> ViewLoader:
    """Batches of 4, with an image that sends its reader a signal, so many times."""
    folder = tmp_path / "charges"
    folder.mkdir()
    for number in range(charges):
        (folder / str(number)).touch()
    plain = map_source(encoded(IMAGES))
    source = DeadlySource(plain.dataset, "image", None, "tiny", None, deadly=17, signal=kind, charges=folder)
    dataset = ViewDataset(source, TRANSFORM, seed=0)
    return ViewLoader(dataset, 4, rank=0, world_size=1, seed=0, **options)


def views(batches) -> list[torch.Tensor]:
    return [torch.stack(batch["views"]) for batch in batches]


def expected(tmp_path: Path) -> list[torch.Tensor]:
    return views(
        ViewLoader(ViewDataset(map_source(encoded(IMAGES)), TRANSFORM, seed=0), 4, rank=0, world_size=1, seed=0)
    )


@pytest.mark.parametrize(
    ("kind", "timeout", "message"), [(signal.SIGKILL, 60.0, "died"), (signal.SIGSTOP, 6.0, "for 6 seconds")]
)
def test_a_lost_worker_costs_no_image_and_changes_none(tmp_path, caplog, kind, timeout, message):
    with caplog.at_level(logging.WARNING):
        batches = views(loader(tmp_path, 1, kind, num_workers=2, worker_timeout=timeout))
    assert message in caplog.records[0].message
    assert all(map(torch.equal, batches, expected(tmp_path)))
    assert len(batches) == IMAGES // 4


@pytest.mark.parametrize(("kind", "timeout"), [(signal.SIGKILL, 60.0), (signal.SIGSTOP, 6.0)])
def test_a_worker_lost_between_two_epochs_costs_no_image_either(tmp_path, caplog, kind, timeout):
    batches = loader(tmp_path, 0, num_workers=2, worker_timeout=timeout)
    first = views(batches)
    os.kill(batches._iterator._workers[0].pid, kind)
    with caplog.at_level(logging.WARNING):
        again = views(batches)
    assert "started again at batch 0 (1 of 3)" in caplog.records[0].message
    assert len(again) == len(first)
    assert all(map(torch.equal, again, first))


PROGRAM = """
import time

from data.image_files import encoded, map_source
from e2mc_hf.arguments import ViewArguments
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.image_settings import ImageSettings
from e2mc_hf.data.loader import ViewLoader
from e2mc_hf.data.views import ViewTransform

if __name__ == "__main__":
    dataset = ViewDataset(map_source(encoded(48)), ViewTransform(ViewArguments(), ImageSettings(size=8)), seed=0)
    batches = iter(ViewLoader(dataset, 4, rank=0, world_size=1, seed=0, num_workers=2))
    next(batches)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_workers_end_with_the_training_process_even_if_that_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    training = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=environment)
    assert training.stdout is not None
    assert training.stdout.readline() == "ready\n"
    family = psutil.Process(training.pid).children(recursive=True)
    assert len(family) >= 2
    training.kill()
    training.communicate()
    _, left = psutil.wait_procs(family, timeout=20)
    for process in left:
        process.kill()
    assert left == []


def test_workers_lost_again_and_again_end_in_one_clear_error_and_none_outlives_it(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "_MOST_RESTARTS", 1)
    stopped = []

    def stop(batches):
        stopped.extend(worker.pid for worker in batches._workers)
        stop_workers(batches)

    monkeypatch.setattr(loader_module, "stop_workers", stop)
    message = r"`dataloader_num_workers` processes were lost 2 times .* \(0 decodes in the training process\)"
    with pytest.raises(UnusableWorkersError, match=message):
        views(loader(tmp_path, 9, num_workers=1))
    assert len(set(stopped)) == 2
    for pid in stopped:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_error_that_is_not_the_workers_end_stays_what_it_is():
    def broken():
        yield 1
        raise RuntimeError("something else")

    batches = broken()
    assert next_batch(batches, WorkerWatch(10.0)) == 1
    with pytest.raises(RuntimeError, match=r"^something else$"):
        next_batch(batches, WorkerWatch(10.0))


@dataclass(frozen=True)
class SlowShard:
    """A shard that is read ever more slowly, as over a bad network, until that breaks."""

    images: list[bytes]

    @property
    def rows(self):
        return len(self.images)

    def read(self, start, stop):
        for number, image in enumerate(self.images[start:stop]):
            if number >= 16 and number % 8 == 0:
                time.sleep(3)
            if number == 24:
                raise ConnectionError("the network is down")
            yield image


def test_time_and_errors_of_reading_a_stream_are_not_the_workers(caplog):
    source = StreamSource([SlowShard(encoded(IMAGES))], "image", "tiny", None)
    dataset = ViewDataset(source, TRANSFORM, seed=0, shuffle_window=8)
    slow = ViewLoader(dataset, 4, rank=0, world_size=1, seed=0, shuffle=False, num_workers=1)
    batches = iter(slow)
    next(batches)
    slow._watch.timeout = 1.5  # the worker runs by now
    with pytest.raises(ConnectionError, match="the network is down"):
        list(batches)
    assert not caplog.records


def test_the_watch_kills_only_for_time_that_was_not_paused():
    watch = WorkerWatch(1.0)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with watch.waiting_for([process]):
        with watch.paused():
            time.sleep(1.5)
        assert process.poll() is None
        assert process.wait(30) != 0
    assert watch.has_fired


def test_the_watch_kills_nobody_once_the_wait_is_over():
    watch = WorkerWatch(0.2)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with watch.waiting_for([process]):
        pass
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.wait()
