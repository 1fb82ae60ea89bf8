"""Notice a loss or a gradient that is not finite before it is used, on all processes at the same step.

The losses of all processes are gathered while the backward pass runs. A gradient that is not finite on one process is
so on all of them once it has been averaged, and makes the norm of the whole gradient, which the Trainer computes
anyway, not finite.

    finite = every process' loss is finite and the gradient's norm is finite

The CPU reads that at once. A GPU would have to be waited for at every step: there the values of the step are copied
to the host without waiting, and behind the copy the device itself asserts that they are finite. What was queued behind
the assertion, the update first of all, never runs; when the failure comes up on the host, the copy says what it was.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from e2mc_hf.distributed import rank, world_size

# The host is a few steps ahead of a GPU at most: its queue of kernels is shorter than that.
_STEPS_REMEMBERED = 64
_MOST_NAMES = 20
_MOST_SKIPS = 20
_LEAST_SCALE = 1.0


@dataclass(frozen=True)
class StepRecord:
    """What is known of one step.

    Attributes:
        step: Number of the step, from 1.
        sample_ids: Images of this process in its batch; None where they are not known.
        terms: Names of the terms of the loss.
        parameters: Names of the parameters with a gradient.
        values: One after the other: 1 if all was finite or 0, the norm of the gradient, the loss of each process, the
            terms, and the norm of each parameter's gradient before it was clipped; on the host.
    """

    step: int
    sample_ids: Sequence[int] | None
    terms: Sequence[str]
    parameters: Sequence[str]
    values: Tensor

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient; 0 where the Trainer does not know it."""
        return float(self.values[1])

    @property
    def losses(self) -> list[float]:
        """Loss of each process."""
        return self._parts()[0]

    @property
    def loss(self) -> float:
        """Loss of the whole batch."""
        return sum(self.losses) / len(self.losses)

    def own_part(self) -> dict[str, Any]:
        """Rank, loss, terms and images of this process, for JSON."""
        terms = zip(self.terms, self._parts()[1], strict=True)
        return {
            "rank": rank(),
            "loss": as_json(self.losses[rank()]),
            "terms": {name: as_json(value) for name, value in terms},
            "sample_ids": None if self.sample_ids is None else list(self.sample_ids),
        }

    def strange_gradients(self) -> list[str]:
        """Names of the parameters whose gradients, or this process' parts of them, had no finite norm."""
        norms = zip(self.parameters, self._parts()[2], strict=True)
        return [name for name, norm in norms if not math.isfinite(norm)]

    def as_json(self, parts: Sequence[Mapping[str, Any]], gradients: Sequence[str]) -> dict[str, Any]:
        """All that is known of the step.

        Args:
            parts: `own_part` of the processes that could be asked.
            gradients: Names from `strange_gradients` of those.
        """
        return {
            "cause": self._cause(parts, gradients),
            "step": self.step,
            "loss": as_json(self.loss),
            "grad_norm": as_json(self.grad_norm),
            "gradients": {
                "not_finite": len(gradients),
                "of": len(self.parameters),
                "names": list(gradients[:_MOST_NAMES]),
            },
            "processes": list(parts),
        }

    def _cause(self, parts: Sequence[Mapping[str, Any]], gradients: Sequence[str]) -> str:
        """What was not finite, in words."""
        losses = self.losses
        strange = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if strange:
            where = f" (on process {', '.join(map(str, strange))} of {len(losses)})" if len(losses) > 1 else ""
            terms = dict.fromkeys(n for part in parts for n, value in part["terms"].items() if isinstance(value, str))
            named = f"; not finite of its terms: {', '.join(terms)}" if terms else ""
            return f"loss is {losses[strange[0]]} at step {self.step}{where}{named}"
        if gradients:
            count = f"{len(gradients)} of {len(self.parameters)} gradients have no finite norm at step {self.step}"
            return f"{count}, the first that of {gradients[0]}"
        return f"the norm of the gradient is {self.grad_norm} at step {self.step}, that of each parameter being finite"

    def _parts(self) -> tuple[list[float], list[float], list[float]]:
        """Losses, terms and norms."""
        rest = self.values[2:].tolist()
        norms = len(rest) - len(self.parameters)
        losses = norms - len(self.terms)
        return rest[:losses], rest[losses:norms], rest[norms:]


