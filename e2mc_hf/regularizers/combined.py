"""Several regularizers as one."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2mc_hf.distributed import world_size
from e2mc_hf.progress import Progress
from e2mc_hf.regularizers.global_batch import SharedBatch
from e2mc_hf.regularizers.output import RegularizerOutput
from e2mc_hf.regularizers.regularizer import Regularizer


class CombinedRegularizer(nn.Module):
    """Sum of regularizers; each keeps its own weights, terms and rules.

    Args:
        parts: Regularizers by name.
    """

    def __init__(self, parts: Mapping[str, Regularizer]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self._in_order = tuple(parts.values())

    def set_progress(self, progress: Progress) -> None:
        """Tell every part how far the run has come."""
        for part in self._in_order:
            part.set_progress(progress)

    def check_batch(self, num_samples: int) -> None:
        """Refuse a batch that is too small for any part.

        Raises:
            ValueError: If there is such a part.
        """
        for part in self._in_order:
            part.check_batch(num_samples)

    def forward(self, embeddings: Float[Tensor, "V N D"]) -> RegularizerOutput:
        """Sum the losses, and collect the terms, of all parts on the embeddings of the whole batch."""
        return _sum([part(embeddings) for part in self._in_order])

    def forward_local(self, embeddings: Float[Tensor, "V B D"]) -> RegularizerOutput:
        """Do the same from the embeddings of each process, which are exchanged and gathered once for all parts."""
        if world_size() == 1:
            return self.forward(embeddings)
        batch = SharedBatch(embeddings)
        self.check_batch(batch.num_samples)
        return _sum([part.forward_shared(batch) for part in self._in_order])


def _sum(outputs: list[RegularizerOutput]) -> RegularizerOutput:
    terms: dict[str, Tensor] = {}
    for output in outputs:
        assert not terms.keys() & output.terms.keys(), "two regularizers log one term"
        terms |= output.terms
    return RegularizerOutput(torch.stack([output.loss for output in outputs]).sum(), terms)
