"""What becomes of a backbone's batch normalization while it is trained further: one option, four policies."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from e2mc_hf.arguments import require
from e2mc_hf.distributed import rank
from e2mc_hf.errors import UsageError
from e2mc_hf.models.batch_norm import synchronize_batch_norm
from e2mc_hf.modes import evaluation_mode

logger = logging.getLogger(__name__)

POLICIES = ("train", "frozen", "synchronized", "recalibrated")


def apply_norm_policy(
    model: nn.Module, backbone: nn.Module, policy: str, device: torch.device, *, is_compiled: bool = False
) -> nn.Module:
    """Prepare a model's batch normalization for training; applying the same policy twice changes nothing more.

    - `train`: each process normalizes by its own share of the batch.
    - `synchronized`: by the batch of all processes, so that W processes of B samples equal one of W * B.
    - `frozen`: the backbone normalizes by the running statistics it came with, and keeps them; its scales and shifts
      are trained. Heads are synchronized.
    - `recalibrated`: synchronized; call `recalibrate` after training.

    Args:
        model: Model that is trained, changed in place; names of parameters and buffers stay.
        backbone: Its backbone, or an `nn.ModuleList` of the backbone and its teacher.
        policy: One of the four.
        device: Device it will train on.
        is_compiled: Whether the backbone will be compiled.

    Returns:
        The model.

    Raises:
        UsageError: If the policy is unknown, or `frozen` meets a layer that keeps no running statistics.
    """
    rule = f"must be one of {', '.join(POLICIES)}"
    require(policy in POLICIES, "batch_norm", rule, policy, "synchronized is the default.")
    has_layers = any(isinstance(module, (_BatchNorm, FrozenBatchNorm)) for module in backbone.modules())
    if policy in ("frozen", "recalibrated") and not has_layers and rank() == 0:
        logger.warning("`batch_norm` %s has no effect: the encoder has no batch normalization.", policy)
    if policy == "frozen":
        freeze_statistics(backbone)
    if policy == "train":
        return model
    synchronize_batch_norm(backbone, device, is_compiled=is_compiled)
    return synchronize_batch_norm(model, device)


class FrozenBatchNorm(nn.Module):
    """Batch normalization by running statistics that stay as they are, in training mode as well.

    Takes over the parameters, the buffers, and the fused dropout and activation of timm's layers, under their names.
    No subclass of torch's batch normalization, so that nothing that sets modes or converts layers reaches it.

    Args:
        source: Layer to take the place of.

    Raises:
        UsageError: If the layer keeps no running statistics.
    """

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__()
        if source.running_mean is None:
            raise UsageError(
                "`batch_norm` must not be frozen for layers without running statistics, got one of "
                f"{source.num_features} channels. Pass train or synchronized."
            )
        self.num_features, self.eps = source.num_features, source.eps
        self.weight, self.bias = source.weight, source.bias
        self.register_buffer("running_mean", source.running_mean)
        self.register_buffer("running_var", source.running_var)
        self.register_buffer("num_batches_tracked", source.num_batches_tracked)
        self.drop = getattr(source, "drop", nn.Identity())
        self.act = getattr(source, "act", nn.Identity())
        self.train(source.training)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` as torch does in evaluation mode."""
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        normalized = batch_norm(input, mean, variance, self.weight, self.bias, training=False, eps=self.eps)
        activated: Tensor = self.act(self.drop(normalized))
        return activated


def freeze_statistics(module: nn.Module, *, where: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Replace batch normalization inside a module by `FrozenBatchNorm`, and return the names of the layers.

    Args:
        module: Module to change in place.
        where: Which layers, by their name in `module`; all when not given.

    Raises:
        UsageError: If a layer keeps no running statistics.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm) and where(name)}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, FrozenBatchNorm(layer))
    return list(layers)


@torch.no_grad()
def recalibrate(backbone: nn.Module, batches: Iterable[Tensor]) -> int:
    """Estimate the running statistics of a backbone anew: the mean over batches of the statistics of each.

    Training leaves an exponential average over weights that have changed since, and over a few batches only. Here the
    weights stand still, and dropout and stochastic depth are off, as they will be where the statistics are used.
    Frozen layers keep theirs. With several processes and synchronized layers, each passes as many batches.

    Args:
        backbone: Backbone or teacher, changed in place; its modes stay.
        batches: (B, 3, H, W) images as in training, normalized.

    Returns:
        Number of batches; 0 if the backbone has no statistics to estimate.

    Raises:
        UsageError: If there is no batch.
    """
    layers = [layer for layer in backbone.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers:
        return 0
    before = [(layer.momentum, {name: buffer.clone() for name, buffer in layer.named_buffers()}) for layer in layers]
    device = next(backbone.parameters()).device
    count = 0
    try:
        with evaluation_mode(backbone):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # torch's sign for a cumulative average
                layer.training = True
            for images in batches:
                backbone(images.to(device))
                count += 1
        if not count:
            raise UsageError("`batches` must hold at least one batch to estimate statistics from, got none.")
    except BaseException:
        for layer, (_, buffers) in zip(layers, before, strict=True):
            layer.load_state_dict(buffers, strict=False)
        raise
    finally:
        for layer, (momentum, _) in zip(layers, before, strict=True):
            layer.momentum = momentum
    return count