class FiniteWatch:
    """Watch the losses and gradients of a training, step by step.

    Args:
        device: Where the training runs.
        deferred: Whether to leave the verdict to the device, and not to wait for it; on GPUs when not given.
    """

    def __init__(self, device: torch.device, *, deferred: bool | None = None) -> None:
        self._deferred = device.type == "cuda" if deferred is None else deferred
        self._losses: Tensor | None = None
        self._gathering: dist.Work | None = None
        self._terms: dict[str, Tensor] = {}
        self._norms: list[Tensor] = []
        self._parameters: list[str] = []
        self._queued: deque[StepRecord] = deque(maxlen=_STEPS_REMEMBERED)
        self._skips = 0

    def see_loss(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        """Take note of the loss of a step, before its backward pass; a collective, which none waits for."""
        own = loss.detach().to(torch.promote_types(loss.dtype, torch.float32)).reshape(1)
        self._losses, self._gathering = own, None
        self._terms = {name: term.detach() for name, term in terms.items()}
        self._norms, self._parameters = [], []
        if world_size() > 1:
            self._losses = own.new_empty(world_size())
            self._gathering = dist.all_gather_into_tensor(self._losses, own, async_op=True)

    def see_gradients(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Take note of gradients, averaged over the processes, before clipping spreads what is not finite.

        Args:
            parameters: Names and parameters; of a sharded one this process' part counts.
        """
        own = [(name, _own_part(p.grad)) for name, p in parameters if p.grad is not None]
        own = [(name, gradient) for name, gradient in own if gradient.numel()]
        self._parameters = [name for name, _ in own]
        self._norms = list(torch._foreach_norm([gradient for _, gradient in own], 2)) if own else []

    def check(
        self,
        step: int,
        grad_norm: Tensor | float | None,
        sample_ids: Sequence[int] | None = None,
        *,
        counts_gradients: bool = True,
    ) -> StepRecord | None:
        """Judge a step between its backward pass and its update.

        Args:
            step: Number of the step, from 1.
            grad_norm: Norm of the whole gradient, the same on every process; None where it is not known.
            sample_ids: Images of this process in the batch.
            counts_gradients: False for float16, where the scaler skips a step whose gradients overflow.

        Returns:
            The step if it must not be used; None if it is finite, or the verdict is left to the device.

        Raises:
            RuntimeError: Sooner or later, from the device, if the verdict was left to it; see `failed`.
        """
        assert self._losses is not None
        if self._gathering is not None:
            self._gathering.wait()  # on a GPU the device waits, not the host
        norm = _full(grad_norm, self._losses)
        finite = self._losses.isfinite().all()
        if counts_gradients:
            finite = finite & norm.isfinite()
        if not self._deferred and finite:
            return None
        values = self._flat([finite, norm, *self._losses, *self._terms.values(), *self._norms])
        if not self._deferred:
            return StepRecord(step, sample_ids, list(self._terms), self._parameters, values.cpu())
        copy = torch.full(values.shape, -1.0, dtype=values.dtype, pin_memory=values.is_cuda)
        copy.copy_(values, non_blocking=True)
        self._queued.append(StepRecord(step, sample_ids, list(self._terms), self._parameters, copy))
        torch._assert_async(finite, "loss or gradient not finite")
        return None

    def failed(self) -> StepRecord | None:
        """The step that the device stopped at; None if it stopped, if at all, for another reason."""
        return next((record for record in self._queued if record.values[0] == 0), None)

    def scaler_gives_up(self, step: int, *, skipped: bool, scale: float) -> str | None:
        """Judge how float16 gets on, after each step: a skipped step now and then is its way, many in a row are not.

        Args:
            step: Number of the step, from 1.
            skipped: Whether the scaler skipped its update.
            scale: Factor of the loss.

        Returns:
            What is wrong, in words; None as long as there is hope.
        """
        self._skips = self._skips + 1 if skipped else 0
        if self._skips > _MOST_SKIPS:
            return f"float16 gradients overflowed at {self._skips} steps in a row, up to step {step} (scale {scale:g})"
        if scale < _LEAST_SCALE:
            return f"the scale of the float16 loss fell to {scale:g} at step {step}, and gradients still overflow"
        return None

    def _flat(self, scalars: Sequence[Tensor]) -> Tensor:
        assert self._losses is not None
        return torch.stack([scalar.to(self._losses).reshape(()) for scalar in scalars])


def as_json(value: float) -> float | str:
    """Number for JSON, which has none that is not finite: these become text."""
    return value if math.isfinite(value) else str(value)


def _own_part(gradient: Tensor) -> Tensor:
    """Gradient, or this process' part of one that is sharded (a DTensor)."""
    to_local = getattr(gradient, "to_local", None)
    return gradient if to_local is None else to_local()


def _full(norm: Tensor | float | None, like: Tensor) -> Tensor:
    """Norm as a plain tensor; 0 if it is not known."""
    if isinstance(norm, Tensor):
        full_tensor = getattr(norm, "full_tensor", None)
        return norm.detach() if full_tensor is None else full_tensor()
    return like.new_tensor(0.0 if norm is None else norm)
