"""Training arguments: those of transformers, with the defaults and the rules of continued pretraining."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from e2mc_hf.arguments import RegularizerArguments, RunArguments, require
from e2mc_hf.training.checkpointing import AUTO, check_options, checkpoints_of
from e2mc_hf.training.compiling import check_compile_options, take_over_launcher
from e2mc_hf.training.sharding import check_sharding, check_sharding_request

# Fields of transformers.TrainingArguments that the optimizers and loaders of this package do not read.
_WITHOUT_EFFECT = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim_args",
    "label_smoothing_factor",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
)


@dataclass
class E2MCTrainingArguments(RunArguments, RegularizerArguments, TrainingArguments):
    """`transformers.TrainingArguments` with a regularizer, and the defaults of `RunArguments`.

    Raises:
        UsageError: If an option breaks a rule, or would silently change what is trained.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: a batch holds views."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Off: a non-finite loss is shown."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "On: every batch has the full statistics."})
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Images whose batch statistics are evaluated together on each process."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Off: parameters that the features do not use are frozen beforehand."}
    )
    fsdp: bool | str | None = field(  # type: ignore[assignment]  # a text is the form of older versions
        default=None, metadata={"help": "Divide weights, gradients and optimizer state among the GPUs (FSDP2)."}
    )
    gradient_cache_chunk_size: int = field(
        default=0,
        metadata={
            "help": "Images of a view that pass the encoder at a time on each process, for the exact gradient of the "
            "whole batch in less memory; 0 passes all at once."
        },
    )
    channels_last: bool = field(
        default=False,
        metadata={
            "help": "Keep a convolutional encoder and its views in channels-last memory format. On a CPU in float32, "
            "at 96 px, a step of ResNet-50 takes 0.8 of the time, one of ResNet-18 about the same."
        },
    )
    new_schedule: bool = field(
        default=False,
        metadata={"help": "Let the schedule and optimizer options given now win over those of the checkpoint."},
    )
    stop_on_collapse: bool = field(
        default=False, metadata={"help": "End the run when its embeddings collapse, instead of a warning."}
    )

    def __post_init__(self) -> None:
        RunArguments.__post_init__(self)
        RegularizerArguments.__post_init__(self)
        require(self.output_dir is not None, "output_dir", "must be given", self.output_dir, "Pass --output_dir.")
        defaults = self.__dataclass_fields__
        require(
            self.gradient_accumulation_steps == 1,
            "gradient_accumulation_steps",
            "must be 1: accumulation does not enlarge the batch whose statistics the losses are about",
            self.gradient_accumulation_steps,
            "Raise per_device_train_batch_size or the number of processes; if such a batch does not fit into memory, "
            "--gradient_cache_chunk_size 32 gives its exact gradient with 32 images at a time.",
        )
        require(
            self.gradient_cache_chunk_size >= 0,
            "gradient_cache_chunk_size",
            "must not be negative",
            self.gradient_cache_chunk_size,
            "Pass the images that fit into memory at a time, or 0 for the whole batch.",
        )
        require(
            not self.remove_unused_columns,
            "remove_unused_columns",
            "must stay false: it would remove the images",
            self.remove_unused_columns,
            "Leave it out.",
        )
        require(
            self.optim == defaults["optim"].default,
            "optim",
            "has no effect here",
            str(self.optim),
            "Choose with --optimizer lars, adamw or sgd.",
        )
        check_options(self)
        for name in _WITHOUT_EFFECT:
            value = getattr(self, name)
            require(value == defaults[name].default, name, "has no effect here", value, "Leave it out.")
        require(
            self.num_train_epochs > 0 or self.max_steps > 0,
            "num_train_epochs",
            "must be positive unless max_steps is given",
            self.num_train_epochs,
            "The paper adds 10 epochs.",
        )
        require(
            not self.auto_find_batch_size,
            "auto_find_batch_size",
            "must be off: another batch is another loss",
            self.auto_find_batch_size,
            "Leave it out; --gradient_cache_chunk_size makes a large batch fit into memory.",
        )
        require(
            not self.use_cpu or self.ddp_timeout == defaults["ddp_timeout"].default,
            "ddp_timeout",
            "has no effect with use_cpu, where processes wait for each other for half an hour",
            self.ddp_timeout,
            "Leave it out.",
        )
        check_sharding_request(self)
        take_over_launcher(self)
        if self.tf32 is None and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            self.tf32 = False  # transformers would turn it on with compilation, for the criterion too
        TrainingArguments.__post_init__(self)
        check_compile_options(self)
        require(
            self.mixed_precision != "fp16" or self.device.type != "cpu",
            "fp16",
            "needs a GPU",
            self.device.type,
            "Pass --bf16 on the CPU.",
        )
        require(
            self.n_gpu <= 1,
            "n_gpu",
            "must be one GPU a process: several in one process would score parts of the batch apart",
            self.n_gpu,
            "Start with torchrun --nproc_per_node N, or choose one with CUDA_VISIBLE_DEVICES=0.",
        )
        check_sharding(self)
        trackers = self.report_to if isinstance(self.report_to, list) else [self.report_to]
        installed = get_available_reporting_integrations()
        for tracker in trackers:
            require(
                tracker in installed,
                "report_to",
                f"must be none or an installed tracker ({', '.join(installed) or 'there is none'})",
                tracker,
                "Install it, or correct its name.",
            )

    def regularizer_options(self) -> dict[str, Any]:
        """Options of the regularizer as given, for `build_regularizer`."""
        return dict(self.regularizer_args)

    def checked_output_dir(self) -> Path:
        """Output folder, which can be written and is not in use; a checkpoint to resume from must be one, or `auto`.

        Raises:
            UsageError: If it cannot be made, it holds an earlier run, or the checkpoint is not there.
        """
        folder = Path(self.output_dir or "")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = parent.is_dir() and os.access(parent, os.W_OK)
        require(writable, "output_dir", "must be a folder that can be written", str(folder), "Pass another path.")
        checkpoint = self.resume_from_checkpoint
        require(
            checkpoint in (None, AUTO) or Path(checkpoint).is_dir(),
            "resume_from_checkpoint",
            "must be a checkpoint folder",
            checkpoint,
            "Pass output_dir/checkpoint-N of the interrupted run, or auto for the newest whole one.",
        )
        is_new = self.resume_from_checkpoint is None and not self.overwrite
        remedy = "Go on with it by --resume_from_checkpoint auto, pass another, or --overwrite."
        begun = [path.name for path in checkpoints_of(folder)]
        require(not (is_new and begun), "output_dir", f"holds {', '.join(begun)}", str(folder), remedy)
        occupied = (folder / "config.json").exists() and is_new
        require(not occupied, "output_dir", "holds an earlier run", str(folder), "Pass another, or --overwrite.")
        return folder
