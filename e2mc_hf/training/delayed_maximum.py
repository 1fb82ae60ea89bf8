"""What the processes need of each other but not at once: sent after a step, read after the next one."""

import torch
import torch.distributed as dist

from e2mc_hf.distributed import world_size


class DelayedMaximum:
    """The maximum of a whole number over all processes.

    `start` waits neither for the others nor for the device. `read` waits for the work that was given to the device
    before `start`, and on CUDA for nothing that was given to it since: a training may be ahead of its device meanwhile.

    Args:
        device: Where the backend of the processes reduces.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._value = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        self._event: torch.cuda.Event | None = None

    def start(self, value: int) -> None:
        """Send this process's number; all processes must call this together."""
        if world_size() == 1:
            self._value.fill_(value)
            return
        # Filled on the device: a copy from the host would wait for it.
        self._sent = torch.full((), value, dtype=torch.int32, device=self.device)
        self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, async_op=True)
        if self.device.type == "cuda":
            self._copy_beside_the_training()

    def read(self) -> int:
        """Maximum of what the processes have sent, once they have."""
        if self._event is not None:
            self._event.synchronize()
        elif self._work is not None:
            self._work.wait()
            self._value = self._sent
        return int(self._value)

    def _copy_beside_the_training(self) -> None:
        """Copy the result on a stream of its own: on that of the training, reading it would wait for all of it."""
        assert self._work is not None
        self._value = torch.zeros((), dtype=torch.int32, pin_memory=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(torch.cuda.Stream(self.device)):  # type: ignore[no-untyped-call]
            self._work.wait()
            self._value.copy_(self._sent, non_blocking=True)
            self._event.record()
