"""A model whose weights FSDP2 divides among processes, and how it becomes whole again."""

import copy
from collections.abc import Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy

from e2mc_hf.arguments import require


class ShardedModel:
    """Ready a model for accelerate's FSDP2, and keep its form without its weights, to put it together again.

    Blocks of the backbone are gathered one by one; what is around them, the heads included, as a whole. Under bfloat16
    weights stay float32 and autocast chooses what runs in 16 bits, as with whole weights: the numbers are the same.

    Args:
        model: Model that is not sharded yet; its `forward` is replaced if the run has mixed precision.
        accelerator: Accelerator of the run, whose FSDP plugin is completed.

    Raises:
        UsageError: If a class of blocks that is named is not in the backbone, or is in the heads as well.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        plugin = accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            found = block_classes(getattr(model, "backbone", model))
            plugin.transformer_cls_names_to_wrap = sorted(found - _head_classes(model))
        check_block_classes(model, plugin.transformer_cls_names_to_wrap)
        self._form = _without_weights(model)
        # accelerate looks for embeddings of tokens, and stops where transformers knows of none.
        vars(model)["get_input_embeddings"] = lambda: None
        if accelerator.native_amp:
            plugin.mixed_precision_policy = MixedPrecisionPolicy()
            model.forward = _under_autocast(model, accelerator)

    def whole(self, sharded: nn.Module) -> nn.Module:
        """Copy of the trained model with whole weights, on every process; all processes must call this together.

        Args:
            sharded: Model after training, as the Trainer holds it.
        """
        weights = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        form, self._form = self._form, _without_weights(self._form)
        form.load_state_dict(weights, assign=True)
        return form.to(next(sharded.parameters()).device).train(sharded.training)


def block_classes(backbone: nn.Module) -> set[str]:
    """Names of the classes of a backbone's blocks: what stands in a row of modules of one class, the outermost rows."""
    return {type(block).__name__ for row in _rows(backbone) for block in row}


def _rows(module: nn.Module) -> Iterator[list[nn.Module]]:
    children = list(module.children())
    is_row = isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(child) for child in children}) == 1
    if is_row and len(children) > 1 and any(True for _ in module.parameters()):
        yield children
        return
    for child in children:
        yield from _rows(child)


def check_block_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse classes to gather one by one that stand in the heads too: objectives read weights past their modules.

    Raises:
        UsageError: If there is one, or one that is not in the backbone.
    """
    known = {type(module).__name__ for module in getattr(model, "backbone", model).modules()}
    heads = _head_classes(model)
    for name in names:
        rule = "must be classes of the encoder's blocks that its heads do not use"
        remedy = "Leave fsdp_transformer_layer_cls_to_wrap out: the blocks are found."
        require(name in known - heads, "fsdp_transformer_layer_cls_to_wrap", rule, name, remedy)


def _head_classes(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in getattr(model, "objective", nn.Identity()).modules()}


def _without_weights(model: nn.Module) -> nn.Module:
    """Copy of a model whose parameters have no values; its buffers, some of which no state dict holds, do."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict(empty))


def _under_autocast(model: nn.Module, accelerator: Accelerator) -> Any:
    """`forward` of a model as accelerate runs it for whole weights: under autocast, its output in float32."""
    plain = model.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            output = plain(*args, **kwargs)
        return convert_to_fp32(output)

    return forward
