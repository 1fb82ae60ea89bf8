"""Batch normalization on a share of a batch; run as a script, one of several processes.

python batch_norm_worker.py RANK WORLD_SIZE FOLDER writes what this process computed to FOLDER/RANK.pt.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.batchnorm import _BatchNorm

from e2mc_hf.models.batch_norm import GlobalBatchNorm, synchronize_batch_norm
from e2mc_hf.models.norm_policy import POLICIES, apply_norm_policy, recalibrate

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "vectors": (lambda: nn.BatchNorm1d(5), (8, 5)),
    "sequences": (lambda: nn.BatchNorm1d(5), (8, 5, 3)),
    "images": (lambda: nn.BatchNorm2d(5), (8, 5, 4, 3)),
    "images with activation": (lambda: BatchNormAct2d(5, act_layer=nn.SiLU), (8, 5, 4, 3)),
    "without parameters": (lambda: nn.BatchNorm2d(5, affine=False), (8, 5, 4, 3)),
    "cumulative average": (lambda: nn.BatchNorm1d(5, momentum=None), (8, 5)),
    "without running statistics": (lambda: nn.BatchNorm1d(5, track_running_stats=False), (8, 5)),
    "network": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=0), (8, 3, 32, 32)),
}
TOLERANCES = {
    (kind, dtype): tolerance for kind in LAYERS for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5))
}
TOLERANCES["network", torch.float64] = 1e-9  # 34 layers add up
del TOLERANCES["network", torch.float32]


def layer(kind: str, dtype: torch.dtype) -> nn.Module:
    """Layer in training mode whose parameters are not those of its constructor."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind][0]()).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(kind: str, dtype: torch.dtype) -> Tensor:
    """Samples far from mean 0, where the difference of two large sums would lose the variance."""
    generator = torch.Generator().manual_seed(1)
    return (3 + 0.5 * torch.randn(LAYERS[kind][1], generator=generator, dtype=torch.float64)).to(dtype)


def two_steps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after two batches in training mode, and the output in evaluation mode."""
    results = {}
    for step in range(2):
        x = (2 * x if step else x).detach().requires_grad_()
        output = model(x)
        output.pow(3).sum().backward()
        results |= {f"output {step}": output, f"input gradient {step}": x.grad}
    results |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    results |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    if list(model.buffers()):  # without running statistics, evaluation is on the share of a process as well
        results["evaluation"] = model.eval()(x)
    return {name: tensor.detach() for name, tensor in results.items()}


def under_autocast(convolution: nn.Module, x: Tensor) -> dict[str, Any]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = convolution(x)
    output.float().pow(3).sum().backward()
    buffers = {name: buffer.clone() for name, buffer in convolution.named_buffers()}
    return {"output": output.detach(), "gradient": convolution[0].weight.grad, **buffers}


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))


class Trained(nn.Module):
    """A backbone with batch normalization, and a head with one more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.backbone(x))
        return output


def under_policy(policy: str, share: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Kinds of the layers, outputs and buffers after a batch in training mode, and what recalibration makes of them."""
    model = Trained().double()
    model = apply_norm_policy(model, model.backbone, policy, torch.device("cpu"))
    model = apply_norm_policy(model, model.backbone, policy, torch.device("cpu"))
    kinds = [type(model.backbone[1]).__name__, type(model.head[1]).__name__]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        output = model.train()(share(images[0]))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    count = recalibrate(model.backbone, [share(image) for image in images])
    estimated = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"kinds": kinds, "output": output, "buffers": buffers, "count": count, "estimated": estimated}


def converted_twice() -> list[str]:
    """Kinds of the layers after two conversions for CUDA, which needs no CUDA."""
    model = Trained()
    for _ in range(2):
        synchronize_batch_norm(model, torch.device("cuda"))
    return [type(model.backbone[1]).__name__, type(model.backbone[1].act).__name__, type(model.head[1]).__name__]


def converted_for_compilation() -> list[str]:
    """Kinds of the layers of a model for CUDA whose backbone will be compiled."""
    model = Trained()
    apply_norm_policy(model, model.backbone, "synchronized", torch.device("cuda"), is_compiled=True)
    return [type(model.backbone[1]).__name__, type(model.backbone[1].act).__name__, type(model.head[1]).__name__]


def compiled(rank: int) -> dict[str, Any]:
    """Graphs of a network at two sizes, compiled with layers that talk, and how far it is from the uncompiled one."""
    plain = synchronize_batch_norm(Trained(), torch.device("cpu"))
    other = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    other.compile(backend=counter, dynamic=False)
    generator = torch.Generator().manual_seed(rank)
    images = [torch.randn(4, 3, side, side, generator=generator) for side in (8, 12)] * 2
    outputs = [[model(view) for view in images] for model in (plain, other)]
    for each in outputs:
        torch.stack([output.pow(2).mean() for output in each]).sum().backward()
    gradients = [torch.cat([parameter.grad.flatten() for parameter in model.parameters()]) for model in (plain, other)]
    return {
        "graphs": counter.frame_count,
        "breaks": len(torch._dynamo.utils.counters["graph_break"]),
        "same outputs": all(torch.equal(one, two) for one, two in zip(*outputs, strict=True)),
        "same gradients": torch.equal(*gradients),
        "same statistics": all(torch.equal(*pair) for pair in zip(plain.buffers(), other.buffers(), strict=True)),
    }


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    results: dict[str, Any] = {}
    try:
        for kind, dtype in TOLERANCES:
            model = layer(kind, dtype)
            names = list(model.state_dict())
            model = synchronize_batch_norm(model, torch.device("cpu"))
            layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
            results[f"{kind}, {dtype}"] = two_steps(model, batch(kind, dtype).chunk(world_size)[rank]) | {
                "names are kept": list(model.state_dict()) == names,
                "all are global": bool(layers) and all(isinstance(module, GlobalBatchNorm) for module in layers),
            }
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).chunk(world_size)[rank]
        model = synchronize_batch_norm(convolution(), torch.device("cpu"))
        results["autocast"] = under_autocast(model, images)
        results |= {policy: under_policy(policy, lambda x: x.chunk(world_size)[rank]) for policy in POLICIES}
        results["converted twice"] = converted_twice()
        results["converted for compilation"] = converted_for_compilation()
        results["compiled"] = compiled(rank)
        torch.save(results, folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
