"""Exact gradients of a large batch on a small device: the backbone works in chunks, the loss sees the whole batch.

    1. features   chunk by chunk through the backbone; the features are kept, the graph is not
    2. loss       heads, objective and regularizer on the features of the whole batch, and back to these features
    3. backbone   chunk by chunk again, with the random numbers of the first time: from the features to the weights

Memory is that of one chunk in the backbone and of the whole batch in the heads; a step costs one more forward pass of
the backbone. Nothing is approximated as long as the features of an image depend on that image alone.

Reference:
    Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021,
    https://arxiv.org/abs/2101.06983, section 3.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from e2mc_hf.arguments import require
from e2mc_hf.distributed import world_size
from e2mc_hf.models.batch_norm import GlobalBatchNorm
from e2mc_hf.models.ssl_model import SSLModel, SSLOutput
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.sharding import sharding_of

_BUCKET_BYTES = 64 * 2**20


class GradientCache:
    """The forward pass of a training step without the graph of the backbone, and what its backward pass left out.

    Between the two stands the backward pass of the loss, with whatever scales it.

    Args:
        model: Model to train, not wrapped for several processes.
        chunk_size: Images of one view that pass the backbone together on each process.
        accelerator: That of the run, for its autocast.
    """

    def __init__(self, model: SSLModel, chunk_size: int, accelerator: Accelerator) -> None:
        self.model = model
        self.chunk_size = chunk_size
        self._accelerator = accelerator
        self._passes: list[_Pass] = []

    def forward(self, views: Sequence[Tensor], return_loss: bool = True) -> SSLOutput:
        """Score a batch as the model in training does; gradients then reach the heads, and the features of each chunk.

        Args:
            views: V tensors (B, 3, H_v, W_v), normalized by `backbone.image_settings`; large views first.
            return_loss: As in `SSLModel.forward`.
        """
        model = self.model
        _take_statistics_of_first(model)
        self._passes = []
        teacher_features = None
        if model.teacher is not None:
            with torch.no_grad():
                large = views[: model.objective.num_large_views]
                teacher_features = [self._features(model.teacher, view) for view in large]
        features = [self._features(model.backbone, view) for view in views]
        with self._accelerator.autocast():
            output = model.score(features, teacher_features)
        return convert_to_fp32(output) if self._accelerator.native_amp else output  # as accelerate's forward does

    def backward(self) -> None:
        """Carry the gradient of the features on to the backbone, and average all gradients over the processes.

        Global random numbers go on as after one pass.
        """
        passes, self._passes = self._passes, []
        for each in passes:
            if each.features.grad is None:
                continue
            after = _RandomState.of(each.images)
            each.random_state.restore(each.images)
            features = self._encode(self.model.backbone, each.images)
            after.restore(each.images)
            features.backward(each.features.grad)  # type: ignore[no-untyped-call]
        average_gradients(self.model.parameters())

    def _features(self, backbone: nn.Module, view: Tensor) -> Tensor:
        """Features of all images of a view, (B, F), leaves of the graph chunk by chunk."""
        return torch.cat([self._first_pass(backbone, images) for images in torch.split(view, self.chunk_size)])

    def _first_pass(self, backbone: nn.Module, images: Tensor) -> Tensor:
        # With a graph, dropped at once, where the second pass has one: the same kernels then, and with a compiled
        # backbone the same code, give the same features from the same random numbers. The second pass needs the memory
        # anyway.
        random_state = _RandomState.of(images)
        encoded = self._encode(backbone, images)
        features = encoded.detach()
        if encoded.requires_grad:
            self._passes.append(_Pass(images, random_state, features.requires_grad_()))
        return features

    def _encode(self, backbone: nn.Module, images: Tensor) -> Tensor:
        with self._accelerator.autocast():
            features: Tensor = backbone(images)
        return features


class _RandomState(NamedTuple):
    """State of torch's random numbers, on the CPU and on the device of some images."""

    cpu: Tensor
    devices: list[int]
    of_devices: list[Tensor]

    @classmethod
    def of(cls, images: Tensor) -> "_RandomState":
        return cls(torch.get_rng_state(), *get_device_states(images))

    def restore(self, images: Tensor) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.of_devices, device_type=images.device.type)


