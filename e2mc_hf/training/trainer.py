"""The Trainer that adds a regularizer to a self-supervised objective."""

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_utils import EvalLoopOutput

from e2mc_hf.arguments import require
from e2mc_hf.distributed import all_gather
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone
from e2mc_hf.models.layer_order import layer_order
from e2mc_hf.models.norm_policy import apply_norm_policy
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.registry import build_regularizer
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.callbacks import ObjectiveCallback
from e2mc_hf.training.compiling import check_can_be_compiled, compiled_backbones, hidden_from_accelerate
from e2mc_hf.training.gradient_cache import check_gradient_cache, gradient_cache
from e2mc_hf.training.guarded_trainer import GuardedTrainer
from e2mc_hf.training.memory_format import channels_last, check_channels_last
from e2mc_hf.training.momentum import restore_momentum
from e2mc_hf.training.optimizers import build_optimizer
from e2mc_hf.training.sharded_model import ShardedModel
from e2mc_hf.training.sharding import check_sharded_model, sharding_of
from e2mc_hf.training.terms import TermAverages


class E2MCTrainer(GuardedTrainer):
    """`transformers.Trainer` whose loss is the model's own plus a regularizer of the embeddings of all processes.

    Works with any model whose output has `loss` (scalar), `embeddings` (V, B, D) and, optionally, `terms`. Every term
    is logged unweighted, averaged over steps and processes, at training and at evaluation. Without a regularizer the
    loss is the model's own, bit for bit: the control.

    Args:
        model: Model to train; its batch normalization follows `args.batch_norm`.
        args: Arguments of the run.
        train_dataset: `ViewDataset`, cut into global batches by the package; any other dataset is left to
            transformers and needs a `data_collator`.
        eval_dataset: Likewise, for the loss on held-out images.
        regularizer: Module from (V, N, D) to `RegularizerOutput`, in place of `args.regularizer`.
        momentum: Momentum that SGD or LARS begins with, by the name of a parameter; none when not given.
        **kwargs: Further arguments of `transformers.Trainer`.

    Raises:
        UsageError: If the batch of all processes is too small for its statistics, or an option is unknown.
        NonFiniteError: While training, if a loss or a gradient is not finite: before it is used for an update.
    """

    model: nn.Module

    # The loss is a mean over the batch; transformers must not rescale it by counts of labels.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: E2MCTrainingArguments,
        train_dataset: Dataset[Any] | None = None,
        eval_dataset: Dataset[Any] | dict[str, Dataset[Any]] | None = None,
        *,
        regularizer: nn.Module | None = None,
        momentum: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        global_batch = args.per_device_train_batch_size * args.world_size
        require(
            global_batch >= 4,
            "per_device_train_batch_size",
            f"times {args.world_size} processes must be at least 4",
            args.per_device_train_batch_size,
            "Batch statistics need more samples.",
        )
        if regularizer is None:
            regularizer = build_regularizer(args.regularizer, args.regularizer_options())
        self.regularizer = regularizer
        _check_prepared(model, args, momentum)
        check_can_be_compiled(model, args)
        check_channels_last(model, args.channels_last)
        check_gradient_cache(model, args)
        check_sharded_model(model, args, momentum)
        _check_batch(regularizer, global_batch, "regularizer_args")
        _check_batch(getattr(model, "objective", None), global_batch, "objective_args")
        self._terms = {"train": TermAverages(), "eval": TermAverages()}
        self._steps_per_epoch = 1
        self._momentum = momentum
        model = apply_norm_policy(
            model, _backbones(model), args.batch_norm, args.device, is_compiled=args.torch_compile
        )
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self._gradient_cache = gradient_cache(model, args, self.accelerator)
        self.sharded_model = ShardedModel(model, self.accelerator) if sharding_of(args) == "fsdp" else None
        self.add_callback(ObjectiveCallback())
        # Otherwise transformers evaluates a loss only where there are labels, or where `forward` has `return_loss`.
        self.can_return_loss, self.label_names = True, []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `ViewTrainer` does, the backbone compiled and in the memory format that was asked for."""
        with (
            self.watched(),
            channels_last(self.model, self.args.channels_last),
            compiled_backbones(self.model, self.args),
        ):
            return super().train(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate, which is never to compile the whole model."""
        with hidden_from_accelerate(self.args):
            super().create_accelerator_and_postprocess()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss of a batch, whose gradient is left in the parameters."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._gradient_cache is not None:
            self._gradient_cache.backward()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of the objective plus the regularizer on the embeddings of all processes."""
        progress = self._announce_progress(model)
        cache = self._gradient_cache if model.training else None
        outputs = model(**inputs) if cache is None else cache.forward(**inputs)
        loss = self._total_loss(outputs, progress, training=model.training)
        return (loss, outputs) if return_outputs else loss

    def _total_loss(self, outputs: Mapping[str, Any], progress: Progress, *, training: bool) -> Tensor:
        """Loss of the objective plus the regularizer's share; the terms are counted for the log."""
        loss: Tensor = outputs["loss"]
        terms = dict(outputs.get("terms") or {})
        if self.regularizer is not None:
            regularization = _regularization(self.regularizer, outputs["embeddings"])
            repeated = terms.keys() & regularization.terms.keys()
            assert not repeated, f"objective and regularizer both log {repeated}"
            terms |= {"objective_loss": loss, **regularization.terms}
            share = progress.linear(0.0, 1.0, self.args.regularizer_warmup_epochs) if training else 1.0
            loss = loss + (regularization.loss if share == 1 else share * regularization.loss)
        self._terms["train" if training else "eval"].add(terms)
        if training:
            self.watch(loss, terms, outputs.get("embeddings"))
        return loss

    def _announce_progress(self, model: nn.Module) -> Progress:
        """Tell model and regularizer, when training, how far the run has come."""
        progress = Progress(self.state.global_step, max(1, self.state.max_steps), self._steps_per_epoch)
        if model.training:
            for follower in (self.accelerator.unwrap_model(model), self.regularizer):
                announce = getattr(follower, "set_progress", None)
                if announce is not None:
                    announce(progress)
        return progress

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of the terms since the last training log."""
        if "loss" in logs:
            logs = logs | self._terms["train"].pop(self._mean_over_processes)
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as transformers does, and report the terms beside the loss."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        terms = self._terms["eval"].pop(self._mean_over_processes)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in terms.items()})
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer of `args.optimizer`."""
        if self.optimizer is None:
            own = self.model if model is None else model
            fixed = getattr(own, "fixed_learning_rates", dict[str, float])
            self.optimizer = build_optimizer(
                own,
                self.args.optimizer,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                momentum=self.args.momentum,
                layer_decay=self.args.layer_decay,
                fixed_learning_rates=fixed(),
            )
            if self._momentum is not None:
                restore_momentum(self.optimizer, own, self._momentum)
        return self.optimizer

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Count none: transformers' estimate is for tokens."""
        return 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of the run; their number is what epochs are counted by."""
        loader = super().get_train_dataloader()
        self._steps_per_epoch = (
            max(1, len(loader)) if isinstance(loader.dataset, Sized) else max(1, self.args.max_steps)
        )
        return loader


def _regularization(regularizer: nn.Module, embeddings: Tensor) -> Any:
    """Loss and terms of a regularizer on the embeddings of all processes; a module of one's own gets them gathered."""
    forward_local = getattr(regularizer, "forward_local", None)
    return regularizer(all_gather(embeddings, dim=1)) if forward_local is None else forward_local(embeddings)


