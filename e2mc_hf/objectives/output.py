"""What every objective returns."""

from typing import NamedTuple

from torch import Tensor


class ObjectiveOutput(NamedTuple):
    """Loss of a batch, what the regularizer acts on, and the parts of the loss.

    Attributes:
        loss: Scalar to be minimized; its mean over the processes is the loss of the whole batch.
        embeddings: Projector outputs of this process before any normalization, (V, B, D).
        terms: Each term by name: scalar, unweighted, detached.
    """

    loss: Tensor
    embeddings: Tensor
    terms: dict[str, Tensor]
