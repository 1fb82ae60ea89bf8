"""Refusal of datasets that were cut by process before: to cut them again would lose most images without a word."""

import hashlib
from typing import Any, NoReturn

import torch.distributed as dist
from datasets import IterableDataset

from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.distributed import world_size
from e2mc_hf.errors import UsageError


def check_same_on_every_process(source: ImageSource | StreamSource, *, name: str = "train_dataset") -> None:
    """Compare the dataset of all processes, which must call this together; one process has nothing to compare.

    Compared by content, not by the fingerprint of `datasets`: that depends on when files were copied to a machine.

    Raises:
        UsageError: If they differ; on every process.
    """
    if world_size() == 1:
        return
    seen: list[Any] = [None] * world_size()
    dist.all_gather_object(seen, (len(source), content_digest(source)))
    if len(set(seen)) > 1:
        raise UsageError(
            f"`{name}` must be the same whole dataset on every process, got {len(set(seen))} different ones with"
            f" {', '.join(str(length) for length, _ in seen)} images. Leave out split_dataset_by_node or shard: each"
            " process takes its own part of a batch, and of a dataset cut before it would see only a part of that."
        )


def refuse_iterable(dataset: IterableDataset) -> NoReturn:
    """Refuse a stream of `datasets`, whose order can neither be resumed nor checked for an earlier split.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        f"`train_dataset` must be a ViewDataset, got {type(dataset).__name__}. Make one of the same files:"
        " ViewDataset(load_images(DataArguments(dataset=..., streaming=True), 'train'), transform, seed=0)."
        " Each process reads its own part: split_dataset_by_node would cut it twice."
    )


def content_digest(source: ImageSource | StreamSource) -> str:
    """Hash of a few images, or of the shards of a stream: reading those might take minutes."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, StreamSource):
        for shard in source.shards:
            name = getattr(shard, "file", getattr(shard, "files", None))
            digest.update(repr((shard.rows, name)).encode())
    elif len(source):
        for index in (0, len(source) // 2, len(source) - 1):
            digest.update(hashlib.blake2b(source.encoded(index) or b"").digest())
    return digest.hexdigest()
