"""The evidence as a file: everything measured, how, on what, and with which versions."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from e2mc_hf.arguments import require
from e2mc_hf.evaluation.protocol import Comparison, EncoderResult, compare
from e2mc_hf.evaluation.statistics import Measurement

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "timm", "scikit-learn", "e2mc-hf")


@dataclass(frozen=True)
class DatasetRecord:
    """Where the images came from.

    Attributes:
        name: Hub id, folder or embedded set.
        train_split: Split the probes were fitted on.
        test_split: Split they were tested on.
        config: Configuration of the Hub dataset.
        revision: Branch, tag or commit; the commit wherever it is known.
    """

    name: str
    train_split: str
    test_split: str
    config: str | None = None
    revision: str | None = None


def metrics_record(
    results: Sequence[EncoderResult], *, dataset: DatasetRecord, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Gather what was measured as plain JSON values, without the folders of this machine.

    Args:
        results: The encoders, the baseline first.
        dataset: Where the images came from.
        arguments: Options of the evaluation, as plain values.

    Raises:
        UsageError: If there is no result, or the results cannot be compared.
    """
    require(len(results) > 0, "results", "must hold at least one encoder", 0, "Evaluate one first.")
    results = [replace(result, name=portable(result.name)) for result in results]
    images = {"num_train_images": results[0].num_train_images, "num_test_images": results[0].num_test_images}
    record = {
        "schema_version": SCHEMA_VERSION,
        "dataset": {**asdict(dataset), **images, "labels_sha256": results[0].labels_sha256},
        "arguments": dict(arguments),
        "versions": {package: version(package) for package in PACKAGES},
        "encoders": [_encoder_record(result) for result in results],
        "differences": [_difference_record(comparison) for comparison in compare(results)],
    }
    shortened: dict[str, Any] = portable(record)
    return shortened


def write_metrics(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON: the file is there complete, or as it was before."""
    path = Path(path)
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        UsageError: If it is a folder, or its own folder cannot be made or written.
    """
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    writable = not path.is_dir() and folder.is_dir() and os.access(folder, os.W_OK)
    require(writable, "output", "must be a file that can be written", str(path), "Pass --output.")


def read_metrics(path: str | Path) -> dict[str, Any]:
    """Read a record that `write_metrics` wrote.

    Raises:
        UsageError: If the file was written with another layout.
    """
    record: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    found = record.get("schema_version")
    require(found == SCHEMA_VERSION, "schema_version", f"must be {SCHEMA_VERSION}", found, "Evaluate again.")
    return record


def _encoder_record(result: EncoderResult) -> dict[str, Any]:
    measurements = [_measurement_record(measurement) for measurement in result.measurements]
    return {"name": result.name, "num_features": result.num_features, "measurements": measurements}


def _measurement_record(measurement: Measurement) -> dict[str, Any]:
    record = {
        "protocol": measurement.name,
        "accuracy": measurement.mean,
        "standard_error": measurement.standard_error,
        "over": measurement.over,
        "num_draws": measurement.num_draws,
        "num_labels": measurement.num_labels,
        "values": list(measurement.values),
    }
    if measurement.strengths:
        record |= {"strengths": list(measurement.strengths), "converged": list(measurement.converged)}
    return record


def _difference_record(comparison: Comparison) -> dict[str, Any]:
    difference = comparison.difference
    return {
        "encoder": comparison.encoder,
        "baseline": comparison.baseline,
        "protocol": difference.name,
        "difference": difference.mean,
        "standard_error": difference.standard_error,
        "over": difference.over,
    }


def portable(value: Any) -> Any:
    """Shorten absolute paths: relative to the working folder when inside it, else the last part."""
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    if isinstance(value, (str, Path)) and Path(value).is_absolute():
        path = Path(value)
        inside = path.is_relative_to(Path.cwd()) and path != Path.cwd()
        return str(path.relative_to(Path.cwd())) if inside else path.name
    return str(value) if isinstance(value, Path) else value
