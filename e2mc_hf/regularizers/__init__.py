"""Criteria without positives: (V, N, D) embeddings in, a loss and its terms out."""

from e2mc_hf.regularizers.covariance import off_diagonal_covariance as off_diagonal_covariance
from e2mc_hf.regularizers.e2mc import E2MCRegularizer as E2MCRegularizer
from e2mc_hf.regularizers.entropy import marginal_entropy as marginal_entropy
from e2mc_hf.regularizers.output import RegularizerOutput as RegularizerOutput
from e2mc_hf.regularizers.registry import build_regularizer as build_regularizer
