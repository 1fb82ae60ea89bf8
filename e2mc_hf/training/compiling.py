"""Compilation of the encoder alone, in place: a graph for each size of view, and nothing new after the first steps.

transformers hands `--torch_compile` to accelerate, which compiles a whole model; but heads wait for other processes,
and views come in several sizes. Here backbone and teacher are compiled, which is where the time goes; heads, objective
and criterion run as they are. Only batches of the training run compiled code. Everything else (evaluation, a last and
smaller chunk of the gradient cache, whatever comes after the training) passes the same modules uncompiled, and can
thus make nothing be compiled again.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainingArguments

from e2mc_hf.arguments import require

_MODES = ("default", "max-autotune-no-cudagraphs")
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # new and old name in transformers
_LAUNCHER = "ACCELERATE_DYNAMO_"  # accelerate launch --dynamo_... leaves its options under these names


def take_over_launcher(args: TrainingArguments) -> None:
    """Make `accelerate launch --dynamo_backend` the arguments that mean the same; flags of the run win.

    Raises:
        UsageError: If the launcher was given an option of compilation that would have no effect.
    """
    backend = os.environ.get(f"{_LAUNCHER}BACKEND", "no").lower()
    if backend == "no":
        return
    for name in ("USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION"):
        value = os.environ.get(_LAUNCHER + name, "false")
        rule = "has no effect: the encoder is compiled whole, for each size of view"
        require(value.lower() in ("false", "0"), f"dynamo_{name.lower()}", rule, value, "Leave it out.")
    if not (args.torch_compile or args.torch_compile_backend or args.torch_compile_mode):
        args.torch_compile, args.torch_compile_backend = True, backend
        args.torch_compile_mode = os.environ.get(f"{_LAUNCHER}MODE", "default")


def check_compile_options(args: TrainingArguments) -> None:
    """Refuse a backend or a mode that there is not, or that would not give the numbers of the uncompiled training.

    Args:
        args: Arguments whose backend has been filled in.

    Raises:
        UsageError: If there is one, or the compiler of the CPU's code is missing.
    """
    if not args.torch_compile:
        return
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    known = torch.compiler.list_backends(exclude_tags=())
    names = "inductor, or another that torch.compiler.list_backends() names"
    require(backend in known, "torch_compile_backend", f"must be {names}", backend, "Leave it out for inductor.")
    why = "CUDA graphs would overwrite the features of one view with those of the next"
    require(backend != "cudagraphs", "torch_compile_backend", f"must be another: {why}", backend, "Leave it out.")
    rule = f"must be {' or '.join(_MODES)}: {why}"
    require(mode in (None, *_MODES), "torch_compile_mode", rule, mode, "Leave it out.")
    require(
        backend == "inductor" or mode in (None, "default"),
        "torch_compile_mode",
        "needs the backend inductor",
        f"{mode} with {backend}",
        "Leave one of the two out.",
    )
    compiler = os.environ.get("CXX", "g++")
    needs_compiler = backend == "inductor" and args.device.type == "cpu" and sys.platform == "linux"
    require(
        not needs_compiler or shutil.which(compiler) is not None,
        "torch_compile",
        "needs a C++ compiler on the CPU",
        f"no {compiler}",
        "Install g++, or name another one in the environment variable CXX.",
    )


@contextmanager
def hidden_from_accelerate(args: TrainingArguments) -> Iterator[None]:
    """Let accelerate, while it is being set up, find neither arguments nor an environment to compile the model by."""
    own, args.torch_compile_backend = args.torch_compile_backend, "no"
    try:
        yield
    finally:
        args.torch_compile_backend = own


def check_can_be_compiled(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse to compile a model where that cannot work.

    Raises:
        UsageError: If compilation is asked for and the model has no `backbone`, or one with batch normalization whose
            activations are computed twice: torch then finds running statistics changed that it needs.
    """
    if not args.torch_compile:
        return
    backbone = getattr(model, "backbone", None)
    kind = type(model).__name__
    rule = "needs a model with a `backbone`, the part that is compiled"
    require(isinstance(backbone, nn.Module), "torch_compile", rule, kind, "Leave it out.")
    assert isinstance(backbone, nn.Module)
    twice = [name for name in _CHECKPOINTING if getattr(args, name, None)]
    normalizes = any(isinstance(layer, _BatchNorm) for layer in backbone.modules())
    require(
        not (twice and normalizes),
        "torch_compile",
        "does not go with activation checkpointing for an encoder with batch normalization",
        " and ".join(twice),
        "Leave one of the two out.",
    )


@contextmanager
def compiled_backbones(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Compile the backbone of a model, and its teacher's, while they train; no change where `torch_compile` is off.

    Names of parameters stay. Code is made at the first batch of each size. Random numbers, such as those of
    stochastic depth, are the ones of uncompiled training.

    Args:
        model: Model to train, not wrapped for several processes; its training mode says when compiled code runs.
        args: Arguments of the run.
    """
    parts = [model.backbone, getattr(model, "teacher", None)] if args.torch_compile else []
    modules = [part for part in parts if isinstance(part, nn.Module)]
    for module in modules:
        compiled = torch.compile(module._call_impl, **_torch_options(args))
        # What nn.Module.compile sets: calls go there, and neither copies nor pickles nor state dicts see it.
        module._compiled_call_impl = _TrainingCall(module._call_impl, compiled, model)
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


class _TrainingCall:
    """Call of a module: compiled for batches of the training, one size of batch for each size of view; else plain."""

    def __init__(self, plain: Callable[..., Tensor], compiled: Callable[..., Tensor], model: nn.Module) -> None:
        self._plain, self._compiled, self._model = plain, compiled, model
        self._num_images: dict[tuple[int, int, bool], int] = {}  # by height, width, and whether there is a gradient

    def __call__(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        num_images = len(pixel_values)
        if self._model.training:  # not the module's own: a teacher is in evaluation mode while it trains
            kind = (pixel_values.shape[-2], pixel_values.shape[-1], torch.is_grad_enabled())
            if self._num_images.setdefault(kind, num_images) == num_images:
                return self._compiled(pixel_values)
        return self._plain(pixel_values)


def _torch_options(args: TrainingArguments) -> dict[str, Any]:
    # Isolated: torch counts graphs by code object, at most 8, and all modules of a process share that of their call.
    options: dict[str, Any] = {"dynamic": False, "isolate_recompiles": True, "backend": args.torch_compile_backend}
    if args.torch_compile_backend == "inductor":
        mode = torch._inductor.list_mode_options(args.torch_compile_mode or "default")
        options["options"] = mode | {"fallback_random": True}
    return options
