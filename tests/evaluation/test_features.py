import sys

import numpy as np
import pytest
import torch
from torch import nn

from e2mc_hf.errors import UsageError
from e2mc_hf.evaluation.features import extract_features


@pytest.fixture
def normalized_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net(torch.randn(64, 3, 8, 8) * 3 + 1)  # running statistics that are not those of the digits
    return net


@pytest.mark.parametrize("batch_size", [1, 7, 797])
def test_features_do_not_depend_on_the_batch_size(normalized_net, digit_images, batch_size):
    images = digit_images[1]
    features = extract_features(normalized_net, images, batch_size=batch_size)
    normalized_net.eval()
    with torch.no_grad():
        expected = normalized_net(images.images)
    np.testing.assert_allclose(features.x, expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(features.y, images.labels)


def test_worker_processes_give_the_same_features_in_the_same_order(normalized_net, digit_images):
    alone = extract_features(normalized_net, digit_images[1], batch_size=64)
    shared = extract_features(normalized_net, digit_images[1], batch_size=64, num_workers=2)
    np.testing.assert_array_equal(shared.x, alone.x)
    np.testing.assert_array_equal(shared.y, alone.y)


def test_the_pass_leaves_modes_and_running_statistics_as_they_were(normalized_net, digit_images):
    normalized_net.train()
    normalized_net[1].eval()
    modes = [module.training for module in normalized_net.modules()]
    state = {name: tensor.clone() for name, tensor in normalized_net.state_dict().items()}
    extract_features(normalized_net, digit_images[1], batch_size=64)
    assert [module.training for module in normalized_net.modules()] == modes == [True, True, False, True, True, True]
    assert all(torch.equal(tensor, state[name]) for name, tensor in normalized_net.state_dict().items())


def test_modes_return_after_a_pass_that_failed(digit_images):
    net = nn.Sequential(nn.Linear(5, 5))
    with pytest.raises(RuntimeError, match="shapes"):
        extract_features(net, digit_images[1], batch_size=64)
    assert net.training
    assert net[0].training


class Divide(nn.Module):
    def forward(self, images):
        return images.flatten(1) / images[:, :1, 2, 2].clamp(min=0)


def test_features_that_are_not_finite_are_refused_and_counted(digit_images):
    num_broken = int((digit_images[1].images[:, 0, 2, 2] == 0).sum())
    assert num_broken > 0
    with pytest.raises(UsageError, match=f"finite features, got 'nan or inf for {num_broken} of 797 images'"):
        extract_features(Divide(), digit_images[1], batch_size=64)


def test_an_encoder_that_does_not_pool_is_refused(digit_images):
    with pytest.raises(UsageError, match=r"\(B, F\), got \(64, 3, 8, 8\)"):
        extract_features(nn.Identity(), digit_images[1], batch_size=64)


def test_no_images_are_refused(digit_images):
    with pytest.raises(UsageError, match="at least one image"):
        extract_features(nn.Flatten(), torch.utils.data.Subset(digit_images[1], []), batch_size=64)


def test_nothing_is_printed_when_stderr_is_no_terminal(digit_images, capsys):
    assert not sys.stderr.isatty()
    extract_features(nn.Flatten(), digit_images[1], batch_size=64, description="digits")
    assert capsys.readouterr() == ("", "")
