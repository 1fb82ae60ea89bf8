"""What the README shows is what a user gets: every fenced command, example and number of it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in FENCES if language == "bash" for line in text.splitlines() if line.strip()]
EXAMPLES = [text for language, text in FENCES if language == "python"]
DEMO = ROOT / "model_cards" / "digits_vicreg_e2mc"


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's relative paths exist, after the demo with one step a training."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "model_cards", "benchmarks", "e2mc_hf"):
        (folder / name).symlink_to(ROOT / name)
    result = run(
        ["python", "scripts/demo.py", "--output_dir", "demo", "--max_steps", "1", "--logging_steps", "1"], folder
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_commands_are_of_the_kinds_that_are_run_here() -> None:
    assert {shlex.split(command)[0] for command in COMMANDS} == {"make", "python", "torchrun", "accelerate"}


def test_demo_writes_its_report_and_metrics(workshop: Path) -> None:
    report = (workshop / "demo" / "report.html").read_text(encoding="utf-8")
    record = json.loads((workshop / "demo" / "metrics.json").read_text(encoding="utf-8"))
    assert [encoder["name"] for encoder in record["encoders"]] == ["before", "control", "e2mc"]
    assert report.count("data:image/png;base64,") == 2


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_goals_are_in_the_makefile(command: str) -> None:
    assert f"\n{command.removeprefix('make ')}:" in (ROOT / "Makefile").read_text()


def test_commands_on_digits_run_in_their_order(workshop: Path) -> None:
    elsewhere = ("photos", "imported/")  # the slow test below; tests of the importer and of the recipes
    commands = [c for c in COMMANDS if c.startswith("python ") and not any(word in c for word in elsewhere)]
    assert len(commands) >= 4
    for command in commands:
        shortened = ["--max_steps", "1", "--head_warmup", "1"] if "continue_pretrain" in command else []
        result = run(shlex.split(command) + shortened, workshop)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    assert (workshop / "runs" / "metrics.json").is_file()


@pytest.mark.slow
def test_commands_on_photographs_run(workshop: Path, test_data: Path) -> None:
    (workshop / "photos").symlink_to(test_data / "imagenette160")
    for command in [command for command in COMMANDS if "photos" in command]:
        result = run(shlex.split(command), workshop)
        assert result.returncode == 0, f"{command}\n{result.stderr}"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_run(number: int, tmp_path: Path) -> None:
    result = run(["python", "-c", EXAMPLES[number]], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_table_of_the_demo_is_its_metrics_file() -> None:
    from e2mc_hf.evaluation.results_table import results_table

    record = json.loads((DEMO / "metrics.json").read_text(encoding="utf-8"))
    assert results_table(record) in README


def test_table_of_the_criterion_is_what_its_benchmark_printed() -> None:
    printed = (ROOT / "benchmarks" / "criterion.txt").read_text(encoding="utf-8").splitlines()[2:]
    rows = [re.split(r"[\s|]+", line.strip()) for line in printed]
    assert [row[:2] for row in rows] == [["512", "128"], ["512", "2048"], ["512", "8192"], ["2048", "8192"]]
    for row in rows:
        assert f"| {' | '.join(row)} |" in README


def test_table_of_the_input_pipeline_is_what_its_benchmark_printed() -> None:
    printed = (ROOT / "benchmarks" / "input_pipeline.txt").read_text(encoding="utf-8").splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")] for line in printed]
    assert [row[1] for row in rows] == ["authors", "lightly", "worker", "whole", "authors", "worker", "whole"]
    for row in rows:
        assert f"| {' | '.join(row)} |" in README


@pytest.mark.parametrize("name", ["distributed_criterion", "soak"])
def test_page_of_benchmarks_shows_what_they_printed(name: str) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    printed = (ROOT / "benchmarks" / f"{name}.txt").read_text(encoding="utf-8").strip()
    assert len(printed.splitlines()) >= 3
    assert f"```text\n{printed}\n```" in page


def test_images_and_links_into_the_repository_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
