"""Training and evaluation mode of modules."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, then give each the mode it had.

    Some attention (LeViT, TinyViT) keeps biases that it computed in evaluation mode until it is put in training mode:
    stale ones from before, or ones without gradient, must not be met here, nor stay behind.
    """
    modes = [(child, child.training) for child in module.modules()]
    module.train()
    module.eval()
    assert not any(child.training for child in module.modules()), "a module refuses evaluation mode"
    try:
        yield
    finally:
        module.train()
        for child, training in modes:
            child.training = training
