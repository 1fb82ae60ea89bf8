"""KoLeo: every embedding keeps away from its nearest neighbor on the hypersphere.

V views, N samples over all processes, D dimensions, u_i the L2-normalized embeddings of one view.

    koleo = mean over views of -1/N * sum_i log( min_{j != i} |u_i - u_j| + eps )     down
    loss  = weight * koleo
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from e2mc_hf.regularizers.regularizer import Regularizer, check_weight
from e2mc_hf.regularizers.sphere import unit_rows

# Rounding of a float64 inner product, relative to the longest row.
_TIE = 2.0**-48


def nearest_neighbors(x: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
    """Row of the nearest other sample of each; the lowest row among neighbors that are equally near.

    Distances are compared through one product. It is taken in float64 of the centered samples, where float32 could
    not tell neighbors nearer than about 3e-4 of the sample's extent, and without gradient.

    Args:
        x: Samples, N >= 2.
    """
    with torch.no_grad():
        centered = x.double()
        centered = centered - centered.mean(dim=0)
        squares = centered.square().sum(dim=1)
        nearness = (centered @ centered.t()).sub_(squares / 2).fill_diagonal_(-torch.inf)
        # Rows that tie differ here by rounding, which depends on where in the product they stand.
        least = nearness.amax(dim=1, keepdim=True) - _TIE * squares.amax()
        return (nearness >= least).to(torch.uint8).argmax(dim=1)


def koleo_loss(x: Float[Tensor, "N D"], eps: float = 1e-8) -> Float[Tensor, ""]:
    """Minus the mean log distance to the nearest neighbor.

    The distance of each chosen pair is taken of the samples themselves, so that value and gradient are exact however
    near it is. A pair at distance 0 has gradient 0.

    Args:
        x: Samples; N >= 2 counts the whole batch over all processes.
        eps: Added to a distance before the logarithm; unit of `x`.

    Returns:
        Scalar, nats.

    Reference:
        Sablayrolles et al., 2019, https://arxiv.org/abs/1806.03198, the loss L_KoLeo; Oquab et al., DINOv2, 2023,
        https://arxiv.org/abs/2304.07193. Differs from DINOv2's code in: eps is added to the distance only, and not to
        the differences under the root as well.
    """
    distance: Tensor = torch.linalg.vector_norm(x - x[nearest_neighbors(x)], dim=1)
    return -(distance + eps).log().mean()


class KoLeoRegularizer(Regularizer):
    """Kozachenko-Leonenko entropy of the L2-normalized embeddings, from the distances of nearest neighbors.

    The term is `koleo`, minus the entropy up to a constant and a factor, averaged over views.

    Args:
        weight: Factor in the loss; 0.1 in DINOv2.
        eps: Added to a distance before the logarithm.

    Raises:
        ValueError: If the weight is negative or `eps` not positive.

    Reference:
        Sablayrolles, Douze, Schmid, Jégou, "Spreading vectors for similarity search", ICLR 2019,
        https://arxiv.org/abs/1806.03198, the loss L_KoLeo; on L2-normalized embeddings as in Oquab et al., "DINOv2",
        2023, https://arxiv.org/abs/2304.07193. Differs from DINOv2's code in: neighbors are sought in the whole batch
        over all processes, not in that of one; embeddings of the projector, not class tokens; the mean over views,
        where that code sums over the two large crops.
    """

    paper = (
        "Sablayrolles, Douze, Schmid, Jégou, Spreading vectors for similarity search, ICLR 2019, "
        "https://arxiv.org/abs/1806.03198, the loss L_KoLeo"
    )
    cost = "time N^2 D, memory N D + N^2; the product over pairs in float64, without gradient"

    def __init__(self, weight: float = 0.1, *, eps: float = 1e-8) -> None:
        check_weight("weight", weight)
        if not eps > 0:
            raise ValueError(f"`eps` must be positive, got {eps}. DINOv2's is 1e-8.")
        super().__init__({"koleo": weight})
        self.eps = eps

    def terms(self, z: Float[Tensor, "V N D"]) -> dict[str, Tensor]:
        """Minus the mean log distance to the nearest neighbor, averaged over views."""
        return {"koleo": torch.stack([koleo_loss(u, self.eps) for u in unit_rows(z)]).mean()}
