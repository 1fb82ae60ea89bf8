import pytest
import torch
from torch import nn

from e2mc_hf.objectives.heads import mlp, projector


def kinds(head: nn.Module) -> list[type[nn.Module]]:
    return [type(layer) for layer in head.children()]


def linears(head: nn.Module) -> list[tuple[int, int, bool]]:
    """Input width, output width and bias of every linear layer."""
    return [(m.in_features, m.out_features, m.bias is not None) for m in head.children() if isinstance(m, nn.Linear)]


def test_hidden_layers_are_normalized_and_activated_and_the_last_is_not() -> None:
    head = mlp([4, 6, 7, 3])
    assert kinds(head) == 2 * [nn.Linear, nn.BatchNorm1d, nn.ReLU] + [nn.Linear]
    assert linears(head) == [(4, 6, True), (6, 7, True), (7, 3, True)]
    assert [m.num_features for m in head.children() if isinstance(m, nn.BatchNorm1d)] == [6, 7]


def test_two_widths_make_one_linear_layer() -> None:
    assert kinds(mlp([4, 3])) == [nn.Linear]


def test_hidden_and_last_biases_are_separate_choices() -> None:
    assert [bias for *_, bias in linears(mlp([4, 6, 7, 3], hidden_bias=False))] == [False, False, True]
    assert [bias for *_, bias in linears(mlp([4, 6, 7, 3], last_bias=False))] == [True, True, False]


@pytest.mark.parametrize("affine", [True, False])
def test_the_last_layer_can_be_normalized_with_or_without_scale_and_shift(affine: bool) -> None:
    head = mlp([4, 6, 3], last_norm=True, last_norm_affine=affine)
    assert kinds(head) == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    norms = [layer for layer in head.children() if isinstance(layer, nn.BatchNorm1d)]
    assert [norm.affine for norm in norms] == [True, affine]
    assert norms[-1].num_features == 3


def test_without_normalization_only_the_activation_is_between_the_layers() -> None:
    head = mlp([4, 6, 3], norm=False, activation=nn.GELU)
    assert kinds(head) == [nn.Linear, nn.GELU, nn.Linear]
    x = torch.randn(5, 4)
    first, last = head[0], head[2]
    torch.testing.assert_close(head(x), last(nn.functional.gelu(first(x))))


def test_output_has_the_last_width_and_depends_on_every_weight() -> None:
    head = mlp([4, 6, 3])
    output = head(torch.randn(5, 4))
    assert output.shape == (5, 3)
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_projector_is_as_wide_as_its_output_everywhere_and_ends_without_bias() -> None:
    assert linears(projector(4, 6, num_layers=3)) == [(4, 6, True), (6, 6, True), (6, 6, False)]
    assert kinds(projector(4, 6, num_layers=1)) == [nn.Linear]
