"""Training arguments: those of transformers, with the defaults and the rules of continued pretraining."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from e2mc_hf.arguments import RegularizerArguments, RunArguments, require

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
            "Raise per_device_train_batch_size or the number of processes.",
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
            not (self.fsdp or self.fsdp_config or self.deepspeed or self.auto_find_batch_size),
            "fsdp, deepspeed and auto_find_batch_size",
            "must be off: they were never run with the exports and batches of this trainer",
            {"fsdp": self.fsdp or self.fsdp_config, "deepspeed": self.deepspeed},
            "Use several processes of one GPU each.",
        )
        TrainingArguments.__post_init__(self)
        require(
            self.n_gpu <= 1,
            "n_gpu",
            "must be one GPU a process: several in one process would score parts of the batch apart",
            self.n_gpu,
            "Start with torchrun --nproc_per_node N, or choose one with CUDA_VISIBLE_DEVICES=0.",
        )
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
        """Output folder, which can be written and is not in use; a checkpoint to resume from must be one.

        Raises:
            UsageError: If it cannot be made, it holds an earlier run, or the checkpoint is not there.
        """
        folder = Path(self.output_dir or "")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = parent.is_dir() and os.access(parent, os.W_OK)
        require(writable, "output_dir", "must be a folder that can be written", str(folder), "Pass another path.")
        checkpoint = self.resume_from_checkpoint
        require(
            checkpoint is None or (Path(checkpoint) / "trainer_state.json").is_file(),
            "resume_from_checkpoint",
            "must be a checkpoint folder",
            checkpoint,
            "Pass output_dir/checkpoint-N of the interrupted run.",
        )
        occupied = (folder / "config.json").exists() and not self.resume_from_checkpoint and not self.overwrite
        require(not occupied, "output_dir", "holds an earlier run", str(folder), "Pass another, or --overwrite.")
        return folder
