"""Regularizers by the name a recipe gives them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from e2mc_hf.errors import UsageError
from e2mc_hf.options import build, suggestion
from e2mc_hf.regularizers.combined import CombinedRegularizer
from e2mc_hf.regularizers.e2mc import E2MCRegularizer
from e2mc_hf.regularizers.koleo import KoLeoRegularizer
from e2mc_hf.regularizers.logdet import LogDetRegularizer
from e2mc_hf.regularizers.mec import MECRegularizer
from e2mc_hf.regularizers.mmcr import MMCRRegularizer
from e2mc_hf.regularizers.radial import RadialRegularizer
from e2mc_hf.regularizers.regularizer import Regularizer
from e2mc_hf.regularizers.sigreg import SIGRegRegularizer
from e2mc_hf.regularizers.sliced_entropy import SlicedEntropyRegularizer
from e2mc_hf.regularizers.uniformity import UniformityRegularizer
from e2mc_hf.regularizers.vcreg import VCRegRegularizer
from e2mc_hf.regularizers.visreg import VISRegRegularizer
from e2mc_hf.regularizers.vne import VNERegularizer

REGULARIZERS: dict[str, type[Regularizer]] = {
    "e2mc": E2MCRegularizer,
    "koleo": KoLeoRegularizer,
    "logdet": LogDetRegularizer,
    "mec": MECRegularizer,
    "mmcr": MMCRRegularizer,
    "radial": RadialRegularizer,
    "sigreg": SIGRegRegularizer,
    "sliced_entropy": SlicedEntropyRegularizer,
    "uniformity": UniformityRegularizer,
    "vcreg": VCRegRegularizer,
    "visreg": VISRegRegularizer,
    "vne": VNERegularizer,
}


def build_regularizer(names: str | Sequence[str], options: Mapping[str, Any]) -> nn.Module | None:
    """Build a regularizer, or the sum of several; None for `none`, the control.

    Args:
        names: One name, or a list of different ones.
        options: Options of the one; for several, the options of each under its name, or as `name.option`.

    Raises:
        UsageError: If a name or an option is unknown, or a value does not fit.
    """
    given = [names] if isinstance(names, str) else list(names)
    if given == ["none"]:
        if options:
            raise UsageError(f"`regularizer_args` must be empty without a regularizer, got {dict(options)}. Drop them.")
        return None
    if len(set(given)) < len(given) or not given or "none" in given:
        raise UsageError(f"`regularizer` must be none, or different names, got {given}. Name each once.")
    for name in given:
        if name not in REGULARIZERS:
            raise UsageError(f"`regularizer` {name!r} is unknown. {suggestion(name, [*REGULARIZERS, 'none'])}")
    if len(given) == 1:
        regularizer: nn.Module = build(REGULARIZERS[given[0]], options, "regularizer_args")
        return regularizer
    options_of = _options_of_each(given, options)
    return CombinedRegularizer(
        {name: build(REGULARIZERS[name], options_of[name], f"regularizer_args.{name}") for name in given}
    )


def _options_of_each(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    options_of: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in options.items():
        name, _, option = key.partition(".")
        if name not in options_of or (not option and not isinstance(value, Mapping)):
            raise UsageError(
                f"`regularizer_args` must say whose option it is when there are several regularizers, got {key!r}. "
                f"Write {names[0]}.{key}, or a mapping under {names[0]}."
            )
        options_of[name] |= {option: value} if option else dict(value)
    return options_of
