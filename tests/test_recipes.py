"""The shipped recipes: each is well-formed, says what it aims at, and trains."""

import importlib.util
import json
import math
import re
from pathlib import Path

import datasets
import pytest

from e2mc_hf.arguments import ViewArguments
from e2mc_hf.command_line import read_recipe, refuse_unknown, take
from e2mc_hf.objectives.registry import build_objective, check_views
from e2mc_hf.recipe_files import shipped_recipes
from e2mc_hf.regularizers.registry import build_regularizer

RECIPES = shipped_recipes()
README = (next(iter(RECIPES.values())).parent / "README.md").read_text()
WITHOUT_PAPER = ["dinov2-vits14", "dinov3-vits16", "mae-vitb16", "timm-resnet50"]
OF_TRANSFORMERS = ["dinov2-vits14", "dinov3-vits16", "mae-vitb16"]
TINY = {"projector_dim": 16, "hidden_dim": 16, "predictor_dim": 8, "num_prototypes": 12, "queue_length": 16}

every_recipe = pytest.mark.parametrize("name", sorted(RECIPES))


def options_of(name):
    return read_recipe(str(RECIPES[name]))


def comment_of(name):
    """The comment a recipe begins with, as one line."""
    lines = RECIPES[name].read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(" ".join(line.removeprefix("#") for line in lines[:end]).split())


def tiny_objective_args(name):
    return {option: TINY.get(option, value) for option, value in options_of(name)["objective_args"].items()}


