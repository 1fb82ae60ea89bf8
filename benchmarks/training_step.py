"""Time of a training step with VICReg, with and without E2MC, and how much of the device's matrix rate it uses.

    python benchmarks/training_step.py [--device cpu] [--threads 2] [--models resnet50 vit_small_patch16_224]
    python benchmarks/training_step.py --device cuda [--batch_sizes 256 512 1024] [--profile]

A step is the forward pass of two views (random images on the device, 224 px), the losses, the backward pass and the
optimizer's update, through the classes that train. On the CPU in float32; on a GPU under bfloat16 autocast, the encoder
compiled and residual networks in channels-last format, as --bf16, --torch_compile and --channels_last do. Steps with
and without E2MC alternate; the fastest of each kind counts.

    images/s     images, of two views each, in a second of steps with E2MC
    of matmul    arithmetic of that step (torch.utils.flop_counter: matrix products and convolutions, forward and
                 backward) in its time, as a share of the rate of one large matrix product measured in the same run
    E2MC         its loss and gradient alone, on embeddings of the same size, and its share of the step with it
    adds         by how much the step with E2MC is longer than the one without, both as measured: on a CPU whose clock
                 or neighbors vary by more than the share, that is noise
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from e2mc_hf.models.loading import load_backbone
from e2mc_hf.models.ssl_model import SSLModel
from e2mc_hf.regularizers.e2mc import E2MCRegularizer
from e2mc_hf.training.arguments import E2MCTrainingArguments
from e2mc_hf.training.compiling import compiled_backbones
from e2mc_hf.training.memory_format import channels_last
from e2mc_hf.training.optimizers import build_optimizer

MODELS = ["resnet18", "resnet50", "vit_tiny_patch16_224", "vit_small_patch16_224"]
BATCH_SIZES = {"cpu": [32], "cuda": [256, 512, 1024]}
REPEATS = {"cpu": 2, "cuda": 20}
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
LARGEST_KERNELS = 10


class Row(NamedTuple):
    """What is measured of one model at one batch; times in seconds."""

    with_e2mc: float
    without_e2mc: float
    criterion: float
    operations: float


class Bench:
    """One device and the way of training on it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.repeats = options.repeats or REPEATS[options.device]
        self.half = options.device == "cuda" if options.bf16 is None else options.bf16
        self.compiles = options.device == "cuda" if options.torch_compile is None else options.torch_compile
        self.formats = options.device == "cuda" if options.channels_last is None else options.channels_last

    def seconds(self, action: Callable[[], object]) -> float:
        """Time of an action, up to its end on the device."""
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Drop what the row before has left: code, and memory of a model."""
        if self.compiles:
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def matmul_rate(self) -> float:
        """Operations per second of one large matrix product, in the precision of the step; the best of ten."""
        size = MATRIX_SIZE[self.device.type]
        matrix = torch.randn(size, size, device=self.device, dtype=torch.bfloat16 if self.half else torch.float32)
        matrix @ matrix
        return 2 * size**3 / min(self.seconds(lambda: matrix @ matrix) for _ in range(10))

    def row(self, name: str, batch_size: int, projector_dim: int) -> Row:
        """Measure one model at one batch."""
        torch.manual_seed(0)
        size = self.options.image_size
        architecture = {"img_size": size} if name.startswith("vit") and size != 224 else {}
        backbone = load_backbone(name, from_scratch=True, backbone_args=architecture, image_size=size)
        heads = {"projector_dim": projector_dim}
        model = SSLModel.from_backbone(backbone, "vicreg", heads, image_size=size).to(self.device).train()
        optimizer = build_optimizer(model, self.options.optimizer, learning_rate=1e-4, weight_decay=1e-6, momentum=0.9)
        regularizer = E2MCRegularizer()
        views = [torch.randn(batch_size, 3, size, size, device=self.device) for _ in range(2)]

        def step(*, with_e2mc: bool) -> None:
            optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                output = model(views)
            loss = output.loss.float()
            if with_e2mc:
                loss = loss + regularizer(output.embeddings.float()).loss
            loss.backward()
            optimizer.step()

        with FlopCounterMode(display=False) as counter:
            step(with_e2mc=True)
        is_convolutional = sum(isinstance(layer, torch.nn.Conv2d) for layer in backbone.modules()) > 1
        arguments = self._arguments()
        times: dict[bool, list[float]] = {True: [], False: []}
        with channels_last(model, self.formats and is_convolutional), compiled_backbones(model, arguments):
            for _ in range(3 if self.compiles else 0):
                step(with_e2mc=True)  # makes the code
            for _ in range(self.repeats):
                for with_e2mc, measured in times.items():
                    measured.append(self.seconds(lambda: step(with_e2mc=with_e2mc)))  # noqa: B023
        criterion = self.criterion(2, batch_size, projector_dim)
        alone = min(self.seconds(criterion) for _ in range(self.repeats + 1))
        return Row(*(min(each) for each in times.values()), alone, counter.get_total_flops())

    def criterion(self, num_views: int, batch_size: int, projector_dim: int) -> Callable[[], Tensor]:
        """Loss and gradient of E2MC on random embeddings, having been run once."""
        regularizer = E2MCRegularizer()
        embeddings = torch.randn(num_views, batch_size, projector_dim, device=self.device, requires_grad=True)

        def run() -> Tensor:
            (gradient,) = torch.autograd.grad(regularizer(embeddings).loss, embeddings)
            return gradient

        run()
        return run

    def _arguments(self) -> E2MCTrainingArguments:
        with tempfile.TemporaryDirectory() as folder:
            on_cpu = self.device.type == "cpu"
            return E2MCTrainingArguments(output_dir=folder, use_cpu=on_cpu, torch_compile=self.compiles)


def print_kernels(bench: Bench, batch_size: int, projector_dim: int) -> None:
    """Print the most expensive kernels of E2MC's forward and backward pass on a GPU."""
    criterion = bench.criterion(2, batch_size, projector_dim)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(10):
            criterion()
        torch.cuda.synchronize()
    kernels = [
        event for event in recorded.key_averages() if event.self_device_time_total and not event.is_user_annotation
    ]
    kernels = [event for event in kernels if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels)
    print(f"\nE2MC, N = {batch_size}, D = {projector_dim}: {total / 1e4:.3f} ms on the device in a pass; of it")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:LARGEST_KERNELS]:
        share = event.self_device_time_total / total
        print(
            f"{share:>6.1%} {event.self_device_time_total / 1e4:>8.3f} ms {event.count / 10:>5.1f} x  {event.key[:80]}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="32 on the CPU; 256, 512 and 1024 on a GPU")
    parser.add_argument("--projector_dim", type=int, nargs="+", default=[8192], help="D, width of the expander")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--optimizer", default="lars", choices=["lars", "adamw", "sgd"])
    parser.add_argument("--repeats", type=int, help="steps of each kind; 2 on the CPU, 20 on a GPU")
    for name in ("bf16", "torch_compile", "channels_last"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help="on for a GPU when not given")
    parser.add_argument("--profile", action="store_true", help="the ten most expensive kernels of E2MC on a GPU")
    options = parser.parse_args()
    if options.profile and options.device != "cuda":
        parser.error("--profile needs --device cuda")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    rate = bench.matmul_rate()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    ways = {"bfloat16 autocast": bench.half, "compiled": bench.compiles, "channels last": bench.formats}
    how = ", ".join(way for way, is_on in ways.items() if is_on) or "float32"
    print(
        f"VICReg, 2 views, {options.image_size} px, {options.optimizer}, {name}, {how}, torch {torch.__version__}; "
        f"a large matrix product: {rate / 1e12:.3g} TFLOP/s"
    )
    print(
        f"{'model':<22} {'batch':>5} {'D':>5} | {'step ms':>9} {'images/s':>8} {'of matmul':>9} |"
        f" {'E2MC ms':>8} {'share':>6} {'adds':>7}"
    )
    batch_sizes = options.batch_sizes or BATCH_SIZES[options.device]
    for model in options.models:
        for projector_dim in options.projector_dim:
            for batch_size in batch_sizes:
                head = f"{model:<22} {batch_size:>5} {projector_dim:>5} |"
                bench.forget()
                try:
                    row = bench.row(model, batch_size, projector_dim)
                except torch.OutOfMemoryError:
                    print(head, "does not fit into memory", flush=True)
                    continue
                print(
                    f"{head} {row.with_e2mc * 1e3:>9.1f} {batch_size / row.with_e2mc:>8.1f}"
                    f" {row.operations / row.with_e2mc / rate:>9.1%} | {row.criterion * 1e3:>8.2f}"
                    f" {row.criterion / row.with_e2mc:>6.2%} {row.with_e2mc / row.without_e2mc - 1:>+7.2%}",
                    flush=True,
                )
    if options.profile:
        for projector_dim in options.projector_dim:
            print_kernels(bench, max(batch_sizes), projector_dim)


if __name__ == "__main__":
    main()
