"""Batch normalization over the samples of all processes, so that W processes of B samples equal one of W * B."""

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from e2mc_hf.distributed import all_reduce_sum, world_size
from e2mc_hf.regularizers.precision import autocast_off, full_precision


def synchronize_batch_norm(model: nn.Module, device: torch.device, *, is_compiled: bool = False) -> nn.Module:
    """Make every batch normalization of a model count the samples of all processes; parameters and names stay.

    On CUDA that is torch's SyncBatchNorm through timm's converter (torch's own drops timm's fused activations). On
    other devices SyncBatchNorm does not run, and `GlobalBatchNorm` takes its place; likewise in what is compiled, where
    each SyncBatchNorm would cut the graph in two (https://github.com/pytorch/pytorch/issues/161302, open in torch 2.15)
    and `GlobalBatchNorm` is a part of it. Layers that are synchronized already stay as they are: timm's converter would
    take their activations from them.

    Args:
        model: Model to convert in place.
        device: Device it will train on.
        is_compiled: Whether `model` will be compiled.

    Returns:
        The converted model; `model` as it is on one process.
    """
    if world_size() == 1:
        return model
    is_torchs = device.type == "cuda" and not is_compiled
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, (GlobalBatchNorm, nn.SyncBatchNorm)):
                setattr(module, name, convert_sync_batchnorm(child) if is_torchs else GlobalBatchNorm(child))
    return model


class GlobalBatchNorm(_BatchNorm):
    """Batch normalization whose training statistics are all-reduced, with gradient.

    Takes over the parameters, the buffers, and the fused dropout and activation of timm's layers. The variance is
    reduced after the mean: the difference of two large sums would lose it in float32. Half precision is normalized in
    float32, as torch does.
    """

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__(source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats)
        self.weight, self.bias = source.weight, source.bias
        self.running_mean, self.running_var = source.running_mean, source.running_var
        self.num_batches_tracked = source.num_batches_tracked
        self.drop = getattr(source, "drop", nn.Identity())
        self.act = getattr(source, "act", nn.Identity())
        self.train(source.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept (N, C), (N, C, L) and (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` by the statistics of all processes when training, else as torch does."""
        if self.training and world_size() > 1:
            with autocast_off(input):
                normalized = self._normalize_globally(full_precision(input)).to(input.dtype)
        else:
            normalized = super().forward(input)
        activated: Tensor = self.act(self.drop(normalized))
        return activated

    def _normalize_globally(self, x: Tensor) -> Tensor:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = world_size() * x.numel() // x.shape[1]
        mean = all_reduce_sum(x.sum(dims)) / count
        centered = x - mean.view(shape)
        variance = all_reduce_sum(centered.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        normalized = centered * (variance + self.eps).rsqrt().view(shape)
        return normalized * self.weight.view(shape) + self.bias.view(shape) if self.affine else normalized

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)
