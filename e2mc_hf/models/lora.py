"""Low-rank adapters on the attention of large vision transformers, through peft, an optional dependency."""

from typing import Any

from torch import Tensor, nn

from e2mc_hf.arguments import require
from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone, name_of
from e2mc_hf.modes import evaluation_mode

_ATTENTION = {"attn", "attention", "self_attn"}
_PROJECTIONS = {
    *("qkv", "proj"),  # timm
    *("q", "k", "v", "kv"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),  # transformers
    *("query", "key", "value", "dense"),
}


def add_lora(
    backbone: Backbone, rank: int, *, alpha: int | None = None, dropout: float = 0.0, teacher: Backbone | None = None
) -> list[str]:
    """Put low-rank adapters on the attention projections of a backbone, and freeze the rest of it.

    An adapter adds (alpha / rank) B A x to W x, with B = 0 at first: the features are those of before. Add them before
    a teacher is copied from the backbone, or hand that teacher over.

    Args:
        backbone: Vision transformer, changed in place.
        rank: Rows of A and columns of B.
        alpha: Scale; `rank` when not given, so that the factor is 1.
        dropout: Dropout of the adapters' input.
        teacher: Copy of the backbone that gets the same adapters, frozen.

    Returns:
        Names of the adapted layers.

    Raises:
        UsageError: If peft is missing, the rank is below 1, the backbone has no attention projections, or it applies
            their weights past their modules, so that adapters would have no effect.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, https://arxiv.org/abs/2106.09685.
    """
    require(rank >= 1, "lora_rank", "must be at least 1", rank, "4 to 16 are usual.")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(
            f'`lora_rank` needs peft, which does not import, got {rank}. Install it: pip install "e2mc-hf[lora]".'
        ) from error
    layers = _attention_projections(backbone)
    scale = rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=layers)
    inject_adapter_in_model(config, backbone)
    if teacher is not None:
        inject_adapter_in_model(config, teacher)
        teacher.load_state_dict(
            {name: tensor for name, tensor in backbone.state_dict().items() if "lora_" in name}, False
        )
        teacher.requires_grad_(False)
    return layers


def merge_lora(module: nn.Module) -> list[str]:
    """Add the adapters to the weights they adapt, and make the layers plain again; nothing without adapters.

    Args:
        module: Backbone or whole model, changed in place; its features stay (to 1e-5).

    Returns:
        Names of the layers that had adapters.
    """
    adapted: dict[str, Any] = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    for name, layer in adapted.items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    for owner in module.modules():
        vars(owner).pop("peft_config", None)
    return list(adapted)


def _attention_projections(backbone: Backbone) -> list[str]:
    """Names of the linear layers of attention, each of which the model calls as a module."""
    inside_torch = [
        f"{name}." for name, module in backbone.named_modules() if isinstance(module, nn.MultiheadAttention)
    ]
    layers = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in _PROJECTIONS
        and _ATTENTION & set(name.split("."))
        and not name.startswith(tuple(inside_torch))
    }
    if not layers:
        raise UsageError(
            f"`lora_rank` needs a vision transformer with linear projections of its attention, got "
            f"{name_of(backbone.model)!r}, which has none. Pass 0 to train every weight."
        )
    called: set[nn.Module] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        called.add(module)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        with evaluation_mode(backbone):
            backbone.measure_num_features(backbone.image_settings.size)
    finally:
        for hook in hooks:
            hook.remove()
    passed_by = [name for name, layer in layers.items() if layer not in called]
    if passed_by:
        raise UsageError(
            f"`lora_rank` needs layers that are called as modules, got {name_of(backbone.model)!r}, which multiplies "
            f"with the weight of {passed_by[0]} itself. Use transformers' version of it, or pass 0."
        )
    return list(layers)
