"""How many images could not be read, and why: counted where batches are delivered, so that none counts twice."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from e2mc_hf.errors import UsageError

# Below this many images a share says nothing.
_FEWEST = 1000
_EXAMPLES = 3


class Unreadable(NamedTuple):
    """An image whose place in a batch another one took.

    Attributes:
        sample_id: Index of the image in the dataset.
        reason: Why it could not be read, one of a few words (see `UnreadableImage`).
    """

    sample_id: int
    reason: str


class UnreadableCount:
    """Images seen and images skipped, by reason, with a few examples of each."""

    def __init__(self) -> None:
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[int]] = {}

    @property
    def skipped(self) -> int:
        """Images that could not be read."""
        return self.reasons.total()

    def add(self, seen: int, unreadable: Iterable[Unreadable]) -> None:
        """Count a batch of `seen` images, of which some could not be read."""
        self.seen += seen
        for sample_id, reason in unreadable:
            self.reasons[reason] += 1
            self._keep([sample_id], reason)

    def merge(self, other: "UnreadableCount") -> None:
        """Add the count of another process, or of the part of an epoch before an interruption."""
        self.seen += other.seen
        self.reasons += other.reasons
        for reason, sample_ids in other.examples.items():
            self._keep(sample_ids, reason)

    def _keep(self, sample_ids: list[int], reason: str) -> None:
        kept = self.examples.setdefault(reason, [])
        kept += sample_ids[: max(0, _EXAMPLES - len(kept))]

    def state_dict(self) -> dict[str, Any]:
        """State as plain numbers, for a JSON file."""
        return {"seen": self.seen, "reasons": dict(self.reasons), "examples": self.examples}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "UnreadableCount":
        """Count as it was when `state_dict` was called."""
        count = cls()
        count.seen = int(state["seen"])
        count.reasons = Counter(state["reasons"])
        count.examples = {reason: list(ids) for reason, ids in state["examples"].items()}
        return count

    def report(self) -> str:
        """One line: how many were skipped, why, and where."""
        parts = [
            f"{number:,} {reason} ({', '.join(map(str, self.examples[reason]))}{', ...' * (number > _EXAMPLES)})"
            for reason, number in self.reasons.most_common()
        ]
        return f"{self.skipped:,} of {self.seen:,} images could not be read and were replaced: {'; '.join(parts)}"

    def check(self, max_share: float, name: str) -> None:
        """Refuse to go on with a dataset that is mostly or notably broken.

        Args:
            max_share: Largest share of unreadable images that is put up with.
            name: The dataset, for the message.

        Raises:
            UsageError: If more than that share could not be read, once 1,000 images were seen.
        """
        if self.seen >= _FEWEST and self.skipped > max_share * self.seen:
            raise UsageError(
                f"`max_unreadable_share` allows {max_share:.2%} of the images of {name!r} to be unreadable, got"
                f" {self.skipped / self.seen:.2%}: {self.report()} (sample ids). Repair the dataset, or allow more."
            )
