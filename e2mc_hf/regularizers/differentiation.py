"""Hand-written gradients are first order, and say so."""

import torch


def refuse_second_derivatives(name: str) -> None:
    """Raise inside a backward pass that is being recorded (`create_graph=True`).

    The gradient holds no graph: going on would treat it as a constant, silently.

    Raises:
        RuntimeError: If the backward pass is being recorded.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"`{name}` has first derivatives only, got create_graph=True. Leave create_graph out.")
