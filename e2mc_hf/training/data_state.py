"""What a checkpoint says about the images of its run, so that the run goes on with the very next batch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from e2mc_hf.data.dataset import ViewDataset
from e2mc_hf.data.double_split import content_digest
from e2mc_hf.data.stream import StreamSource
from e2mc_hf.data.unreadable import UnreadableCount
from e2mc_hf.errors import UsageError
from e2mc_hf.training.arguments import E2MCTrainingArguments

FILE = "data_state.json"


def order_of(dataset: ViewDataset, args: E2MCTrainingArguments, lanes: int | None) -> dict[str, Any]:
    """All that the order of the batches depends on."""
    order = {
        "images": len(dataset),
        "batch over all processes": args.per_device_train_batch_size * args.world_size,
        "seed": args.seed,
        "view seed": dataset.seed,
        "views": _views_of(dataset),
        "revision": dataset.source.revision,
        "streaming": isinstance(dataset.source, StreamSource),
    }
    if isinstance(dataset.source, StreamSource):
        rows = [shard.rows for shard in dataset.source.shards]
        digest = hashlib.blake2b(repr(rows).encode(), digest_size=4).hexdigest()
        order |= {"shuffle_window": dataset.shuffle_window, "lanes": lanes, "shards": f"{len(rows)} shards {digest}"}
    else:
        order["first, middle and last image"] = content_digest(dataset.source)[:8]
    return order


def _views_of(dataset: ViewDataset) -> str:
    """How the views are drawn and normalized, in few words."""
    recipes = dataset.transform.recipes
    photometry = dataset.transform.photometry
    drawn = repr([*recipes, photometry.mean, photometry.std]).encode()
    sizes = ", ".join(str(recipe.size) for recipe in recipes)
    return f"{len(recipes)} of {sizes} pixels, recipe {hashlib.blake2b(drawn, digest_size=4).hexdigest()}"


def data_state(order: dict[str, Any], unreadable: UnreadableCount, earlier: UnreadableCount) -> dict[str, Any]:
    """Order and counts, of the epoch and of those before it, as JSON has them."""
    return {"order": order, "unreadable": unreadable.state_dict(), "unreadable_earlier": earlier.state_dict()}


def read_data_state(checkpoint: str | Path) -> dict[str, Any]:
    """Order and counts of a checkpoint.

    Raises:
        UsageError: If it has none, so that nothing could tell whether the images to come are the right ones.
    """
    path = Path(checkpoint) / FILE
    if not path.is_file():
        raise UsageError(
            f"`resume_from_checkpoint` must be a checkpoint of a run on views, which holds {FILE}, got"
            f" {str(checkpoint)!r}. Take another checkpoint, or start a new run from its model."
        )
    return dict(json.loads(path.read_text()))


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
