import subprocess
import sys

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from e2mc_hf.evaluation.metrics import METRICS_FOLDER, accuracy


def test_accuracy_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 5, 999), generator.integers(0, 5, 999)
    assert accuracy(predictions, references) == accuracy_score(references, predictions)


@pytest.mark.parametrize(("predictions", "expected"), [([1, 2, 3, 4], 1.0), ([1, 2, 3, 9], 0.75), ([0, 0, 0, 0], 0.0)])
def test_accuracy_is_the_share_of_equal_labels(predictions, expected):
    assert accuracy(np.array(predictions), np.array([1, 2, 3, 4])) == expected


def test_the_metric_loads_by_its_path_and_adds_up_batches():
    metric = evaluate.load(str(METRICS_FOLDER / "top1_accuracy" / "top1_accuracy.py"))
    metric.add_batch(predictions=[1, 2], references=[1, 3])
    metric.add_batch(predictions=[4], references=[4])
    assert metric.compute() == {"top1_accuracy": pytest.approx(2 / 3)}
    assert "Top-1 accuracy" in metric.description


def test_loading_and_computing_print_nothing_from_any_folder(tmp_path):
    code = """
import numpy as np, sys
import e2mc_hf.evaluation.protocol
from e2mc_hf.evaluation.metrics import accuracy
heavy = {"evaluate", "datasets", "sklearn", "transformers"} & set(sys.modules)
assert not heavy, heavy
assert accuracy(np.array([1, 2]), np.array([1, 1])) == 0.5
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
