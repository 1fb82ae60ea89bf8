"""The Trainer whose checkpoints are written whole or not at all, and which a failed save does not end."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from e2mc_hf.distributed import rank, world_size
from e2mc_hf.errors import UsageError
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.checkpointing import rotate
from e2mc_hf.training.saved_arguments import NAME as ARGUMENTS
from e2mc_hf.training.saved_arguments import save_arguments
from e2mc_hf.training.saving import SaveFailedError, save_together
from e2mc_hf.training.schedule_state import FILE, schedule_state

logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """`transformers.Trainer` that writes checkpoints whole or not at all, each with a manifest.

    A save that fails on any process leaves the earlier checkpoints as they are, is logged, and tried again when the
    next one is due.

    Attributes:
        writes_checkpoints: False for a training that is not worth resuming.
        failed_saves: What went wrong with each checkpoint of this training that could not be written.
    """

    args: E2MCTrainingArguments
    writes_checkpoints = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget_saves()

    def _forget_saves(self, newest: Path | None = None, newest_bytes: int | None = None) -> None:
        """Begin a training: from a checkpoint of that size, or from none."""
        self.failed_saves: list[str] = []
        self._saves = 0
        self._last_save_failed = False
        self._newest, self._newest_bytes = newest, newest_bytes  # that this training wrote or began from
        self._best_saved: tuple[float | None, int | None] = (None, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-N` on all processes together.

        Raises:
            SaveFailedError: On all processes, if any could not write.
        """
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if not self.writes_checkpoints or (self._newest is not None and folder.resolve() == self._newest.resolve()):
            return
        extra = {FILE: self._schedule_state(self.state.max_steps), **self._extra_members()}
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, self._best_checkpoint(folder)
        self._saves += 1
        try:
            size = save_together(
                folder,
                self.state.global_step,
                [
                    lambda making: self.save_model(making, _internal_call=True),
                    self._save_optimizer_and_scheduler,
                    self._save_scaler,
                    self._save_rng_state,
                    lambda making: self._save_states(making, extra),
                ],
                expected_bytes=self._expected_bytes(),
                required=self._required_members(extra, world_size()),
            )
        except SaveFailedError as error:
            self.state.best_model_checkpoint = best
            if self.state.best_global_step == self.state.global_step:  # the next best is the best of those there are
                self.state.best_metric, self.state.best_global_step = self._best_saved
            self._note_failure(folder, error)
            raise
        self._last_save_failed = False
        self._newest, self._newest_bytes = folder, size
        self._best_saved = self.state.best_metric, self.state.best_global_step
        self._rotate(folder)

    def _schedule_state(self, total_steps: int | None) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        sharding = "fsdp" if self.is_fsdp_enabled else "deepspeed" if self.is_deepspeed_enabled else "none"
        return schedule_state(self.args, getattr(model, "config", None), total_steps, sharding)

    def _extra_members(self) -> dict[str, Any]:
        """Further JSON files of a checkpoint by name; every process calls it, and they may talk here."""
        return {}

    def _save_states(self, making: str, extra: dict[str, Any]) -> None:
        if not self.args.should_save:
            return
        parts: list[Any] = [*self.callback_handler.callbacks, self.control]
        parts = [part for part in parts if isinstance(part, ExportableState)]
        kept: Any = self.state.stateful_callbacks  # dictionaries, whatever transformers' annotation says
        now: Any = TrainerState(stateful_callbacks=parts).stateful_callbacks
        self.state.stateful_callbacks = {**kept, **now}  # type: ignore[assignment]
        self.state.save_to_json(str(Path(making) / "trainer_state.json"))
        for name, content in extra.items():
            (Path(making) / name).write_text(json.dumps(content, indent=1), encoding="utf-8")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model as transformers does, and the arguments as JSON without secrets, never as a pickle."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, state_dict=state_dict)
        else:
            tensors = model.state_dict() if state_dict is None else state_dict
            safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        save_arguments(self.args, folder)

    def _required_members(self, extra: Iterable[str], processes: int) -> list[str]:
        """Files without which a checkpoint of so many processes could not be resumed exactly."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # their own writers name the files of the weights
        members = [] if sharded else [ARGUMENTS, "optimizer.pt", "scheduler.pt"]
        scaler = ["scaler.pt"] if getattr(self.accelerator, "scaler", None) is not None and not sharded else []
        rng = [f"rng_state_{process}.pth" for process in range(processes)] if processes > 1 else ["rng_state.pth"]
        return [*members, *scaler, *rng, "trainer_state.json", *extra]

    def _expected_bytes(self) -> int:
        """Size of the last checkpoint, or of the tensors that the first one will hold."""
        if self._newest_bytes is not None:
            return self._newest_bytes
        assert self.model is not None
        tensors = [*self.model.parameters(), *self.model.buffers()]
        states = [] if self.optimizer is None else self.optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def _best_checkpoint(self, folder: Path) -> str | None:
        """Folder of the best step so far, which may be the one that is about to be written."""
        if not self.state.best_global_step:
            return self.state.best_model_checkpoint
        best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
        return str(best) if best == folder or best.is_dir() else self.state.best_model_checkpoint

    def _rotate(self, newest: Path) -> None:
        if rank() > 0:
            return
        best = self.state.best_model_checkpoint
        try:
            rotate(newest.parent, self.args.save_total_limit, keep=[newest, *([Path(best)] if best else [])])
        except OSError as error:
            logger.warning("`save_total_limit`: an old checkpoint could not be removed: %s", error)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # transformers (5.23) removes the newest checkpoint here if the limit is 1 and another one is the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.args.save_total_limit = limit

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except SaveFailedError:
            self.control.should_save = False  # trackers are not told of a folder that is not there

    def _note_failure(self, folder: Path, error: SaveFailedError) -> None:
        self.failed_saves.append(f"{folder.name}: {error}")
        self._last_save_failed = True
        if rank() == 0:
            logger.error(
                "%s WAS NOT SAVED: %s. Earlier checkpoints are untouched (newest: %s). The training goes on, the next"
                " save is tried when it is due.",
                folder,
                error,
                self._newest or "none",
            )

    def refuse_failed_save(self) -> None:
        """Call it when everything else is saved, so that the exit code tells of a checkpoint that is not there.

        Raises:
            UsageError: If the last checkpoint that was due could not be written.
        """
        if self._last_save_failed:
            raise UsageError(
                f"`output_dir` must take the checkpoints, got {len(self.failed_saves)} of {self._saves} that could not"
                f" be written, the last one among them: {self.failed_saves[-1]}. The training itself went to its end;"
                " make room, or pass another folder."
            )
