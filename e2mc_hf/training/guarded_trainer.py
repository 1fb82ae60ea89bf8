"""The Trainer that stops before it uses what is not finite, and says when embeddings collapse."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from e2mc_hf.distributed import all_gather_object, rank, run_on_first
from e2mc_hf.errors import CollapseError, NonFiniteError
from e2mc_hf.training.callbacks import StepEndCallback
from e2mc_hf.training.checkpointing import newest_whole_checkpoint
from e2mc_hf.training.collapse import CHECK_STEPS, CollapseWatch, Sign
from e2mc_hf.training.durable_files import write_durably
from e2mc_hf.training.non_finite import FiniteWatch, StepRecord
from e2mc_hf.training.view_trainer import ViewTrainer

logger = logging.getLogger(__name__)


class GuardedTrainer(ViewTrainer):
    """`ViewTrainer` that watches the numbers of a training; it changes none of them.

    - NaN or infinity in the loss or in a gradient of any process stops all of them before the optimizer's update.
      What was seen goes to `non_finite.json` in the output folder; nothing is saved after it.
    - `embedding_std`, `effective_rank` and `tiny_spacings` of the whole batch are logged. When they say that the
      embeddings have collapsed there is a warning, or an end with `args.stop_on_collapse`.

    A subclass trains within `watched`, and calls `watch` with the loss of each training step.

    Attributes:
        watches_collapse: Whether embeddings are measured.
    """

    watches_collapse = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._embeddings: Tensor | None = None  # those of one view, at the step under way
        self._entropy: Tensor | None = None
        self._spread: dict[str, float] = {}
        super().__init__(*args, **kwargs)
        self._begin_to_watch()
        self.add_callback(StepEndCallback(self._after_step))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context of a training, around all that has to be put right after it.

        Raises:
            NonFiniteError: If the device stopped at a loss or a gradient that is not finite.
        """
        self._begin_to_watch()
        try:
            yield
        except RuntimeError as error:
            record = self._finite.failed()
            if record is None:
                raise
            # The device that made the verdict computes nothing any more: no process can ask another.
            raise self._non_finite(record, together=False) from error

    def _begin_to_watch(self) -> None:
        objective = getattr(self.model, "objective", None)
        self._finite = FiniteWatch(self.args.device)
        self._collapse = CollapseWatch(scale_matters=getattr(objective, "scale_matters", False))

    def watch(self, loss: Tensor, terms: Mapping[str, Tensor], embeddings: Tensor | None) -> None:
        """Take note of a training step, between its forward and its backward pass.

        Args:
            loss: Loss of this process.
            terms: Its terms.
            embeddings: (V, B, D), before any normalization.
        """
        self._finite.see_loss(loss, terms)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._check_finite(None)  # its backward pass makes the update as well, and keeps the gradients
        if self.watches_collapse and embeddings is not None:
            self._embeddings, self._entropy = embeddings[0].detach(), terms.get("marginal_entropy")

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._see_gradients()
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Norm of the gradient; the last thing that the Trainer does with it before the update."""
        if grad_norm is None:
            self._see_gradients()
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            self._check_finite(norm)
        return norm

    def _see_gradients(self) -> None:
        if self.accelerator.scaler is None:
            assert self.model is not None
            self._finite.see_gradients(self.model.named_parameters())

    def _check_finite(self, grad_norm: Any) -> None:
        step = self.state.global_step + 1
        sample_ids = self._train_loader.sample_ids if self._train_loader is not None else None
        record = self._finite.check(step, grad_norm, sample_ids, counts_gradients=self.accelerator.scaler is None)
        if record is not None:
            raise self._non_finite(record)

    def _may_overflow(self) -> bool:
        """Whether a step whose gradients overflow is left out by a scaler: in float16."""
        return self.accelerator.scaler is not None or self.accelerator.mixed_precision == "fp16"

    def _after_step(self, step: int, is_logged: bool) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None:
            skipped = self.accelerator.optimizer_step_was_skipped
            scale = scaler.get_scale() if skipped else math.inf  # the scaler has just waited for the device itself
            cause = self._finite.scaler_gives_up(step, skipped=skipped, scale=scale)
            if cause is not None:
                raise self._non_finite_error({"cause": cause, "step": step})
        embeddings, self._embeddings = self._embeddings, None
        if embeddings is not None and (is_logged or step % CHECK_STEPS == 0):
            self._spread = self._collapse.measure(embeddings, self._entropy)
            signs = self._collapse.alarm(step, self._spread)
            if signs:
                self._alarm(step, signs)

    def _alarm(self, step: int, signs: list[Sign]) -> None:
        """Say that the embeddings have collapsed, in the log as well; end if that was asked for."""
        message = (
            f"The embeddings have collapsed at step {step}: {'; '.join(map(str, signs))}. Try a lower --learning_rate,"
            " a larger weight of what keeps embeddings apart (entropy_weight, variance_weight), or more --head_warmup."
        )
        self.log({"collapse_alarm": 1.0} | {sign.name: sign.value for sign in signs})
        if self.args.stop_on_collapse:
            raise CollapseError(f"{message} The training stopped; no checkpoint was written for that.")
        if rank() == 0:
            logger.warning("%s --stop_on_collapse ends such a run.", message)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `ViewTrainer` does, with what was last measured of the embeddings."""
        if "loss" in logs:
            shown = ("embedding_std", "effective_rank", "tiny_spacings")
            logs = logs | {name: self._spread[name] for name in shown if name in self._spread}
            self._spread = {}
        super().log(logs, start_time)
        grad_norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(grad_norm) and not self._may_overflow():  # DeepSpeed tells it here alone
            cause = f"the norm of the gradient is {grad_norm} at step {self.state.global_step}, after its update"
            raise self._non_finite_error({"cause": cause, "step": self.state.global_step})

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as transformers does; a loss that is not finite is reported, and nothing stops for it."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss = (output.metrics or {}).get(f"{metric_key_prefix}_loss", 0.0)
        if not math.isfinite(loss) and rank() == 0:
            logger.warning("`%s_loss` is %s at step %d.", metric_key_prefix, loss, self.state.global_step)
        return output

    def _non_finite(self, record: StepRecord, *, together: bool = True) -> NonFiniteError:
        """The error to raise for a step, once all that is known of it is in the log and in a file.

        Args:
            record: The step.
            together: Whether the processes can still talk; every process calls this then.
        """
        seen = (record.own_part(), record.strange_gradients())
        parts, gradients = zip(*(all_gather_object(seen) if together else [seen]), strict=True)
        logs = {"loss": record.loss, "grad_norm": record.grad_norm, "learning_rate": self._get_learning_rate()}
        self._show_last(record.step, logs)
        names = list(dict.fromkeys(chain.from_iterable(gradients)))
        return self._non_finite_error(record.as_json(parts, names), together=together)

    def _non_finite_error(self, details: dict[str, Any], *, together: bool = True) -> NonFiniteError:
        details |= {"epoch": self.state.epoch, "learning_rate": self._get_learning_rate()}
        if self.accelerator.scaler is not None and together:
            details["loss_scale"] = self.accelerator.scaler.get_scale()
        report = run_on_first(lambda: self._report(details)) if together else self._report(details)
        return NonFiniteError(f"Training stopped before an update that is not finite: {details['cause']}. {report}")

    def _show_last(self, step: int, logs: dict[str, float]) -> None:
        """Add the last line to the log; `log` itself asks the other processes, which may be out of reach."""
        self.state.log_history.append(logs | {"epoch": self.state.epoch, "step": step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _report(self, details: dict[str, Any]) -> str:
        """Write what was seen, and say where it is and what to do."""
        folder = Path(str(self.args.output_dir))
        path = folder / ("non_finite.json" if rank() == 0 else f"non_finite-process-{rank()}.json")
        unfinished = path.with_name(f".{path.name}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(unfinished, json.dumps(details, indent=1, allow_nan=False))
            unfinished.replace(path)
            written = f"What was seen is in {path}."
        except OSError as error:
            written = f"What was seen could not be written: {error}."
        checkpoint, _ = newest_whole_checkpoint(folder)
        saved = f"The newest whole checkpoint is {checkpoint}." if checkpoint else "There is no whole checkpoint."
        clips = "" if self.args.max_grad_norm else ", --max_grad_norm 1"
        half = ", --bf16 instead of --fp16" if self._may_overflow() else ""
        return f"{written} {saved} Try a lower --learning_rate{clips}{half}."
