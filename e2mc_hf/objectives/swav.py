"""SwAV: each view predicts the prototypes that the other view of the same image was assigned to.

B samples on this process, N over all processes, V views of which the first two are large, D dimensions, K prototypes
c_k of unit norm, u the L2-normalized embeddings.

    scores of view v   s_v = u_v . c_k
    codes of view t    q_t = Sinkhorn-Knopp over the N samples, and the queue, of s_t / sinkhorn_temperature; t = 1, 2
    loss               mean over t, mean over v != t, mean over samples of -sum_k q_t log softmax(s_v / temperature)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from e2mc_hf.distributed import all_gather, rank, world_size
from e2mc_hf.objectives.heads import mlp
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.output import ObjectiveOutput
from e2mc_hf.objectives.prototypes import (
    assignment_terms,
    check_at_least,
    check_positive,
    cross_view_entropy,
    renormalize,
)
from e2mc_hf.objectives.sinkhorn import sinkhorn
from e2mc_hf.regularizers.precision import autocast_off, full_precision


class SwAV(Objective):
    """SwAV with its projector, prototypes and queue.

    The queue keeps the latest embeddings of the large views over all processes, oldest first, the same on every
    process: it is saved with the weights, and a run goes on from it with any number of processes that divides its
    length. It takes part in the codes once it is full.

    Args:
        feature_dim: F, width of the backbone's features.
        projector_dim: D, width of the projector's output.
        hidden_dim: Width of the projector's hidden layer.
        num_prototypes: K.
        temperature: Of the predictions.
        sinkhorn_temperature: Of the codes (the paper's epsilon).
        sinkhorn_iterations: Iterations of Sinkhorn-Knopp.
        queue_length: Earlier samples that take part in the codes, over all processes; 0 for none. Only useful where
            the batch is small against the number of prototypes: 3584 or 3840 in the authors' recipes of batch 256-512.
        freeze_prototypes_epochs: Passes over the images, counted from the start of this run, in which the prototypes
            stand still.

    Raises:
        ValueError: If an option is out of range, or the processes do not divide `queue_length`.

    Reference:
        Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting
        Cluster Assignments", NeurIPS 2020, https://arxiv.org/abs/2006.09882, Eq. 1-6. Differs from the authors' code
        in: the freeze counts from the start of the run, where theirs counts the epochs of an earlier run and, when that
        is continued, never freezes; the queue is one for all processes and fills from the first step.
    """

    paper = (
        "Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, Unsupervised Learning of Visual Features by Contrasting "
        "Cluster Assignments, NeurIPS 2020, https://arxiv.org/abs/2006.09882"
    )
    takes_small_views = True
    default_small_views = 6
    joint_batch_statistics = True

    queue: Tensor | None
    queue_count: Tensor | None

    def __init__(
        self,
        feature_dim: int,
        projector_dim: int = 128,
        hidden_dim: int = 2048,
        num_prototypes: int = 3000,
        *,
        temperature: float = 0.1,
        sinkhorn_temperature: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_length: int = 0,
        freeze_prototypes_epochs: float = 1.0,
    ) -> None:
        super().__init__()
        check_at_least(1, projector_dim=projector_dim, hidden_dim=hidden_dim, sinkhorn_iterations=sinkhorn_iterations)
        check_at_least(2, num_prototypes=num_prototypes)
        check_at_least(0, queue_length=queue_length, freeze_prototypes_epochs=freeze_prototypes_epochs)
        check_positive(temperature=temperature, sinkhorn_temperature=sinkhorn_temperature)
        self.projector = mlp([feature_dim, hidden_dim, projector_dim])
        self.prototypes = nn.Linear(projector_dim, num_prototypes, bias=False)
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        self.temperature = temperature
        self.sinkhorn_temperature = sinkhorn_temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.queue_length = queue_length
        self.freeze_prototypes_epochs = freeze_prototypes_epochs
        self._check_processes()
        self.register_buffer("queue", torch.zeros(2, queue_length, projector_dim) if queue_length else None)
        self.register_buffer("queue_count", torch.zeros((), dtype=torch.long) if queue_length else None)

    def check_batch(self, num_samples: int) -> None:
        """Refuse a training batch that does not fit into the queue.

        Args:
            num_samples: N, samples of a batch over all processes.

        Raises:
            ValueError: If the queue is shorter than the batch, or the processes do not divide it.
        """
        self._check_processes()
        if 0 < self.queue_length < num_samples:
            raise ValueError(
                f"`queue_length` must be 0 or at least the batch of all processes, {num_samples}, got "
                f"{self.queue_length}. Take a multiple of that batch, or 0: a large batch needs no queue."
            )

    def before_optimizer_step(self) -> None:
        """Drop the gradient of the prototypes while they are frozen: no optimizer then moves or decays them."""
        if isinstance(self.prototypes.weight, DTensor):  # FSDP steps on shards, which the forward pass did not reach
            renormalize(self.prototypes)
        if self.progress.epoch < self.freeze_prototypes_epochs:
            self.prototypes.weight.grad = None

    def forward(self, features: Sequence[Float[Tensor, "B F"]], teacher_features: None = None) -> ObjectiveOutput:
        """Project the features of all views as one batch and score them.

        Args:
            features: Pooled backbone outputs of each view on this process, the two large views first.
            teacher_features: None.

        Returns:
            Loss, embeddings of the large views (2, B, D) and the terms `swapped_prediction`, `code_entropy` in nats and
            `prototypes_used`.

        Raises:
            ValueError: If there are fewer than two views, or the queue does not fit batch or processes.
        """
        self.check_views(features)
        projected = self.projector(torch.cat(list(features)))
        return self.score(projected.unflatten(0, (len(features), -1)))

    def score(self, embeddings: Float[Tensor, "V B D"]) -> ObjectiveOutput:
        """Score embeddings of this process; the loss runs in float32 under autocast, float64 stays float64.

        In training, also brings the prototypes to unit norm and puts the large views into the queue.
        """
        self._check_processes()
        if self.training:
            self.check_batch(embeddings.shape[1] * world_size())
        z = full_precision(embeddings)
        with autocast_off(z):
            unit = F.normalize(z, dim=-1)
            prototypes = self._unit_prototypes().to(z.dtype)
            scores = F.linear(unit, prototypes)
            codes = self._codes(scores[:2].detach(), prototypes.detach())
            loss = cross_view_entropy(codes, scores, self.temperature)
        if self.training:
            self._push(unit[:2].detach())
        terms = {"swapped_prediction": loss.detach(), **assignment_terms(codes, "code")}
        return ObjectiveOutput(loss, embeddings[:2], terms)

    def _unit_prototypes(self) -> Float[Tensor, "K D"]:
        if not self.training:
            return F.normalize(self.prototypes.weight, dim=1)
        renormalize(self.prototypes)
        return self.prototypes.weight

    @torch.no_grad()
    def _codes(self, scores: Float[Tensor, "2 B K"], prototypes: Float[Tensor, "K D"]) -> Float[Tensor, "2 B K"]:
        batch = scores.shape[1]
        if self.queue is not None and self.queue_count is not None and self.queue_count >= self.queue_length:
            share = self.queue.chunk(world_size(), dim=1)[rank()].to(scores.dtype)
            scores = torch.cat([scores, F.linear(share, prototypes)], dim=1)
        codes = [sinkhorn(view, self.sinkhorn_temperature, self.sinkhorn_iterations)[:batch] for view in scores]
        return torch.stack(codes)

    @torch.no_grad()
    def _push(self, unit: Float[Tensor, "2 B D"]) -> None:
        if self.queue is None or self.queue_count is None:
            return
        latest = all_gather(unit, dim=1).to(self.queue.dtype)
        self.queue.copy_(torch.cat([self.queue, latest], dim=1)[:, -self.queue_length :])
        self.queue_count.add_(latest.shape[1]).clamp_(max=self.queue_length)

    def _check_processes(self) -> None:
        if self.queue_length % world_size():
            raise ValueError(
                f"`queue_length` must be a multiple of the number of processes, {world_size()}, got "
                f"{self.queue_length}. Run on a number of processes that divides it, or choose another length."
            )
