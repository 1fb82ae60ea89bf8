"""A report to look at: the comparison, the loss terms over the steps, and the marginals of the embeddings."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from e2mc_hf.arguments import require
from e2mc_hf.evaluation.results_table import table_cells

# A log entry of the Trainer holds these beside the terms.
_NOT_TERMS = {"step", "epoch", "learning_rate", "grad_norm"}
_COLORS = {"before": "#8a8f98", "control": "#d28b26", "e2mc": "#2166ac"}


def write_report(
    path: str | Path,
    *,
    title: str,
    introduction: str,
    record: Mapping[str, Any],
    logs: Mapping[str, Sequence[Mapping[str, float]]],
    unit_embeddings: Mapping[str, Float[np.ndarray, "N D"]],
) -> None:
    """Write one HTML file that needs nothing else.

    Args:
        path: File to write.
        title: Heading.
        introduction: One paragraph on what was run.
        record: What `metrics_record` made.
        logs: Training log of each arm by name, as the Trainer keeps it.
        unit_embeddings: Embeddings of test images in the unit cube, by encoder.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("e2mc_hf.evaluation") / "report.html.jinja").read_text("utf-8"))
    header, *rows = table_cells(record)
    page = template.render(
        title=title,
        introduction=introduction,
        header=header,
        rows=rows,
        dataset=record["dataset"],
        versions=record["versions"],
        terms_figure=_embedded(terms_figure(logs)),
        marginals_figure=_embedded(marginals_figure(unit_embeddings)),
    )
    Path(path).write_text(page, encoding="utf-8")


def terms_figure(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Any:
    """Each logged term over the steps, one panel a term, one line an arm."""
    curves = {arm: [entry for entry in log if "loss" in entry] for arm, log in logs.items()}
    names = list(dict.fromkeys(key for log in curves.values() for entry in log for key in entry))
    names = [name for name in names if name not in _NOT_TERMS]
    require(bool(names), "logs", "must hold logged terms", list(logs), "Log more often: --logging_steps 1.")
    figure, panels = _panels(len(names))
    for panel, name in zip(panels, names, strict=True):
        for arm, log in curves.items():
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if points:
                panel.plot(*zip(*points, strict=True), color=_COLORS.get(arm), label=arm, marker=".", markersize=4)
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.set_xlabel("step", fontsize=8)
        panel.legend(fontsize=8, frameon=False)
    return figure


def marginals_figure(unit_embeddings: Mapping[str, Float[np.ndarray, "N D"]], num_dims: int = 6) -> Any:
    """Histograms of a few dimensions of the embeddings in the unit interval; flat is the most entropy there is.

    The dimensions are evenly spaced over all of them, the same for every encoder: chosen before anything was seen.
    """
    total = next(iter(unit_embeddings.values())).shape[1]
    dims = np.linspace(0, total - 1, num_dims).round().astype(int)
    figure, panels = _panels(num_dims)
    bins = np.linspace(0, 1, 31)
    for panel, dim in zip(panels, dims, strict=True):
        for name, cube in unit_embeddings.items():
            panel.hist(cube[:, dim], bins=bins, density=True, histtype="step", color=_COLORS.get(name), label=name)
        panel.axhline(1, color="#cccccc", linewidth=0.8, zorder=0)
        panel.set_title(f"dimension {dim}", fontsize=10)
        panel.set_xlabel("sigmoid of the embedding", fontsize=8)
        panel.legend(fontsize=8, frameon=False)
    return figure


def _panels(count: int, columns: int = 3) -> tuple[Any, list[Any]]:
    """Figure with `count` panels; made without pyplot, which keeps figures and needs a display to be chosen."""
    from matplotlib.figure import Figure

    num_rows = -(-count // columns)
    figure = Figure(figsize=(10, 2.6 * num_rows), layout="constrained")
    panels = [figure.add_subplot(num_rows, columns, position + 1) for position in range(count)]
    for panel in panels:
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _embedded(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
