"""Regularizers by the name a recipe gives them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from e2mc_hf.errors import UsageError
from e2mc_hf.options import build, suggestion
from e2mc_hf.regularizers.e2mc import E2MCRegularizer

REGULARIZERS: dict[str, type[nn.Module]] = {"e2mc": E2MCRegularizer}


def build_regularizer(name: str, options: Mapping[str, Any]) -> nn.Module | None:
    """Build a regularizer; None for `none`, the control.

    Raises:
        UsageError: If the name or an option is unknown, or a value does not fit.
    """
    if name == "none":
        if options:
            raise UsageError(f"`regularizer_args` must be empty without a regularizer, got {dict(options)}. Drop them.")
        return None
    if name not in REGULARIZERS:
        raise UsageError(f"`regularizer` {name!r} is unknown. {suggestion(name, [*REGULARIZERS, 'none'])}")
    regularizer: nn.Module = build(REGULARIZERS[name], options, "regularizer_args")
    return regularizer
