"""Optimizers of torch in one kernel for all parameters: where they are used, and what they need to be right."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

# torch has fused AdamW and SGD there and on the CPU, where the plain ones are kept: their numbers are those of before.
_DEVICES = ("cuda", "mps", "xpu")


def fused_option(groups: Iterable[Mapping[str, Any]], asked: bool | None = None) -> bool | None:
    """Value of `fused` for AdamW and SGD over groups of parameters.

    Args:
        groups: Groups as an optimizer takes them.
        asked: What was asked for; None leaves it to the devices of the parameters.

    Returns:
        True, or None for the kernels that torch chooses among the others.
    """
    if asked is None:
        asked = all(parameter.device.type in _DEVICES for group in groups for parameter in group["params"])
    return asked or None


def keep_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Let an AdamW or SGD keep its kernels, fused or not, when it takes over a state, and make a state fit for them.

    Fused kernels read a state as if it lay in memory as its parameter does, and take wrong steps where it does not: a
    checkpoint without channels-last format resumed with it (torch 2.15, on the CPU). Fused SGD fails when some
    parameters have a momentum and others none yet, as after frozen prototypes or with an imported momentum; a momentum
    of zeros is the same as none.
    """
    (own,) = {group["fused"] for group in optimizer.param_groups}
    is_checked = False

    def keep(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        nonlocal is_checked
        is_checked = False
        return {**state, "param_groups": [{**group, "fused": own} for group in state["param_groups"]]}

    def make_fit(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal is_checked
        if not is_checked:
            is_checked = True
            _fill_and_align(optimizer)

    optimizer.register_load_state_dict_pre_hook(keep)
    if own:
        optimizer.register_step_pre_hook(make_fit)


@torch.no_grad()
def _fill_and_align(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if group.get("momentum", 0) > 0 and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            for name, value in state.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