def _check_prepared(model: nn.Module, args: E2MCTrainingArguments, momentum: Mapping[str, Tensor] | None) -> None:
    """Refuse options that `continue_pretraining` carries out, where nobody has."""
    parameters = dict(model.named_parameters())
    done = {
        "freeze_blocks": _are_frozen(getattr(model, "backbone", None), args.freeze_blocks),
        "lora_rank": any("lora_" in name for name in parameters),
        "restore_momentum": momentum is not None,
    }
    for name, is_done in done.items():
        require(
            is_done or not getattr(args, name),
            name,
            "is not carried out by the Trainer",
            getattr(args, name),
            "Call e2mc_hf.continue_pretraining, which prepares the model.",
        )


def _are_frozen(backbone: object, count: int) -> bool:
    """Whether the first blocks of a backbone are frozen, each parameter of them."""
    if not isinstance(backbone, Backbone) or count == 0:
        return False
    depths = layer_order(backbone).depths
    return not any(p.requires_grad for name, p in backbone.named_parameters() if depths[name] <= count)


def _backbones(model: nn.Module) -> nn.Module:
    """Backbone and teacher of a model, or a model that does not tell them apart from its heads."""
    parts = [getattr(model, name, None) for name in ("backbone", "teacher")]
    found = [part for part in parts if isinstance(part, nn.Module)]
    return nn.ModuleList(found) if found else model


def _check_batch(part: nn.Module | None, global_batch: int, option: str) -> None:
    """Refuse a batch that the regularizer or the objective cannot work with before a folder is made."""
    check = getattr(part, "check_batch", None)
    if check is None:
        return
    try:
        check(global_batch)
    except ValueError as error:
        raise UsageError(f"`{option}` does not fit a batch of {global_batch} over all processes: {error}") from error
