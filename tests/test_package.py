import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import e2mc_hf

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "e2mc_hf").rglob("*.py"))
LONGEST_FILE = 350
SLOWEST_IMPORT = 0.3  # seconds
IMPORT = """
import sys, time
start = time.perf_counter()
import e2mc_hf
print(time.perf_counter() - start)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def import_in_fresh_interpreter() -> tuple[float, set[str]]:
    answer = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    seconds, modules = answer.stdout.splitlines()
    return float(seconds), set(modules.split())


def test_importing_the_package_imports_no_heavy_library_and_is_instant():
    measured = [import_in_fresh_interpreter() for _ in range(3)]
    assert {"torch", "transformers", "timm", "datasets", "numpy"} & measured[0][1] == set()
    assert min(seconds for seconds, _ in measured) < SLOWEST_IMPORT


def test_every_public_name_resolves_to_what_its_home_defines():
    for name in e2mc_hf.__all__:
        value = getattr(e2mc_hf, name)
        assert (value.__name__, value.__module__) == (name, e2mc_hf._HOMES[name])


def test_type_checkers_see_the_same_public_names():
    tree = ast.parse(Path(e2mc_hf.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        assert all(alias.asname == alias.name for alias in statement.names), "not re-exported: X as X"
        seen |= {alias.name: statement.module for alias in statement.names}
    assert sorted(seen) == sorted(e2mc_hf.__all__)
    assert seen == e2mc_hf._HOMES


def test_the_public_names_are_listed_once_and_sorted():
    assert e2mc_hf.__all__ == sorted(set(e2mc_hf.__all__))
    assert set(e2mc_hf.__all__) <= set(dir(e2mc_hf))


def test_a_name_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = e2mc_hf.nothing_of_the_kind


def test_no_file_is_named_after_nothing():
    assert [path.name for path in FILES if path.stem in {"utils", "helpers", "common", "misc"}] == []


def test_every_file_can_be_read_in_one_sitting():
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_the_installed_version_is_that_of_the_project():
    (stated,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version("e2mc-hf") == stated


def test_the_package_is_marked_as_typed():
    assert (ROOT / "e2mc_hf" / "py.typed").is_file()


@pytest.mark.skipif(find_spec("pip") is None, reason="no pip in this environment to build a wheel with")
def test_a_wheel_holds_the_template_the_metrics_and_the_recipes(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "demo", "runs", "build", "*.egg-info", "tests"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    result = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "e2mc_hf/evaluation/report.html.jinja" in names
    assert "e2mc_hf/metrics/top1_accuracy/top1_accuracy.py" in names
    assert "e2mc_hf/py.typed" in names
    assert {"e2mc_hf/METHODS.md", "e2mc_hf/recipes/README.md", "e2mc_hf/recipes/swav-800-e2mc.yaml"} <= names
    assert "e2mc_hf/launch/ddp.yaml" in names
    assert not any(name.startswith(("scripts/", "tests/", "benchmarks/")) for name in names)
