"""What every regularizer is: a weighted sum of named terms of the embeddings of the whole batch."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2mc_hf.distributed import world_size
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.global_batch import SharedBatch
from e2mc_hf.regularizers.output import RegularizerOutput
from e2mc_hf.regularizers.precision import autocast_off, full_precision


class Regularizer(nn.Module):
    """Criterion without positives and without parameters: (V, N, D) embeddings to a loss and its terms.

    A subclass defines `terms`. Names of terms begin with the regularizer's own name, so that several can be added.
    Randomness is drawn from a generator seeded by `self.step` and an option `seed`, so that every process draws the
    same and a resumed run goes on with the same draws.

    Args:
        weights: Factor of each term in the loss, by name; a term without a factor is computed for the log only.

    Attributes:
        paper: Authors, title, venue, link, equation.
        cost: Time and memory in N and D.
        min_samples: Fewest samples over all processes.

    Raises:
        ValueError: If a weight is not a number.
    """

    paper: ClassVar[str]
    cost: ClassVar[str]
    min_samples: ClassVar[int] = 2

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.step = 0

    def set_progress(self, progress: Progress) -> None:
        """Learn, before the forward pass of a training step, how far the run has come."""
        self.step = progress.step

    def check_batch(self, num_samples: int) -> None:
        """Refuse a batch that is too small, before anything is computed or written.

        Args:
            num_samples: N over all processes.

        Raises:
            ValueError: If the criterion is not defined for so few.
        """
        if num_samples < self.min_samples:
            raise ValueError(
                f"`embeddings` must hold at least {self.min_samples} samples over all processes, got {num_samples}. "
                "Raise the batch size."
            )

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Compute every term, in float32 or float64, outside autocast.

        Args:
            z: Embeddings of the whole batch, before any normalization; the same on every process.
        """
        raise NotImplementedError

    def forward(self, embeddings: Float[Tensor, "V N D"]) -> RegularizerOutput:
        """Regularize the embeddings of the whole batch.

        Args:
            embeddings: Projector outputs before any normalization; N counts the batch over all processes, and every
                process passes the same tensor.

        Returns:
            Loss and the unweighted terms.

        Raises:
            ValueError: If N is too small.
        """
        self.check_batch(embeddings.shape[1])
        z = full_precision(embeddings)
        return self._weighted(lambda: self.terms(z), z)

    def forward_local(self, embeddings: Float[Tensor, "V B D"]) -> RegularizerOutput:
        """Regularize the embeddings of the whole batch, of which every process passes its own samples.

        Args:
            embeddings: Projector outputs of this process before any normalization; B is the same on every process.

        Returns:
            Loss and the unweighted terms, those of `forward` and the same on every process. Gradients are summed over
            the processes: the mean of DistributedDataParallel makes them those of one process on the whole batch.

        Raises:
            ValueError: If N is too small.
        """
        if world_size() > 1:
            return self.forward_shared(SharedBatch(embeddings))
        output: RegularizerOutput = self(embeddings)
        return output

    def forward_shared(self, batch: SharedBatch) -> RegularizerOutput:
        """Do what `forward_local` does with a batch that several regularizers may have in common.

        The embeddings of all processes are gathered here, and every process computes everything; the regularizers that
        can do with a share are `SharedRegularizer`.
        """
        self.check_batch(batch.num_samples)
        output: RegularizerOutput = self(batch.everyone)
        return output

    def _weighted(self, terms_of_batch: Callable[[], dict[str, Tensor]], z: Tensor) -> RegularizerOutput:
        """Compute the terms in the precision of `z` and add them up."""
        takes_part = torch.is_grad_enabled() and any(self.weights.values())
        with autocast_off(z), torch.set_grad_enabled(takes_part):
            terms = terms_of_batch()
            loss = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum()
        return RegularizerOutput(loss, {name: term.detach() for name, term in terms.items()})

    def extra_repr(self) -> str:
        """Weights, for `print(regularizer)`."""
        return ", ".join(f"{name}={weight}" for name, weight in self.weights.items())


def check_weight(name: str, weight: float) -> None:
    """Refuse a negative weight.

    Raises:
        ValueError: If it is negative or not a number.
    """
    if not weight >= 0:
        raise ValueError(f"`{name}` must not be negative, got {weight}. Pass 0 to leave the term out.")
