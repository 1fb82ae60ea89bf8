"""Time and traffic of E2MC over processes: shared out, and gathered on each, for one global batch.

    python benchmarks/distributed_criterion.py [--sizes 512x2048 512x8192 2048x2048 2048x8192] [--repeats 5]

Forward and backward, 2 views, float32, gloo, one thread a process. `one` is one process that holds the whole batch,
while the other waits. `gathered`: two processes with half of the samples each gather the embeddings, and each computes
everything. `shared`: each computes its share (`forward_local`). The three take turns; the best of the repeats is
printed, each the time of the slower process. All give the same loss and gradient, which is asserted first.

Bytes are those a process sends, for rings: (W-1)/W of a buffer in an all-to-all, W-1 times it in an all-gather,
2 (W-1)/W of it in an all-reduce. At W = 2 they are counted at the collectives, and asserted to be those of the formulas
that are printed and give the rest. gloo on one machine sends the same bytes over its sockets.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from e2mc_hf.distributed import all_gather, all_gather_object
from e2mc_hf.regularizers.e2mc import E2MCRegularizer

SIZES = ["512x2048", "512x8192", "2048x2048", "2048x8192"]
NUM_VIEWS, WORLD_SIZES = 2, (2, 8, 64)
FORMULAS = """\
Bytes a process sends, forward / backward, with V views, N samples, D dimensions and W processes; T = M (M + 256) / 2
entries of a symmetric product of M = min(N, D) rows, M a multiple of 256, are summed. Sums of a few numbers left out:
  shared    4 V (W-1)/W (N D / W + 2 T)  /  4 V (W-1)/W N D / W
  gathered  4 V (W-1)/W N D              /  4 V (W-1)/W N D"""


def shared(embeddings: Tensor) -> Tensor:
    return E2MCRegularizer().forward_local(embeddings).loss


def gathered(embeddings: Tensor) -> Tensor:
    return E2MCRegularizer()(all_gather(embeddings, dim=1)).loss


def alone(embeddings: Tensor) -> Tensor:
    return E2MCRegularizer()(embeddings).loss


FORMS = {"gathered": gathered, "shared": shared}


def run(criterion: Callable[[Tensor], Tensor], embeddings: Tensor) -> tuple[Tensor, Tensor, float]:
    """Loss, gradient and seconds; the processes start together and end together."""
    leaf = embeddings.clone().requires_grad_()
    dist.barrier()
    start = time.perf_counter()
    loss = criterion(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    elapsed = time.perf_counter() - start
    dist.barrier()
    return loss.detach(), gradient, elapsed


def run_on_first(embeddings: Tensor) -> tuple[Tensor, Tensor, float]:
    """As `run`, of the whole batch on the first process; the others do nothing in the meantime."""
    if dist.get_rank() == 0:
        return run(alone, embeddings)
    dist.barrier()
    dist.barrier()
    return torch.zeros(()), torch.zeros_like(embeddings), 0.0


def assert_equal(whole: Tensor, own: Tensor) -> None:
    """All forms have the loss and, averaged as DistributedDataParallel does, the gradient of one process."""
    one_loss, one_gradient, _ = run_on_first(whole)
    for criterion in FORMS.values():
        loss, gradient, _ = run(criterion, own)
        together = all_gather(gradient, dim=1) / dist.get_world_size()
        if dist.get_rank() == 0:
            torch.testing.assert_close(loss, one_loss, rtol=1e-5, atol=0)
            largest = one_gradient.abs().max().item()
            torch.testing.assert_close(together, one_gradient, rtol=0, atol=1e-5 * largest)


def best_times(whole: Tensor, own: Tensor, repeats: int) -> dict[str, float]:
    """Seconds of one process with everything, and of the slower process in each form."""
    best = {"one": float("inf")} | dict.fromkeys(FORMS, float("inf"))
    for _ in range(repeats):
        seconds = {"one": run_on_first(whole)[2]} | {form: run(FORMS[form], own)[2] for form in FORMS}
        everyone = all_gather_object(seconds)
        best = {form: min(best[form], max(times[form] for times in everyone)) for form in best}
    return best


def sent(num_samples: int, num_dims: int, world_size: int, form: str) -> tuple[float, float]:
    """Bytes that a process sends, forward and backward, by the formulas."""
    share = 4 * NUM_VIEWS * (world_size - 1) / world_size
    embeddings = share * num_samples * num_dims
    if form == "gathered":
        return embeddings, embeddings
    rows, block = min(num_samples, num_dims), 256
    summed = sum(min(block, rows - start) * min(start + block, rows) for start in range(0, rows, block))
    return embeddings / world_size + share * 2 * summed, embeddings / world_size


@contextmanager
def counted_bytes() -> Iterator[list[float]]:
    """One number for each collective that runs in the context: the bytes that this process sends."""
    world_size = dist.get_world_size()
    # Position of the buffer among the arguments, and the part of it that goes to each other process.
    factors = {
        "all_to_all_single": (1, 1 / world_size),
        "all_gather_into_tensor": (1, 1),
        "all_reduce": (0, 2 / world_size),
    }
    counts: list[float] = []
    originals = {name: getattr(dist, name) for name in factors}

    def counting(name: str) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            position, factor = factors[name]
            counts.append(args[position].nbytes * factor * (world_size - 1))
            return originals[name](*args, **kwargs)

        return collective

    for name in factors:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def measured_bytes(criterion: Callable[[Tensor], Tensor], embeddings: Tensor) -> tuple[float, float]:
    leaf = embeddings.clone().requires_grad_()
    with counted_bytes() as forward:
        loss = criterion(leaf)
    with counted_bytes() as backward:
        loss.backward()
    return sum(forward), sum(backward)


def traffic_lines(size: str, own: Tensor) -> list[str]:
    """Bytes that this process sends in each form, counted and by the formulas, which must agree."""
    num_samples, num_dims = map(int, size.split("x"))
    lines = []
    for form, criterion in FORMS.items():
        counted = measured_bytes(criterion, own)
        cells = [sent(num_samples, num_dims, world_size, form) for world_size in WORLD_SIZES]
        for found, expected in zip(counted, cells[0], strict=True):
            assert abs(found - expected) <= 1e-3 * expected + 1000, (size, form, found, expected)
        texts = [f"{forward / 2**20:>7.1f} / {back / 2**20:>6.1f}" for forward, back in (counted, *cells[1:])]
        lines.append(f"{num_samples:>5} {num_dims:>5} {form:<8} | {' | '.join(texts)}")
    return lines


def measure(rank: int, folder: str, sizes: list[str], repeats: int) -> None:
    """What each of the two processes does; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    lines = []
    for size in sizes:
        num_samples, num_dims = map(int, size.split("x"))
        whole = torch.randn(NUM_VIEWS, num_samples, num_dims, generator=torch.Generator().manual_seed(0))
        own = whole.chunk(2, dim=1)[rank].clone()
        assert_equal(whole, own)
        times = best_times(whole, own, repeats)
        lines += traffic_lines(size, own)
        if rank == 0:
            ratios = [f"{times[form] * 1e3:>11.1f} {times[form] / times['one']:>5.2f}x" for form in FORMS]
            print(f"{num_samples:>5} {num_dims:>5} | {times['one'] * 1e3:>9.1f} | {' | '.join(ratios)}", flush=True)
    if rank == 0:
        print(f"\n{FORMULAS}\n")
        heads = [f"W = {number}, {'counted' if number == 2 else 'paper'}" for number in WORLD_SIZES]
        print(f"    N     D MiB sent | {' | '.join(f'{head:^16}' for head in heads)}")
        print("\n".join(lines))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="NxD")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"E2MC forward + backward, 2 views, float32, CPU, 1 thread a process, gloo, torch {torch.__version__}")
    print(f"    N     D | {'W = 1 ms':>9} | {'W = 2 gathered ms':>18} | {'W = 2 shared ms':>18}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, options.sizes, options.repeats)
        multiprocessing.start_processes(measure, arguments, nprocs=2, daemon=True, start_method="spawn")


if __name__ == "__main__":
    main()
