"""Objectives by the name a recipe gives them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from e2mc_hf.errors import UsageError
from e2mc_hf.objectives.vicreg import VICReg
from e2mc_hf.options import build, suggestion

OBJECTIVES: dict[str, type[nn.Module]] = {"vicreg": VICReg}


def build_objective(name: str, options: Mapping[str, Any], feature_dim: int) -> nn.Module:
    """Build an objective with new heads for features of width `feature_dim`.

    Raises:
        UsageError: If the name or an option is unknown, or a value does not fit.
    """
    if name not in OBJECTIVES:
        raise UsageError(f"`objective` {name!r} is unknown. {suggestion(name, OBJECTIVES)}")
    objective: nn.Module = build(OBJECTIVES[name], options, "objective_args", feature_dim)
    return objective
