"""Heads of an author's checkpoint as those of an objective: what options they were built with, and what differs."""

import re
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


def options_of(objective: str, heads: Mapping[str, Tensor], feature_dim: int) -> dict[str, Any]:
    """Options of an objective whose heads have these shapes.

    Every matrix that the objective would make is found in the file, each as wide as the one before: a small file cannot
    ask for large heads.

    Args:
        objective: Name of the objective.
        heads: By their names in the objective.
        feature_dim: F, width of the backbone's features.

    Raises:
        UsageError: If a head is missing, or the objective cannot have such heads.
    """
    if objective in ("vicreg", "barlow_twins"):
        numbers = [int(match[1]) for name in heads if (match := re.fullmatch(r"projector\.(\d{1,2})\.\w+", name))]
        last = -(-max(numbers, default=0) // 3)  # each layer but the last is followed by normalization and activation
        widths = _chain(heads, feature_dim, *(f"projector.{3 * layer}" for layer in range(last + 1)))
        _require_fit(len(set(widths)) == 1, f"a projector of widths {widths}, where {objective}'s layers are alike")
        return {"projector_dim": widths[-1], "projector_layers": len(widths)}
    if objective == "swav":
        hidden, width, count = _chain(heads, feature_dim, "projector.0", "projector.3", "prototypes")
        return {"projector_dim": width, "hidden_dim": hidden, "num_prototypes": count}
    if objective == "dino":
        has_norm = "projector.1.running_mean" in heads
        layers = [f"projector.{(3 if has_norm else 2) * layer}" for layer in range(3)]
        first, second, width, count = _chain(heads, feature_dim, *layers, "prototypes")
        _require_fit(first == second, f"a head of hidden widths {first} and {second}, where dino's are alike")
        return {"projector_dim": width, "hidden_dim": first, "num_prototypes": count, "norm": has_norm}
    layers = ["projector.0", "projector.3", "projector.6", "predictor.0", "predictor.3"]
    *widths, predictor, width = _chain(heads, feature_dim, *layers)
    _require_fit(
        set(widths) == {width}, f"heads of widths {[*widths, predictor, width]}, where {objective}'s are alike"
    )
    return {"projector_dim": width, "predictor_dim": predictor}


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


def _chain(heads: Mapping[str, Tensor], width: int, *layers: str) -> list[int]:
    """Output widths of linear layers, each of which takes what the one before gives."""
    names = [f"{layer}.weight" for layer in layers]
    check_whole(names, {name: heads[name] for name in names if name in heads})
    widths = []
    for name in names:
        shape = tuple(heads[name].shape)
        _require_fit(len(shape) == 2 and shape[1] == width, f"{name} of shape {shape}, where it takes {width}")
        width = shape[0]
        widths.append(width)
    return widths


def _require_fit(fits: bool, got: str) -> None:
    if not fits:
        raise UsageError(f"`file` must hold heads that the objective can have, got {got}. {_REMEDY}")
