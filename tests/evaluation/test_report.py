import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e2mc_hf.evaluation.report import marginals_figure, terms_figure, write_report

LOGS = {
    "control": [{"loss": 3.0, "invariance": 0.5, "epoch": 1, "step": 10}, {"train_loss": 3.0, "step": 20}],
    "e2mc": [
        {"loss": 9.0, "invariance": 0.4, "marginal_entropy": -0.3, "step": 10, "learning_rate": 0.1},
        {"loss": 8.0, "invariance": 0.3, "marginal_entropy": -0.2, "step": 20, "learning_rate": 0.1},
    ],
}
RECORD = {
    "dataset": {"name": "digits", "num_train_images": 1347, "num_test_images": 450},
    "versions": {"torch": "2.15.0"},
    "encoders": [
        {
            "name": "<before>",
            "measurements": [
                {
                    "protocol": "knn k=20",
                    "accuracy": 0.75,
                    "standard_error": 0.01,
                    "over": "test images",
                    "num_draws": 1,
                    "num_labels": 1347,
                }
            ],
        }
    ],
    "differences": [],
}


@pytest.fixture
def page(tmp_path: Path) -> str:
    cubes = {name: np.random.default_rng(0).random((50, 16)) for name in ("before", "e2mc")}
    write_report(
        tmp_path / "report.html",
        title="A title",
        introduction="What was run.",
        record=RECORD,
        logs=LOGS,
        unit_embeddings=cubes,
    )
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_holds_the_table_and_two_figures_and_needs_nothing_else(page: str) -> None:
    assert "75.00 ± 1.00" in page
    figures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(figures) == 2
    for figure in figures:
        image = Image.open(io.BytesIO(base64.b64decode(figure)))
        assert image.width > 500
        assert len(image.convert("L").getcolors() or []) > 5
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_names_cannot_inject_markup(page: str) -> None:
    assert "&lt;before&gt;" in page
    assert "<before>" not in page


def test_every_logged_term_has_a_panel_with_the_arms_that_log_it() -> None:
    panels = {panel.get_title(): panel for panel in terms_figure(LOGS).axes}
    assert set(panels) == {"loss", "invariance", "marginal entropy"}
    assert [line.get_label() for line in panels["invariance"].lines] == ["control", "e2mc"]
    (line,) = panels["marginal entropy"].lines
    assert line.get_xydata().tolist() == [[10, -0.3], [20, -0.2]]


def test_marginals_are_densities_of_the_same_dimensions_for_every_encoder() -> None:
    cubes = {"before": np.full((40, 8), 0.55), "e2mc": np.linspace(0, 1, 40)[:, None].repeat(8, axis=1)}
    figure = marginals_figure(cubes, num_dims=3)
    assert [panel.get_title() for panel in figure.axes] == ["dimension 0", "dimension 4", "dimension 7"]
    narrow, wide = (patch.get_xy()[:, 1].max() for patch in figure.axes[0].patches)
    assert narrow == pytest.approx(30)
    assert wide < 2
