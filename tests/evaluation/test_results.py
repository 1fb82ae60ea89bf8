import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch

from e2mc_hf.arguments import EvaluationArguments
from e2mc_hf.errors import UsageError
from e2mc_hf.evaluation.protocol import EncoderResult
from e2mc_hf.evaluation.results import DatasetRecord, metrics_record, read_metrics, write_metrics
from e2mc_hf.evaluation.statistics import Measurement

DATASET = DatasetRecord("org/flowers", "train", "validation", revision="abc123")


def result(name, values, correct):
    probe = Measurement("linear probe 1%", values, np.zeros((2, 4), dtype=bool), (0.1, 1.0), (True, False))
    neighbors = Measurement("knn k=20", (sum(correct) / 4,), np.array([correct], dtype=bool))
    return EncoderResult(name, 512, 100, 4, "digest", (neighbors, probe))


@pytest.fixture
def results():
    return [result("before", (0.5, 0.6), [1, 1, 0, 0]), result("after", (0.6, 0.8), [1, 1, 1, 0])]


@pytest.fixture
def record(results):
    return metrics_record(results, dataset=DATASET, arguments=asdict(EvaluationArguments()))


def test_a_record_read_back_is_the_record_written(record, tmp_path):
    write_metrics(tmp_path / "new" / "metrics.json", record)
    assert read_metrics(tmp_path / "new" / "metrics.json") == record
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]


def test_the_record_holds_what_was_measured(record):
    assert record["encoders"][1]["measurements"][1] == {
        "protocol": "linear probe 1%",
        "accuracy": pytest.approx(0.7),
        "standard_error": pytest.approx(0.1),
        "over": "draws",
        "num_draws": 2,
        "num_labels": 0,
        "values": [0.6, 0.8],
        "strengths": [0.1, 1.0],
        "converged": [True, False],
    }
    assert "strengths" not in record["encoders"][0]["measurements"][0]
    assert record["encoders"][0]["num_features"] == 512


def test_the_record_holds_the_differences_to_the_first_encoder(record):
    assert record["differences"][1] == {
        "encoder": "after",
        "baseline": "before",
        "protocol": "linear probe 1%",
        "difference": pytest.approx(0.15),
        "standard_error": pytest.approx(0.05),
        "over": "draws",
    }
    assert record["differences"][0]["difference"] == 0.25


def test_the_record_says_on_what_and_with_what(record):
    assert record["dataset"] == {
        "name": "org/flowers",
        "train_split": "train",
        "test_split": "validation",
        "config": None,
        "revision": "abc123",
        "num_train_images": 100,
        "num_test_images": 4,
        "labels_sha256": "digest",
    }
    assert record["arguments"]["num_draws"] == 5
    assert (record["versions"]["torch"], record["versions"]["scikit-learn"]) == (
        torch.__version__.split("+")[0],
        sklearn.__version__,
    )
    assert set(record["versions"]) == {"torch", "transformers", "timm", "scikit-learn", "e2mc-hf"}


def test_no_folder_of_this_machine_is_recorded(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outside = tmp_path.parent / "elsewhere"
    results = [result(str(outside / "encoder"), (0.5, 0.6), [1, 1, 0, 0]), *results[1:]]
    record = metrics_record(
        results,
        dataset=DatasetRecord(str(outside / "photos"), "train", "test"),
        arguments={"output": str(tmp_path / "runs" / "metrics.json"), "files": [outside / "a.bin", Path("b.bin")]},
    )
    assert str(tmp_path.parent) not in json.dumps(record)
    assert record["encoders"][0]["name"] == record["differences"][0]["baseline"] == "encoder"
    assert record["dataset"]["name"] == "photos"
    assert record["arguments"] == {"output": "runs/metrics.json", "files": ["a.bin", "b.bin"]}


def test_encoders_whose_names_become_one_without_their_folder_are_refused(tmp_path):
    twins = [result(str(tmp_path / folder / "encoder"), (0.5, 0.6), [1, 1, 0, 0]) for folder in "ab"]
    with pytest.raises(UsageError, match="a name each"):
        metrics_record(twins, dataset=DATASET, arguments={})


def test_a_record_that_cannot_be_written_leaves_the_old_file_and_no_other(record, tmp_path):
    write_metrics(tmp_path / "metrics.json", record)
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path / "metrics.json", {**record, "extra": float("nan")})
    assert read_metrics(tmp_path / "metrics.json") == record
    with pytest.raises(OSError, match="directory"):
        write_metrics(tmp_path, record)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert not list(tmp_path.parent.glob(".*unfinished"))


def test_a_file_of_another_layout_is_refused(tmp_path):
    (tmp_path / "metrics.json").write_text('{"schema_version": 0}')
    with pytest.raises(UsageError, match="`schema_version` must be 1, got 0"):
        read_metrics(tmp_path / "metrics.json")


def test_no_results_make_no_record():
    with pytest.raises(UsageError, match="at least one encoder"):
        metrics_record([], dataset=DATASET, arguments={})
