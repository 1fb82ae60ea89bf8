"""A regularizer whose terms treat the dimensions one by one: W processes share its work."""

from jaxtyping import Float
from torch import Tensor

from e2mc_hf.distributed import world_size
from e2mc_hf.regularizers.global_batch import SharedBatch, WholeBatch
from e2mc_hf.regularizers.output import RegularizerOutput
from e2mc_hf.regularizers.regularizer import Regularizer


class SharedRegularizer(Regularizer):
    """Criterion of means over dimensions and of their covariance: computed by each process for its share of them.

    A subclass defines `batch_terms` in place of `terms`, for whole batches and shared ones alike. Value and gradient
    of `forward_local` are those of `forward` on the gathered embeddings, in 1/W of the time.
    """

    def batch_terms(self, batch: WholeBatch | SharedBatch) -> dict[str, Tensor]:
        """Compute every term, in float32 or float64, outside autocast; the same on every process."""
        raise NotImplementedError

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Compute every term of embeddings of the whole batch."""
        return self.batch_terms(WholeBatch(list(z)))

    def forward_shared(self, batch: SharedBatch) -> RegularizerOutput:
        """Do what `forward_local` does with a batch that several regularizers may have in common.

        With fewer dimensions than processes everything is gathered: some processes would have nothing to compute of.
        So it is for a subclass that defines `terms` again.
        """
        if batch.num_dims < world_size() or type(self).terms is not SharedRegularizer.terms:
            return super().forward_shared(batch)
        self.check_batch(batch.num_samples)
        return self._weighted(lambda: self.batch_terms(batch), batch.local[0])
