"""Notice embeddings that collapse: to a point, onto a few directions, or into clusters.

N samples, D dimensions, Z (N, D) the embeddings of one view. Where only directions count for the objective, Z stands
for sqrt(D) times the rows of unit length.

    embedding_std   mean over dimensions of the standard deviation over the samples
    effective_rank  exp(-sum_k p_k log p_k), p_k = s_k / sum_j s_j, s_k the singular values of Z minus its mean
    tiny_spacings   share of neighboring values closer than 0.1/N, each dimension mapped to the unit interval by the
                    normal distribution of its own quartiles: 1 - exp(-0.1) = 10 % for normal samples

Reference:
    Roy, Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007, Eq. 2 and 3; Garrido,
    Balestriero, Najman, LeCun, "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank", ICML 2023, https://arxiv.org/abs/2210.02885, Eq. 1. Differs from RankMe in: the
    mean is subtracted, so that embeddings that share a large one do not pass as collapsed.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from e2mc_hf.distributed import all_gather, world_size
from e2mc_hf.regularizers.precision import full_precision

# A check sees at most so many samples of the batch. That costs little in any batch, and rounding to the 8 bits of
# bfloat16 alone would bring too many of more samples closer than 0.1/N: 12 % of 256, but 33 % of 1024.
_MOST_SAMPLES = 256
# Checked at every log line and every so many steps; a sign that has lasted 20 steps raises the alarm: within 50.
CHECK_STEPS = 25
_LASTING_STEPS = 20

# Distance of the quartiles of the standard normal distribution. Unlike the variance, they do not see a few outliers,
# which would press all other samples together.
_QUARTILE_RANGE = 1.349

_LEAST_STD = 0.01
_LEAST_RANK_SHARE = 0.1
_MOST_TINY = 0.5
# What a normal coordinate of standard deviation 0.01 has under the sigmoid: 0.5 * log(2 pi e (0.01 / 4)^2) = -4.57.
_LEAST_ENTROPY = -4.5


class Sign(NamedTuple):
    """One sign of a collapse.

    Attributes:
        name: Of the value in the log.
        value: What was measured.
        threshold: What a healthy run does not reach.
        meaning: What a healthy run looks like, in words.
    """

    name: str
    value: float
    threshold: float
    meaning: str

    def __str__(self) -> str:
        return f"`{self.name}` is {self.value:.3g}, {self.meaning} {self.threshold:.3g}"


class CollapseWatch:
    """Measure a sample of the batch now and then, and tell a collapse from a passing sign.

    Args:
        scale_matters: Whether the objective sees the scale of embeddings, or only their directions.
    """

    def __init__(self, *, scale_matters: bool) -> None:
        self._scale_matters = scale_matters
        self._since: dict[str, int] = {}
        self._alarmed: set[str] = set()

    def measure(self, embeddings: Float[Tensor, "B D"], entropy: Tensor | None = None) -> dict[str, float]:
        """Measure embeddings over all processes; a collective, and every process gets the values of the first.

        Args:
            embeddings: Those of one view on this process, before any normalization.
            entropy: The regularizer's `marginal_entropy`, nats, the same on every process.

        Returns:
            Values by name, `most_rank` among them: the largest effective rank there can be; NaN where an embedding is
            not finite.
        """
        sample = _sample(embeddings.detach())
        values = [*spread(sample, scale_matters=self._scale_matters), min(sample.shape[0] - 1, sample.shape[1])]
        if entropy is not None:
            values.append(entropy.item())
        names = ["embedding_std", "effective_rank", "tiny_spacings", "most_rank", "marginal_entropy"]
        on_first = all_gather(torch.tensor(values, dtype=torch.float32, device=embeddings.device))[: len(values)]
        return dict(zip(names, on_first.tolist(), strict=False))

    def alarm(self, step: int, values: Mapping[str, float]) -> list[Sign]:
        """Signs that have lasted until now; each once, and again only after it was gone.

        Args:
            step: Number of the step, from 1.
            values: What was measured at it.
        """
        signs = {sign.name: sign for sign in signs_of_collapse(values)}
        self._since = {name: self._since.get(name, step) for name in signs}
        lasting = {name for name, since in self._since.items() if step - since >= _LASTING_STEPS}
        new = lasting - self._alarmed
        self._alarmed = lasting
        return [sign for name, sign in signs.items() if name in new]


def spread(z: Float[Tensor, "N D"], *, scale_matters: bool) -> tuple[float, float, float]:
    """Measure `embedding_std`, `effective_rank` and `tiny_spacings`; NaN where an entry is not finite.

    Args:
        z: Embeddings before any normalization.
        scale_matters: False to look at their directions alone.
    """
    spacings = tiny_spacings(z)
    z = z.double()
    if not z.isfinite().all():
        return math.nan, math.nan, math.nan
    if not scale_matters:
        z = F.normalize(z, dim=1) * math.sqrt(z.shape[1])
    return z.std(dim=0).mean().item(), effective_rank(z), spacings


def effective_rank(z: Float[Tensor, "N D"]) -> float:
    """Effective rank of samples minus their mean: between 1 and min(N - 1, D); 1 for a single point."""
    centered = z.double() - z.double().mean(dim=0)
    gram = centered @ centered.t() if z.shape[0] <= z.shape[1] else centered.t() @ centered
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp())


def tiny_spacings(z: Float[Tensor, "N D"]) -> float:
    """Share of neighboring values closer than 0.1/N, of all dimensions together; 1 for a single point.

    Of values that tie with the smallest of their dimension one counts, unless all do.
    """
    z = full_precision(z).sort(dim=0).values
    quartiles = [z[round(share * (len(z) - 1))] for share in (0.25, 0.5, 0.75)]
    scale = (quartiles[2] - quartiles[0]) / _QUARTILE_RANGE
    cube = torch.special.ndtr((z - quartiles[1]) / scale.clamp_min(torch.finfo(z.dtype).tiny))
    # Zeros behind a ReLU are a floor, no cluster.
    counted = (z[1:] > z[0]) | (z[-1] == z[0])
    return float((cube.diff(dim=0) < 0.1 / len(z))[counted].double().mean())


def signs_of_collapse(values: Mapping[str, float]) -> list[Sign]:
    """Signs of a collapse among the values of `CollapseWatch.measure`."""
    most = values["most_rank"]
    at_least = "and should be at least"
    of_most = f"of {most:.0f} that this batch can have, {at_least}"
    signs = [
        Sign("embedding_std", values["embedding_std"], _LEAST_STD, at_least),
        Sign("effective_rank", values["effective_rank"], _LEAST_RANK_SHARE * most, of_most),
        Sign("marginal_entropy", values.get("marginal_entropy", 0.0), _LEAST_ENTROPY, at_least),
    ]
    found = [sign for sign in signs if sign.value < sign.threshold]
    if values["tiny_spacings"] > _MOST_TINY:
        found.append(Sign("tiny_spacings", values["tiny_spacings"], _MOST_TINY, "and should be at most"))
    return found


def _sample(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "n D"]:
    """Evenly spaced samples of every process: the same number of each, `_MOST_SAMPLES` together."""
    own = max(1, _MOST_SAMPLES // world_size())
    return all_gather(embeddings[:: math.ceil(len(embeddings) / own)].contiguous())
