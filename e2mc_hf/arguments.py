"""Every option a user can set, described once: dataclasses whose `help` the scripts and the README are made from.

Light on purpose (no torch, no transformers): `scripts/*.py --help` reads it and must answer at once.
"""

from dataclasses import dataclass
from typing import Any

from e2mc_hf.image_arguments import DataArguments as DataArguments
from e2mc_hf.image_arguments import ViewArguments as ViewArguments
from e2mc_hf.option_fields import option as option
from e2mc_hf.option_fields import require as require


@dataclass
class ModelArguments:
    """Where the encoder comes from."""

    model: str = option(
        "resnet18",
        "Encoder to start from: Hub id, timm name, folder, or earlier run (heads kept).",
    )
    model_revision: str | None = option(None, "Branch, tag or commit of the encoder on the Hub.")
    from_scratch: bool = option(False, "Random weights on purpose; without it every weight must come from `model`.")
    backbone_args: dict[str, Any] = option({}, "Arguments of the timm architecture, key=value (img_size=96).")


@dataclass
class ObjectiveArguments:
    """What the encoder is trained with."""

    objective: str | None = option(
        None,
        "Self-supervised objective: vicreg, swav, simsiam, mec, simclr, barlow_twins, byol or dino; that of the heads "
        "in `model` when not given, or vicreg.",
    )
    objective_args: dict[str, Any] = option(
        {}, "Options of the objective, key=value (projector_dim=512 projector_layers=3)."
    )


@dataclass
class RegularizerArguments:
    """The criterion added to the objective."""

    regularizer: str | list[str] = option(
        "e2mc",
        "Criterion added to the objective: e2mc, vcreg, uniformity, mmcr, mec, logdet, vne, koleo, sigreg, visreg, "
        "radial, sliced_entropy, several, or none (control).",
    )
    regularizer_args: dict[str, Any] = option(
        {},
        "Options of the regularizer, key=value (entropy_weight=1000 covariance_weight=100 transform=sigmoid); "
        "name.key=value for one of several.",
    )
    regularizer_warmup_epochs: float = option(0.0, "Epochs over which the criterion's weight grows from 0 to its own.")

    def __post_init__(self) -> None:
        require(
            self.regularizer_warmup_epochs >= 0,
            "regularizer_warmup_epochs",
            "must not be negative",
            self.regularizer_warmup_epochs,
            "0 starts at full weight, as the paper does.",
        )


@dataclass
class EvaluationArguments:
    """How frozen features are judged (scripts/evaluate.py)."""

    test_split: str | None = option(None, "Split they are tested on; test or validation, whichever is there.")
    label_fractions: list[float] = option([0.01, 0.1, 1.0], "Shares of the training labels the probe gets, stratified.")
    num_draws: int = option(5, "Draws of the labels for each share below 1.")
    num_neighbors: int = option(20, "k of the nearest-neighbor classifier.")
    batch_size: int = option(64, "Images in one forward pass.")
    num_workers: int = option(0, "Processes that decode images.")
    seed: int = option(0, "Seed of the label draws.")
    output: str = option("metrics.json", "File the results are written to.")

    def __post_init__(self) -> None:
        require(
            bool(self.label_fractions) and all(0 < share <= 1 for share in self.label_fractions),
            "label_fractions",
            "must lie in (0, 1]",
            self.label_fractions,
            "Pass --label_fractions 0.01 0.1 1.0, for example.",
        )
        for name in ("num_draws", "num_neighbors", "batch_size"):
            require(
                getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name), "Pass a positive number."
            )
        for name in ("num_workers", "seed"):
            require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name), "Pass 0 or more.")


