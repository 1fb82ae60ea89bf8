"""Time and peak memory of E2MC against the direct form, forward and backward, both in this process.

    python benchmarks/criterion.py [--threads 1] [--repeats 3]

Direct form: autograd through sigmoid, sort, spacings and X^T X, as the equations are written. Both sides see the same
two views and must agree before they are timed: on the loss, and in float64 on the gradient. Peak memory is the growth
of the resident set while loss and gradient are computed (Linux only), the embeddings themselves not counted.
"""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from e2mc_hf.regularizers.e2mc import E2MCRegularizer

SIZES = [(512, 128), (512, 2048), (512, 8192), (2048, 8192)]
ENTROPY_WEIGHT, COVARIANCE_WEIGHT = 1000.0, 100.0


def direct_form(embeddings: Tensor) -> Tensor:
    """E2MC written as its equations, for autograd to differentiate."""
    num_samples, num_dims = embeddings.shape[1:]
    window = round(num_samples**0.5)
    entropies, covariances = [], []
    for view in embeddings:
        cube = torch.sigmoid(view)
        ordered = cube.sort(dim=0).values
        spacings = (num_samples + 1) / window * (ordered[window:] - ordered[:-window])
        entropies.append(torch.log(spacings + 1e-7).mean(dim=0).mean())
        centered = cube - cube.mean(dim=0)
        covariance = centered.T @ centered / (num_samples - 1)
        off_diagonal = covariance - torch.diag(torch.diag(covariance))
        covariances.append(off_diagonal.square().sum() / num_dims)
    return COVARIANCE_WEIGHT * torch.stack(covariances).sum() - ENTROPY_WEIGHT * torch.stack(entropies).mean()


def ours(embeddings: Tensor) -> Tensor:
    """The package's regularizer."""
    return E2MCRegularizer(ENTROPY_WEIGHT, COVARIANCE_WEIGHT)(embeddings).loss


def run(criterion: Callable[[Tensor], Tensor], embeddings: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    loss = criterion(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def seconds(criterion: Callable[[Tensor], Tensor], embeddings: Tensor, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run(criterion, embeddings)
        best = min(best, time.perf_counter() - start)
    return best


def peak_mebibytes(criterion: Callable[[Tensor], Tensor], embeddings: Tensor) -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory the allocator keeps would be used again and not show
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
    run(criterion, embeddings)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])


def assert_equal(embeddings: Tensor) -> None:
    """Same loss in float32; same gradient in float64 without ties, which the direct form breaks at random."""
    torch.testing.assert_close(run(ours, embeddings)[0], run(direct_form, embeddings)[0], rtol=1e-4, atol=0)
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(2, embeddings.shape[1], 256, dtype=torch.float64, generator=generator)
    (_, gradient), (_, direct_gradient) = run(ours, wide), run(direct_form, wide)
    torch.testing.assert_close(gradient, direct_gradient, rtol=0, atol=1e-9 * direct_gradient.abs().max().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"E2MC forward + backward, 2 views, float32, CPU, {options.threads} thread(s), torch {torch.__version__}")
    print(
        f"{'N':>5} {'D':>5} | {'direct ms':>10} {'ours ms':>9} {'speed':>7} | {'direct MiB':>10} {'ours MiB':>9} memory"
    )
    for num_samples, num_dims in SIZES:
        embeddings = torch.randn(2, num_samples, num_dims, generator=torch.Generator().manual_seed(0))
        assert_equal(embeddings)
        memory = [peak_mebibytes(criterion, embeddings) for criterion in (direct_form, ours)]
        repeats = options.repeats * (10 if num_dims < 1000 else 1)
        times = [seconds(criterion, embeddings, repeats) for criterion in (direct_form, ours)]
        print(
            f"{num_samples:>5} {num_dims:>5} | {times[0] * 1e3:>10.1f} {times[1] * 1e3:>9.1f}"
            f" {times[0] / times[1]:>6.1f}x | {memory[0]:>10.0f} {memory[1]:>9.0f}"
            f" {memory[1] / max(memory[0], 1e-9):>5.2f}x"
        )


if __name__ == "__main__":
    main()
