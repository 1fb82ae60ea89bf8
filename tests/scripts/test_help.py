import dataclasses
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SLOWEST_HELP = 3.0  # seconds
MOST_LINES, MOST_CHARACTERS = 100, 120  # two screens

both_scripts = pytest.mark.parametrize("name", ["continue_pretrain", "evaluate"])


def run(name: str, *words: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *words]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    return answer, time.perf_counter() - start


@both_scripts
def test_help_answers_at_once_and_fits_on_two_screens(name, tmp_path):
    answers = [run(name, "--help", cwd=tmp_path) for _ in range(2)]
    help_text = answers[0][0].stdout
    assert (answers[0][0].returncode, answers[0][0].stderr) == (0, "")
    assert min(seconds for _, seconds in answers) < SLOWEST_HELP
    assert len(help_text.splitlines()) <= MOST_LINES
    assert max(map(len, help_text.splitlines())) <= MOST_CHARACTERS


@both_scripts
def test_help_describes_every_option(name, tmp_path):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = " ".join(run(name, "-h", cwd=tmp_path)[0].stdout.split())
    for title, kind in module.GROUPS.items():
        assert f"{title}:" in words
        for field in dataclasses.fields(kind):
            assert f"--{field.name} " in words
            assert field.metadata["help"] in words


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        (
            "continue_pretrain",
            ["--learning-rat", "1"],
            "`learning-rat` is not an option. Did you mean 'learning_rate'?",
        ),
        ("evaluate", ["resnet18", "--num_draw", "1"], "`num_draw` is not an option. Did you mean 'num_draws'?"),
        ("continue_pretrain", ["--image_size"], "--image_size: expected one argument"),
        ("continue_pretrain", ["--image_size", "x"], "`image_size` must be of type int, got 'x'"),
        ("evaluate", ["--dataset", "digits"], "name at least one encoder"),
    ],
)
def test_a_wrong_option_is_one_line_with_exit_code_2_and_leaves_nothing(name, words, complaint, tmp_path):
    answer, _ = run(name, *words, cwd=tmp_path)
    assert (answer.returncode, answer.stdout) == (2, "")
    (line,) = answer.stderr.splitlines()
    assert line.startswith(f"{name}.py: error: ")
    assert complaint in line
    assert list(tmp_path.iterdir()) == []
