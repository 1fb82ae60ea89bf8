"""Take a vision encoder you already have, improve it with a handful of epochs of E2MC, prove it, publish it.

Importing the package is instant: torch, transformers and timm are imported with the first name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2mc_hf.errors import UsageError as UsageError
    from e2mc_hf.evaluation.protocol import evaluate_encoder as evaluate_encoder
    from e2mc_hf.models.backbone import Backbone as Backbone
    from e2mc_hf.models.checkpoint_import import import_checkpoint as import_checkpoint
    from e2mc_hf.models.loading import load_backbone as load_backbone
    from e2mc_hf.models.ssl_model import SSLConfig as SSLConfig
    from e2mc_hf.models.ssl_model import SSLModel as SSLModel
    from e2mc_hf.models.ssl_model import SSLOutput as SSLOutput
    from e2mc_hf.objectives.vicreg import VICReg as VICReg
    from e2mc_hf.publishing.encoder import export_encoder as export_encoder
    from e2mc_hf.regularizers.covariance import off_diagonal_covariance as off_diagonal_covariance
    from e2mc_hf.regularizers.e2mc import E2MCRegularizer as E2MCRegularizer
    from e2mc_hf.regularizers.entropy import marginal_entropy as marginal_entropy
    from e2mc_hf.regularizers.output import RegularizerOutput as RegularizerOutput
    from e2mc_hf.training.arguments import E2MCTrainingArguments as E2MCTrainingArguments
    from e2mc_hf.training.continuation import continue_pretraining as continue_pretraining
    from e2mc_hf.training.trainer import E2MCTrainer as E2MCTrainer

_HOMES = {
    "Backbone": "e2mc_hf.models.backbone",
    "E2MCRegularizer": "e2mc_hf.regularizers.e2mc",
    "E2MCTrainer": "e2mc_hf.training.trainer",
    "E2MCTrainingArguments": "e2mc_hf.training.arguments",
    "RegularizerOutput": "e2mc_hf.regularizers.output",
    "SSLConfig": "e2mc_hf.models.ssl_model",
    "SSLModel": "e2mc_hf.models.ssl_model",
    "SSLOutput": "e2mc_hf.models.ssl_model",
    "UsageError": "e2mc_hf.errors",
    "VICReg": "e2mc_hf.objectives.vicreg",
    "continue_pretraining": "e2mc_hf.training.continuation",
    "evaluate_encoder": "e2mc_hf.evaluation.protocol",
    "export_encoder": "e2mc_hf.publishing.encoder",
    "import_checkpoint": "e2mc_hf.models.checkpoint_import",
    "load_backbone": "e2mc_hf.models.loading",
    "marginal_entropy": "e2mc_hf.regularizers.entropy",
    "off_diagonal_covariance": "e2mc_hf.regularizers.covariance",
}

__all__ = [
    "Backbone",
    "E2MCRegularizer",
    "E2MCTrainer",
    "E2MCTrainingArguments",
    "RegularizerOutput",
    "SSLConfig",
    "SSLModel",
    "SSLOutput",
    "UsageError",
    "VICReg",
    "continue_pretraining",
    "evaluate_encoder",
    "export_encoder",
    "import_checkpoint",
    "load_backbone",
    "marginal_entropy",
    "off_diagonal_covariance",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
