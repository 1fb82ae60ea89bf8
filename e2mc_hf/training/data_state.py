"""What a checkpoint says about the images of its run, so that the run goes on with the very next batch."""

import json
from pathlib import Path
from typing import Any

from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.unreadable import UnreadableCount
from e2mc_hf.errors import UsageError
from e2mc_hf.training.arguments import E2MCTrainingArguments

_FILE = "data_state.json"


def order_of(dataset: ViewDataset, args: E2MCTrainingArguments, lanes: int | None) -> dict[str, Any]:
    """All that the order of the batches depends on."""
    order = {
        "images": len(dataset),
        "batch over all processes": args.per_device_train_batch_size * args.world_size,
        "seed": args.seed,
        "view seed": dataset.seed,
        "streaming": isinstance(dataset.source, StreamSource),
    }
    if isinstance(dataset.source, StreamSource):
        order |= {"shuffle_window": dataset.shuffle_window, "lanes": lanes}
    return order


def save_data_state(
    folder: str | Path, order: dict[str, Any], unreadable: UnreadableCount, earlier: UnreadableCount
) -> None:
    """Write order and counts, of the epoch and of those before it, beside the rest of a checkpoint."""
    state = {"order": order, "unreadable": unreadable.state_dict(), "unreadable_earlier": earlier.state_dict()}
    (Path(folder) / _FILE).write_text(json.dumps(state, indent=1))


def read_data_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """Order and counts of a checkpoint; None if it has none (it was not made on a `ViewDataset`)."""
    path = Path(checkpoint) / _FILE
    return dict(json.loads(path.read_text())) if path.is_file() else None


def check_same_order(saved: dict[str, Any], order: dict[str, Any]) -> None:
    """Refuse to resume where the batches to come would not be those of the interrupted run.

    Raises:
        UsageError: If anything that the order depends on differs; names it with both values.
    """
    differing = [
        f"{name} (then {saved.get(name)}, now {order.get(name)})"
        for name in {**saved, **order}
        if saved.get(name) != order.get(name)
    ]
    if differing:
        raise UsageError(
            "`resume_from_checkpoint` must go on with the images of the interrupted run, got another"
            f" {', '.join(differing)}. Resume with the old options, or start a new run from the encoder."
        )