class _Pass(NamedTuple):
    """A chunk on its way through the backbone."""

    images: Tensor
    random_state: _RandomState
    features: Tensor


def _take_statistics_of_first(model: nn.Module) -> None:
    """Let all processes have the first one's running statistics where they differ, as DistributedDataParallel does."""
    if world_size() == 1:
        return
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, (GlobalBatchNorm, nn.SyncBatchNorm)):
            for buffer in layer.buffers():
                dist.broadcast(buffer, src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over the processes, in flat buckets; a collective: every process calls it.

    As with DistributedDataParallel: frozen parameters take no part, a process without a gradient for some parameter
    counts with 0, and a parameter without one on every process keeps none.

    Args:
        parameters: Those of the model, in the same order on every process.
    """
    if world_size() == 1:
        return
    for bucket in _buckets(parameter for parameter in parameters if parameter.requires_grad):
        missing = [index for index, parameter in enumerate(bucket) if parameter.grad is None]
        present = bucket[0].new_ones(len(bucket))
        present[missing] = 0
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([*(part.flatten() for part in parts), present]).div_(world_size())
        dist.all_reduce(flat)
        *means, present = torch.split(flat, [*(part.numel() for part in parts), len(bucket)])
        for part, mean in zip(parts, means, strict=True):
            part.copy_(mean.view_as(part))
        for index in missing:  # there on another process
            if present[index] > 0:
                bucket[index].grad = parts[index]


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type, in order, together until they fill a bucket."""
    bucket: list[nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if bucket and (parameter.dtype != bucket[0].dtype or filled + num_bytes > _BUCKET_BYTES):
            yield bucket
            bucket, filled = [], 0
        bucket.append(parameter)
        filled += num_bytes
    if bucket:
        yield bucket


def check_gradient_cache(model: nn.Module, args: E2MCTrainingArguments) -> None:
    """Refuse a model whose gradient in chunks would be another one, before anything is written.

    Raises:
        UsageError: If `args.gradient_cache_chunk_size` is given, and the model is no `SSLModel`, or its backbone
            normalizes by the statistics of the batch.
    """
    size, name = args.gradient_cache_chunk_size, "gradient_cache_chunk_size"
    if not size:
        return
    require(
        isinstance(model, SSLModel),
        name,
        f"needs an SSLModel, whose backbone and heads are told apart, not a {type(model).__name__}",
        size,
        "Leave it out, or put the backbone into an SSLModel with SSLModel.from_backbone.",
    )
    require(
        sharding_of(args) == "none",
        name,
        "must be 0 with FSDP and DeepSpeed, which average gradients on the way: passes in chunks go around that",
        size,
        "Use --config_file ddp.yaml: every process then holds the whole model.",
    )
    backbones = [getattr(model, part) for part in ("backbone", "teacher") if getattr(model, part) is not None]
    by_batch = sum(isinstance(module, _BatchNorm) for part in backbones for module in part.modules())
    require(
        by_batch == 0 or args.batch_norm == "frozen",
        name,
        f"must be 0 with --batch_norm {args.batch_norm} for an encoder with batch normalization (here {by_batch} "
        "layers): they would normalize each chunk by its own statistics, which is another loss",
        size,
        "Pass --batch_norm frozen: the encoder then normalizes by the running statistics it came with, each image by "
        "itself. Or leave the option out.",
    )


def gradient_cache(model: nn.Module, args: E2MCTrainingArguments, accelerator: Accelerator) -> GradientCache | None:
    """The gradient cache that the arguments ask for; None without one."""
    if not args.gradient_cache_chunk_size:
        return None
    assert isinstance(model, SSLModel)
    return GradientCache(model, args.gradient_cache_chunk_size, accelerator)
