"""What is removed of an earlier run before another takes its folder."""

import shutil
from pathlib import Path

_RESULTS = ("encoder", "config.json", "model.safetensors", "log.json", "recipe.yaml")


def remove_earlier_run(output_dir: Path) -> None:
    """Remove what a run leaves, so that its encoder and its checkpoints are never taken for those of the next.

    Args:
        output_dir: Output folder; what else it holds stays.
    """
    left = [path for pattern in ("non_finite*.json", "checkpoint-*") for path in output_dir.glob(pattern)]
    for path in [output_dir / name for name in _RESULTS] + left:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
