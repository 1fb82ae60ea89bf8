"""Objectives by the name a recipe gives them."""

from collections.abc import Mapping
from typing import Any

from e2mc_hf.errors import UsageError
from e2mc_hf.objectives.barlow_twins import BarlowTwins
from e2mc_hf.objectives.byol import BYOL
from e2mc_hf.objectives.dino import DINO
from e2mc_hf.objectives.mec import MEC
from e2mc_hf.objectives.objective import Objective
from e2mc_hf.objectives.simclr import SimCLR
from e2mc_hf.objectives.simsiam import SimSiam
from e2mc_hf.objectives.swav import SwAV
from e2mc_hf.objectives.vicreg import VICReg
from e2mc_hf.options import build, suggestion

OBJECTIVES: dict[str, type[Objective]] = {
    "barlow_twins": BarlowTwins,
    "byol": BYOL,
    "dino": DINO,
    "mec": MEC,
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "swav": SwAV,
    "vicreg": VICReg,
}


def objective_kind(name: str) -> type[Objective]:
    """Look up an objective by name.

    Raises:
        UsageError: If the name is unknown.
    """
    if name not in OBJECTIVES:
        raise UsageError(f"`objective` {name!r} is unknown. {suggestion(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def build_objective(name: str, options: Mapping[str, Any], feature_dim: int) -> Objective:
    """Build an objective with new heads for features of width `feature_dim`.

    Raises:
        UsageError: If the name or an option is unknown, or a value does not fit.
    """
    objective: Objective = build(objective_kind(name), options, "objective_args", feature_dim)
    return objective


def check_views(name: str, num_views: int, num_small_views: int) -> None:
    """Refuse a number of views that an objective has no loss for, before anything is loaded.

    Raises:
        UsageError: If there is one.
    """
    kind = objective_kind(name)
    wanted = kind.num_large_views
    if num_views != wanted:
        raise UsageError(f"`num_views` must be {wanted} for {name}, got {num_views}. Pass --num_views {wanted}.")
    if num_small_views and not kind.takes_small_views:
        raise UsageError(
            f"`num_small_views` must be 0 for {name}, got {num_small_views}. Leave it out, or use swav or dino."
        )
