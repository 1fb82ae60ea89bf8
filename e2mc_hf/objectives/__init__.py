"""Self-supervised objectives: heads, state and loss of one method in one file."""

from e2mc_hf.objectives.output import ObjectiveOutput as ObjectiveOutput
from e2mc_hf.objectives.registry import build_objective as build_objective
from e2mc_hf.objectives.vicreg import VICReg as VICReg
