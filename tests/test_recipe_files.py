import subprocess
import sys
from pathlib import Path

import pytest

from e2mc_hf.errors import UsageError
from e2mc_hf.recipe_files import find_recipe, shipped_recipes


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_shipped_recipes_are_files_by_name_in_order():
    recipes = shipped_recipes()
    assert "vicreg-1000-e2mc" in recipes
    assert list(recipes) == sorted(recipes)
    assert all(path.is_file() and path.name == f"{name}.yaml" for name, path in recipes.items())


@pytest.mark.parametrize("name", ["swav-800-e2mc", "swav-800-e2mc.yaml"])
def test_a_shipped_recipe_is_found_by_name_with_or_without_the_ending(name):
    assert find_recipe(name) == shipped_recipes()["swav-800-e2mc"]


@pytest.mark.parametrize("name", ["swav-800-e2mc", "swav-800-e2mc.yaml", "mine.yml", "folder/swav-800-e2mc.yaml"])
def test_a_file_that_is_there_wins(name):
    Path("folder").mkdir()
    Path(name).write_text("seed: 1")
    assert find_recipe(name) == Path(name)


def test_a_folder_of_that_name_is_no_recipe():
    Path("swav-800-e2mc").mkdir()
    assert find_recipe("swav-800-e2mc") == shipped_recipes()["swav-800-e2mc"]


@pytest.mark.parametrize("name", ["swav-800-e2m", "swav-800-e2m.yaml", "recipes/swav-800-e2mc.yaml", "a/swav-800-e2mc"])
def test_a_name_that_is_not_there_is_refused_with_the_nearest(name):
    with pytest.raises(UsageError) as caught:
        find_recipe(name)
    rule = "`recipe` must be a YAML file or the name of a shipped recipe, got"
    assert str(caught.value) == f"{rule} {name!r}. Did you mean 'swav-800-e2mc'?"


def test_without_a_near_name_all_are_listed():
    with pytest.raises(UsageError, match=r"got 'zzz'\. There are: dinov2-vits14, .*, vicreg-1000-e2mc\.$"):
        find_recipe("zzz")


def test_finding_a_recipe_loads_nothing_slow():
    code = (
        "import sys, e2mc_hf.recipe_files as r; r.find_recipe('mec-100'); print({'torch', 'yaml'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"
