"""The Trainer that resumes: from a verified checkpoint, with the same schedule, and after a signal."""

import logging
import signal
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from e2mc_hf.distributed import all_gather_object, rank, run_on_first, world_size
from e2mc_hf.errors import UsageError
from e2mc_hf.training.checkpointing import check_shared, checkpoints_of, find_checkpoint, step_of, sweep
from e2mc_hf.training.manifest import current_versions, read_manifest, verify
from e2mc_hf.training.rng_state import load_rng_of_other_world
from e2mc_hf.training.saving import SaveFailedError
from e2mc_hf.training.saving_trainer import SavingTrainer
from e2mc_hf.training.schedule_state import (
    FILE,
    changed_schedule,
    options_of_groups,
    read_schedule_state,
    take_up_schedule,
)
from e2mc_hf.training.stopping import StopCallback, StopRequests, TrainingStopped

logger = logging.getLogger(__name__)


class CheckpointTrainer(SavingTrainer):
    """`transformers.Trainer` with checkpoints that survive, and from which a run goes on exactly.

    SIGTERM and SIGINT save a checkpoint after the step and end the process with exit code 143 or 130.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verified: str | None = None
        self._saved_processes = 1
        self._has_new_schedule = False

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers does, from a checkpoint whose every byte was verified.

        A save that failed does not end the training, and not with an error either, for then the model would be lost:
        it is logged, `failed_saves` has it, and `refuse_failed_save` raises.

        Args:
            resume_from_checkpoint: A checkpoint folder; True for the newest whole one in `output_dir`; `auto` for the
                same, or a fresh start where none was ever written.
            *args: Further arguments of `transformers.Trainer.train`.
            **kwargs: Likewise.

        Raises:
            UsageError: If the checkpoint is not whole, or not of a run like this one; if checkpoints are to be written
                to a folder that not all processes share.
            TrainingStopped: If SIGTERM or SIGINT ended the training.
        """
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        self._verified = None  # a later training verifies anew
        self._begin(checkpoint)
        with StopRequests(saves=self.writes_checkpoints) as requests:
            callback = StopCallback(requests)
            self.add_callback(callback)
            try:
                output = self._train_from(checkpoint, *args, **kwargs)
            finally:
                self.remove_callback(callback)
            self._end_if_asked(requests)
        if self.failed_saves and rank() == 0:
            logger.error("%d of %d saves failed: %s", len(self.failed_saves), self._saves, "; ".join(self.failed_saves))
        return output

    def checkpoint_to_resume(self, request: str | Path | bool | None) -> str | None:
        """Verified checkpoint that `train` resumes from; every process calls it and gets the same.

        Args:
            request: As `train` takes it.

        Raises:
            UsageError: If there is no whole one, not every process sees it, or it is not of a run like this one.
        """
        if self.args.new_schedule and not (request or self.args.resume_from_checkpoint):
            raise UsageError("`new_schedule` only has an effect on a resumed run, got True. Leave it out.")
        if not request:
            self._has_new_schedule = False
            return None
        if str(request) == self._verified:
            return self._verified
        wanted = request if request is True else str(request)
        found, problems = run_on_first(partial(find_checkpoint, wanted, str(self.args.output_dir)))
        if rank() == 0:
            for problem in problems:
                logger.warning("Passed over, for it is not whole: %s", problem)
            logger.warning("%s", f"The run goes on from {found}." if found else "There is no checkpoint yet.")
        if found is not None and not all(all_gather_object(found.is_dir())):
            raise UsageError(
                f"`resume_from_checkpoint` must be a folder that all processes share, got {str(found)!r}, which some do"
                " not see. Pass a path on a file system that all nodes mount."
            )
        self._verified = None if found is None else str(found)
        if self._verified is not None:
            self._check_like(self._verified)
        return self._verified

    def _train_from(self, checkpoint: str | None, *args: Any, **kwargs: Any) -> Any:
        return super().train(checkpoint, *args, **kwargs)

    def _begin(self, checkpoint: str | None) -> None:
        """Check, on every process, that the run can go on from a checkpoint and write others."""
        output_dir = Path(str(self.args.output_dir))
        self._forget_saves()
        if self.writes_checkpoints:
            run_on_first(partial(sweep, output_dir))
            if self.args.save_strategy != "no":
                check_shared(output_dir)
        if checkpoint is not None:
            entries = read_manifest(checkpoint)["files"].values()
            self._forget_saves(Path(checkpoint), sum(entry["bytes"] for entry in entries))
        if rank() == 0 and self.writes_checkpoints:
            _warn_of_others(output_dir, checkpoint)

    def _check_like(self, checkpoint: str) -> None:
        """Refuse to go on with another loss, or with another schedule that was not asked for."""
        manifest = read_manifest(checkpoint)
        self._saved_processes = manifest["processes"]
        if self.is_deepspeed_enabled and (self.args.new_schedule or self._saved_processes != world_size()):
            raise UsageError(
                "`resume_from_checkpoint` must go on with the same processes and schedule under DeepSpeed, got"
                f" {world_size()} processes after {self._saved_processes}, new_schedule {self.args.new_schedule}."
                " Resume as before, or start a new run from the checkpoint's model."
            )
        missing = set(self._required_members([FILE], self._saved_processes)) - manifest["files"].keys()
        if missing:
            raise UsageError(
                f"`resume_from_checkpoint` must hold all that this run needs, got {checkpoint!r} without"
                f" {', '.join(sorted(missing))}. Take another checkpoint, or start a new run from its model."
            )
        changes = changed_schedule(
            read_schedule_state(checkpoint), self._schedule_state(None), new_schedule=self.args.new_schedule
        )
        self._has_new_schedule = bool(changes)
        if rank() == 0 and changes:
            logger.warning("A new schedule from step %d on: %s.", manifest["step"], ", ".join(changes))
        then, now = manifest["versions"], current_versions()
        if rank() == 0 and then != now:
            logger.warning("The checkpoint is of %s, this is %s: the run may not go on bit for bit.", then, now)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        started = super()._init_training_state(max_steps, *args, **kwargs)
        self._best_saved = self.state.best_metric, self.state.best_global_step
        self.state.compute_steps(self.args, max_steps)  # those given now: transformers takes the checkpoint's
        return started

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
            raise _other_model(resume_from_checkpoint, " ".join(str(error).split()).rstrip(".")) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse weights that are not those of the model, where transformers only warns."""
        assert self.model is not None
        tensors = self.model.state_dict()
        loaded = {tensor.data_ptr() for name, tensor in tensors.items() if name not in load_result.missing_keys}
        # A tensor under two names is saved under one.
        missing = [name for name in load_result.missing_keys if tensors[name].data_ptr() not in loaded]
        if missing or load_result.unexpected_keys:
            raise _other_model("the checkpoint", f"missing {missing}, unexpected {load_result.unexpected_keys}")

    def _load_best_model(self) -> None:
        run_on_first(partial(verify, str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        groups, rates = options_of_groups(self.optimizer), list(getattr(self.lr_scheduler, "base_lrs", []))
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise UsageError(
                f"`resume_from_checkpoint` must hold the state of this run's optimizer, got {checkpoint!r}: {error}."
                " Resume with the old options (layer_decay makes other parameter groups), or start a new run."
            ) from error
        if self._has_new_schedule:
            take_up_schedule(self.optimizer, self.lr_scheduler, groups, rates)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._saved_processes == world_size():
            super()._load_rng_state(checkpoint)
            return
        load_rng_of_other_world(checkpoint, rank(), self._saved_processes, self.args.seed)
        if rank() == 0:
            logger.warning(
                "%d processes go on with what %d had saved: processes beyond, and the generators of all accelerators,"
                " begin with the random state of a fresh start.",
                world_size(),
                self._saved_processes,
            )

    def _end_if_asked(self, requests: StopRequests) -> None:
        """End the process if any process got a signal since, with a checkpoint of the step it came to."""
        signum = requests.agree(self.args.device)
        if signum is None:
            return
        if self.writes_checkpoints:
            try:
                assert self.model is not None
                self._save_checkpoint(self.model, trial=None)  # nothing to do if it was saved already
            except SaveFailedError:
                pass  # said already
        if rank() == 0 and self._newest is not None:
            logger.warning(
                "%s ended the run. Go on with --resume_from_checkpoint %s, or auto.",
                signal.Signals(signum).name,
                self._newest,
            )
        raise TrainingStopped(signum, self._newest)


def _other_model(checkpoint: str, difference: str) -> UsageError:
    return UsageError(
        f"`resume_from_checkpoint` must hold the weights of this very model, got {checkpoint}: {difference}."
        " Resume with the old options, or start a new run from the checkpoint's model."
    )


def _warn_of_others(output_dir: Path, checkpoint: str | None) -> None:
    """Say which checkpoints `auto` would prefer to those that this run is about to write."""
    begin = read_manifest(checkpoint)["step"] if checkpoint is not None else 0
    newer = [str(path) for path in checkpoints_of(output_dir) if step_of(path) > begin]
    if newer:
        logger.warning(
            "Newer than where this run begins: %s. `auto` takes the newest by its step; move away what is not wanted.",
            ", ".join(newer),
        )
