"""Time of every registered regularizer, forward and backward, next to E2MC's in the same process.

    python benchmarks/regularizers.py [--threads 1] [--repeats 3] [--sizes 512x128 512x2048 256x8192]

Each is built with its defaults and sees the same two views of N samples in D dimensions. The best of the repeats is
printed, in milliseconds, and its ratio to E2MC's: below 1 is faster than E2MC.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from e2mc_hf.regularizers.registry import REGULARIZERS

BASELINE = "e2mc"
SIZES = ["512x128", "512x2048", "256x8192"]


def seconds(regularizer: nn.Module, embeddings: Tensor, repeats: int) -> float:
    """Best time of loss and gradient after one run that is not counted."""
    best = float("inf")
    for number in range(repeats + 1):
        leaf = embeddings.clone().requires_grad_()
        start = time.perf_counter()
        torch.autograd.grad(regularizer(leaf).loss, leaf)
        best = min(best, time.perf_counter() - start) if number else best
    return best


def times_at(size: str, repeats: int) -> dict[str, float]:
    """Seconds of each regularizer, by name, at a size such as 512x128."""
    num_samples, num_dims = map(int, size.split("x"))
    embeddings = torch.randn(2, num_samples, num_dims, generator=torch.Generator().manual_seed(0))
    repeats *= 10 if num_dims < 1000 else 1
    return {name: seconds(kind(), embeddings, repeats) for name, kind in REGULARIZERS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxD")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"Forward + backward, 2 views, float32, CPU, {options.threads} thread(s), torch {torch.__version__}")
    columns = [times_at(size, options.repeats) for size in options.sizes]
    width = max(map(len, REGULARIZERS))
    print(" | ".join([" " * width, *(f"{'N x D = ' + size:^17}" for size in options.sizes)]))
    print(" | ".join([" " * width, *(f"{'ms':>8} {'/ ' + BASELINE:>8}" for _ in options.sizes)]))
    for name in REGULARIZERS:
        cells = [f"{times[name] * 1e3:>8.1f} {times[name] / times[BASELINE]:>7.2f}x" for times in columns]
        print(" | ".join([f"{name:<{width}}", *cells]))


if __name__ == "__main__":
    main()
