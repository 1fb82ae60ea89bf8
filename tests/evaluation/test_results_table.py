from e2mc_hf.evaluation.results_table import results_table


def encoder(name, neighbors, probe):
    return {
        "name": name,
        "measurements": [
            {
                "protocol": "knn k=20",
                "accuracy": neighbors,
                "standard_error": 0.01,
                "over": "test images",
                "num_draws": 1,
                "num_labels": 9469,
            },
            {
                "protocol": "linear probe 1%",
                "accuracy": probe,
                "standard_error": 0.02,
                "over": "draws",
                "num_draws": 5,
                "num_labels": 95,
            },
        ],
    }


def difference(name, protocol, value, baseline="before"):
    return {"encoder": name, "baseline": baseline, "protocol": protocol, "difference": value, "standard_error": 0.001}


RECORD = {
    "dataset": {"num_test_images": 3925},
    "encoders": [encoder("before", 0.7, 0.5), encoder("after", 0.71234, 0.49), encoder("control", 0.7, 0.5)],
    "differences": [
        difference("after", "knn k=20", 0.01234),
        difference("after", "linear probe 1%", -0.01),
        difference("control", "knn k=20", 0.0),
        difference("control", "linear probe 1%", 0.002),
        difference("control", "knn k=20", -0.01234, "after"),
        difference("control", "linear probe 1%", 0.012, "after"),
    ],
}


def test_rows_are_protocols_and_columns_encoders_then_differences():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in results_table(RECORD).splitlines()]
    encoders, pairs = ["before", "after", "control"], ["after - before", "control - before", "control - after"]
    assert lines[0] == ["protocol", "labels", *encoders, *pairs, "error over"]
    assert lines[2:] == [
        [
            "knn k=20",
            "9469",
            "70.00 ± 1.00",
            "71.23 ± 1.00",
            "70.00 ± 1.00",
            "+1.23 ± 0.10",
            "+0.00 ± 0.10",
            "-1.23 ± 0.10",
            "3925 test images",
        ],
        [
            "linear probe 1%",
            "95",
            "50.00 ± 2.00",
            "49.00 ± 2.00",
            "50.00 ± 2.00",
            "-1.00 ± 0.10",
            "+0.20 ± 0.10",
            "+1.20 ± 0.10",
            "5 draws",
        ],
    ]


def test_lines_are_aligned_whole_and_free_of_escape_codes_whatever_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = results_table(RECORD)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert len(text.splitlines()) == 4
    assert "\x1b" not in text
    assert "…" not in text


def test_one_encoder_alone_has_no_difference_column():
    text = results_table({**RECORD, "encoders": RECORD["encoders"][:1], "differences": []})
    assert " - " not in text
    assert "70.00 ± 1.00" in text
