"""F24 and P11: under half-precision autocast, every criterion computes what it computes in float32."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from e2mc_hf.objectives.barlow_twins import BarlowTwins
from e2mc_hf.objectives.byol import prediction_distance
from e2mc_hf.objectives.dino import DINO
from e2mc_hf.objectives.mec import MEC
from e2mc_hf.objectives.simclr import SimCLR
from e2mc_hf.objectives.simsiam import SimSiam
from e2mc_hf.objectives.swav import SwAV
from e2mc_hf.objectives.vicreg import VICReg
from e2mc_hf.regularizers.registry import REGULARIZERS, build_regularizer

N, D = 48, 16
TOLERANCE = 1e-3
Criterion = Callable[[Tensor], Tensor]


def regularizer(name: str) -> Criterion:
    built = build_regularizer(name, {})
    assert built is not None
    return lambda z: built(z).loss


def objectives() -> dict[str, Criterion]:
    """Loss of each objective by its embeddings; those of a teacher or predictor are the same, views exchanged."""
    torch.manual_seed(0)
    barlow, vicreg, simclr, simsiam = BarlowTwins(4, D), VICReg(4, D), SimCLR(4, D, 8), SimSiam(4, D, 8)
    mec, exact = MEC(4, D, 8), MEC(4, D, 8, exact=True)
    swav, dino = SwAV(4, D, 8, num_prototypes=12), DINO(4, D, 8, num_prototypes=12)
    return {
        "barlow_twins": lambda z: barlow.score(z).loss,
        "byol": lambda z: prediction_distance(z, z.detach().flip(0)),
        "dino": lambda z: dino.eval().score(z, z.detach()).loss,
        "mec": lambda z: mec.score(z, z.detach())[0],
        "mec, exact": lambda z: exact.score(z, z.detach())[0],
        "simclr": lambda z: simclr.score(z).loss,
        "simsiam": lambda z: simsiam.score(z, z.detach()),
        "swav": lambda z: swav.eval().score(z).loss,
        "vicreg": lambda z: vicreg.score(z).loss,
    }


CRITERIA: dict[str, Criterion] = {name: regularizer(name) for name in sorted(REGULARIZERS)}
CRITERIA |= {f"{name} (objective)": criterion for name, criterion in objectives().items()}
every = pytest.mark.parametrize("name", CRITERIA)
both = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def features() -> dict[str, Tensor]:
    normal = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0))
    return {f"standard deviation {std:g}": std * normal for std in (1e-4, 1e-2, 1.0, 5.6, 1e2, 1e3)} | {
        "constant": torch.full((2, N, D), 0.7),
        "zero": torch.zeros(2, N, D),
        "duplicated rows": normal[:, : N // 2].repeat(1, 2, 1),
        "nearly constant": 1 + 1e-3 * normal,
    }


def loss_and_gradient(criterion: Criterion, z: Tensor, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Value under autocast, gradient outside of it, as accelerate has it."""
    leaf = z.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = criterion(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@every
@both
def test_f24_loss_and_gradient_under_autocast_are_those_of_float32(name: str, dtype: torch.dtype) -> None:
    for case, z in features().items():
        rounded = z.to(dtype).float()
        expected, exact = loss_and_gradient(CRITERIA[name], rounded)
        loss, gradient = loss_and_gradient(CRITERIA[name], rounded, dtype)
        assert loss.dtype == gradient.dtype == torch.float32
        assert loss.isfinite(), case
        assert gradient.isfinite().all(), case
        assert abs(loss - expected) <= TOLERANCE * abs(expected), case
        assert (gradient - exact).norm() <= TOLERANCE * exact.norm(), case


@every
@both
def test_p11_half_precision_embeddings_give_a_float32_loss_and_its_gradient_rounded(
    name: str, dtype: torch.dtype
) -> None:
    for case, z in features().items():
        half = z.to(dtype)
        expected, exact = loss_and_gradient(CRITERIA[name], half.float())
        loss, gradient = loss_and_gradient(CRITERIA[name], half, dtype)
        assert loss.dtype == torch.float32
        assert abs(loss - expected) <= TOLERANCE * abs(expected), case
        assert gradient.dtype == dtype
        representable = exact.abs().max() <= torch.finfo(dtype).max
        assert gradient.isfinite().all() == representable, case
        if representable:
            smallest = torch.finfo(dtype).smallest_normal
            error = (gradient.float() - exact).abs().max()
            assert error <= torch.finfo(dtype).eps * exact.abs().max() + smallest, case
