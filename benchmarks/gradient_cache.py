"""Peak memory and time of a training step with the gradient cache against the plain step, both in this process.

    python benchmarks/gradient_cache.py [--device cpu] [--bf16] [--threads 1] [--repeats 3] [--batch 64] [--size 224]
                                        [--model vit_tiny_patch16_224] [--projector_dim 2048]

A step is forward and backward of the encoder, VICReg's expander and loss, and E2MC (second table: without E2MC), on two
views; no optimizer, no data. Chunks are of 1/2, 1/4 and 1/8 of the batch. Both sides must agree before they are timed:
in float64, on the gradient of every weight. They are timed in turns, the median counts.

Peak memory is what a step adds to weights and views: on the CPU the growth of the resident set (Linux only), on a GPU
that of the memory allocated. The gradients themselves, as large as the weights, are in it on both sides.
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.regularizers.e2mc import E2MCRegularizer
from e2mc_hf.training.gradient_cache import GradientCache

Step = Callable[[list[Tensor]], None]


def new_model(options: argparse.Namespace) -> SSLModel:
    torch.manual_seed(0)
    backbone = load_backbone(options.model, from_scratch=True, image_size=options.size)
    heads = {"projector_dim": options.projector_dim}
    return SSLModel.from_backbone(backbone, "vicreg", heads, image_size=options.size).train()


def step_of(model: SSLModel, accelerator: Accelerator, chunk_size: int, *, regularized: bool) -> Step:
    """One step that leaves gradients; 0 is the plain one."""
    cache = GradientCache(model, chunk_size, accelerator) if chunk_size else None
    regularizer = E2MCRegularizer()

    def step(views: list[Tensor]) -> None:
        model.zero_grad()
        output = model(views) if cache is None else cache.forward(views)
        loss = output.loss + regularizer(output.embeddings).loss if regularized else output.loss
        accelerator.backward(loss)
        if cache is not None:
            cache.backward()

    return step


def assert_equal(options: argparse.Namespace, accelerator: Accelerator) -> float:
    """Relative difference of the gradients of eight images, in chunks of three, in float64: no autocast there."""
    model = new_model(options).double().to(accelerator.device)
    views = [torch.randn(8, 3, options.size, options.size, dtype=torch.float64).to(accelerator.device) for _ in "12"]
    gradients = []
    for chunk_size in (0, 3):
        step_of(model, accelerator, chunk_size, regularized=True)(views)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    difference = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    assert difference <= 1e-10, f"the gradients differ by {difference:.1e}"
    return difference


def peak_mebibytes(step: Step, views: list[Tensor]) -> float:
    device = views[0].device
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(views)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory the allocator keeps would be used again and not show
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
    step(views)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])


def seconds(step: Step, views: list[Tensor]) -> float:
    _wait(views[0].device)
    start = time.perf_counter()
    step(views)
    _wait(views[0].device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(options: argparse.Namespace, accelerator: Accelerator, *, regularized: bool) -> None:
    model = accelerator.prepare_model(new_model(options))
    shape = (options.batch, 3, options.size, options.size)
    views = [
        torch.randn(shape, generator=torch.Generator().manual_seed(view)).to(accelerator.device) for view in (0, 1)
    ]
    chunks = [0] + [max(1, options.batch // parts) for parts in (2, 4, 8)]
    steps = [step_of(model, accelerator, chunk_size, regularized=regularized) for chunk_size in chunks]
    memory: list[float] = []
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step(views)
        model.zero_grad()
        memory.append(peak_mebibytes(step, views))
        model.zero_grad()
    for _ in range(options.repeats):
        for step, each in zip(steps, times, strict=True):
            each.append(seconds(step, views))
    print(f"\nVICReg{' + E2MC' if regularized else ''}")
    print(f"{'chunk':>7} | {'peak MiB':>9} {'of plain':>9} | {'s a step':>9} {'of plain':>9}")
    typical = [statistics.median(each) for each in times]
    for chunk_size, peak, time_of in zip(chunks, memory, typical, strict=True):
        name = chunk_size or "plain"
        ratios = peak / memory[0], time_of / typical[0]
        print(f"{name:>7} | {peak:>9.0f} {ratios[0]:>8.2f}x | {time_of:>9.3f} {ratios[1]:>8.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    for name, default in {"threads": 1, "repeats": 3, "batch": 64, "size": 224, "projector_dim": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="bf16" if options.bf16 else "no")
    difference = assert_equal(options, accelerator)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    print(
        f"{options.model} at {options.size}, batch {options.batch}, projector {options.projector_dim}, "
        f"{'bfloat16 autocast' if options.bf16 else 'float32'}, {where}, torch {torch.__version__}\n"
        f"gradient of the cache against the plain one in float64: {difference:.1e}"
    )
    for regularized in (True, False):
        table(options, accelerator, regularized=regularized)


if __name__ == "__main__":
    main()
