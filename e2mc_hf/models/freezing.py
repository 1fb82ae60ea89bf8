"""Leave the first blocks of a backbone as they are."""

from e2mc_hf.arguments import require
from e2mc_hf.models.backbone import Backbone, name_of
from e2mc_hf.models.layer_order import layer_order
from e2mc_hf.models.norm_policy import freeze_statistics


def freeze_first_blocks(backbone: Backbone, count: int) -> list[str]:
    """Freeze the stem or patch embedding and the first blocks: neither weights nor batch statistics change.

    Blocks are those of timm's `group_matcher`, one by one: residual blocks, transformer blocks, or stages where an
    architecture says no more. A class token and position embeddings belong to the patch embedding. Unlike
    `timm.utils.freeze`, every name that a checkpoint needs stays.

    Args:
        backbone: Backbone to change in place.
        count: Number of blocks; 0 freezes nothing, not even the stem.

    Returns:
        Names of the frozen parameters.

    Raises:
        UsageError: If there are fewer blocks, or the architecture does not tell them apart.
    """
    if count == 0:
        return []
    order = layer_order(backbone)
    require(
        0 < count <= order.num_blocks,
        "freeze_blocks",
        f"must lie between 0 and {order.num_blocks}, the blocks of {name_of(backbone.model)!r}",
        count,
        "Pass fewer.",
    )
    frozen = {name for name, depth in order.depths.items() if depth <= count}
    freeze_statistics(backbone, where=frozen.__contains__)
    parameters = [(name, parameter) for name, parameter in backbone.named_parameters() if name in frozen]
    for _, parameter in parameters:
        parameter.requires_grad_(False)
    return [name for name, _ in parameters]
