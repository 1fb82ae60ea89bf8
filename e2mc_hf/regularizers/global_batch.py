"""The embeddings of all processes, whole on each or shared out, for criteria that treat the dimensions one by one.

V views, N samples over all processes, B on each, D dimensions, d of them on this process.

                      WholeBatch                  SharedBatch
    views             V x (N, D)                  V x (N, d): an all-to-all
    per dimension     mean over D                 sum over d, summed over the processes, over D
    covariance        off_diagonal_covariance     N < D: of `views`; else of the samples of each process
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from e2mc_hf.distributed import all_gather, all_reduce_sum, own_dimensions, share_dimensions, world_size
from e2mc_hf.regularizers.covariance import gram_is_cheaper, off_diagonal_covariance
from e2mc_hf.regularizers.precision import full_precision
from e2mc_hf.regularizers.shared_covariance import covariance_of_dimension_shares, covariance_of_sample_shares

RowMap = Callable[[Float[Tensor, "n D"]], Float[Tensor, "n K"]]


class WholeBatch:
    """Embeddings of all processes, at hand on each; nothing is sent.

    Args:
        views: Embeddings (N, D) of each view, in float32 or float64.

    Attributes:
        num_dims: D.
        own_dims: Those of `views`: all.
        samples_are_shared: Whether `covariance_views` hold the samples of this process only: no.
    """

    samples_are_shared = False

    def __init__(self, views: Sequence[Float[Tensor, "N D"]]) -> None:
        self.views = list(views)
        self.num_samples: int = self.views[0].shape[0]
        self.num_dims: int = self.views[0].shape[1]
        self.own_dims = slice(0, self.num_dims)

    def map_rows(self, function: RowMap) -> "WholeBatch":
        """Batch whose samples are functions of these, each of its own."""
        return WholeBatch([function(view) for view in self.views])

    def means_over_dims(self, values: Sequence[Float[Tensor, " D"]]) -> Float[Tensor, " V"]:
        """Mean over the dimensions of what was computed for each, view by view."""
        return torch.stack([value.mean() for value in values])

    @property
    def covariance_views(self) -> list[Float[Tensor, "N D"]]:
        """Views of which, or of whose entries mapped one by one, `covariances` are taken."""
        return self.views

    def covariances(self, views: Sequence[Float[Tensor, "N D"]], *, debias: bool = False) -> Float[Tensor, " V"]:
        """Off-diagonal covariance of each view."""
        return torch.stack([off_diagonal_covariance(view, debias=debias) for view in views])


class SharedBatch:
    """Embeddings of all processes, of which this one has its samples and is sent its share of the dimensions.

    What is sent is sent when it is first asked for, once, with gradient if there was gradient at the beginning. All
    processes must ask for the same in the same order; the numbers they get are the same, and gradients are summed over
    the processes as `share_dimensions` and `all_gather` say.

    Args:
        embeddings: Embeddings (V, B, D) of this process, or a list of them by view; B is the same on every process.

    Attributes:
        local: Samples of this process, (B, D) of each view.
        num_samples: N.
        num_dims: D.
        own_dims: The dimensions of `views`.
        samples_are_shared: Whether `covariance_views` hold the samples of this process, all dimensions of them, and
            not its dimensions of all samples. Both forms are exact and share their operations over the processes;
            the cheaper is taken, as on one process: `gram_is_cheaper`.
    """

    def __init__(self, embeddings: Float[Tensor, "V B D"] | Sequence[Float[Tensor, "B D"]]) -> None:
        self.local = list(embeddings)
        self._with_gradient = torch.is_grad_enabled()
        self.num_samples: int = self.local[0].shape[0] * world_size()
        self.num_dims: int = self.local[0].shape[1]
        self.own_dims = own_dimensions(self.num_dims)
        self.samples_are_shared = not gram_is_cheaper(self.num_samples, self.num_dims)

    @cached_property
    def everyone(self) -> Float[Tensor, "V N D"]:
        """All samples of all dimensions, gathered."""
        with torch.set_grad_enabled(self._with_gradient):
            everyone: Tensor = all_gather(torch.stack(self.local), dim=1)
            return everyone

    @cached_property
    def views(self) -> list[Float[Tensor, "N d"]]:
        """All samples of the dimensions of this process, in float32 or float64."""
        with torch.set_grad_enabled(self._with_gradient):
            # Sent in the precision they have: half of the bytes under autocast.
            return [full_precision(share_dimensions(view)) for view in self.local]

    def map_rows(self, function: RowMap) -> "SharedBatch":
        """Batch whose samples are functions of these, each of its own; each process computes those of its samples."""
        with torch.set_grad_enabled(self._with_gradient):
            return SharedBatch([function(full_precision(view)) for view in self.local])

    def means_over_dims(self, values: Sequence[Float[Tensor, " d"]]) -> Float[Tensor, " V"]:
        """Mean over all dimensions of what every process computed for its own, view by view."""
        sums: Tensor = all_reduce_sum(torch.stack([value.sum() for value in values]))
        return sums / self.num_dims

    @property
    def covariance_views(self) -> list[Float[Tensor, "n k"]]:
        """Views of which, or of whose entries mapped one by one, `covariances` are taken."""
        return [full_precision(view) for view in self.local] if self.samples_are_shared else self.views

    def covariances(self, views: Sequence[Float[Tensor, "n k"]], *, debias: bool = False) -> Float[Tensor, " V"]:
        """Off-diagonal covariance of each view over all samples and dimensions."""
        if self.samples_are_shared:
            return torch.stack([covariance_of_sample_shares(view, debias=debias) for view in views])
        shares = [covariance_of_dimension_shares(view, self.num_dims, debias=debias) for view in views]
        return torch.stack(shares)


def global_batch(embeddings: Float[Tensor, "V B D"]) -> WholeBatch | SharedBatch:
    """Batch of the embeddings that every process passes its own of.

    Whole when there is one process, and when there are more processes than dimensions: some would get none.
    """
    if 1 < world_size() <= embeddings.shape[2]:
        return SharedBatch(embeddings)
    return WholeBatch(list(full_precision(all_gather(embeddings, dim=1))))
