"""A record of results as a table to read: the one place where fractions become percent points."""

from collections.abc import Mapping
from typing import Any


def results_table(record: Mapping[str, Any]) -> str:
    """Lay out a record of `metrics_record` as a Markdown table.

    Args:
        record: What `metrics_record` made or `read_metrics` read.
    """
    header, *rows = table_cells(record)
    return _layout(header, rows)


def table_cells(record: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table, header first.

    A row is a protocol; a column is an encoder, then the difference of two, a later minus an earlier one. Numbers are
    percent (points) ± one standard error.

    Args:
        record: What `metrics_record` made or `read_metrics` read.
    """
    encoders, differences = record["encoders"], record["differences"]
    pairs = dict.fromkeys(f"{entry['encoder']} - {entry['baseline']}" for entry in differences)
    rows = []
    for index, first in enumerate(encoders[0]["measurements"]):
        cells = [_percent(encoder["measurements"][index], "accuracy") for encoder in encoders]
        protocol = first["protocol"]
        cells += [_percent(entry, "difference", "+") for entry in differences if entry["protocol"] == protocol]
        rows.append([protocol, str(first["num_labels"]), *cells, _source(first, record["dataset"])])
    return [["protocol", "labels", *(encoder["name"] for encoder in encoders), *pairs, "error over"], *rows]


def _percent(entry: Mapping[str, Any], key: str, sign: str = "") -> str:
    """Print a fraction and its standard error in percent."""
    return f"{100 * entry[key]:{sign}.2f} ± {100 * entry['standard_error']:.2f}"


def _source(measurement: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    count = measurement["num_draws"] if measurement["over"] == "draws" else dataset["num_test_images"]
    return f"{count} {measurement['over']}"


def _layout(header: list[str], rows: list[list[str]]) -> str:
    """Align the cells, the first column to the left; as wide as they are, whether or not there is a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
