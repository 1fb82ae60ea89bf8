"""Sources that end or freeze the worker process that reads them, or may not be read."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from e2mc_hf.data.image_source import ImageSource
from e2mc_hf.data.retrying import RemoteFileError


@dataclass(frozen=True)
class DeadlySource(ImageSource):
    """Sends a signal to the process that reads one of its images, as often as there are files to remove."""

    deadly: int = 0
    signal: int = signal.SIGKILL
    charges: Path = Path()

    def encoded(self, index: int) -> bytes | None:
        if index == self.deadly:
            for charge in sorted(self.charges.iterdir()):
                charge.unlink()
                os.kill(os.getpid(), self.signal)
        return super().encoded(index)


@dataclass(frozen=True)
class DeniedSource(ImageSource):
    """A server refuses its images."""

    def encoded(self, index: int) -> bytes | None:
        raise RemoteFileError("`dataset` is not for you (403). Ask for it.", "http://server", 403)
