"""Self-supervised objectives: heads, state and loss of one method in one file."""

from e2mc_hf.objectives.barlow_twins import BarlowTwins as BarlowTwins
from e2mc_hf.objectives.byol import BYOL as BYOL
from e2mc_hf.objectives.dino import DINO as DINO
from e2mc_hf.objectives.mec import MEC as MEC
from e2mc_hf.objectives.objective import Objective as Objective
from e2mc_hf.objectives.output import ObjectiveOutput as ObjectiveOutput
from e2mc_hf.objectives.registry import build_objective as build_objective
from e2mc_hf.objectives.simclr import SimCLR as SimCLR
from e2mc_hf.objectives.simsiam import SimSiam as SimSiam
from e2mc_hf.objectives.swav import SwAV as SwAV
from e2mc_hf.objectives.vicreg import VICReg as VICReg
