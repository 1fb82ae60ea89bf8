"""The Trainer's way of getting images: which batches, from where a resumed run goes on, and what could not be read."""

import logging
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from e2mc_hf.arguments import require
from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.double_split import check_same_on_every_process, refuse_iterable
from e2mc_hf.data.loader import ViewLoader, batch_order
from e2mc_hf.data.retrying import RemoteFileError, RemoteFileUnreachableError
from e2mc_hf.data.stream_order import StreamBatchSampler
from e2mc_hf.data.unreadable import UnreadableCount
from e2mc_hf.data.workers import UnusableWorkersError
from e2mc_hf.distributed import all_gather_object, rank
from e2mc_hf.errors import UsageError
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.checkpoint_trainer import CheckpointTrainer
from e2mc_hf.training.data_state import FILE, check_same_order, data_state, order_of, read_data_state
from e2mc_hf.training.saving import SaveFailedError
from e2mc_hf.training.skipping import batches_skipped_by_the_loader

logger = logging.getLogger(__name__)


class ViewTrainer(CheckpointTrainer):
    """`transformers.Trainer` that trains on a `ViewDataset`: exact batches on every process, exact resume.

    Global batches are cut by rank here, never by accelerate. Images that cannot be read are counted over all processes,
    reported at the end of each epoch, and stop the training when there are too many. Any other dataset is left to
    transformers.
    """

    train_dataset: Dataset[Any] | None
    eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | None

    def __init__(
        self,
        model: nn.Module,
        args: E2MCTrainingArguments,
        train_dataset: Dataset[Any] | None = None,
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        for dataset in (train_dataset, eval_dataset):
            if isinstance(dataset, datasets.IterableDataset):
                refuse_iterable(dataset)
        if isinstance(train_dataset, ViewDataset):
            check_same_on_every_process(train_dataset.source)
            # Refuses a dataset smaller than a batch before transformers makes the output folder.
            batch_order(
                train_dataset,
                args.per_device_train_batch_size,
                rank=args.process_index,
                world_size=args.world_size,
                seed=args.seed,
            )
        if isinstance(eval_dataset, ViewDataset) and args.eval_strategy != "no":
            check_same_on_every_process(eval_dataset.source, name="eval_dataset")
            _check_evaluation_batch(eval_dataset, args)
        self._resumed_state: dict[str, Any] | None = None
        self._train_loader: ViewLoader | None = None
        self._earlier = UnreadableCount()  # of the epochs before this one, over all processes
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Global batches of views, cut by rank here and not by accelerate."""
        if not isinstance(self.train_dataset, ViewDataset):
            return super().get_train_dataloader()
        lanes = self._resumed_state["order"].get("lanes") if self._resumed_state else None
        loader = self._view_loader(self.train_dataset, self.args.per_device_train_batch_size, lanes=lanes)
        self._train_loader = loader
        logger.info("%d of %d images fill no batch in an epoch.", loader.order.num_dropped, len(self.train_dataset))
        if self._resumed_state is not None:
            check_same_order(self._resumed_state["order"], self._order())
            self._earlier = UnreadableCount.from_state_dict(self._resumed_state["unreadable_earlier"])
            if rank() == 0:
                loader.unreadable = UnreadableCount.from_state_dict(self._resumed_state["unreadable"])
        return loader

    def get_eval_dataloader(self, eval_dataset: Dataset[Any] | str | None = None) -> DataLoader[Any]:
        """Global batches of views in the order of the dataset."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str) and isinstance(self.eval_dataset, dict):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, ViewDataset):
            _check_evaluation_batch(dataset, self.args)
            return self._view_loader(dataset, self.args.per_device_eval_batch_size, shuffle=False)
        return super().get_eval_dataloader(eval_dataset)

    def _begin(self, checkpoint: str | None) -> None:
        super()._begin(checkpoint)
        has_views = isinstance(self.train_dataset, ViewDataset)
        self._resumed_state = read_data_state(checkpoint) if checkpoint is not None and has_views else None
        self._earlier = UnreadableCount()

    def _train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        """Train; a resumed run goes on with the very next batch.

        Raises:
            UsageError: If the checkpoint is of a run on other images or other batches, too many images cannot be read,
                or no images come any more, because workers are lost again and again or a stream's server is out of
                reach; a single process saves a checkpoint then.
        """
        try:
            return super()._train_from(checkpoint, *args, **kwargs)
        except (UnusableWorkersError, RemoteFileUnreachableError, RemoteFileError) as error:
            raise UsageError(f"{error} {self._save_where_it_stopped()}") from error

    def _save_where_it_stopped(self) -> str:
        """Save the run between two steps, if no other process is in the middle of one; say from where to go on.

        Several processes do not: the one that has no images would wait for those that wait for it in a step.
        """
        if self.args.world_size > 1 or self.state.global_step == 0:
            return "A run with checkpoints can be resumed from its last one."
        assert self.model is not None
        try:
            self._save_checkpoint(self.model, trial=None)
        except SaveFailedError as failure:
            return f"The run could not be saved: {failure}. It can be resumed from its last checkpoint, if it has one."
        return f"The run was saved: go on with --resume_from_checkpoint {self._newest}."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, and stop when too many images could not be read."""
        super().log(logs, start_time)
        if "loss" in logs and self._train_loader is not None:
            self._check_images(self._train_loader)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # resumed at its end; transformers (5.23) would take one more step
            return None
        with batches_skipped_by_the_loader():
            result = super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self._train_loader is not None:
            self._finish_epoch(self._train_loader, int(kwargs["epoch"]))
        return result

    def _finish_epoch(self, loader: ViewLoader, epoch: int) -> None:
        """Report what could not be read in an epoch, and begin to count anew."""
        count = self._count_over_processes(loader)
        if count.skipped and rank() == 0:
            logger.warning("Epoch %d: %s.", epoch + 1, count.report())
        self._refuse_too_many(count)
        self._earlier.merge(count)
        loader.unreadable = UnreadableCount()

    def _check_images(self, loader: ViewLoader) -> None:
        """Stop all processes together when too many images could not be read."""
        own = torch.tensor(loader.unreadable.skipped, device=self.args.device)
        if self._earlier.skipped + int(self.accelerator.reduce(own, reduction="sum")) > 0:
            self._refuse_too_many(self._count_over_processes(loader))

    def _refuse_too_many(self, count: UnreadableCount) -> None:
        assert isinstance(self.train_dataset, ViewDataset)
        self._of_the_run(count).check(self.train_dataset.max_unreadable_share, self.train_dataset.source.name)

    def _of_the_run(self, count: UnreadableCount) -> UnreadableCount:
        """Count of an epoch and all before it."""
        total = UnreadableCount()
        total.merge(self._earlier)
        total.merge(count)
        return total

    def _count_over_processes(self, loader: ViewLoader) -> UnreadableCount:
        total = UnreadableCount()
        for count in all_gather_object(loader.unreadable):
            total.merge(count)
        return total

    def _extra_members(self) -> dict[str, Any]:
        """What the images to come depend on."""
        members = super()._extra_members()
        if self._train_loader is None:
            return members
        count, earlier = self._count_over_processes(self._train_loader), self._earlier
        if self.state.global_step % len(self._train_loader) == 0:  # resumed from here, the next epoch counts anew
            count, earlier = UnreadableCount(), self._of_the_run(count)
        return {**members, FILE: data_state(self._order(), count, earlier)}

    def _order(self) -> dict[str, Any]:
        assert isinstance(self.train_dataset, ViewDataset)
        order = self._train_loader.order if self._train_loader is not None else None
        lanes = order.lanes if isinstance(order, StreamBatchSampler) else None
        return order_of(self.train_dataset, self.args, lanes)

    def _view_loader(
        self, dataset: ViewDataset, batch_size: int, *, shuffle: bool = True, lanes: int | None = None
    ) -> ViewLoader:
        return ViewLoader(
            dataset,
            batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            seed=self.args.seed,
            shuffle=shuffle,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            device=self.args.device,
            worker_timeout=self.args.worker_timeout,
            lanes=lanes,
        )

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return torch.as_tensor(self.accelerator.reduce(values, reduction="mean"))


def _check_evaluation_batch(dataset: ViewDataset, args: E2MCTrainingArguments) -> None:
    require(
        len(dataset) >= args.per_device_eval_batch_size * args.world_size,
        "per_device_eval_batch_size",
        f"times {args.world_size} processes must not exceed the {len(dataset)} images to evaluate on",
        args.per_device_eval_batch_size,
        "Pass a smaller one.",
    )