@pytest.fixture(scope="module")
def script():
    """scripts/continue_pretrain.py."""
    path = Path(__file__).parents[1] / "scripts" / "continue_pretrain.py"
    spec = importlib.util.spec_from_file_location("continue_pretrain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_recipe_for_each_row_of_the_papers_and_for_what_people_hold():
    rows = ["vicreg-1000-e2mc", "swav-400-e2mc", "swav-800-e2mc", "simsiam-100-e2mc", "mec-100", "mec-100-e2mc"]
    ablations = [f"swav-800-{name}" for name in ("entropy-only", "covariance-only", "vcreg", "uniformity", "mmcr")]
    assert sorted(RECIPES) == sorted(rows + ablations + WITHOUT_PAPER)


@every_recipe
def test_every_option_is_one_of_the_scripts_and_of_its_type(name, script):
    options = options_of(name)
    refuse_unknown(options, list(script.GROUPS.values()))
    for kind in script.GROUPS.values():
        take(options, kind)
    assert options == {}


@every_recipe
def test_every_option_of_objective_and_regularizer_is_its_own(name):
    options = options_of(name)
    build_objective(options["objective"], tiny_objective_args(name), 32)
    regularizer = build_regularizer(options["regularizer"], options.get("regularizer_args", {}))
    assert (regularizer is None) == (name == "mec-100")


@every_recipe
def test_views_are_as_many_as_the_objective_takes(name):
    options = options_of(name)
    views = take(options, ViewArguments)
    check_views(options["objective"], views.num_views, views.num_small_views or 0)
    assert views.num_small_views == {"swav": 6, "dino": 8}.get(options["objective"])


@every_recipe
def test_the_control_is_two_flags_away(name, script):
    options = script.parse([str(RECIPES[name]), "--regularizer", "none", "--regularizer_args"])
    assert build_regularizer(options["regularizer"], options["regularizer_args"]) is None


@every_recipe
def test_the_first_lines_say_the_aim_the_start_and_what_was_never_run(name):
    comment = comment_of(name)
    if name in WITHOUT_PAPER:
        assert "A starting point, never run here: no figure was measured with it, and no paper has one." in comment
    else:
        assert re.search(r"Aims at: (E2MC \(arXiv 2411\.15931\) Table|MEC \(arXiv 2210\.11464\)|nothing pub)", comment)
        assert "Never run here: no figure of this recipe was measured with this package." in comment
    assert f"scripts/continue_pretrain.py {name} " in comment
    imported = options_of(name)["model"]
    assert not imported.startswith("imported/") or f"--output_dir {imported}" in comment
    assert max(map(len, RECIPES[name].read_text().splitlines())) <= 120


@every_recipe
def test_processes_and_batch_of_the_first_lines_are_those_of_the_recipe(name):
    total, processes, each = map(
        int, re.search(r"The batch is (\d+) in all: (\d) processes of (\d+)\.", comment_of(name)).groups()
    )
    assert total == processes * each
    assert each == options_of(name)["per_device_train_batch_size"]
    assert f"torchrun --nproc_per_node {processes} " in comment_of(name)


def test_the_table_lists_every_recipe_once():
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", README, flags=re.MULTILINE)) == sorted(RECIPES)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(WITHOUT_PAPER)))
def test_the_figures_of_the_table_are_those_of_the_recipe(name):
    row = re.search(rf"^\| `{name}` \|.*$", README, flags=re.MULTILINE).group()
    aimed_at = re.findall(r"\d\d\.\d+", row.split("|")[-2])
    rows = re.findall(r"^#.* \d\d\.\d\d .*$", RECIPES[name].read_text(), flags=re.MULTILINE)
    own = [line for line in rows if "this recipe" in line]
    assert len(own) == (0 if name.startswith("mec") else 1)
    assert all(figure in (own[0] if own else comment_of(name)) for figure in aimed_at)
    assert aimed_at or name == "mec-100-e2mc"


@pytest.mark.parametrize(
    ("names", "entropy_weight", "covariance_weight", "transform", "learning_rate"),
    [
        (["vicreg-1000-e2mc", "timm-resnet50"], 1000, 100, "sigmoid", 0.003),
        (["swav-400-e2mc", "swav-800-e2mc"], 1, 25, "normal_cdf", 0.001),
        (["simsiam-100-e2mc", "mec-100-e2mc"], 0.001, 0.01, "normal_cdf", 0.001),
    ],
)
def test_weights_map_and_learning_rate_are_the_papers(
    names, entropy_weight, covariance_weight, transform, learning_rate
):
    for name in names:
        options = options_of(name)
        assert options["regularizer_args"] == {
            "entropy_weight": entropy_weight,
            "covariance_weight": covariance_weight,
            "transform": transform,
        }
        assert (options["learning_rate"], options["lr_scheduler_type"]) == (learning_rate, "constant")
        assert (options["num_train_epochs"], options["per_device_train_batch_size"]) == (10, 256)


@pytest.mark.parametrize("name", [name for name in sorted(RECIPES) if name.startswith("swav-")])
def test_the_recipes_of_swav_differ_in_criterion_and_start_alone(name):
    varied = {"model", "regularizer", "regularizer_args"}
    first, second = (
        {key: value for key, value in options_of(n).items() if key not in varied} for n in (name, "swav-800-e2mc")
    )
    assert first == second
    assert options_of(name)["model"] == f"imported/swav-{name[5:8]}"


@every_recipe
def test_a_recipe_trains_two_steps_on_a_tiny_encoder(name, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    words = {
        "model": "test_vit" if name in OF_TRANSFORMERS else "test_resnet",
        "from_scratch": "true",
        "dataset": "digits",
        "max_samples": "16",
        "image_size": "32",
        "small_image_size": "16",
        "per_device_train_batch_size": "8",
        "max_steps": "2",
        "logging_steps": "1",
        "restore_momentum": "false",
        "dataloader_num_workers": "0",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "output_dir": "out",
    }
    flags = [f"--{option}={value}" for option, value in words.items()]
    heads = [f"{option}={value}" for option, value in tiny_objective_args(name).items()]
    own_size = ["--backbone_args", "dynamic_img_size=true"] if name in OF_TRANSFORMERS else []
    script.run(script.parse([name, *flags, *own_size, "--objective_args", *heads]))

    logs = [entry for entry in json.loads((tmp_path / "out" / "log.json").read_text()) if "loss" in entry]
    assert len(logs) == 2
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert all(entry["grad_norm"] > 0 for entry in logs)
    assert ("objective_loss" in logs[0]) == (name != "mec-100")
    assert (tmp_path / "out" / "encoder" / "model.safetensors").is_file()
    assert read_recipe("out/recipe.yaml")["objective"] == options_of(name)["objective"]