@dataclass
class RunArguments:
    """How the training runs: the fields of transformers.TrainingArguments that a continued run is about."""

    output_dir: str | None = option(None, "Folder for the encoder, the heads, the log and the recipe as run.")
    overwrite: bool = option(False, "Replace an earlier run in `output_dir`.")
    num_train_epochs: float = option(10.0, "Epochs to add.")
    max_steps: int = option(-1, "Optimizer steps to take instead of epochs; -1 counts epochs.")
    per_device_train_batch_size: int = option(256, "Images per step on each process.")
    optimizer: str = option("lars", "lars, adamw or sgd; vectors (biases, norms) are neither decayed nor adapted.")
    learning_rate: float = option(0.003, "Learning rate, as given: never scaled by the batch size.")
    momentum: float = option(0.9, "Momentum of lars and sgd.")
    weight_decay: float = option(1e-6, "Weight decay of matrices and convolutions.")
    lr_scheduler_type: str = option("constant", "constant, cosine, or any other schedule of transformers.")
    warmup_steps: float = option(0, "Steps of linear warm-up; below 1, a share of all steps.")
    max_grad_norm: float = option(0.0, "Gradient norm to clip at; 0 does not clip.")
    batch_norm: str = option(
        "synchronized",
        "train (statistics of each process), synchronized (of all), frozen (the encoder's own) or recalibrated "
        "(synchronized, then estimated anew after training).",
    )
    head_warmup: str | int = option(
        "auto",
        "Steps for which new heads are fitted alone first: a number, none, or auto (until the loss levels off; "
        "none where heads were loaded or the encoder is random).",
    )
    head_warmup_learning_rate: float = option(1e-3, "Learning rate of AdamW in that phase.")
    layer_decay: float = option(1.0, "Factor of the learning rate from heads to last block, and from block to block.")
    freeze_blocks: int = option(0, "First blocks of the encoder, with its stem, to leave as they are.")
    lora_rank: int = option(0, "Rank of LoRA on the attention (needs e2mc-hf[lora]); 0 trains every weight.")
    restore_momentum: bool = option(False, "Start with the momentum that an imported checkpoint brought along.")
    seed: int = option(0, "Seed of new heads, order and views.")
    use_cpu: bool = option(False, "Train on the CPU; needed for several CPU processes.")
    bf16: bool = option(False, "bfloat16 autocast; the criterion stays in float32.")
    dataloader_num_workers: int = option(0, "Processes on each rank that decode and augment images.")
    worker_timeout: float = option(120.0, "Seconds without a batch after which these processes count as frozen.")
    logging_steps: float = option(10, "Steps between two log lines.")
    save_strategy: str = option("no", "no, epoch or steps: checkpoints to resume from, besides the final encoder.")
    report_to: str | list[str] | None = option("none", "Tracker: none, tensorboard, wandb, trackio, ...")

    def __post_init__(self) -> None:
        self.head_warmup = str(self.head_warmup)  # a number in Python
        require(
            self.optimizer in ("lars", "adamw", "sgd"),
            "optimizer",
            "must be lars, adamw or sgd",
            self.optimizer,
            "Pass --optimizer lars for the paper's.",
        )
        positive = ("learning_rate", "head_warmup_learning_rate", "per_device_train_batch_size", "logging_steps")
        for name in (*positive, "worker_timeout"):
            require(getattr(self, name) > 0, name, "must be positive", getattr(self, name), "Pass a positive number.")
        require(
            self.optimizer != "lars" or self.weight_decay > 0,
            "weight_decay",
            "must be positive for lars, which adapts only decayed parameters",
            self.weight_decay,
            "The paper's is 1e-6.",
        )
        require(
            self.max_steps == -1 or self.max_steps >= 1,
            "max_steps",
            "must be at least 1, or -1 to count epochs",
            self.max_steps,
            "Leave it out to train for num_train_epochs.",
        )
        not_negative = ("weight_decay", "warmup_steps", "max_grad_norm", "seed", "dataloader_num_workers")
        for name in (*not_negative, "freeze_blocks", "lora_rank"):
            require(getattr(self, name) >= 0, name, "must not be negative", getattr(self, name), "Pass 0 or more.")
        require(
            self.batch_norm in ("train", "synchronized", "frozen", "recalibrated"),
            "batch_norm",
            "must be train, synchronized, frozen or recalibrated",
            self.batch_norm,
            "The paper's is synchronized.",
        )
        require(
            self.head_warmup in ("auto", "none") or self.head_warmup.isdecimal(),
            "head_warmup",
            "must be auto, none or a number of steps",
            self.head_warmup,
            "Pass --head_warmup auto.",
        )
        require(
            not (self.restore_momentum and self.lora_rank),
            "restore_momentum",
            "must be off with lora_rank: the momentum is that of weights which LoRA freezes",
            self.restore_momentum,
            "Leave one of the two out.",
        )
        require(
            0 < self.layer_decay <= 1, "layer_decay", "must lie in (0, 1]", self.layer_decay, "1 treats layers alike."
        )
        require(0 <= self.momentum < 1, "momentum", "must lie in [0, 1)", self.momentum, "The paper's is 0.9.")
