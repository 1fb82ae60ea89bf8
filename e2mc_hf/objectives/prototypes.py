"""What methods that assign views to prototypes have in common.

B samples on this process, V views, K prototypes, D dimensions.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from e2mc_hf.distributed import all_reduce_sum


def cosine_scores(z: Float[Tensor, "*batch D"], rows: Float[Tensor, "K D"]) -> Float[Tensor, "*batch K"]:
    """Cosine of every embedding with every prototype, with gradient through both norms."""
    return F.linear(F.normalize(z, dim=-1), F.normalize(rows, dim=-1).to(z.dtype))


def cross_view_entropy(
    targets: Float[Tensor, "T B K"], scores: Float[Tensor, "V B K"], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of each target view with the prediction of each other view, averaged over pairs and samples.

    Args:
        targets: Assignments of the first T views, each row a distribution, without gradient.
        scores: Similarity of every view to the prototypes.
        temperature: Divides the scores before the softmax of the prediction.
    """
    losses = []
    for view, view_scores in enumerate(scores):
        # The cross-entropy is linear in the target: one softmax a view serves all of its pairs.
        others = [target for number, target in enumerate(targets) if number != view]
        losses.append(F.cross_entropy(view_scores / temperature, torch.stack(others).sum(dim=0)))
    return torch.stack(losses).sum() / (len(targets) * (len(scores) - 1))


@torch.no_grad()
def renormalize(prototypes: nn.Linear) -> None:
    """Bring the rows of the weight back to unit norm, in place; rows within rounding of it keep every bit."""
    rows = prototypes.weight
    norms = rows.norm(dim=1, keepdim=True)
    is_off = (norms - 1).abs() > 16 * torch.finfo(rows.dtype).eps
    if is_off.any():
        rows.div_(torch.where(is_off, norms.clamp_min(torch.finfo(rows.dtype).tiny), 1))


@torch.no_grad()
def assignment_terms(targets: Float[Tensor, "T B K"], name: str) -> dict[str, Tensor]:
    """What to watch for collapse.

    Args:
        targets: Assignments of the samples of this process.
        name: What the method calls them.

    Returns:
        `<name>_entropy`, the mean entropy of an assignment in nats, from 0 (each sample has one prototype) to log K
        (all are alike); and `prototypes_used`, how many prototypes are the first choice of a sample on any process.
    """
    used = targets.new_zeros(targets.shape[-1])
    used[targets.argmax(dim=-1).flatten()] = 1
    return {
        f"{name}_entropy": torch.special.entr(targets).sum(dim=-1).mean(),
        "prototypes_used": all_reduce_sum(used).count_nonzero().to(targets.dtype),
    }


def check_at_least(minimum: float, **options: float) -> None:
    """Refuse options below `minimum`.

    Raises:
        ValueError: If one is, naming it.
    """
    for name, value in options.items():
        if not value >= minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}. Leave it out for the paper's.")


def check_positive(**options: float) -> None:
    """Refuse options that are not above 0.

    Raises:
        ValueError: If one is not, naming it.
    """
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}. Leave it out for the paper's.")
