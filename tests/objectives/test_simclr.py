import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from e2mc_hf.errors import UsageError
from e2mc_hf.objectives.simclr import SimCLR
from e2mc_hf.options import build


def naive_loss(z: Tensor, temperature: float) -> Tensor:
    """Eq. 1 and Algorithm 1, one pair of views at a time."""
    views = [row / row.norm() for view in z for row in view]
    num_images = len(views) // 2
    losses = []
    for anchor in range(2 * num_images):
        positive = (anchor + num_images) % (2 * num_images)
        similar = [math.inf if k == anchor else views[anchor] @ views[k] / temperature for k in range(2 * num_images)]
        others = torch.stack([similar[k].exp() for k in range(2 * num_images) if k != anchor])
        losses.append(-(similar[positive].exp() / others.sum()).log())
    return torch.stack(losses).mean()


def score(z: Tensor, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of given embeddings."""
    output = SimCLR(4, 2, 2, temperature=temperature).score(z)
    return output.loss, output.terms["contrastive_accuracy"]


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(1, 6),
    num_dims=st.integers(1, 5),
    temperature=st.floats(0.05, 2.0),
)
def test_loss_and_gradient_are_those_of_the_equation(
    seed: int, num_images: int, num_dims: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, num_images, num_dims, generator=generator, dtype=torch.float64).requires_grad_()
    loss, expected = score(z, temperature)[0], naive_loss(z, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-10)


def test_positives_alone_are_found_and_leave_the_share_of_the_two_orthogonal_views() -> None:
    identity = torch.eye(2, dtype=torch.float64)
    loss, accuracy = score(torch.stack([identity, identity]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(1 + 2 / math.e), rel=1e-12)
    assert accuracy.item() == 1


def test_exchanged_positives_are_never_found() -> None:
    identity = torch.eye(2, dtype=torch.float64)
    loss, accuracy = score(torch.stack([identity, identity.flip(0)]), temperature=1.0)
    assert loss.item() == pytest.approx(math.log(2 + math.e), rel=1e-12)
    assert accuracy.item() == 0


@pytest.mark.parametrize("num_images", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_equal_embeddings_lose_the_logarithm_of_all_other_views(num_images: int, temperature: float) -> None:
    loss, _ = score(torch.ones(2, num_images, 3, dtype=torch.float64), temperature)
    assert loss.item() == pytest.approx(math.log(2 * num_images - 1), rel=1e-12)


@given(seed=st.integers(0, 2**31))
def test_scale_of_a_view_order_of_images_and_order_of_views_do_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    scale = torch.empty(2, 6, 1, dtype=torch.float64).log_normal_(0, 3, generator=generator)
    order = torch.randperm(6, generator=generator)
    expected = score(z)[0].item()
    for same in (scale * z, z[:, order], z.flip(0)):
        assert score(same)[0].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("kind", ["equal", "zero", "one zero row", "rank 1", "tiny"])
def test_collapsed_embeddings_have_a_finite_loss_and_gradient(
    kind: str, temperature: float, dtype: torch.dtype
) -> None:
    z = torch.randn(2, 8, 4, dtype=dtype)
    if kind == "one zero row":
        z[1, 3] = 0
    else:
        z = {"equal": z[:1, :1].expand(2, 8, 4), "zero": 0 * z, "rank 1": z[..., :1] * z[0, 0], "tiny": 1e-30 * z}[kind]
    z = z.clone().requires_grad_()
    loss, _ = score(z, temperature)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_loss_is_float32_under_autocast() -> None:
    z = torch.randn(2, 16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, accuracy = score(z)
        halved, _ = score(z.bfloat16())
    assert loss.dtype == accuracy.dtype == halved.dtype == torch.float32
    assert torch.equal(loss, score(z)[0])
    assert torch.equal(halved, score(z.bfloat16().float())[0])


def test_head_has_the_layers_of_the_paper() -> None:
    head = SimCLR(2048).projector
    assert [(m.in_features, m.out_features, m.bias) for m in head if isinstance(m, nn.Linear)] == [
        (2048, 2048, None),
        (2048, 128, None),
    ]
    assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_both_views_pass_the_head_as_one_batch() -> None:
    objective = SimCLR(4, 3, 5)
    features = [torch.randn(6, 4), 3 + torch.randn(6, 4)]
    output = objective(features)
    assert objective.projector[1].num_batches_tracked == 1
    torch.testing.assert_close(output.embeddings.flatten(0, 1), objective.projector(torch.cat(features)))
    assert not torch.allclose(output.embeddings[0], objective.projector(features[0]))
    assert objective.joint_batch_statistics


def test_embeddings_are_the_heads_outputs_and_reach_every_weight() -> None:
    objective = SimCLR(4, 3, 5).eval()
    features = [torch.randn(6, 4), torch.randn(6, 4)]
    output = objective(features)
    torch.testing.assert_close(output.embeddings, torch.stack([objective.projector(view) for view in features]))
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in objective.parameters())
    assert set(output.terms) == {"contrastive", "contrastive_accuracy"}
    assert not any(term.requires_grad for term in output.terms.values())


def test_three_views_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_views` must be 2 for simclr, got 3"):
        SimCLR(4, 8)([torch.randn(4, 4)] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"`temperature` must be positive, got 0\.0"),
        ({"temperature": float("nan")}, "`temperature` must be positive, got nan"),
        ({"projector_layers": 0}, "`projector_layers` must be at least 1, got 128, 2048 and 0"),
        ({"hidden_dim": -1}, "must be at least 1, got 128, -1 and 2"),
        ({"temperatur": 0.1}, "no option 'temperatur'. Did you mean 'temperature'"),
    ],
)
def test_unfit_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(SimCLR, options, "objective_args", 16)
