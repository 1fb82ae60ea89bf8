"""Heads of an author's checkpoint as those of an objective: what options they were built with, and what differs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from e2mc_hf.errors import UsageError
from e2mc_hf.models.checkpoint_formats import Layout

_REMEDY = "Pass --encoder_only to leave the heads out."


def heads_of(layout: Layout) -> dict[str, Tensor]:
    """Heads by their names in the objective, changed where the authors' module differs from ours.

    - SimSiam, MEC: the last linear layer has a bias that batch normalization takes out again at once. It is left out,
      and subtracted from that normalization's running mean, so that evaluation stays what it was.
    - DINO: the prototypes' rows count with unit norm, so only their direction (`weight_v`) is kept; the center loses
      its leading dimension of 1.

    Raises:
        UsageError: If DINO's prototypes have learned norms.
    """
    heads = layout.part("objective.")
    if layout.objective in ("simsiam", "mec"):
        for projector in ("projector", "teacher_projector"):
            bias, mean = heads.pop(f"{projector}.6.bias", None), heads.get(f"{projector}.7.running_mean")
            if bias is not None and mean is not None and bias.shape == mean.shape:
                heads[f"{projector}.7.running_mean"] = mean - bias
    if layout.objective == "dino":
        _check_unit_norms(layout)
        if "center" in heads:
            heads["center"] = heads["center"].flatten()
    return heads


def _check_unit_norms(layout: Layout) -> None:
    endings = ("last_layer.weight_g", "last_layer.parametrizations.weight.original0")
    for name, norms in layout.tensors.items():
        if name.endswith(endings) and not torch.all((norms - 1).abs() <= 1e-3):
            raise UsageError(
                f"`file` must hold prototypes of unit norm, as DINO's objective has them here, got {name} from "
                f"{norms.min().item():.3g} to {norms.max().item():.3g} (norm_last_layer was off). {_REMEDY}"
            )


def options_of(objective: str, heads: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of an objective whose heads have these shapes.

    Args:
        objective: Name of the objective.
        heads: By their names in the objective.

    Raises:
        UsageError: If a head is missing, or the objective cannot have such heads.
    """
    if objective in ("vicreg", "barlow_twins"):
        widths = _widths(heads, "projector.")
        _require_fit(len(set(widths)) == 1, f"a projector of widths {widths}, where {objective}'s layers are alike")
        return {"projector_dim": widths[-1], "projector_layers": len(widths)}
    if objective == "swav":
        (hidden, _), (width, _), (count, _) = _shapes(heads, "projector.0", "projector.3", "prototypes")
        return {"projector_dim": width, "hidden_dim": hidden, "num_prototypes": count}
    if objective == "dino":
        widths = _widths(heads, "projector.")
        _require_fit(len(widths) == 3 and widths[0] == widths[1], f"a head of widths {widths}, where dino's has three")
        ((count, _),) = _shapes(heads, "prototypes")
        return {
            "projector_dim": widths[-1],
            "hidden_dim": widths[0],
            "num_prototypes": count,
            "norm": "projector.1.running_mean" in heads,
        }
    widths = [width for width, _ in _shapes(heads, "projector.0", "projector.3", "projector.6")]
    _require_fit(len(set(widths)) == 1, f"a projector of widths {widths}, where {objective}'s layers are alike")
    ((predictor_width, _),) = _shapes(heads, "predictor.0")
    return {"projector_dim": widths[-1], "predictor_dim": predictor_width}


def check_whole(wanted: Iterable[str], heads: Mapping[str, Tensor]) -> None:
    """Refuse heads that are there in part, or that the objective does not have.

    Args:
        wanted: Names the objective has.
        heads: What the file has for it.

    Raises:
        UsageError: If they differ, naming up to five.
    """
    wanted = list(wanted)
    missing = [name for name in wanted if name not in heads]
    further = [name for name in heads if name not in wanted]
    if missing or further:
        named = [f"without {name}" for name in missing] + [f"with {name[:80]!r}" for name in further]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        raise UsageError(
            f"`file` must hold its heads whole or not at all, got them {', '.join(named[:5])}{more}. {_REMEDY}"
        )


def _widths(heads: Mapping[str, Tensor], prefix: str) -> list[int]:
    """Output widths of the linear layers of a head, in order."""
    names = [name for name in heads if name.startswith(prefix) and heads[name].dim() == 2]
    if not names:
        check_whole([f"{prefix}0.weight"], {})
    return [heads[name].shape[0] for name in sorted(names, key=lambda name: (len(name), name))]


def _shapes(heads: Mapping[str, Tensor], *layers: str) -> list[tuple[int, int]]:
    names = [f"{layer}.weight" for layer in layers]
    check_whole(names, {name: heads[name] for name in names if name in heads})
    _require_fit(all(heads[name].dim() == 2 for name in names), f"heads that are no linear layers: {', '.join(names)}")
    return [(heads[name].shape[0], heads[name].shape[1]) for name in names]


def _require_fit(fits: bool, got: str) -> None:
    if not fits:
        raise UsageError(f"`file` must hold heads that the objective can have, got {got}. {_REMEDY}")
