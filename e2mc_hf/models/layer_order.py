"""Depth of every parameter of a backbone: what layer-wise learning rates and the freezing of first blocks share."""

from dataclasses import dataclass
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch.nn.modules.batchnorm import _BatchNorm

from e2mc_hf.errors import UsageError
from e2mc_hf.models.backbone import Backbone, name_of

# timm's mark of a group that belongs to the one before it: a norm after the last block, the downsampling after a stage.
_WITH_PREVIOUS = (99999,)

# transformers has no `group_matcher`; this is one, in timm's notation, for the names its vision models share.
_INNER = r"^(?:model\.|encoder\.)*"
_TRANSFORMERS: dict[str, Any] = {
    "stem": [
        (r"^(?:embeddings|embedder|pre_layrnorm|pre_layernorm)\.", None),
        (_INNER + r"stages\.0\.downsample_layers\.", None),  # DINOv3's ConvNext
    ],
    "blocks": [
        (_INNER + r"(?:stages|layers)\.(\d+)\.(?:layers|blocks)\.(\d+)\.", None),
        (_INNER + r"stages\.(\d+)\.downsampl(?:ing_layer|e_layers)\.", (0,)),  # before the stage: with its first block
        (_INNER + r"(?:stages|layers)\.(\d+)\.downsample\.", _WITH_PREVIOUS),
        (_INNER + r"layers?\.(\d+)\.", None),
        (r"^(?:layernorm|layer_norm|norm|post_layernorm|rms_norm)\.", _WITH_PREVIOUS),
    ],
}
_STEM, _HEADS = "embeddings. of a model that has none", "heads on top of the backbone"


@dataclass(frozen=True)
class LayerOrder:
    """Depth of each parameter and batch normalization of a backbone.

    Attributes:
        depths: 0 for the stem or patch embedding, 1 to `num_blocks` for the blocks, `num_blocks` + 1 for what timm
            counts with the classifier (a pooler, a norm after pooling). A batch normalization has its module's name.
        num_blocks: Residual or transformer blocks, as timm's `group_matcher(coarse=False)` cuts them.
    """

    depths: dict[str, int]
    num_blocks: int


def layer_order(backbone: Backbone) -> LayerOrder:
    """Order the layers of a backbone: timm's by its own `group_matcher`, transformers' by the names of their blocks.

    Heads count as the layer above the last block, where timm has the classifier, so that depths are the layers of
    `timm.optim.param_groups_layer_decay` for the model with its classifier.

    Raises:
        UsageError: If the architecture says nothing about the order of its layers.
    """
    model: Any = backbone.model
    places = [_HEADS]
    if model.config.model_type == "timm_wrapper":
        prefix, model = "model.timm_model.", model.timm_model
        matcher = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {}
    else:
        prefix, matcher = "model.", _TRANSFORMERS
        places.append(_STEM)  # so that depth 0 is the stem's even if these names do not tell it
    # A batch normalization without parameters has a depth as well: that of a weight inside it.
    norms = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    names = {name for name, _ in model.named_parameters()}
    listed = [(name, None) for name in [*names, *(norms.keys() - names), *places]]
    found: dict[str, int] = group_with_matcher(listed, matcher, reverse=True)
    num_blocks = found[_HEADS] - 1
    if num_blocks < 1 or not any(found[name] == 0 for name in names):
        raise UsageError(
            f"`model` must be an architecture whose blocks are known by name, got {name_of(backbone.model)!r}. Leave "
            "layer-wise learning rates and the freezing of first blocks out, or choose timm's version of it."
        )
    depths = {f"{prefix}{name}": depth for name, depth in found.items() if name in names}
    return LayerOrder(depths | {f"{prefix}{name}": found[weight] for weight, name in norms.items()}, num_blocks)
