"""Load the datasets asked for in a process of its own, since the address of the Hub is read when it is imported."""

import hashlib
import json
import sys
import warnings
from typing import Any

from e2mc_hf.arguments import DataArguments
from e2mc_hf.data.sources import load_images, load_test_images


def load(options: dict[str, Any], split: str | None, is_test: bool) -> dict[str, Any]:
    """What loading gave: the source with its images as digests, or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            source = (load_test_images if is_test else load_images)(DataArguments(**options), split)
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}
    if options.get("streaming"):
        images = [content for shard in source.shards for content in shard.read(0, shard.rows)]
    else:
        images = [source.encoded(index) for index in range(len(source))]
    return {
        "name": source.name,
        "revision": source.revision,
        "split": source.split,
        "image_column": source.image_column,
        "label_column": getattr(source, "label_column", None),
        "images": [hashlib.sha256(content).hexdigest() for content in images],
        "warnings": [str(warning.message) for warning in caught if warning.category is UserWarning],
    }


if __name__ == "__main__":
    print(json.dumps([load(*case) for case in json.loads(sys.argv[1])]))
